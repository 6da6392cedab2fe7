"""Each way to load rheap, and the server on which it must not hook."""

import re
import subprocess
import time

import pytest
from cluster import HERE, Cluster, SqlError

CLUSTER_WIDE = ["rheap_leaks", "rheap_call_sites", "rheap_contexts", "rheap_processes", "rheap_reset"]
CLUSTER_WIDE += ["rheap_report", "rheap_report_json", "rheap_folded", "rheap_flamegraph", "rheap_html", "rheap_pprof"]


@pytest.fixture(scope="module")
def plain(server):
    with Cluster(server, preload="") as cluster:
        cluster.sql("CREATE EXTENSION rheap")
        cluster.run_file(HERE / "modules/leaky.sql")
        yield cluster


def test_what_a_new_process_writes_is_on_one_page(server):
    """Each page more costs every connection a fault, and each library more some mappings."""
    library = subprocess.check_output([server, "--pkglibdir"], text=True).strip() + "/rheap.so"
    symbols = subprocess.check_output(["nm", "--defined-only", library], text=True)
    found = {name: (int(at, 16), kind) for at, kind, name in re.findall(r"(\w+) (\w) _ZN5rheap\w*?(TABLES|PROCESS)17h", symbols)}
    (tables, kind), (process, _) = found["TABLES"], found["PROCESS"]
    # All zero, so that it is no part of the file. The tables begin with two pages that are only read.
    assert kind == "b" and tables % 4096 == 0 and process // 4096 == tables // 4096 + 2, found
    needed = re.findall(r"NEEDED.*\[(.*)\]", subprocess.check_output(["readelf", "-dW", library], text=True))
    assert all(name.startswith(("libc.", "libm.", "ld-linux")) for name in needed), needed


def own_leak(session):
    session("SELECT leaky_leak(1000, 100)")
    return session(
        "SELECT alloc_count, alloc_bytes, live_count, live_bytes, exact FROM rheap_call_sites(pg_backend_pid()) WHERE function = 'leaky_leak'"
    )


def test_load_watches_the_session_from_that_moment_on(plain):
    session = plain.session()
    session("LOAD 'rheap'")
    session("SET rheap.mode = exact")
    assert own_leak(session) == "1000\t100000\t1000\t100000\tt"


def test_session_preload_libraries_watches_new_sessions(plain):
    before = plain.session()
    plain.reload(session_preload_libraries="rheap", rheap__mode="exact")
    try:
        assert own_leak(plain.session()) == "1000\t100000\t1000\t100000\tt"
        assert before("SELECT 1") == "1"
    finally:
        plain.reload(session_preload_libraries="")


@pytest.mark.parametrize("function", CLUSTER_WIDE)
def test_without_the_preload_other_processes_are_out_of_reach(plain, function):
    with pytest.raises(SqlError) as caught:
        plain.sql(f"LOAD 'rheap'; SELECT * FROM {function}()")
    assert caught.value.sqlstate == "55000"
    assert caught.value.hint == (
        "Set shared_preload_libraries = 'rheap' and restart the server. "
        f"For this session alone, write {function}(pg_backend_pid())."
    )
    plain.sql(f"LOAD 'rheap'; SELECT * FROM {function}(pg_backend_pid())")


def test_without_the_preload_no_moment_of_all_processes_is_noted(plain):
    with pytest.raises(SqlError) as caught:
        plain.sql("LOAD 'rheap'; SELECT rheap_snapshot()")
    assert caught.value.sqlstate == "55000"
    assert caught.value.message == "rheap_snapshot needs the data of other processes, and rheap was loaded in this session only"
    assert caught.value.hint == "Set shared_preload_libraries = 'rheap' and restart the server."
    with pytest.raises(SqlError) as caught:
        plain.sql("LOAD 'rheap'; SELECT * FROM rheap_diff(1)")
    assert (caught.value.sqlstate, caught.value.message) == ("22023", "there is no snapshot 1")


def test_without_the_preload_a_session_has_its_own_reports(plain):
    session = plain.session()
    session("LOAD 'rheap'; SET rheap.mode = exact")
    for _ in range(12):
        session("SELECT leaky_leak(200, 1000)")
    assert "leaky_leak at" in session("SELECT rheap_report(pg_backend_pid())")
    assert re.search(r";leaky_leak(;MemoryContextAlloc)? 2400000$", session("SELECT rheap_folded(pg_backend_pid())"), re.M)
    for name in ("report_json", "flamegraph", "html", "heaptrack"):
        assert "leaky_leak" in session(f"SELECT rheap_{name}(pg_backend_pid())"), name
    assert session("SELECT encode(rheap_pprof(pg_backend_pid()), 'hex')").startswith("1f8b")
    session("SELECT rheap_track(pg_backend_pid(), 'off')")
    session("SELECT leaky_leak(200, 1000)")
    assert session("SELECT mode FROM rheap_processes(pg_backend_pid())") == "off"
    # Of a process that is none of its own it knows nothing.
    with pytest.raises(SqlError) as caught:
        session("SELECT rheap_heaptrack(1)")
    assert caught.value.sqlstate == "55000" and "shared_preload_libraries" in caught.value.hint
    # The view is of all, and says the same as the function.
    with pytest.raises(SqlError) as caught:
        session("SELECT * FROM rheap_report")
    assert caught.value.sqlstate == "55000" and "rheap_report(pg_backend_pid())" in caught.value.hint


def test_a_server_that_fails_the_self_check_runs_on_unhooked(server):
    # TopMemoryContext points at a table that is not the server's own.
    with Cluster(server, preload="foreign_hook, rheap") as cluster:
        log = cluster.log_text()
        warnings = [l for l in log.splitlines() if "rheap runs without its hooks" in l]
        assert len(warnings) == 1 and "which is not code of the server" in warnings[0]
        assert cluster.sql("SELECT sum(length(random()::text)) > 0 FROM generate_series(1, 100000)") == "t"
        with pytest.raises(SqlError) as caught:
            cluster.sql("SELECT * FROM rheap_leaks()")
        assert caught.value.sqlstate == "55000"
        assert caught.value.message.startswith("rheap records nothing: the method table of")
        assert cluster.stop("fast") < 10


def test_frame_pointers_are_used_where_the_server_keeps_them(server):
    with Cluster(server, log_min_messages="debug1") as cluster:
        # Debian compiles its server with them; a plain configure does not.
        way = "frame pointers" if cluster.major == 15 else "unwind tables"
        assert f"rheap walks the server's stacks by {way}" in cluster.log_text()


def test_a_leak_is_logged_once_when_asked_for(server):
    with Cluster(server, rheap__mode="exact", rheap__log_leaks="on", rheap__walk_interval="10ms") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        session = cluster.session()

        def leak_and_look():
            session("SELECT leaky_leak(20, 100), pg_sleep(0.01)")
            return [l for l in cluster.log_text().splitlines() if "rheap: leak of" in l]

        # It is logged by the first walk that finds it; walks take at most a hundredth of the time.
        until = time.monotonic() + 30
        while not leak_and_look() and time.monotonic() < until:
            pass
        lines = [leak_and_look() for _ in range(50)][-1]
        assert len(lines) == 1
        assert "in TopMemoryContext at" in lines[0] and "leaky.so+0x" in lines[0]
        assert f"SELECT * FROM rheap_leaks({session.pid})" in lines[0]


def test_a_full_table_is_said_once_and_counted(server):
    with Cluster(server, rheap__mode="exact", rheap__max_call_sites=1024) as cluster:
        sessions = [cluster.session() for _ in range(8)]
        for session in sessions:
            session("SELECT count(*) FROM pg_class, pg_attribute WHERE attrelid = pg_class.oid")
            session("SELECT 1")
        assert cluster.log_text().count("new call sites go unseen") == 1
        assert int(cluster.sql("SELECT count(*) FROM rheap_processes WHERE dropped > 0")) > 0
        # What has an account already is still counted right.
        assert cluster.sql("SELECT count(*) FROM rheap_call_sites() WHERE alloc_count - free_count <> live_count") == "0"


def test_jit_code_ends_a_stack_and_nothing_else(server):
    with Cluster(server, rheap__mode="exact", rheap__scope="all", jit="on", jit_above_cost=0) as cluster:
        session = cluster.session()
        assert session("SELECT sum(length(md5(g::text))) FROM generate_series(1, 20000) g") == "640000"
        if session("SELECT pg_jit_available()") == "t":
            cut = f"SELECT count(*) > 0 FROM rheap_call_sites({session.pid}) WHERE '(cut)' = ANY(stack)"
            assert cluster.sql(cut) == "t"


def test_single_user_mode_works(server):
    from cluster import run

    with Cluster(server) as cluster:
        cluster.stop()
        done = run(
            cluster.bin / "postgres", "--single", "-D", cluster.data, "-c", "rheap.mode=exact", "postgres",
            input="SELECT sum(g) FROM generate_series(1, 1000) g\n",
        )
        assert '"500500"' in done.stdout and "WARNING" not in done.stdout
        cluster.start()

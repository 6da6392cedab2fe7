"""Whatever happens to a process, the server answers afterwards, nobody hangs, the data is right, and rheap's books are
consistent or say that they are not."""

import os
import random
import re
import signal
import subprocess
import time

import pytest
from cluster import HERE, Cluster, SqlError, demote, run

# On the server that is not 17 a tenth of them.
KILLS = int(os.environ.get("RHEAP_TEST_KILLS", "200"))

ACCOUNTS = """
CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL);
INSERT INTO accounts SELECT g, 0 FROM generate_series(1, 100) g;
CREATE TABLE numbers AS SELECT g FROM generate_series(1, 100000) g;
ANALYZE numbers;
"""
WORK = """
\\set a random(1, 50)
\\set b random(51, 100)
BEGIN;
UPDATE accounts SET balance = balance - 1 WHERE id = :a;
SELECT leaky_leak(50, 100), leaky_churn(200, 64);
SELECT leaky_context('Generation', 20, 64, 'delete'), leaky_context('AllocSet', 20, 64, 'reset');
SELECT sum(length(md5(g::text))) FROM generate_series(1, 500) g;
UPDATE accounts SET balance = balance + 1 WHERE id = :b;
COMMIT;
"""


@pytest.fixture(scope="module")
def cluster(slow_server):
    settings = dict(rheap__mode="exact", rheap__scope="all", rheap__walk_interval="10ms", autovacuum_naptime="1s")
    with Cluster(slow_server, max_prepared_transactions=2, **settings) as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        cluster.sql(ACCOUNTS)
        (cluster.root / "work.sql").write_text(WORK)
        yield cluster


@pytest.fixture
def session(cluster):
    session = cluster.session()
    yield session
    session.close()


def comes_back(cluster, seconds=60):
    until = time.monotonic() + seconds
    while True:
        try:
            return cluster.sql("SELECT 1")
        except SqlError:
            assert time.monotonic() < until, "the server comes back"
            time.sleep(0.02)


def consistent(cluster):
    """The data is right, and so is what rheap says; one connection for all of it."""
    broken, processes, strangers, total = cluster.sql(
        """
        SELECT (SELECT count(*) FROM rheap_call_sites() WHERE alloc_count - free_count <> live_count OR alloc_bytes - free_bytes <> live_bytes
                   OR live_count < 0 OR live_bytes < 0 OR generations > live_count),
               (SELECT count(*) FROM rheap_processes),
               (SELECT count(*) FROM rheap_processes p WHERE backend_type = 'client backend'
                   AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = p.pid)),
               (SELECT sum(balance) FROM accounts)
        """
    ).split("\t")
    assert (broken, total) == ("0", "0")
    assert int(processes) >= 5
    # One may have ended between the two looks.
    assert int(strangers) <= 4


def children(cluster, title):
    listed = subprocess.run(["pgrep", "-P", str(cluster.postmaster), "-f", title], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def work(cluster, clients=4):
    """Clients that allocate and change data until the server throws them out."""
    return subprocess.Popen(
        [str(cluster.bin / "pgbench"), "-n", "-c", str(clients), "-T", "60", "-f", str(cluster.root / "work.sql"),
         "-h", str(cluster.root), "-U", "postgres", "postgres"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **demote(),
    )


# So many are killed at once: the server restarts after the first anyway.
BUNCH = 5


def kill_at_work(cluster, how, draw, number=1):
    """Whom it has killed."""
    clients = work(cluster, 3 + number)
    try:
        until = time.monotonic() + 30
        while len(children(cluster, r"\[local\]")) < 3 + number:
            if clients.poll() is not None:
                clients = work(cluster, 3 + number)
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(draw.random() * 0.15)
        victims = draw.sample(children(cluster, r"\[local\]"), number)
        # The first death makes the postmaster end all others.
        os.kill(cluster.postmaster, signal.SIGSTOP)
        try:
            for victim in victims:
                os.kill(victim, how)
            while how == signal.SIGKILL and not all(" Z " in open(f"/proc/{victim}/stat").read() for victim in victims):
                time.sleep(0.001)
        finally:
            os.kill(cluster.postmaster, signal.SIGCONT)
    finally:
        clients.wait(60)
    return victims


def test_a_backend_killed_at_work_harms_nobody(cluster):
    draw = random.Random(5)
    rounds = max((KILLS if cluster.major == 17 else KILLS // 10) // BUNCH, 1)
    before = cluster.log_text().count("was terminated by signal 9")
    on_record = 0
    for number in range(rounds):
        victims = kill_at_work(cluster, signal.SIGKILL, draw, BUNCH)
        comes_back(cluster)
        if number % 5 == 0:
            consistent(cluster)
        listed = ", ".join(map(str, victims))
        on_record += int(cluster.sql(f"SELECT count(DISTINCT pid) FROM rheap_ended() WHERE pid IN ({listed}) AND how = 'killed'"))
    consistent(cluster)
    log = cluster.log_text()
    # Of those that are killed at once the server names one.
    assert log.count("was terminated by signal 9") - before == rounds
    # Nobody else fell over.
    assert not re.search(r"terminated by signal (?!9:)|PANIC", log)
    # Who is killed before the first statement is done has no books yet.
    assert on_record >= 0.9 * rounds * BUNCH


@pytest.mark.parametrize("how", ["SIGQUIT", "SIGABRT", "SIGSEGV"])
def test_a_backend_that_crashes_harms_nobody(cluster, how):
    for seed in range(3):
        kill_at_work(cluster, getattr(signal, how), random.Random(seed))
        comes_back(cluster)
        consistent(cluster)


def test_a_backend_that_is_told_to_leave_at_work_leaves(cluster):
    draw = random.Random(7)
    restarts = cluster.log_text().count("all server processes terminated")
    for _ in range(20):
        session = cluster.session()
        session.send("SELECT leaky_churn(1000000, 100), leaky_leak(100, 100) FROM generate_series(1, 1000)")
        time.sleep(draw.random() * 0.1)
        os.kill(session.pid, signal.SIGTERM)
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{session.pid}"):
            assert time.monotonic() < until, "it leaves"
            time.sleep(0.01)
    consistent(cluster)
    assert cluster.log_text().count("all server processes terminated") == restarts


def test_a_parallel_worker_that_is_killed_harms_nobody(cluster):
    settings = (
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; "
        "SET parallel_leader_participation = off"
    )
    for _ in range(5):
        session = cluster.session()
        session(settings)
        session.send("SELECT sum(length(repeat(md5((a.g + b.g)::text), 100))) FROM numbers a, (SELECT g FROM numbers LIMIT 1000) b")
        until = time.monotonic() + 30
        while not (workers := children(cluster, "parallel worker")) and time.monotonic() < until:
            time.sleep(0.01)
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        with pytest.raises((RuntimeError, SqlError)):
            session.receive()
            session("SELECT 1")
        comes_back(cluster)
        consistent(cluster)


def test_senders_and_receivers_of_wal_that_are_killed_come_back(cluster):
    standby = cluster.root / "standby"
    run(cluster.bin / "pg_basebackup", "-h", cluster.root, "-U", "postgres", "-D", standby, "-R", "-X", "stream", "-c", "fast")
    options = "-c port=5433 -c hot_standby=on -c wal_retrieve_retry_interval=100ms"
    run(cluster.bin / "pg_ctl", "start", "-w", "-D", standby, "-l", cluster.root / "standby.log", "-o", options)
    try:
        postmaster = int((standby / "postmaster.pid").read_text().split()[0])

        def on_standby(sql):
            done = run(cluster.bin / "psql", "-XqAt", "-h", cluster.root, "-p", "5433", "-U", "postgres", "-c", sql, check=False)
            return done.stdout.strip()

        def receiver():
            listed = subprocess.run(["pgrep", "-P", str(postmaster), "-f", "walreceiver"], capture_output=True, text=True)
            return [int(pid) for pid in listed.stdout.split()]

        for number, find in enumerate([receiver, lambda: children(cluster, "walsender"), receiver], 1):
            until = time.monotonic() + 60
            while not (found := find()):
                assert time.monotonic() < until
                time.sleep(0.05)
            os.kill(found[0], signal.SIGKILL)
            comes_back(cluster)
            cluster.sql(f"CREATE TABLE after_kill_{number} AS SELECT {number} AS n")
            until = time.monotonic() + 60
            while on_standby(f"SELECT n FROM after_kill_{number}") != str(number):
                assert time.monotonic() < until, "the standby follows again"
                time.sleep(0.1)
            assert on_standby("SELECT count(*) FROM rheap_call_sites() WHERE alloc_count - free_count <> live_count") == "0"
        assert "walreceiver" in on_standby("SELECT string_agg(backend_type, ' ') FROM rheap_processes")
    finally:
        run(cluster.bin / "pg_ctl", "stop", "-D", standby, "-m", "immediate", check=False)
    consistent(cluster)


def test_timeouts_and_cancels_in_the_busiest_moments_harm_nobody(cluster, session):
    watcher = cluster.session()
    statement = (
        "SELECT count(*) FROM (SELECT leaky_churn(1000, 64), leaky_context('AllocSet', 50, 64, 'delete'), leaky_leak(10, 100), "
        "md5(g::text) FROM generate_series(1, 1000000) g) s"
    )
    for milliseconds in range(1, 61):
        # For this statement only: on a slow machine the next SET would not be done in time.
        session("BEGIN")
        session(f"SET LOCAL statement_timeout = {milliseconds}")
        with pytest.raises(SqlError) as caught:
            session(statement)
        assert caught.value.sqlstate == "57014"
        session("ROLLBACK")
    draw = random.Random(11)
    for _ in range(60):
        session.send(statement)
        # A server that waits for a statement ignores a cancel.
        while watcher(f"SELECT state FROM pg_stat_activity WHERE pid = {session.pid}") != "active":
            pass
        time.sleep(draw.random() * 0.03)
        os.kill(session.pid, signal.SIGINT)
        with pytest.raises(SqlError) as caught:
            session.receive()
        assert caught.value.sqlstate == "57014"
    watcher.close()
    # Nothing was lost: what comes next is counted exactly.
    session("SELECT rheap_reset(pg_backend_pid())")
    session("SELECT leaky_leak(1000, 100)")
    rows = cluster.rows(
        f"SELECT sum(live_count) AS live_count, sum(live_bytes) AS live_bytes FROM rheap_call_sites({session.pid}) WHERE function = 'leaky_leak'"
    )
    assert rows == [{"live_count": 1000, "live_bytes": 100_000}]
    consistent(cluster)


def test_a_process_without_memory_gets_errors_and_goes_on(cluster, session):
    """The address space is bounded, as by `ulimit -v`, ever more tightly."""
    before = cluster.log_text()
    session("SELECT leaky_leak(1000, 100)")
    size = int(open(f"/proc/{session.pid}/status").read().split("VmSize:")[1].split()[0]) * 1024
    refused = 0
    for megabytes in (24, 12, 6, 3, 2, 1, 0):
        run("prlimit", f"--pid={session.pid}", f"--as={size + (megabytes << 20)}:")
        for sql in (
            "SELECT leaky_leak(50000, 1000)",
            "SELECT leaky_context('AllocSet', 20000, 1000, 'delete')",
            "SELECT length(string_agg(repeat(md5(g::text), 20), '')) FROM generate_series(1, 100000) g",
            "SELECT count(*) FROM pg_class a, pg_class b, pg_attribute c WHERE a.oid = c.attrelid",
            "SELECT count(*) FROM rheap_processes",
        ):
            try:
                session(sql)
            except SqlError as error:
                assert error.sqlstate == "53200", error
                refused += 1
    assert refused >= 7
    run("prlimit", f"--pid={session.pid}", "--as=unlimited:")
    assert session("SELECT sum(g) FROM generate_series(1, 100000) g") == "5000050000"
    log = cluster.log_text()[len(before):]
    assert "terminated by" not in log and "PANIC" not in log
    assert "rheap: watched call sites of this process hold" in log
    consistent(cluster)


def test_an_answer_that_does_not_fit_into_memory_is_an_error_of_its_session(cluster, session):
    """rheap's own heap cannot grow, at ever other places of its answers: none of them may end the process."""
    before = cluster.log_text()
    session("SELECT leaky_leak(1000, 100), leaky_context('AllocSet', 200, 64, 'keep')")
    answers = [
        "SELECT count(stack) FROM rheap_leaks", "SELECT count(stack) FROM rheap_call_sites", "SELECT count(*) FROM rheap_contexts",
        "SELECT count(*) FROM rheap_processes", "SELECT count(stack) FROM rheap_ended", "SELECT length(rheap_report())",
        "SELECT rheap_report_json() IS NULL", "SELECT length(rheap_html())", "SELECT length(rheap_pprof())",
        "SELECT count(*) FROM rheap_check('SELECT leaky_leak(10, 100)', 4, 1)",
    ]
    refused = {}
    for answer in answers:
        asker = cluster.session()
        asker("SELECT leaky_leak(1000, 100)")
        # The reserve has 64 MB: below them there is no answer, above them one that breaks off somewhere.
        for kilobytes in (0, 4000, 65_500, 66_500, 67_000, 67_500, 68_000, 69_000, 71_000, 80_000, 120_000):
            size = int(open(f"/proc/{asker.pid}/status").read().split("VmSize:")[1].split()[0]) * 1024
            run("prlimit", f"--pid={asker.pid}", f"--as={size + (kilobytes << 10)}:")
            try:
                asker(answer)
            except SqlError as error:
                assert error.sqlstate == "53200", (answer, kilobytes, error)
                refused.setdefault(answer, []).append(kilobytes)
            run("prlimit", f"--pid={asker.pid}", "--as=unlimited:")
        # Whole again.
        assert asker(answer) != ""
        asker.close()
    assert all(4000 in refused[answer] for answer in answers), refused
    # Some had begun to build their answer when there was no more room.
    assert sum(kilobytes > 67_000 for places in refused.values() for kilobytes in places) >= 5, refused
    assert session("SELECT 1") == "1"
    log = cluster.log_text()[len(before):]
    assert "terminated by" not in log and "PANIC" not in log
    consistent(cluster)


def test_a_session_that_starts_without_memory_dies_alone(slow_server):
    """A FATAL error: the server frees what belongs to its report, so that has to be the server's own."""
    with Cluster(slow_server, rheap__mode="exact") as cluster:
        session = cluster.session()
        session("CREATE TABLE kept AS SELECT 17 AS a")
        size = int(open(f"/proc/{cluster.postmaster}/status").read().split("VmSize:")[1].split()[0]) * 1024
        died = 0
        for kilobytes in range(0, 6000, 100):
            run("prlimit", f"--pid={cluster.postmaster}", f"--as={size + (kilobytes << 10)}:")
            try:
                cluster.sql("SELECT 1")
            except SqlError:
                died += 1
        run("prlimit", f"--pid={cluster.postmaster}", "--as=unlimited:")
        assert died >= 5
        log = cluster.log_text()
        assert re.search("FATAL: .*out of memory", log)
        assert "terminated by signal" not in log and "invalid pointer" not in log, log[-3000:]
        assert session("SELECT a FROM kept") == "17"


def test_recursion_without_end_is_an_error_and_no_more(cluster, session):
    session("CREATE OR REPLACE FUNCTION endless(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN endless(n + 1); END'")
    for _ in range(3):
        with pytest.raises(SqlError) as caught:
            session("SELECT endless(1)")
        assert caught.value.sqlstate == "54001"
    with pytest.raises(SqlError) as caught:
        session("SELECT " + "(" * 20_000 + "1" + ")" * 20_000)
    assert caught.value.sqlstate in ("54001", "53200", "42601")
    session("DROP FUNCTION endless")
    consistent(cluster)


def test_a_fork_that_fails_is_an_error_of_the_client_alone(cluster):
    run("prlimit", f"--pid={cluster.postmaster}", "--nproc=1:")
    try:
        for _ in range(20):
            with pytest.raises(SqlError):
                cluster.sql("SELECT 1")
    finally:
        run("prlimit", f"--pid={cluster.postmaster}", "--nproc=unlimited:", check=False)
        if "Max processes             1 " in open(f"/proc/{cluster.postmaster}/limits").read():
            limit = open(f"/proc/{cluster.postmaster}/limits").read().split("Max processes")[1].split()[1]
            run("prlimit", f"--pid={cluster.postmaster}", f"--nproc={limit}:")
    assert "could not fork" in cluster.log_text()
    comes_back(cluster)
    consistent(cluster)


def test_500_connections_at_once(slow_server):
    with Cluster(slow_server, max_connections=520, rheap__mode="exact", rheap__max_call_sites=1 << 18) as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        script = cluster.root / "script.sql"
        script.write_text("SELECT leaky_leak(10, 100);\nSELECT pg_sleep(0.2);\n")
        clients = subprocess.Popen(
            [str(cluster.bin / "pgbench"), "-n", "-c", "500", "-j", "2", "-T", "90", "-f", str(script), "-h",
             str(cluster.root), "-U", "postgres", "postgres"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", **demote(),
        )
        until, most = time.monotonic() + 60, 0
        while clients.poll() is None and time.monotonic() < until and most < 500:
            most = max(most, int(cluster.sql("SELECT count(*) FROM rheap_processes WHERE backend_type = 'client backend'")) - 1)
        assert most == 500, "each has a slot"
        # The last of them may not have come to run its statement, with 500 for two processors; none leaves before that.
        until = time.monotonic() + 60
        while True:
            rows = cluster.rows(
                "SELECT sum(live_count) AS live, sum(alloc_count) AS all, max(processes) AS processes FROM rheap_call_sites() WHERE function = 'leaky_leak'"
            )
            if clients.poll() is not None or time.monotonic() > until or rows[0]["processes"] == 500 and rows[0]["live"] >= 5000:
                break
        assert rows[0]["live"] == rows[0]["all"] >= 5000 and rows[0]["processes"] == 500
        # Its sessions then find nobody there any more, and leave.
        clients.send_signal(signal.SIGINT)
        said, _ = clients.communicate(timeout=120)
        assert "ERROR" not in said and "FATAL" not in said, said
        assert cluster.log_text().count("new call sites go unseen") <= 1
        assert cluster.stop("fast") < 20


def test_at_the_least_memory_limit_every_allocation_is_counted(cluster, session):
    session("SET rheap.memory_limit = '4MB'")
    session("SELECT 1")
    for _ in range(5):
        session("SELECT leaky_leak(1000000, 16)")
    session("SELECT leaky_tree(5000), leaky_sites(0, 4096, 16)")
    session("SELECT pg_sleep(0.1)")
    session("SELECT 1")
    [process] = cluster.rows(f"SELECT own_bytes, dropped FROM rheap_processes({session.pid})")
    assert process["own_bytes"] <= 4 << 20 and process["dropped"] > 0
    [site] = cluster.rows(
        f"SELECT sum(alloc_count) AS alloc_count, sum(live_count) AS live_count, bool_and(exact) AS exact FROM rheap_call_sites({session.pid}) WHERE function = 'leaky_leak'"
    )
    assert site["alloc_count"] == 5_000_000 and site["exact"] is False
    assert abs(site["live_count"] - 5_000_000) <= 0.05 * 5_000_000


def test_a_mapping_that_is_refused_leaves_the_server_without_rheap(slow_server):
    with Cluster(slow_server) as cluster:
        cluster.stop()
        cluster.configure(rheap__max_call_sites=1 << 24)
        run("prlimit", f"--as={2 << 30}", cluster.bin / "pg_ctl", "start", "-w", "-D", cluster.data, "-l", cluster.log)
        cluster.postmaster = int((cluster.data / "postmaster.pid").read_text().split()[0])
        assert "rheap runs without its hooks and records nothing: the shared mapping is refused" in cluster.log_text()
        assert cluster.sql("SELECT sum(g) FROM generate_series(1, 1000) g") == "500500"
        for function in ("rheap_leaks", "rheap_ended"):
            with pytest.raises(SqlError) as caught:
                cluster.sql(f"SELECT * FROM {function}()")
            assert caught.value.sqlstate == "55000" and "the shared mapping is refused" in caught.value.message
        assert cluster.stop() < 10

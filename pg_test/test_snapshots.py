"""Two moments compared, across sessions; and one process that records in a mode of its own."""

import subprocess
import time

import pytest
from cluster import Cluster, SqlError


class Process:
    """One that is not a session of ours."""

    def __init__(self, pid):
        self.pid = pid

    def ticks(self):
        """Hundredths of a second that it has worked."""
        return sum(map(int, open(f"/proc/{self.pid}/stat").read().rsplit(")", 1)[1].split()[11:13]))


def eventually(happens):
    """What it returns as soon as that is something."""
    late = time.monotonic() + 30
    while not (seen := happens()):
        assert time.monotonic() < late, "it did not happen within 30 s"
        time.sleep(0.05)
    return seen


@pytest.fixture
def session(exact):
    session = exact.session()
    yield session
    session.close()


def diff(cluster, *moments):
    return cluster.rows(f"SELECT * FROM rheap_diff({', '.join(map(str, moments))})")


def of(rows, function):
    [row] = [r for r in rows if r["function"] == function and r["kind"] == "call site"]
    return row


def test_what_is_new_grew_shrank_and_is_gone(exact, session):
    session("SELECT leaky_leak(100, 100), leaky_context('AllocSet', 50, 64, 'keep')")
    first = exact.sql("SELECT rheap_snapshot('before')")
    session("SELECT leaky_leak(200, 100), leaky_grow(10, 100)")
    second = exact.sql("SELECT rheap_snapshot('after')")
    session("SELECT leaky_leak(400, 100)")
    assert exact.rows(f"SELECT id, label FROM rheap_snapshots WHERE id IN ({first}, {second}) ORDER BY id") == [
        {"id": int(first), "label": "before"}, {"id": int(second), "label": "after"}
    ]
    # Other tests of this server may have leaked at the same place.
    row = of(diff(exact, first, second), "leaky_leak")
    assert (row["change"], row["growth_bytes"], row["growth_count"]) == ("grew", 20_000, 200)
    assert row["bytes_after"] - row["bytes_before"] == 20_000 and row["context"] == "TopMemoryContext"
    assert any("leaky_leak at" in frame for frame in row["stack"])
    grown = of(diff(exact, first, second), "leaky_grow")
    assert (grown["change"], grown["growth_bytes"], grown["bytes_before"]) == ("new", 1000, 0)
    assert of(diff(exact, first), "leaky_leak")["growth_bytes"] == 60_000, "until now"
    back = of(diff(exact, second, first), "leaky_grow")
    assert (back["change"], back["growth_bytes"]) == ("gone", -1000)
    assert diff(exact, first, first) == []
    session("SELECT pg_sleep(0.3)")
    session("SELECT 1")
    contexts = [r for r in diff(exact, first) if r["kind"] == "context"]
    assert all(r["bytes_after"] - r["bytes_before"] == r["growth_bytes"] for r in contexts)
    exact.sql("DELETE FROM rheap_snapshots")
    assert exact.sql("SELECT count(*) FROM rheap_snapshot_call_sites") == "0"


def test_what_one_of_two_sessions_takes_with_it_has_shrunk(exact):
    def at_work():
        session = exact.session()
        session("SELECT leaky_context('Generation', 50, 1024, 'keep')")
        # Its walk tells the contexts.
        session("SELECT pg_sleep(0.3)")
        session("SELECT 1")
        return session

    path = "TopMemoryContext/leaky"
    held = lambda: exact.rows(f"SELECT coalesce(sum(used_bytes), 0) AS bytes, coalesce(sum(contexts), 0) AS n FROM rheap_contexts() WHERE path = '{path}'")[0]
    one, other = at_work(), at_work()
    before = held()
    [leaving] = exact.rows(f"SELECT used_bytes AS bytes, contexts AS n FROM rheap_contexts({other.pid}) WHERE path = '{path}'")
    first = exact.sql("SELECT rheap_snapshot()")
    other.close()
    while exact.sql(f"SELECT count(*) FROM rheap_processes WHERE pid = {other.pid}") != "0":
        time.sleep(0.05)
    rows = diff(exact, first)
    row = of(rows, "leaky_context")
    assert (row["change"], row["growth_bytes"], row["growth_count"]) == ("shrank", -51_200, -50)
    assert (row["bytes_after"], row["count_after"], row["context"]) == (row["bytes_before"] - 51_200, row["count_before"] - 50, path)
    [row] = [r for r in rows if r["kind"] == "context" and r["context"] == path and r["backend_type"] == "client backend"]
    assert (row["change"], row["growth_bytes"], row["growth_count"]) == ("shrank", -leaving["bytes"], -1)
    assert (row["bytes_before"], row["count_before"], leaving["n"]) == (before["bytes"], before["n"], 1)
    assert leaving["bytes"] > 51_200 and (row["function"], row["location"], row["stack"]) == (None, None, None)
    # The greatest change first, whichever its direction.
    assert [abs(r["growth_bytes"]) for r in rows] == sorted((abs(r["growth_bytes"]) for r in rows), reverse=True)
    one.close()
    exact.sql("DELETE FROM rheap_snapshots")


def test_a_snapshot_that_does_not_exist(exact):
    for moments in ("-1", "(SELECT rheap_snapshot()), 999999"):
        with pytest.raises(SqlError) as caught:
            exact.sql(f"SELECT * FROM rheap_diff({moments})")
        assert caught.value.sqlstate == "22023" and caught.value.message.startswith("there is no snapshot ")
        assert "rheap_snapshots" in caught.value.hint


def mode(cluster, session):
    return cluster.sql(f"SELECT mode FROM rheap_processes({session.pid})")


def live(cluster, session):
    return cluster.sql(f"SELECT coalesce(sum(live_count), 0) FROM rheap_call_sites({session.pid}) WHERE function = 'leaky_leak'")


def test_another_process_follows_with_its_next_statement(exact, session):
    session("SELECT leaky_leak(10, 100)")
    exact.sql(f"SELECT rheap_track({session.pid}, 'off')")
    session("SELECT leaky_leak(10, 100)")
    assert (mode(exact, session), live(exact, session)) == ("off", "10")
    exact.sql(f"SELECT rheap_track({session.pid}, 'exact')")
    session("SELECT leaky_leak(10, 100)")
    assert (mode(exact, session), live(exact, session)) == ("exact", "20")
    exact.sql(f"SELECT rheap_track({session.pid}, 'sampled')")
    session("SELECT 1")
    assert mode(exact, session) == "sampled"
    # A reset keeps the wish, a reload does not undo it; `default` does.
    exact.sql(f"SELECT rheap_reset({session.pid})")
    session("SET rheap.sample_bytes = '1kB'")
    session("SELECT 1")
    assert mode(exact, session) == "sampled"
    exact.sql(f"SELECT rheap_track({session.pid}, 'default')")
    session("SELECT 1")
    assert mode(exact, session) == "exact"
    other = exact.session()
    assert mode(exact, other) == "exact", "nobody else was asked"
    other.close()


@pytest.mark.parametrize("before, after", [("off", "exact"), ("exact", "off")])
def test_a_busy_process_follows_within_a_second_of_work(exact, session, before, after):
    exact.sql(f"SELECT rheap_track({session.pid}, '{before}')")
    session("SELECT 1")
    session.send("SELECT count(length(i::text || i::text)) FROM generate_series(1, 20000000) i")
    time.sleep(0.5)
    assert mode(exact, session) == before
    exact.sql(f"SELECT rheap_track({session.pid}, '{after}')")
    asked = time.monotonic()
    ticks = lambda: sum(map(int, open(f"/proc/{session.pid}/stat").read().rsplit(")", 1)[1].split()[11:12]))
    start = ticks()
    while mode(exact, session) != after:
        # In hundredths of a second of its own work: this machine may have more to do.
        assert ticks() - start < 100, "within a second of its work"
        assert time.monotonic() - asked < 30
        time.sleep(0.05)
    exact.sql(f"SELECT pg_cancel_backend({session.pid})")
    with pytest.raises(SqlError):
        session.receive()


def test_a_session_of_prepared_statements_follows(exact, tmp_path):
    script = tmp_path / "script"
    script.write_text("SELECT leaky_leak(1, 100);\n")
    tmp_path.chmod(0o755)
    bench = subprocess.Popen(
        [exact.bin / "pgbench", "-n", "-M", "prepared", "-f", script, "-T", "60", *exact.target()[:-2], "postgres"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        # pgbench looks around in a session of its own first.
        works = "application_name = 'pgbench' AND query LIKE 'SELECT leaky_leak(1%'"
        pid = eventually(lambda: exact.sql(f"SELECT pid FROM pg_stat_activity WHERE {works}"))
        there = Process(int(pid))
        counted = lambda: int(live(exact, there))
        eventually(lambda: counted() > 100)
        exact.sql(f"SELECT rheap_track({pid}, 'off')")
        eventually(lambda: mode(exact, there) == "off")
        # Nothing is counted while it goes on working.
        before, work = counted(), there.ticks()
        eventually(lambda: there.ticks() > work + 20)
        assert counted() == before
        exact.sql(f"SELECT rheap_track({pid}, 'exact')")
        eventually(lambda: counted() > before + 100)
        assert mode(exact, there) == "exact"
    finally:
        bench.terminate()
        bench.wait(30)


def test_the_postmaster_follows_and_its_children_do_not(server):
    with Cluster(server, preload="rheap, leaky", rheap__mode="exact") as cluster:
        postmaster = Process(cluster.postmaster)
        forked = lambda: int(cluster.sql(f"SELECT coalesce(sum(live_count), 0) FROM rheap_call_sites({postmaster.pid}) WHERE function = 'leak_at_fork'"))
        connect = lambda: [cluster.sql("SELECT 1") for _ in range(10)]
        before = forked()
        connect()
        assert forked() >= before + 10
        cluster.sql(f"SELECT rheap_track({postmaster.pid}, 'off')")
        connect()
        eventually(lambda: mode(cluster, postmaster) == "off")
        before = forked()
        connect()
        assert forked() == before
        child = cluster.session()
        assert mode(cluster, child) == "exact"
        cluster.sql(f"SELECT rheap_track({postmaster.pid}, 'default')")
        connect()
        eventually(lambda: mode(cluster, postmaster) == "exact")
        before = forked()
        connect()
        assert forked() >= before + 10


def test_a_process_that_comes_later_has_no_wish(exact, session):
    exact.sql(f"SELECT rheap_track({session.pid}, 'off')")
    session("SELECT 1")
    session.close()
    for _ in range(3):
        later = exact.session()
        assert mode(exact, later) == "exact"
        later.close()


def test_wrong_wishes(exact):
    for call, message in (
        ("1, 'exact'", "no process of this cluster has the pid 1"), ("pg_backend_pid(), 'fast'", 'there is no mode "fast"')
    ):
        with pytest.raises(SqlError) as caught:
            exact.sql(f"SELECT rheap_track({call})")
        assert (caught.value.sqlstate, caught.value.message) == ("22023", message)
        assert caught.value.hint

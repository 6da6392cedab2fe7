"""The evidence survives: what a session held that has left, what one held that was killed, and what the log says of one
that ran out of memory."""

import os
import signal
import time

import pytest
from cluster import HERE, Cluster, SqlError, run


@pytest.fixture(scope="module")
def cluster(server):
    with Cluster(server, rheap__mode="exact", rheap__walk_interval="100ms") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        yield cluster


def ended(cluster, pid):
    return cluster.rows(f"SELECT *, to_json(stack) AS frames FROM rheap_ended() WHERE pid = {pid}")


def comes_back(cluster, seconds=60):
    """Waits until the server takes connections again."""
    until = time.monotonic() + seconds
    while True:
        try:
            return cluster.sql("SELECT 1")
        except SqlError:
            assert time.monotonic() < until, "the server comes back"
            time.sleep(0.05)


def leave(cluster, session):
    session.close()
    until = time.monotonic() + 30
    while os.path.exists(f"/proc/{session.pid}") and time.monotonic() < until:
        time.sleep(0.01)


def leak(session, statements=20):
    for _ in range(statements):
        session("SELECT leaky_leak(1000, 100)")
    session("SELECT pg_sleep(0.2)")
    session("SELECT 1")


def statement_id(cluster, sql):
    plan = cluster.sql(f"EXPLAIN (VERBOSE) {sql}")
    return int(next(l for l in plan.splitlines() if "Query Identifier" in l).split(":")[1])


def test_a_session_that_left_with_memory_held_is_on_record(cluster):
    session = cluster.session()
    leak(session)
    leave(cluster, session)
    first = ended(cluster, session.pid)[0]
    assert (first["how"], first["backend_type"], first["function"]) == ("exit", "client backend", "leaky_leak")
    assert (first["context"], first["live_count"], first["live_bytes"]) == ("TopMemoryContext", 20_000, 2_000_000)
    assert first["query_id"] == statement_id(cluster, "SELECT leaky_leak(1000, 100)")
    assert first["context_bytes"] > first["contexts"]["TopMemoryContext"] > 2_000_000
    assert any("leaky_leak" in frame for frame in first["frames"])


def test_a_session_that_leaks_nothing_leaves_nothing(cluster):
    session = cluster.session()
    session("SELECT count(*) FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid")
    session("SELECT leaky_churn(10000, 100)")
    leave(cluster, session)
    assert ended(cluster, session.pid) == []


def test_what_a_killed_session_held_survives_the_crash_restart(cluster):
    victim, bystander, leaking_bystander = (cluster.session() for _ in range(3))
    bystander("SELECT 1")
    leak(victim)
    leak(leaking_bystander)
    identifier = statement_id(cluster, "SELECT leaky_leak(1000, 100)")
    started = cluster.rows("SELECT clock_timestamp() AS moment")[0]["moment"]
    os.kill(victim.pid, signal.SIGKILL)
    # The restart is over when shared memory is new: wait for its message, then for the server.
    until = time.monotonic() + 60
    while "all server processes terminated" not in cluster.log_text() and time.monotonic() < until:
        time.sleep(0.05)
    comes_back(cluster)
    first = ended(cluster, victim.pid)[0]
    assert (first["how"], first["backend_type"], first["function"]) == ("killed", "client backend", "leaky_leak")
    assert (first["context"], first["live_count"], first["live_bytes"]) == ("TopMemoryContext", 20_000, 2_000_000)
    assert first["query_id"] == identifier
    assert first["contexts"]["TopMemoryContext"] > 2_000_000
    assert first["ended_at"] >= started
    assert any("leaky_leak" in frame for frame in first["frames"])
    # The server ended the others: nobody killed them.
    assert ended(cluster, bystander.pid) == []
    assert {row["how"] for row in ended(cluster, leaking_bystander.pid)} == {"exit"}
    assert cluster.sql("SELECT count(DISTINCT pid) FROM rheap_ended() WHERE how = 'killed'") == "1"
    order = cluster.rows("SELECT ended_at FROM rheap_ended()")
    assert order == sorted(order, key=lambda row: row["ended_at"], reverse=True)


def test_a_session_killed_in_the_middle_of_a_statement_is_on_record(cluster):
    victim = cluster.session()
    victim("SELECT 1")
    victim.send("SELECT leaky_leak(1000, 100), pg_sleep(0.001) FROM generate_series(1, 100000)")
    time.sleep(1.0)
    os.kill(victim.pid, signal.SIGKILL)
    time.sleep(0.3)
    comes_back(cluster)
    first = ended(cluster, victim.pid)[0]
    assert (first["how"], first["function"]) == ("killed", "leaky_leak")
    assert first["live_bytes"] == 100 * first["live_count"] > 1_000_000


def test_the_number_of_endings_is_bounded(cluster):
    for _ in range(70):
        cluster.sql("SELECT leaky_leak(1000, 100), pg_sleep(0)")
    assert cluster.sql("SELECT count(DISTINCT pid) <= 64 FROM rheap_ended() WHERE how = 'exit'") == "t"
    assert int(cluster.sql("SELECT count(DISTINCT pid) FROM rheap_ended() WHERE how = 'killed'")) >= 1


def test_an_out_of_memory_error_says_in_the_log_who_has_the_memory(cluster):
    """The address space is bounded, as by `ulimit -v`."""
    session = cluster.session()
    leak(session)
    status = open(f"/proc/{session.pid}/status").read()
    now = int(status.split("VmSize:")[1].split()[0]) * 1024
    run("prlimit", f"--pid={session.pid}", f"--as={now + (64 << 20)}:")
    before = len(cluster.log_text())
    with pytest.raises(SqlError) as caught:
        session("SELECT leaky_leak(1000000, 1000)")
    assert caught.value.sqlstate == "53200"
    # What it held of that statement stays in TopMemoryContext; the session goes on.
    session("SELECT 1")
    block = cluster.log_text()[before:].split("rheap: watched call sites of this process hold")
    assert len(block) == 2, "one block"
    lines = block[1].splitlines()
    assert "Failed on request of size 1000" in cluster.log_text()[before:]
    assert "in TopMemoryContext at leaky_leak" in lines[1]
    assert len([l for l in lines if " allocations in " in l]) <= 5
    # Only the log has it.
    assert "rheap" not in str(caught.value)

"""What starts as transient and does not stay so: queries that grow, contexts that move below long-lived ones."""

import time

import pytest


@pytest.fixture
def session(exact):
    session = exact.session()
    yield session
    session.close()


def running(cluster, pid):
    return cluster.sql(f"SELECT state FROM pg_stat_activity WHERE pid = {pid}") == "active"


def test_a_query_that_leaks_into_its_own_context_is_attributed_while_it_runs(exact, session):
    session("SET rheap.adopt_bytes = '1MB'")
    session("SET rheap.memory_limit = '1GB'")
    # So that the rows' own store stays below what is adopted.
    session("SET work_mem = '64kB'")
    start = time.monotonic()
    session.send("SELECT sum(leaky_query(100)) FROM generate_series(1, 8000000)")
    where = "function = 'leaky_query' AND context LIKE '%/ExecutorState'"
    seen = []
    while running(exact, session.pid):
        seen += exact.rows(
            "SELECT sum(live_bytes) AS live_bytes, sum(live_count) AS live_count "
            f"FROM rheap_call_sites({session.pid}) WHERE {where} HAVING sum(live_count) > 0"
        )
        time.sleep(0.1)
    assert session.receive() == "8000000"
    assert time.monotonic() - start > 0.5, "too quick to have been looked into"
    assert len(seen) > 2, "attributed only when it was over"
    sizes = [row["live_bytes"] for row in seen]
    # Growing all the time, until the context goes at the end of the query.
    growing = sizes[: sizes.index(max(sizes)) + 1]
    assert growing == sorted(growing) and len(growing) > 2
    assert all(row["live_bytes"] == 100 * row["live_count"] for row in seen)
    # Before a megabyte, and before the next walk, it was not watched.
    assert 10_000_000 < max(sizes) < 800_000_000
    [after] = exact.rows(
        f"SELECT sum(live_count) AS live_count, sum(free_count) AS free_count FROM rheap_call_sites({session.pid}) WHERE {where}"
    )
    assert after["live_count"] == 0
    assert 1_000_000 < after["free_count"] < 8_000_000


def test_prepared_statements_are_attributed_to_their_statement_and_their_code(exact, session):
    count = 2000
    for i in range(count):
        session(f"PREPARE p{i:04} AS SELECT relname FROM pg_class WHERE oid = {i:04}")
    plans = "TopMemoryContext/CacheMemoryContext/CachedPlanSource"
    sites = exact.rows(
        "SELECT function, context, live_count, live_bytes, free_count, query_id, to_json(stack) AS stack, exact "
        f"FROM rheap_call_sites({session.pid}) WHERE context LIKE '{plans}%'"
    )
    # The first was found after it had moved, already filled; every other one was watched from birth.
    assert all(s["exact"] for s in sites)
    created = [s for s in sites if s["function"] == "CreateCachedPlan" and s["context"] == plans and s["live_count"]]
    assert created and all(s["live_count"] % (count - 1) == 0 for s in created), created
    queries = [s for s in sites if s["context"] == f"{plans}/CachedPlanQuery"]
    assert any("CompleteCachedPlan" in f for s in queries for f in s["stack"])
    statement = exact.sql("EXPLAIN (VERBOSE) SELECT relname FROM pg_class WHERE oid = 1")
    identifier = int(next(l for l in statement.splitlines() if "Query Identifier" in l).split(":")[1])
    assert {s["query_id"] for s in queries} == {identifier}
    # Nothing of it lies elsewhere: what is attributed is nearly all that the contexts hold.
    # After a walk, which may be put off for a hundred times as long as the last one took.
    walks = lambda: int(exact.sql(f"SELECT walks FROM rheap_processes({session.pid})"))
    before, until = walks(), time.monotonic() + 60
    while walks() == before:
        assert time.monotonic() < until, "no walk"
        session("SELECT pg_sleep(0.1)")
    held = {r["path"]: r for r in exact.rows(
        f"SELECT path, contexts, used_bytes, watched FROM rheap_contexts({session.pid}) WHERE path LIKE '{plans}%'")}
    assert held[plans]["contexts"] == held[f"{plans}/CachedPlanQuery"]["contexts"] == count
    for path, row in held.items():
        attributed = sum(s["live_bytes"] for s in sites if s["context"] == path)
        assert row["watched"]
        assert 0.5 * row["used_bytes"] < attributed < row["used_bytes"], path


def test_prepared_statements_that_are_deallocated_hold_nothing(exact, session):
    for i in range(50):
        session(f"PREPARE p{i} AS SELECT relname FROM pg_class WHERE oid = {i}")
    session("DEALLOCATE ALL")
    held = exact.rows(
        f"SELECT function, live_count FROM rheap_call_sites({session.pid}) WHERE context LIKE '%CachedPlan%' AND live_count > 0"
    )
    assert held == []


def test_a_look_into_a_command_that_returns_rows_does_not_make_later_ones_dearer(exact, session):
    """Its rows lie in a context like those of a cursor that is held, which is watched from birth once one was found."""
    stores = (
        f"SELECT sum(alloc_count) FROM rheap_call_sites({session.pid}) WHERE context LIKE '%/PortalHoldContext'"
    )
    session("PREPARE long AS SELECT sum(random()) FROM generate_series(1, 20000000)")
    session("PREPARE short AS SELECT 1")
    session("SET rheap.walk_interval = '100ms'")
    session.send("EXECUTE long")
    looked = 0
    while running(exact, session.pid):
        looked += int(exact.sql(
            f"SELECT count(*) FROM rheap_contexts({session.pid}) WHERE path LIKE '%/PortalHoldContext' AND contexts > 0"
        ))
        time.sleep(0.1)
    session.receive()
    assert looked > 2, "no walk came while it ran"
    for _ in range(100):
        session("EXECUTE short")
    assert exact.sql(stores) == "", "watched"
    # One that is held is found, and the second is watched from birth; but what EXECUTE uses still is not.
    for name in ("one", "two"):
        session(f"DECLARE {name} CURSOR WITH HOLD FOR SELECT * FROM generate_series(1, 1000)")
        session("SELECT pg_sleep(0.2)")
    held = int(exact.sql(stores))
    assert held > 0
    for _ in range(100):
        session("EXECUTE short")
    assert int(exact.sql(stores)) == held

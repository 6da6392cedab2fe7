"""In exact mode, with all contexts in scope, what rheap holds per context is what the server's own statistics allow:
requested bytes, and for each chunk and block no more than the allocators add."""

import time

import pytest
from cluster import HERE, Cluster

STATEMENTS = [
    "CREATE TABLE parts (id int, name text) PARTITION BY RANGE (id)",
    "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (1000)",
    "CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (1000) TO (2000)",
    "INSERT INTO parts SELECT g, md5(g::text) FROM generate_series(0, 1999) g",
    "CREATE INDEX ON parts (id)",
    "PREPARE by_id(int) AS SELECT * FROM parts WHERE id = $1",
    *(f"EXECUTE by_id({i})" for i in range(0, 2000, 250)),
    "CREATE FUNCTION twice(n int) RETURNS int LANGUAGE plpgsql AS 'BEGIN IF n < 0 THEN RAISE EXCEPTION ''no''; END IF; RETURN 2 * n; END'",
    "SELECT sum(twice(id)) FROM parts",
    "SELECT name, count(*), array_agg(id) FROM parts GROUP BY name ORDER BY name LIMIT 3",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 500) SELECT string_agg(n::text, ',') FROM r",
    "SELECT p.tableoid, * FROM parts p JOIN pg_class c ON c.oid = p.tableoid JOIN pg_attribute a ON a.attrelid = c.oid WHERE p.id < 5",
    "SELECT to_tsvector('english', 'the quick brown foxes') @@ to_tsquery('english', 'fox')",
    "SELECT regexp_replace(md5(g::text), '[a-f]+', '', 'g') FROM generate_series(1, 50) g",
    "DO $$ BEGIN PERFORM twice(-1); EXCEPTION WHEN OTHERS THEN NULL; END $$",
    "BEGIN", "DECLARE c CURSOR WITH HOLD FOR SELECT * FROM parts", "FETCH 10 FROM c", "SAVEPOINT s", "SELECT twice(4)",
    "ROLLBACK TO s", "COMMIT", "FETCH 10 FROM c", "CLOSE c",
    "CREATE TEMP TABLE t AS SELECT * FROM parts", "TRUNCATE t", "DROP TABLE t",
    "SELECT leaky_leak(100, 30), leaky_context('Slab', 100, 48, 'keep'), leaky_context('Generation', 100, 48, 'keep'), leaky_move(50, 100)",
    "ANALYZE parts", "VACUUM parts", "DISCARD PLANS", "SET search_path = public, pg_temp", "RESET search_path",
]


@pytest.mark.parametrize("end", ["at rest", "within a transaction"])
def test_the_books_balance_with_the_servers_statistics(server, end):
    settings = dict(rheap__mode="exact", rheap__scope="all", rheap__walk_interval="10ms", rheap__memory_limit="256MB")
    with Cluster(server, **settings) as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        session = cluster.session()
        for statement in STATEMENTS:
            session(statement)
        if end == "within a transaction":
            session("BEGIN")
            session("DECLARE d CURSOR FOR SELECT * FROM parts ORDER BY name")
            session("FETCH 10 FROM d")
        # So that the last walk has seen what there is now; one that took long is not followed by the next at once.
        walks = lambda: cluster.rows(f"SELECT walks FROM rheap_processes({session.pid})")[0]["walks"]
        before, until = walks(), time.monotonic() + 60
        while walks() == before:
            assert time.monotonic() < until
            session("SELECT pg_sleep(0.05)")
        rows = cluster.rows(
            f"""
            SELECT c.path, c.type, c.contexts, c.total_bytes, c.used_bytes, coalesce(s.bytes, 0) AS bytes, coalesce(s.count, 0) AS count, coalesce(s.exact, true) AS exact
            FROM rheap_contexts({session.pid}) c
            LEFT JOIN (SELECT context, sum(live_bytes) AS bytes, sum(live_count) AS count, bool_and(exact) AS exact
                       FROM rheap_call_sites({session.pid}) GROUP BY 1) s ON s.context = c.path
            WHERE c.contexts > 0
            """
        )
        inherited = {r["path"] for r in cluster.rows(f"SELECT path FROM rheap_contexts({cluster.postmaster})")}
        # Not watched, since errors must pass; and what a child has from the postmaster, before its own books begin.
        rows = [r for r in rows if r["path"] not in inherited and "ErrorContext" not in r["path"]]
        assert len(rows) > 20
        assert all(r["exact"] for r in rows)
        off = []
        for r in rows:
            # What is asked for is never more than what is used.
            low = r["bytes"] <= r["used_bytes"]
            # Small chunks are rounded up to a power of two, larger ones to a multiple of eight; each has a header, and
            # each block and context has one too. Slab rounds all chunks alike, and marks the free ones.
            blocks = r["contexts"] * 8 + r["total_bytes"] // 8192
            high = r["used_bytes"] <= 2 * r["bytes"] + 32 * r["count"] + 320 * r["contexts"] + 64 * blocks
            if not (low and high):
                off.append(r)
        assert off == []


def test_what_is_freed_is_counted(server):
    """By work of which the number of frees is known: that allocations less frees are what lives is true of any number."""
    with Cluster(server, rheap__mode="exact", rheap__walk_interval="1h") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        session = cluster.session()
        work = "SELECT leaky_churn({0}, 64), leaky_leak({1}, 100), leaky_context('AllocSet', {2}, 64, 'delete'), leaky_context('Generation', {2}, 64, 'reset')"
        figures = lambda: [int(n) for n in cluster.sql(f"SELECT allocations, frees FROM rheap_processes({session.pid})").split()]
        before, numbers = None, []
        # The first calls fill caches, and the two after them tell what a call takes anyway.
        for step in [(1, 1, 1), (1, 1, 1), (1, 1, 1), (5001, 801, 301)]:
            session(work.format(*step))
            after = figures()
            numbers.append([b - a for a, b in zip(before, after)] if before else None)
            before = after
        allocations, frees = (last - usual for last, usual in zip(numbers[-1], numbers[-2]))
        # Contexts of their own come and go with what is in them.
        assert (allocations, frees) == (5000 + 800 + 600, 5000 + 600), numbers
        counted = cluster.sql(
            f"SELECT function, sum(alloc_count), sum(free_count), sum(live_count), sum(free_bytes) FROM rheap_call_sites({session.pid}) "
            "WHERE function IN ('leaky_churn', 'leaky_leak', 'leaky_context') AND context NOT LIKE '%/leaky%' GROUP BY 1 ORDER BY 1"
        )
        rows = {row.split("\t")[0]: [int(n) for n in row.split("\t")[1:]] for row in counted.splitlines()}
        assert rows["leaky_churn"] == [5004, 5004, 0, 5004 * 64]
        assert rows["leaky_leak"] == [804, 0, 804, 0]
        session.close()

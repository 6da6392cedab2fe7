"""The two leaks that rheap is for, in the form that every version can have: by a module that leaks in the postmaster at
each fork, and in a session at each call. The same leaks inside the server's own code are in test_seed_cases."""

from cluster import HERE, Cluster


def test_a_leak_of_the_postmaster_is_counted_fork_by_fork(server):
    settings = dict(autovacuum="off", max_parallel_workers=0, log_connections="on")
    with Cluster(server, preload="rheap, leaky", rheap__min_leak_bytes="1kB", **settings) as cluster:

        def held():
            # Several ways lead to fork.
            return cluster.rows(
                "SELECT sum(live_count) AS live_count, sum(live_bytes) AS live_bytes, bool_and(exact) AS exact "
                "FROM rheap_call_sites() WHERE backend_type = 'postmaster' AND function = 'leak_at_fork'"
            )[0]

        before = held(), cluster.log_text().count("connection received")
        for _ in range(20):
            cluster.pgbench("-n", "-C", "-f", HERE / "modules/nothing.sql", "-c", "2", "-t", "10")
        after = held(), cluster.log_text().count("connection received")
        connections = after[1] - before[1]
        assert connections >= 400
        assert after[0]["live_count"] - before[0]["live_count"] == connections
        assert after[0]["live_bytes"] == 80 * after[0]["live_count"] and after[0]["exact"]
        [leak] = cluster.rows("SELECT * FROM rheap_leaks() WHERE verdict = 'leak'")
        assert (leak["function"], leak["context"], leak["pid"]) == ("leak_at_fork", "TopMemoryContext", cluster.postmaster)
        assert cluster.stop("fast") < 10


def test_a_leak_of_a_session_is_counted_call_by_call(server):
    with Cluster(server, rheap__mode="exact", rheap__memory_limit="1GB") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        session = cluster.session()
        for _ in range(5):
            session("SELECT leaky_leak(200000, 120)")
        [leak] = cluster.rows(f"SELECT * FROM rheap_leaks({session.pid})")
        assert (leak["function"], leak["verdict"], leak["generations"]) == ("leaky_leak", "leak", 5)
        assert (leak["live_count"], leak["live_bytes"]) == (1_000_000, 120_000_000)
    with Cluster(server) as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        session = cluster.session()
        for _ in range(5):
            session("SELECT leaky_leak(200000, 120)")
        [leak] = cluster.rows(f"SELECT * FROM rheap_leaks({session.pid})")
        assert (leak["function"], leak["verdict"]) == ("leaky_leak", "leak")
        # 120 MB are 29,000 samples: a standard error of 0.6 %.
        assert abs(leak["live_bytes"] - 120_000_000) <= 0.04 * 120_000_000

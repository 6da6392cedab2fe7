"""The two leaks of the article, on a real PostgreSQL 17 that has them, and its twin without: what rheap is for."""

import pytest
from cluster import Cluster

CONNECTIONS = 20_000
CALLS = 10_000_000
STATEMENTS = 5


def patched_line(pg_config, file):
    """Number of the line that the patch added with its palloc."""
    source = (pg_config.parent.parent / "src" / file).read_text().splitlines()
    return next(i for i, line in enumerate(source, 1) if "*(volatile char *) palloc(" in line)


def connect(cluster):
    """CONNECTIONS connections, each with one select."""
    if "pgbench_accounts" not in cluster.sql("SELECT string_agg(relname, ' ') FROM pg_class"):
        cluster.pgbench("-i", "-q")
    cluster.pgbench("-n", "-C", "-S", "-c", "4", "-t", str(CONNECTIONS // 4))


def connections(cluster):
    """The truth: the server logs each connection that it accepts."""
    return cluster.log_text().count("connection received")


def call_random(session):
    for _ in range(STATEMENTS):
        session(f"SELECT sum(random()) FROM generate_series(1, {CALLS // STATEMENTS})")


def postmaster_leak(cluster):
    return cluster.rows("SELECT * FROM rheap_leaks() WHERE backend_type = 'postmaster'")[0]


def backend_leak(cluster, pid):
    return cluster.rows(f"SELECT * FROM rheap_leaks({pid})")[0]


def call_site(cluster, pid, function):
    [site] = cluster.rows(f"SELECT * FROM rheap_call_sites({pid}) WHERE function = '{function}' AND context = 'TopMemoryContext' AND stack[1] LIKE '{function} %' AND live_count > 0")
    assert site["alloc_count"] - site["free_count"] == site["live_count"]
    return site


def process(cluster, pid):
    [row] = cluster.rows(f"SELECT * FROM rheap_processes({pid})")
    return row


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_postmaster_leak_is_shown_live(pg17_leaks, mode):
    with Cluster(pg17_leaks, rheap__mode=mode, log_connections="on") as cluster:
        connect(cluster)
        # The query's own connection is counted too: it leaked before it could ask.
        leak = postmaster_leak(cluster)
        truth = connections(cluster)
        assert truth > CONNECTIONS
        assert leak["function"] == "BackendStartup"
        assert leak["location"] == f"src/backend/postmaster/postmaster.c:{patched_line(pg17_leaks, 'postmaster.c')}"
        assert (leak["context"], leak["verdict"]) == ("TopMemoryContext", "leak")
        # The postmaster allocates so little that sampled mode is exact in it.
        assert (leak["live_count"], leak["live_bytes"]) == (truth, 80 * truth)
        assert leak["processes"] == 1 and leak["pid"] == cluster.postmaster

        if mode == "sampled":
            # In the default mode once more: no process hangs, and the cluster stops. An attached heaptrack fails here.
            connect(cluster)
            assert postmaster_leak(cluster)["live_count"] == connections(cluster) > 2 * CONNECTIONS
        assert cluster.stop("fast") < 10


def test_backend_leak_is_exact_with_enough_memory(pg17_leaks):
    with Cluster(pg17_leaks, rheap__mode="exact", rheap__memory_limit="1GB") as cluster:
        session = cluster.session()
        call_random(session)
        leak = backend_leak(cluster, session.pid)
        assert leak["function"] == "drandom"
        line = patched_line(pg17_leaks, "pseudorandomfuncs.c")
        assert leak["location"] == f"src/backend/utils/adt/pseudorandomfuncs.c:{line}"
        assert (leak["context"], leak["verdict"]) == ("TopMemoryContext", "leak")
        assert (leak["live_count"], leak["live_bytes"]) == (CALLS, 120 * CALLS)
        assert leak["generations"] == STATEMENTS
        assert call_site(cluster, session.pid, "drandom")["exact"] is True
        assert leak["stack"][1].startswith("ExecInterpExpr at src/backend/executor/execExprInterp.c:")
        assert leak["stack"][-1].startswith("main at src/backend/main/main.c:")
        # The idle session is seen as it is after its last statement: allocator overhead on top of the leak.
        row = process(cluster, session.pid)
        assert 1_200_000_000 < row["context_bytes"] < 1_500_000_000
        assert row["dropped"] == 0
        [statement] = cluster.rows(f"SELECT query_id FROM pg_stat_activity WHERE pid = {session.pid}")
        assert leak["query_id"] == statement["query_id"]


def test_backend_leak_at_the_default_limit_stays_under_it(pg17_leaks):
    with Cluster(pg17_leaks, rheap__mode="exact") as cluster:
        session = cluster.session()
        limit = 32 << 20
        for _ in range(STATEMENTS):
            session(f"SELECT sum(random()) FROM generate_series(1, {CALLS // STATEMENTS})")
            assert process(cluster, session.pid)["own_bytes"] <= limit
        leak = backend_leak(cluster, session.pid)
        assert (leak["function"], leak["verdict"]) == ("drandom", "leak")
        assert abs(leak["live_count"] - CALLS) <= CALLS * 0.01
        assert abs(leak["live_bytes"] - 120 * CALLS) <= 120 * CALLS * 0.01
        site = call_site(cluster, session.pid, "drandom")
        assert site["exact"] is False
        # Every allocation is counted, followed or not.
        assert site["alloc_count"] == CALLS
        assert process(cluster, session.pid)["dropped"] > 0


def test_backend_leak_is_found_by_sampling(pg17_leaks):
    with Cluster(pg17_leaks) as cluster:
        session = cluster.session()
        call_random(session)
        leak = backend_leak(cluster, session.pid)
        assert (leak["function"], leak["verdict"]) == ("drandom", "leak")
        # 1.2 GB are 293,000 samples of 4 kB: a standard error of 0.2 %.
        assert abs(leak["live_count"] - CALLS) <= CALLS * 0.02
        assert abs(leak["live_bytes"] - 120 * CALLS) <= 120 * CALLS * 0.02
        assert call_site(cluster, session.pid, "drandom")["exact"] is False


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_the_server_without_the_leaks_reports_nothing(pg17_control, mode):
    with Cluster(pg17_control, rheap__mode=mode, rheap__walk_interval="1s") as cluster:
        session = cluster.session()
        call_random(session)
        connect(cluster)
        cluster.pgbench("-n", "-c", "4", "-T", "10")
        cluster.pgbench("-n", "-c", "4", "-S", "-M", "prepared", "-T", "5")
        assert cluster.rows("SELECT * FROM rheap_leaks()") == []
        assert int(cluster.sql("SELECT count(*) FROM rheap_call_sites()")) > 10

"""The corpus: every leak is found and nothing else, the bytes are right, and confidence means what it says."""

import pytest

import corpus
from cluster import Cluster


def run(pg_config, **options):
    ran = corpus.corpus(pg_config, **options)
    print(corpus.table(ran))
    sums = corpus.summary(ran)
    print(sums)
    missed = [s.name for s in ran if s.leaks and not s.found]
    assert missed == []
    alarms = [s.name for s in ran if not s.leaks and s.verdict == "leak"]
    assert alarms == []
    assert sums["suspects"] * 10 <= sums["benign"]
    assert sums["leaks"] >= 20 and sums["benign"] >= 20
    assert sums["sure"] >= 20 and sums["sure_and_leaks"] >= 0.9 * sums["sure"]
    return sums


@pytest.mark.parametrize("version", ["pg15", "pg17_control"])
def test_leaks_are_found_within_ten_seconds_in_exact_mode(request, version):
    assert run(request.getfixturevalue(version), mode="exact", seconds=10)["median_error"] <= 0.01


@pytest.mark.parametrize("version", ["pg15", "pg17_control"])
def test_leaks_are_found_within_ten_seconds_by_sampling(request, version):
    assert run(request.getfixturevalue(version), mode="sampled", seconds=10)["median_error"] <= 0.10


def test_leaks_are_found_within_a_minute_at_the_default_interval(pg17_control):
    assert run(pg17_control, seconds=60, interval="10s")["median_error"] <= 0.10


def test_pgbench_raises_no_alarm(slow_server):
    with Cluster(slow_server, rheap__walk_interval="1s") as cluster:
        cluster.pgbench("-i", "-s", "5", "-q")
        cluster.pgbench("-n", "-c", "4", "-j", "2", "-T", "20", "-M", "prepared")
        session = cluster.session()
        pgbench = __import__("threading").Thread(target=cluster.pgbench, args=("-n", "-c", "4", "-T", "20"))
        pgbench.start()
        seen = 0
        while pgbench.is_alive():
            rows = cluster.rows("SELECT verdict, function, context, reason FROM rheap_leaks()")
            assert rows == []
            seen += 1
        pgbench.join()
        assert seen > 20
        session.close()


def test_the_rows_of_a_cursor_are_no_leak_whoever_else_has_had_one(server):
    settings = dict(rheap__mode="exact", rheap__scope="all", rheap__memory_limit="64MB", rheap__min_leak_bytes="0")
    with Cluster(server, **settings) as cluster:
        # No join can be read backwards: what the cursor has read is stored.
        cursor = "DECLARE c SCROLL CURSOR FOR SELECT a, b FROM generate_series(1, 100) AS a, generate_series(1, 2) AS b"
        before, now = cluster.session(), cluster.session()
        for session in before, now:
            session("BEGIN")
            session(cursor)
            for _ in range(50):
                session("FETCH c")
            if session is before:
                session("COMMIT")
                session("SELECT 1")
        [row] = cluster.rows(
            "SELECT verdict, generations, live_count, processes, reason FROM rheap_call_sites() "
            "WHERE context ~ '/ExecutorState(/tuplestore tuples)?$' AND array_to_string(stack, ' ') LIKE '%tuplestore_puttupleslot%'"
        )
        assert (row["verdict"], row["generations"], row["live_count"], row["processes"]) == ("cache", 50, 50, 1)
        assert row["reason"].startswith("kept until the transaction ends: the rows that a cursor has read; ")
        assert cluster.rows("SELECT function, context, reason FROM rheap_leaks() WHERE context ~ '/ExecutorState'") == []
        for session in before, now:
            session.close()


def test_suppression(server):
    settings = dict(rheap__mode="exact", rheap__walk_interval="1s")
    with Cluster(server, preload="rheap, corpus", **settings) as cluster:
        cluster.run_file(corpus.HERE / "modules/corpus.sql")
        session = cluster.session()
        for _ in range(100):
            session("SELECT corpus_large(), corpus_cache()")

        def leaks():
            # What has stopped growing is no leak any more.
            session("SELECT corpus_large(), corpus_cache()")
            return session(f"SELECT function FROM rheap_leaks({session.pid}) ORDER BY 1").split()

        assert leaks() == ["cache_site", "large_site"]
        session("SELECT rheap_suppress('large_*', 'known: ticket 17')")
        assert leaks() == ["cache_site"]
        row = session(f"SELECT verdict, confidence, reason FROM rheap_call_sites({session.pid}) WHERE function = 'large_site'")
        assert row == "steady\t0\tsuppressed by 'large_*': known: ticket 17"
        # By the context, as a path or its last name; by a function up the stack.
        for pattern in ("CacheMemoryContext", "*/CacheMemoryContext", "corpus_cache"):
            session(f"SELECT rheap_suppress('{pattern}', 'mine')")
            assert leaks() == []
            assert session(f"SELECT rheap_unsuppress('{pattern}')") == "t"
            assert leaks() == ["cache_site"]
        assert session("SELECT rheap_unsuppress('nothing like it')") == "f"
        # A second reason takes the place of the first; the list survives a restart and is in a dump.
        session("SELECT rheap_suppress('large_*', 'ticket 18')")
        session.close()
        cluster.restart()
        assert cluster.sql("SELECT pattern, reason, created_by FROM rheap_suppressions") == "large_*\tticket 18\tpostgres"
        dump = corpus.subprocess.run([cluster.bin / "pg_dump", *cluster.target()], stdout=-1, text=True, check=True,
                                     cwd="/", **corpus.demote()).stdout
        assert "large_*\tticket 18" in dump


@pytest.mark.parametrize("arguments, says, hint", [
    ("'', 'x'", "needs a pattern", "Write the name of a function"),
    ("'*', 'x'", "every leak", "Write a part of a name"),
    ("'x', ' '", "needs a reason", "Write why"),
])
def test_suppressions_that_make_no_sense(exact, arguments, says, hint):
    with pytest.raises(corpus.SqlError) as error:
        exact.sql(f"SELECT rheap_suppress({arguments})")
    assert error.value.sqlstate == "22023"
    assert says in error.value.message and hint in error.value.hint

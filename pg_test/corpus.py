"""The corpus that verdicts are measured on: what leaks, and what only looks like it, each in a backend of its own.

    python3 pg_test/corpus.py --pg-config /usr/lib/postgresql/15/bin/pg_config --mode sampled --seconds 10

prints a table (scenario, truth, verdict, confidence, rank, error) and its sum. The modules and rheap must be
installed there: `make test` does that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from cluster import HERE, Cluster, SqlError, demote


@dataclass
class Scenario:
    name: str
    leaks: bool
    # One statement per unit of work; a number in {n} counts them. The first column of the last row, if it is a
    # number, is how many bytes of them stay for ever.
    work: list
    # The culprit, where there is one (the other name if compilers inline it), and what the context's path must hold.
    function: tuple = ()
    context: str = ""
    setup: str = ""
    least: int = 15
    # The processes to look at, where it is not the session itself.
    process: str = ""
    also: tuple = ()
    # All that stays in the process is of this one leak.
    alone: bool = False
    # It goes on, however slow the machine, for so many units, or until a walk has seen so many contexts: more than a
    # cache of the server's may hold, as many as a rare leak takes to be seen, or until what is full is.
    enough: int = 0
    many: int = 0
    # Filled by the run.
    truth: int = 0
    known: bool = True
    units: int = 0
    pid: int = 0
    rows: list = field(default_factory=list)

    @property
    def verdict(self):
        order = ["none", "steady", "cache", "suspect", "leak"]
        return max((r["verdict"] for r in self.rows), key=order.index, default="none")

    @property
    def ours(self):
        """The rows of the culprit, in the order of rheap_leaks."""
        return [r for r in self.rows if self.is_culprit(r)]

    def is_culprit(self, row):
        return (not self.function or row["function"] in self.function) and self.context in row["context"]

    @property
    def rank(self):
        """Where the culprit stands among the process's leaks; 0: nowhere."""
        leaks = [r for r in self.rows if r["verdict"] == "leak"]
        return next((i for i, r in enumerate(leaks, 1) if self.is_culprit(r)), 0)

    @property
    def found(self):
        rest = {r["function"] for r in self.rows if r["verdict"] == "leak"}
        return self.rank == 1 and rest.issuperset(self.also)

    @property
    def error(self):
        """Of the bytes, where the truth is known."""
        if not self.leaks or not self.known or not self.truth:
            return None
        return abs(sum(r["live_bytes"] for r in self.ours) - self.truth) / self.truth


# What the module's functions do shows by then: they have kept more than rheap.min_leak_bytes, or begun anew.
UNITS = 200


def module(name, enough=UNITS, **options):
    return Scenario(name, True, [f"SELECT corpus_{name}()"], function=(f"{name}_site",), enough=enough, **options)


def leaks():
    session = [
        module("small"), module("rare", enough=300), module("large"), module("variable"),
        module("cache", context="CacheMemoryContext"),
        module("child", context="CacheMemoryContext/corpus child"),
        module("contexts", context="corpus session"),
        module("reparented", context="CacheMemoryContext/corpus plan"),
        module("hash"),
        module("array"), module("list"),
        module("generation", context="corpus generation"),
        module("slab", context="corpus slab"),
        module("bump", context="corpus bump", least=17),
        module("nine", also=("one_site",)),
        module("shared"), module("recursion"), module("late"), module("arrays", context="CacheMemoryContext"),
        module("numbers"), module("ways"), module("hollow", context="corpus hollow"),
        Scenario("error path", True, ["SELECT corpus_error({n})"], function=("error_site",), enough=UNITS),
        Scenario("plpgsql functions", True, [
            "CREATE FUNCTION pg_temp.f{n}() RETURNS int LANGUAGE plpgsql AS 'BEGIN RETURN {n}; END'",
            "SELECT pg_temp.f{n}()", "DROP FUNCTION pg_temp.f{n}()"], function=("plpgsql_compile", "do_compile"),
            context="PL/pgSQL function", alone=True, many=300),
        Scenario("prepared statements", True, [
            "PREPARE p{n} AS SELECT count(*) FROM pg_class WHERE oid = {n}"], function=("PrepareQuery",), context="CachedPlanSource", alone=True),
        Scenario("cursors with hold", True, [
            "DECLARE c{n} CURSOR WITH HOLD FOR SELECT * FROM generate_series(1, 3)"], context="PortalHoldContext", alone=True),
        Scenario("row types", True, ["".join(
            f"CREATE TYPE pg_temp.t{i} AS (a int, b text); SELECT ROW(1, 'x')::pg_temp.t{i};"
            f" DROP TYPE pg_temp.t{i};" for i in range(20))], function=("lookup_type_cache",), alone=True, enough=60),
    ]
    others = [
        Scenario("background worker", True, [], function=("worker_site",), process="corpus worker",
                 also=("worker_cache_site",)),
        Scenario("postmaster", True, [], function=("fork_site",), process="postmaster"),
        Scenario("checkpointer", True, ["CHECKPOINT"], function=("checkpointer_site",), process="checkpointer"),
        Scenario("logical decoding", True, ["UPDATE decoded SET a = a + 1"], function=("decoding_site",),
                 process="walsender", also=("plugin_site",)),
        Scenario("parallel worker", True, [], function=("parallel_site",), process="parallel worker"),
    ]
    return session + others


def benign():
    names = ["saturates", "lru", "sawtooth", "arena", "once", "ring", "round", "behind", "buffer"]
    sql = {
        "prepare and deallocate": ["PREPARE q AS SELECT count(*) FROM pg_class WHERE oid = {n}; EXECUTE q; DEALLOCATE q"],
        "cursors": ["BEGIN; DECLARE c CURSOR FOR SELECT * FROM pg_class; FETCH 10 FROM c; CLOSE c; COMMIT"],
        "subtransactions": ["BEGIN; SAVEPOINT a; SELECT 1; SAVEPOINT b; SELECT 2; ROLLBACK TO a; COMMIT"],
        "exceptions": ["DO $$ BEGIN FOR i IN 1..20 LOOP BEGIN PERFORM 1/0; EXCEPTION WHEN division_by_zero THEN NULL;"
                       " END; END LOOP; END $$"],
        "temporary table refilled": ["TRUNCATE kept; INSERT INTO kept SELECT generate_series(1, 2000)"],
        "500 partitions": ["SELECT count(*) FROM parted WHERE a = {n} % 500"],
        "do blocks": ["DO $$ DECLARE t text; BEGIN SELECT string_agg(relname, ',') INTO t FROM pg_class; END $$"],
        "call with commit": ["CALL committing()"],
        "listen and unlisten": ["LISTEN channel{n}", "NOTIFY channel{n}, 'payload'", "UNLISTEN channel{n}"],
        "advisory locks": ["SELECT pg_advisory_lock({n}), pg_advisory_unlock({n})"],
        "sort": ["SELECT count(*) FROM (SELECT a FROM big ORDER BY b OFFSET 1) s"],
        "hash": ["SELECT count(*) FROM (SELECT b FROM big GROUP BY b OFFSET 1) s"],
        "jit": ["SELECT sum(a * 2 + length(b)) FROM big WHERE a % 3 = 1"],
        "parallel plan": ["SELECT count(*), sum(a) FROM big"],
        "vacuum": ["VACUUM ANALYZE small"],
        "create index": ["CREATE INDEX i ON small (a); DROP INDEX i"],
        "failing statements": ["SELECT 1/0", "SELECT * FROM nowhere"],
        "regular expressions": ["SELECT 'abc' ~ ('ab+' || md5('{n}'))"],
        "a schema, table by table": ["SELECT count(*) FROM tables.t{n} WHERE a = 1"],
        "functions": ["SELECT tables.f{n}()"],
        "savepoints": ["SAVEPOINT s{n}; SELECT count(*) FROM pg_class"],
        "cursors that sort": [
            "DECLARE c{n} CURSOR FOR SELECT a FROM generate_series(1, 1000) a ORDER BY a DESC; FETCH 1 FROM c{n}"],
        "locks": ["SELECT count(pg_advisory_xact_lock({n}, g)) FROM generate_series(1, 20) g"],
        "many tables": ["CREATE TABLE pg_temp.t{n} (a int PRIMARY KEY, b text); DROP TABLE pg_temp.t{n}"],
    }
    setup = {
        "temporary table refilled": "CREATE TEMP TABLE kept (a int)",
        "savepoints": "BEGIN",
        "cursors that sort": "BEGIN",
        "locks": "BEGIN",
        "jit": "SET jit = on; SET jit_above_cost = 0; SET jit_inline_above_cost = 0; SET jit_optimize_above_cost = 0;"
               " SET max_parallel_workers_per_gather = 0",
        "parallel plan": "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0",
    }
    return [Scenario(n, False, [f"SELECT corpus_{n}()"], enough=UNITS) for n in names] + [
        Scenario(n, False, work, setup=setup.get(n, "")) for n, work in sql.items()]


PREPARATION = """
CREATE TABLE decoded AS SELECT generate_series(1, 20) AS a;
ALTER TABLE decoded REPLICA IDENTITY FULL;
CREATE TABLE big AS SELECT i AS a, md5(i::text) AS b FROM generate_series(1, {rows}) i;
CREATE TABLE small AS SELECT generate_series(1, 1000) AS a;
CREATE TABLE parted (a int, b text) PARTITION BY LIST (a);
DO $$ BEGIN FOR i IN 0..499 LOOP EXECUTE format('CREATE TABLE parted_%s PARTITION OF parted FOR VALUES IN (%s)', i, i);
END LOOP; END $$;
CREATE SCHEMA tables;
DO $$ BEGIN FOR i IN 1..200 LOOP
EXECUTE format('CREATE TABLE tables.t%s (a int PRIMARY KEY, b text UNIQUE, c text DEFAULT md5(%L))', i, i);
EXECUTE format('CREATE FUNCTION tables.f%s() RETURNS int LANGUAGE plpgsql AS %L', i, 'BEGIN RETURN 1; END');
END LOOP; END $$;
CREATE PROCEDURE committing() LANGUAGE plpgsql AS 'BEGIN FOR i IN 1..5 LOOP PERFORM i; COMMIT; END LOOP; END';
ANALYZE;
"""


def drive(cluster, scenario, until, others_go_on):
    """Works in a session of its own until the time has come and enough is done; leaves it open."""
    def is_enough():
        if scenario.process:
            # What works all the time elsewhere would be judged to have stopped.
            return not others_go_on()
        if not scenario.many:
            return n >= scenario.enough
        return n % 10 == 0 and cluster.rows(
            f"SELECT coalesce(sum(contexts), 0) AS n FROM rheap_contexts({session.pid}) WHERE name = '{scenario.context}'"
        )[0]["n"] > scenario.many

    session = cluster.session()
    if scenario.setup:
        session(scenario.setup)
    scenario.pid = session.pid
    n = 0
    while time.monotonic() < until or (time.monotonic() < until + 120 and not is_enough()):
        n += 1
        for statement in scenario.work:
            try:
                answer = session(statement.replace("{n}", str(n % 200 + 1 if "tables." in statement else n))).splitlines()
                stays = answer[-1] if answer and "corpus_" in statement else ""
            except SqlError:
                # On the error path; the function says nothing then.
                stays = "4000" if "corpus_error" in statement else ""
            if scenario.name in ("hash", "list", "numbers"):
                scenario.known = False
            if stays.isdigit():
                scenario.truth += int(stays)
        # So that many sessions have their turn on few cores, and no scenario is a flood.
        time.sleep(0.01)
    scenario.units = n


def corpus(pg_config, mode="sampled", seconds=10, interval="1s", only=None, rows=1_000_000):
    """Runs all scenarios at one time; returns them with what rheap said of each."""
    major = int(subprocess.check_output([pg_config, "--version"], text=True).split()[1].split(".")[0])
    scenarios = [s for s in leaks() + benign() if s.least <= major and (not only or s.name in only)]
    settings = dict(rheap__mode=mode, rheap__walk_interval=interval, wal_level="logical", log_checkpoints="on",
                    max_worker_processes=20, max_parallel_workers=16, shared_buffers="256MB")
    with Cluster(pg_config, preload="rheap, corpus, corpus_processes, corpus_benign", **settings) as cluster:
        cluster.run_file(HERE / "modules/corpus.sql")
        cluster.sql(PREPARATION.format(rows=rows))
        wanted = {s.name: s for s in scenarios}
        until = time.monotonic() + seconds
        others = []
        if "logical decoding" in wanted:
            # Minor releases of 2026 ask for it.
            if cluster.sql("SELECT count(*) FROM pg_settings WHERE name = 'output_plugin_libraries'") == "1":
                cluster.reload(output_plugin_libraries="corpus_processes")
            cluster.sql("SELECT pg_create_logical_replication_slot('corpus', 'corpus_processes')")
            others.append(subprocess.Popen(
                [cluster.bin / "pg_recvlogical", *cluster.target(), "--slot=corpus", "--start", "-f", "/dev/null"],
                **demote(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"))
        if "postmaster" in wanted:
            script = cluster.root / "connect.sql"
            script.write_text("SELECT 1;\n")
            others.append(subprocess.Popen(
                [cluster.bin / "pgbench", "-n", "-C", "-c", "1", "-R", "60", "-T", str(int(seconds)), "-f", script,
                 *cluster.target()[:-2], "postgres"], cwd="/",
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **demote()))
        if "parallel worker" in wanted:
            query = cluster.session()
            query("SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;"
                  " SET max_parallel_workers_per_gather = 2")
            query.send("SELECT count(corpus_parallel(a)) FROM big")
        working = [s for s in scenarios if s.work]

        def others_go_on():
            return any(thread.is_alive() for s, thread in zip(working, threads) if s.enough or s.many)

        threads = [threading.Thread(target=drive, args=(cluster, s, until, others_go_on)) for s in working]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(max(0, until - time.monotonic()))
        # What a scenario's process says of itself, at one moment.
        found = cluster.rows("SELECT * FROM rheap_leaks()")
        for s in scenarios:
            if s.process:
                s.rows = [r for r in found if r["backend_type"] == s.process]
                s.known = False
            else:
                s.rows = cluster.rows(f"SELECT * FROM rheap_leaks({s.pid})")
        for process in others:
            process.terminate()
            process.wait()
        if "parallel worker" in wanted:
            cluster.sql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE '%corpus_parallel%'"
                        " AND pid <> pg_backend_pid()")
        log = cluster.log_text()
        assert "PANIC" not in log and "terminated by signal" not in log, log[-3000:]
    return scenarios


def table(scenarios):
    lines = [f"{'scenario':26} {'truth':7} {'verdict':8} {'conf.':>5} {'rank':>4} {'error':>7}  {'units':>6}  first row"]
    for s in scenarios:
        first = next((r for r in s.rows if r["verdict"] == s.verdict), None) if s.rows else None
        error = "" if s.error is None else f"{100 * s.error:.1f} %"
        wrong = not s.found if s.leaks else s.verdict in ("leak", "suspect")
        lines.append(
            f"{s.name:26} {'leak' if s.leaks else 'benign':7} {s.verdict:8}"
            f" {first['confidence'] if first else 0:5.2f} {s.rank if s.leaks else '':>4} {error:>7}  {s.units:6}  "
            + (f"{first['function']}: {first['context'].rsplit('/')[-1]}, {first['live_bytes']}: {first['reason']}" if first else "")
            + ("  <- WRONG" if wrong else ""))
    return "\n".join(lines)


def summary(scenarios):
    """The figures that are asserted."""
    leaking, clean = [s for s in scenarios if s.leaks], [s for s in scenarios if not s.leaks]
    sure = [(s, r) for s in scenarios for r in s.rows if r["confidence"] >= 0.9]
    errors = [s.error for s in leaking if s.error is not None]
    return {
        "leaks": len(leaking),
        "found": sum(s.found for s in leaking),
        "benign": len(clean),
        "false_alarms": sum(s.verdict == "leak" for s in clean),
        "suspects": sum(s.verdict == "suspect" for s in clean),
        "median_error": statistics.median(errors) if errors else 0.0,
        "sure": len(sure),
        "sure_and_leaks": sum(s.leaks and (s.alone or s.is_culprit(r) or r["function"] in s.also) for s, r in sure),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pg-config", required=True)
    parser.add_argument("--mode", default="sampled", choices=["sampled", "exact"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--interval", default="1s", help="rheap.walk_interval")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table that is sorted and hashed")
    parser.add_argument("--dump", help="a file for all rows, as JSON")
    parser.add_argument("scenario", nargs="*", help="only these")
    options = parser.parse_args()
    ran = corpus(options.pg_config, options.mode, options.seconds, options.interval, options.scenario, options.rows)
    print(table(ran))
    print(json.dumps(summary(ran)))
    if options.dump:
        with open(options.dump, "w") as file:
            json.dump({s.name: s.rows for s in ran}, file, indent=1)
    sys.exit(any(not s.found if s.leaks else s.verdict == "leak" for s in ran))

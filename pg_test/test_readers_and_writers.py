"""Sixteen readers of all views while eight backends allocate and sessions come and go: no row is torn, nobody waits,
nothing grows."""

import os
import subprocess
import time

import pytest
from cluster import HERE, Cluster, demote

SECONDS = int(os.environ.get("RHEAP_TEST_SECONDS", "20"))

# Each count goes with its bytes: whatever a reader sees, it is of one moment. A chunk of leaky_leak has 100 bytes.
CHECK = """
DO $$
DECLARE torn bigint; example text;
BEGIN
    SELECT count(*), min(t::text) INTO torn, example FROM rheap_call_sites t WHERE alloc_count - free_count <> live_count OR alloc_bytes - free_bytes <> live_bytes OR generations > live_count
       OR first_seen > last_seen
       OR (function IN ('leaky_leak', 'leaky_churn') AND (live_bytes <> 100 * live_count OR alloc_bytes <> 100 * alloc_count));
    IF torn > 0 THEN RAISE EXCEPTION 'torn: % rows of call sites, %', torn, example; END IF;
    SELECT count(*), min(t::text) INTO torn, example FROM rheap_contexts t WHERE total_bytes <> used_bytes + free_bytes OR free_bytes < 0 OR path = '' OR path NOT LIKE 'TopMemoryContext%';
    IF torn > 0 THEN RAISE EXCEPTION 'torn: % rows of contexts, %', torn, example; END IF;
    SELECT count(*), min(t::text) INTO torn, example FROM rheap_processes t WHERE frees > allocations OR captures > allocations;
    IF torn > 0 THEN RAISE EXCEPTION 'torn: % rows of processes, %', torn, example; END IF;
    SELECT count(*), min(t::text) INTO torn, example FROM rheap_ended t WHERE how NOT IN ('exit', 'killed') OR live_bytes <= 0 OR context = ''
        OR (function = 'leaky_leak' AND live_bytes <> 100 * live_count);
    IF torn > 0 THEN RAISE EXCEPTION 'torn: % rows of endings, %', torn, example; END IF;
    PERFORM count(*) FROM rheap_leaks;
END $$;
"""
# So little that all records fit into the default memory: then bytes and counts are exact.
LONG = "SELECT leaky_leak(2, 100), leaky_churn(500, 100), leaky_context('AllocSet', 20, 64, 'delete');\n"
SHORT = "SELECT leaky_leak(1000, 100), leaky_churn(20, 100);\n"


def test_no_reader_sees_a_torn_row_and_no_writer_waits(slow_server):
    with Cluster(slow_server, rheap__mode="exact", rheap__walk_interval="10ms") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")

        def client(name, script, clients, *more):
            file = cluster.root / f"{name}.sql"
            file.write_text(script)
            return subprocess.Popen(
                [str(cluster.bin / "pgbench"), "-n", "-c", str(clients), "-T", str(SECONDS), "-f", str(file), *more,
                 "-h", str(cluster.root), "-U", "postgres", "postgres"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", **demote(),
            )

        # A statement on one line, as pgbench wants it.
        running = [
            client("read", CHECK.replace("\n", " ").strip() + "\n", 16),
            client("long", LONG, 4),
            client("short", SHORT, 4, "-C"),
        ]
        time.sleep(SECONDS / 2)
        waits = cluster.sql(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type NOT IN ('Client', 'Activity', 'Timeout') AND backend_type = 'client backend'"
        )
        outputs = [process.communicate(timeout=SECONDS + 120)[0] for process in running]
        for process, output in zip(running, outputs):
            assert process.returncode == 0, output[-2000:]
            assert "torn" not in output and "aborted" not in output, output[-2000:]
        done = [int(output.split("number of transactions actually processed: ")[1].split()[0]) for output in outputs]
        assert done[0] >= 16 and done[1] >= 100 and done[2] >= 20, done
        # Locks of the server are short here; rheap has none.
        assert int(waits) <= 6
        # Slots and chunks came back: what is left is what lives.
        time.sleep(0.5)
        assert int(cluster.sql("SELECT count(*) FROM rheap_processes")) <= 12
        assert cluster.log_text().count("go unseen") == 0

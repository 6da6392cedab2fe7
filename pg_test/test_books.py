"""Every kind of allocation and of its end is counted to the byte, seen from another session."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import HERE, Cluster, demote, run


@pytest.fixture
def session(exact):
    session = exact.session()
    yield session
    session.close()


def sites(cluster, pid, where):
    return cluster.rows(
        "SELECT function, context, alloc_count, alloc_bytes, free_count, free_bytes, live_count, live_bytes, exact "
        f"FROM rheap_call_sites({pid}) WHERE {where}"
    )


def site(cluster, pid, function):
    [found] = sites(cluster, pid, f"function = '{function}'")
    return found


def books(row):
    return tuple(row[c] for c in ("alloc_count", "alloc_bytes", "free_count", "free_bytes", "live_count", "live_bytes"))


def walk(session):
    """Lets the session walk its tree: at the latest a walk interval later, between two messages."""
    session("SELECT pg_sleep(0.3)")
    session("SELECT 1")


def test_a_leak_is_counted_to_the_byte(exact, session):
    session("SELECT leaky_leak(1000, 100)")
    session("SELECT leaky_leak(500, 100)")
    row = site(exact, session.pid, "leaky_leak")
    assert books(row) == (1500, 150_000, 0, 0, 1500, 150_000)
    assert (row["context"], row["exact"]) == ("TopMemoryContext", True)


def test_a_leak_in_an_open_transaction_is_seen_at_once(exact, session):
    session("BEGIN")
    for n in (1, 2, 3):
        session("SELECT leaky_leak(10, 100), leaky_churn(10, 100)")
        assert books(site(exact, session.pid, "leaky_leak")) == (10 * n, 1000 * n, 0, 0, 10 * n, 1000 * n)
    session("COMMIT")


@pytest.mark.parametrize("block", [False, True])
def test_a_statement_of_several_messages_is_counted_to_the_byte(exact, block):
    """Bind, describe, execute and sync are one message each."""
    statements = ["SELECT leaky_leak(10, 100), leaky_churn(10, 100);"] * 2
    script = exact.root / "messages.sql"
    script.write_text("\n".join(["BEGIN;", *statements, "COMMIT;"] if block else statements) + "\n\\sleep 20 ms\n")
    client = subprocess.Popen(
        [exact.bin / "pgbench", "-n", "-f", script, "-M", "prepared", "-t", "100", *exact.target()[:-2], "postgres"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", **demote())
    seen = []
    while client.poll() is None:
        rows = exact.rows(
            "SELECT live_count, live_bytes, alloc_count FROM rheap_call_sites() WHERE function = 'leaky_leak' AND pid IN "
            "(SELECT pid FROM pg_stat_activity WHERE application_name = 'pgbench')")
        seen += [r["live_count"] for r in rows]
        assert all(r["live_bytes"] == 100 * r["live_count"] and r["alloc_count"] == r["live_count"] for r in rows), rows
    assert client.returncode == 0, client.stdout.read()
    assert len(set(seen)) > 5 and seen == sorted(seen), seen
    [left] = exact.rows(
        "SELECT live_count, live_bytes FROM rheap_ended() WHERE function = 'leaky_leak' ORDER BY ended_at DESC LIMIT 1")
    assert (left["live_count"], left["live_bytes"]) == (2000, 200_000)


def test_what_is_freed_is_counted_as_freed(exact, session):
    session("SELECT leaky_churn(1000, 100)")
    assert books(site(exact, session.pid, "leaky_churn")) == (1000, 100_000, 1000, 100_000, 0, 0)


def test_a_chunk_that_grows_is_one_chunk_of_its_last_size(exact, session):
    session("SELECT leaky_grow(1000, 100)")
    rows = sites(exact, session.pid, "function = 'leaky_grow'")
    assert sum(r["live_count"] for r in rows) == 1
    assert sum(r["live_bytes"] for r in rows) == 100_000
    assert sum(r["alloc_count"] for r in rows) == 1000
    assert sum(r["alloc_bytes"] for r in rows) == 100 * 1000 * 1001 // 2


@pytest.mark.parametrize("kind", ["AllocSet", "Generation", "Slab", "Bump"])
def test_each_allocator_is_counted_until_its_context_is_reset_or_deleted(exact, session, kind):
    if kind == "Bump" and exact.major < 17:
        pytest.skip("Bump is new in 17")
    for end in ("keep", "reset", "delete"):
        session(f"SELECT leaky_context('{kind}', 1000, 64, '{end}')")
    [row] = sites(exact, session.pid, "context = 'TopMemoryContext/leaky'")
    assert books(row) == (3000, 192_000, 2000, 128_000, 1000, 64_000)
    walk(session)
    [row] = exact.rows(f"SELECT type, contexts, used_bytes >= 64000 AS used FROM rheap_contexts({session.pid}) WHERE name = 'leaky'")
    assert row == {"type": kind, "contexts": 2, "used": True}


def test_recycled_headers_keep_the_books_apart(exact, session):
    for _ in range(5):
        session("SELECT leaky_context('AllocSet', 10, 64, 'delete')")
    session("SELECT leaky_context('AllocSet', 7, 64, 'keep')")
    [row] = sites(exact, session.pid, "context = 'TopMemoryContext/leaky'")
    assert books(row) == (57, 57 * 64, 50, 50 * 64, 7, 7 * 64)


def test_a_context_that_moves_takes_its_books_along(exact, session):
    session("SELECT leaky_move(100, 64)")
    walk(session)
    rows = [r for r in sites(exact, session.pid, "function = 'leaky_move'") if r["live_count"] > 0]
    assert [(r["context"], books(r)) for r in rows] == [
        ("TopMemoryContext/CacheMemoryContext/leaky mover", (100, 6400, 0, 0, 100, 6400))
    ]


def test_a_forked_child_starts_with_empty_books(exact):
    exact.sql("SELECT rheap_reset()")
    first, second = exact.session(), exact.session()
    first("SELECT leaky_leak(1000, 100)")
    second("SELECT 1")
    assert sites(exact, second.pid, "function = 'leaky_leak'") == []
    # What the postmaster holds is the postmaster's alone.
    # In 16's own build the child reads its start-up packet in code that is inlined into ServerLoop.
    functions = "BackendStartup" if exact.major == 16 else "BackendStartup|ServerLoop"
    held = f"SELECT array_agg(DISTINCT backend_type) FROM rheap_call_sites() WHERE live_count > 0 AND function ~ '{functions}'"
    assert exact.sql(held) in ("", "{postmaster}")


def test_a_leak_of_many_small_statements_gets_the_verdict_leak(exact, session):
    for _ in range(50):
        session("SELECT leaky_leak(20, 100)")
    [leak] = exact.rows(f"SELECT * FROM rheap_leaks({session.pid})")
    assert (leak["function"], leak["verdict"], leak["generations"]) == ("leaky_leak", "leak", 50)
    assert "nothing of 1000 allocations freed" in leak["reason"]
    assert leak["stack"][0].startswith(("MemoryContextAlloc", "leaky_leak"))
    source = (HERE / "modules/leaky.c").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "= 42" in text and i > source.index("leaky_leak(PG_FUNCTION_ARGS)"))
    assert leak["location"].endswith(f"pg_test/modules/leaky.c:{line}")


def test_the_report_for_programs_says_what_the_view_says(exact, session):
    for _ in range(50):
        session("SELECT leaky_leak(20, 100)")
    report = exact.rows(f"SELECT rheap_report_json({session.pid}) AS r")[0]["r"]
    [leak], [process] = report["leaks"], report["processes"]
    [row] = exact.rows(f"SELECT * FROM rheap_leaks({session.pid})")
    assert leak["stack"][leak["culprit"]]["function"] == row["function"] == "leaky_leak"
    for key in ("verdict", "live_bytes", "live_count", "context", "generations", "reason"):
        assert leak[key] == row[key]
    assert process["pid"] == session.pid and process["mode"] == "exact"


def test_reset_forgets_and_starts_again(exact, session):
    session("SELECT leaky_leak(1000, 100)")
    exact.sql(f"SELECT rheap_reset({session.pid})")
    assert sites(exact, session.pid, "true") == [], "at once, though the session is idle"
    session("SELECT leaky_leak(10, 100)")
    assert books(site(exact, session.pid, "leaky_leak")) == (10, 1000, 0, 0, 10, 1000)
    [top] = exact.rows(f"SELECT baseline_bytes, growth_bytes FROM rheap_contexts({session.pid}) WHERE path = 'TopMemoryContext'")
    assert top["baseline_bytes"] > 100_000 and top["growth_bytes"] < 100_000


def test_mode_off_records_nothing_and_can_be_changed_while_running(exact, session):
    session("SET rheap.mode = off")
    session("SELECT leaky_leak(100, 100)")
    assert sites(exact, session.pid, "function = 'leaky_leak'") == []
    session("SET rheap.mode = exact")
    session("SELECT leaky_leak(10, 100)")
    assert books(site(exact, session.pid, "leaky_leak")) == (10, 1000, 0, 0, 10, 1000)


def test_every_process_has_a_slot_and_gives_it_back(exact):
    [types] = exact.rows("SELECT array_agg(DISTINCT backend_type ORDER BY backend_type) AS kinds FROM rheap_processes")
    assert {"postmaster", "checkpointer", "background writer", "walwriter", "autovacuum launcher"} <= set(types["kinds"])
    session = exact.session()
    assert exact.sql(f"SELECT count(*) FROM rheap_processes({session.pid})") == "1"
    session.close()
    # psql has ended; its backend may need a moment more.
    gone = f"SELECT count(*) FROM rheap_processes WHERE pid = {session.pid}"
    exact.sql(f"DO $$ BEGIN WHILE (SELECT count(*) FROM pg_stat_activity WHERE pid = {session.pid}) > 0 LOOP PERFORM pg_sleep(0.01), pg_stat_clear_snapshot(); END LOOP; PERFORM pg_sleep(0.1); END $$")
    assert exact.sql(gone) == "0"


def test_the_slot_of_a_killed_process_is_recycled(server):
    with Cluster(server, max_connections=10) as cluster:
        victim = cluster.session()
        os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            try:
                if cluster.sql(f"SELECT count(*) FROM rheap_processes WHERE pid = {victim.pid}") == "0":
                    break
            except Exception:
                pass
            assert time.monotonic() < deadline, "the server comes back after a crash"
            time.sleep(0.1)
        # More processes than slots, one after another.
        for _ in range(120):
            cluster.sql("SELECT 1")
        assert cluster.sql("SELECT count(*) > 5 FROM rheap_processes") == "t"


def test_memory_for_symbols_is_given_back(exact):
    reader = exact.session()
    reader("SELECT count(*) FROM rheap_call_sites()")

    def anonymous():
        status = open(f"/proc/{reader.pid}/status").read()
        return int(status.split("RssAnon:")[1].split()[0])

    before = anonymous()
    for _ in range(20):
        reader("SELECT count(*), count(stack) FROM rheap_call_sites()")
    assert anonymous() - before < 2048, "kB that 20 more queries cost the asking backend"


@pytest.mark.parametrize("debug_file", ["by link", "by build id", "none"])
def test_names_come_from_a_separate_debug_file(exact, session, debug_file, tmp_path):
    """The module's own debug information is taken away and put where Debian's -dbgsym packages put it."""
    library = Path(run(exact.bin / "pg_config", "--pkglibdir").stdout.strip())
    name = "leaky_" + debug_file.replace(" ", "_")
    module, debug = library / f"{name}.so", tmp_path / f"{name}.so.debug"
    shutil.copy(library / "leaky.so", module)
    objcopy = lambda *arguments: subprocess.run(["objcopy", *map(str, arguments)], check=True)
    placed = None
    try:
        objcopy("--only-keep-debug", module, debug)
        objcopy("--strip-all", module)
        if debug_file == "by link":
            placed = library / ".debug" / debug.name
            placed.parent.mkdir(exist_ok=True)
            objcopy(f"--add-gnu-debuglink={debug}", module)
        elif debug_file == "by build id":
            notes = subprocess.run(["readelf", "-n", module], capture_output=True, text=True, check=True).stdout
            build_id = notes.split("Build ID: ")[1].split()[0]
            placed = Path("/usr/lib/debug/.build-id") / build_id[:2] / f"{build_id[2:]}.debug"
            placed.parent.mkdir(parents=True, exist_ok=True)
        if placed:
            shutil.copy(debug, placed)
        session(f"CREATE FUNCTION {name}(count int, size int) RETURNS void LANGUAGE c STRICT AS '{name}', 'leaky_leak'")
        session(f"SELECT {name}(10, 100)")
        [row] = exact.rows(
            f"SELECT function, location, live_bytes FROM rheap_call_sites({session.pid}) WHERE array_to_string(stack, ' ') LIKE '%leaky_leak%'"
        )
        assert (row["function"], row["live_bytes"]) == ("leaky_leak", 1000), "an exported function keeps its name"
        expected = r"pg_test/modules/leaky\.c:\d+$" if placed else rf"^{name}\.so\+0x[0-9a-f]+$"
        assert re.search(expected, row["location"])
    finally:
        session(f"DROP FUNCTION IF EXISTS {name}")
        for path in filter(None, [module, placed]):
            path.unlink(missing_ok=True)

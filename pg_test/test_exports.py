"""Reports and files for other tools: opened by the real tools, and all of one mind at one moment."""

import json
import os
import re
import signal
import subprocess
import threading
import xml.etree.ElementTree as xml

import pytest
from cluster import HERE, SqlError
from reports import METRICS, folded_sum, frozen, pprof_file, saved, tool, totals  # noqa: F401 (fixtures)


# --- Collapsed stacks and flame graphs ---


@pytest.mark.parametrize("metric", METRICS)
def test_collapsed_stacks_sum_up_to_the_view(exact, frozen, totals, metric):
    text = exact.sql(f"SELECT rheap_folded({frozen}, '{metric}')")
    assert folded_sum(text) == totals[metric]
    assert all(line.startswith("client backend;main;") for line in text.splitlines())
    if metric == "live":
        assert re.search(r";leaky_leak(;MemoryContextAlloc)? 2400000$", text, re.M)


@pytest.mark.parametrize("metric", METRICS)
def test_a_flame_graph_is_a_picture_that_says_what_it_shows(exact, frozen, metric):
    root = xml.fromstring(exact.sql(f"SELECT rheap_flamegraph({frozen}, '{metric}')"))
    text = " ".join(t for t in root.itertext())
    assert root.tag.endswith("svg") and f"pid {frozen} (client backend, exact)" in text
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC, PostgreSQL 1[5-8]\.\d+", text)
    # Browsers and readers of screens know a picture by its first element.
    assert root[0].tag.endswith("}title") and root[0].text.startswith("rheap: ") and f"pid {frozen} (client backend, exact)" in root[0].text


@pytest.mark.parametrize("metric", METRICS)
def test_the_root_of_a_flame_graph_is_the_views_sum(exact, frozen, totals, metric):
    svg = exact.sql(f"SELECT rheap_flamegraph({frozen}, '{metric}')")
    [(sum, share)] = re.findall(r"<title>all \(([\d,]+) [^,]*, ([\d.]+)%\)</title>", svg)
    assert (int(sum.replace(",", "")), float(share)) == (totals[metric], 100.0)
    if metric == "live":
        assert re.search(r"<title>leaky_leak \(2,400,000 bytes, [\d.]+%\)</title>", svg)


def test_an_unknown_metric(exact):
    for function in ("rheap_folded", "rheap_flamegraph"):
        with pytest.raises(SqlError) as caught:
            exact.sql(f"SELECT {function}(NULL, 'size')")
        assert (caught.value.sqlstate, caught.value.message) == ("22023", 'there is no metric "size"')
        assert caught.value.hint == "Write one of: live, live_count, allocated, allocations, temporary, growth."


@pytest.mark.parametrize("function", ["report", "report_json", "flamegraph", "folded", "html", "pprof", "heaptrack"])
def test_a_report_of_no_process_is_refused_and_of_all_is_made(exact, function):
    with pytest.raises(SqlError) as caught:
        exact.sql(f"SELECT rheap_{function}(1)")
    assert caught.value.sqlstate == "22023" and "rheap_processes" in caught.value.hint
    if function != "heaptrack":
        assert exact.sql(f"SELECT rheap_{function}() IS NOT NULL") == "t"


# --- heaptrack ---


def test_heaptrack_print_agrees_with_the_view(exact, frozen, totals, tmp_path):
    file = saved(tmp_path, "rheap.heaptrack", exact.sql(f"SELECT rheap_heaptrack({frozen})") + "\n")
    text = tool("heaptrack_print", "--print-leaks", "1", file)
    # It has no exact sums in its text; in its collapsed stacks it does.
    for kind, metric in (("leaked", "live"), ("allocations", "allocations"), ("temporary", "temporary")):
        stacks = tmp_path / kind
        tool("heaptrack_print", "--flamegraph-cost-type", kind, "--print-flamegraph", stacks, file)
        assert folded_sum(stacks.read_text()) == totals[metric], kind
    assert f"calls to allocation functions: {totals['allocations']} " in text
    assert f"temporary memory allocations: {totals['temporary']} " in text
    leaked = re.search(r"total memory leaked: ([\d.]+)([BKM])", text)
    scale = {"B": 1, "K": 1000, "M": 1000_000}[leaked[2]]
    assert abs(float(leaked[1]) * scale - totals["live"]) <= 0.011 * scale
    top = text.split("MEMORY LEAKS\n")[1].split("\n\n")[0]
    assert "2.40M leaked over 2400 calls from" in top
    assert "leaky_leak" in top and "leaky.c:" in top


def test_heaptrack_compares_two_files(exact, tmp_path):
    session = exact.session()
    files = []
    for name in ("first", "second"):
        session("SELECT leaky_leak(1000, 100)")
        session("SELECT 1")
        files.append(saved(tmp_path, name, exact.sql(f"SELECT rheap_heaptrack({session.pid})") + "\n"))
    text = tool("heaptrack_print", "--print-leaks", "1", "--diff", files[0], files[1])
    session.close()
    assert re.search(r"100\.00K leaked over 1000 calls from", text), text


def test_a_file_of_many_events_is_thinned_out_and_what_is_alive_stays_true(exact, tmp_path):
    session = exact.session()
    session("SELECT leaky_churn(3000000, 50), leaky_leak(1000, 1000)")
    session("SELECT 1")
    [row] = exact.rows(f"SELECT sum(live_bytes) AS live, sum(alloc_count) AS allocations FROM rheap_call_sites({session.pid})")
    file = saved(tmp_path, "rheap.heaptrack", exact.sql(f"SELECT rheap_heaptrack({session.pid})") + "\n")
    session.close()
    lines = file.read_text().splitlines()
    assert lines[1].endswith(", one of 2 freed allocations is shown") and row["allocations"] > 3_000_000
    assert 3_000_000 < sum(line[0] in "+-" for line in lines) < 4_000_000
    tool("heaptrack_print", "--flamegraph-cost-type", "leaked", "--print-flamegraph", tmp_path / "leaked", file)
    assert folded_sum((tmp_path / "leaked").read_text()) == row["live"]


# --- A process that samples ---


@pytest.fixture(scope="module")
def sampling(exact):
    """The pid of a session that samples one byte in 4096, and has nothing to do any more."""
    session = exact.session("-c rheap.mode=sampled")
    for _ in range(20):
        session("SELECT leaky_leak(2000, 1000), leaky_churn(5000, 50)")
    session("SELECT 1")
    os.kill(session.pid, signal.SIGSTOP)
    yield session.pid
    os.kill(session.pid, signal.SIGCONT)
    session.close()


def test_estimates_are_the_same_in_all_files_and_say_what_they_are(exact, sampling, tmp_path):
    columns = ", ".join(f"{sum}::int8 AS {name}" for name, sum in METRICS.items())
    [sums] = exact.rows(f"SELECT {columns}, bool_or(NOT exact) AS estimated, max(live_bytes) AS most FROM rheap_call_sites({sampling})")
    # 40,000 chunks of 1000 bytes: a sample of a quarter of them is within 5 % all but surely.
    assert sums["estimated"] and 38_000_000 < sums["most"] < 42_000_000
    file = saved(tmp_path, "rheap.heaptrack", exact.sql(f"SELECT rheap_heaptrack({sampling})") + "\n")
    assert f"pid {sampling} (client backend, sampled)" in file.read_text().splitlines()[1]
    for kind, metric in (("leaked", "live"), ("allocations", "allocations"), ("temporary", "temporary")):
        tool("heaptrack_print", "--flamegraph-cost-type", kind, "--print-flamegraph", tmp_path / kind, file)
        assert folded_sum((tmp_path / kind).read_text()) == sums[metric], kind
    profile = pprof_file(exact, sampling, tmp_path)
    for index, metric in PPROF_METRICS:
        text = tool("go", "tool", "pprof", "-top", "-unit=B", f"-sample_index={index}", profile)
        assert f" of {sums[metric]}B total" in text, text[:500]
    for metric in METRICS:
        assert folded_sum(exact.sql(f"SELECT rheap_folded({sampling}, '{metric}')")) == sums[metric]
    text = exact.sql(f"SELECT rheap_report({sampling})")
    assert "Figures with ~ are unbiased estimates from a sample." in text
    assert re.search(rf"^alive +~{sums['live_count']:,} allocations", text, re.M), text
    assert f"\n  ~{sums['most'] / 2**20:.1f} MB in ~" in text, text


# --- pprof ---


PPROF_METRICS = (
    ("inuse_space", "live"), ("inuse_objects", "live_count"), ("alloc_space", "allocated"), ("alloc_objects", "allocations")
)


def test_pprof_agrees_with_the_view(exact, frozen, totals, tmp_path):
    file = pprof_file(exact, frozen, tmp_path)
    for index, metric in PPROF_METRICS:
        # It writes the unit that was asked for behind numbers of objects too.
        text = tool("go", "tool", "pprof", "-top", "-unit=B", f"-sample_index={index}", file)
        assert f" of {totals[metric]}B total" in text, text[:500]
    raw = tool("go", "tool", "pprof", "-raw", file)
    assert "backend_type:[client backend]" in raw and "context:[TopMemoryContext]" in raw and "query_id:[" in raw
    top = tool("go", "tool", "pprof", "-top", "-unit=B", "-sample_index=inuse_space", "-lines", file)
    assert re.search(r"2400000B .*leaky_leak .*leaky\.c:\d+", top) or re.search(r"2400000B .*MemoryContextAlloc", top)
    assert "leaky_leak" in top


# --- Text and JSON ---


def key_of_leak(leak):
    return tuple(leak[k] for k in ("verdict", "function", "location", "context", "live_bytes", "live_count", "reason"))


def test_a_suppressed_leak_is_in_no_list_of_leaks(exact, frozen):
    exact.sql("SELECT rheap_suppress('leaky_leak', 'it is meant to')")
    try:
        report = json.loads(exact.sql(f"SELECT rheap_report_json({frozen})"))
        assert report["leaks"] == []
        [site] = [s for s in report["call_sites"] if s["function"] == "leaky_leak"]
        assert (site["verdict"], site["reason"]) == ("steady", "suppressed by 'leaky_leak': it is meant to")
        assert "none: nothing here keeps growing" in exact.sql(f"SELECT rheap_report({frozen})")
    finally:
        exact.sql("SELECT rheap_unsuppress('leaky_leak')")


def test_the_readmes_line_for_a_terminal_is_drawn_again_and_again(exact, frozen):
    readme = (HERE.parent / "README.md").read_text()
    line = re.search(r"postgres=# (SELECT verdict, .* \\watch) 2$", readme, re.M)[1]
    # Of all sessions here that leak at this place.
    live = exact.sql("SELECT pg_size_pretty(sum(live_bytes)) FROM rheap_call_sites() WHERE function = 'leaky_leak'")
    psql = subprocess.Popen(
        [exact.bin / "psql", "-X", *exact.target()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    late = threading.Timer(30, psql.kill)
    late.start()
    try:
        psql.stdin.write(line + " 0.2\n")
        psql.stdin.flush()
        seen = 0
        for text in psql.stdout:
            seen += "leaky_leak" in text and f" {live} " in text
            if seen == 3:
                break
        assert seen == 3
    finally:
        late.cancel()
        psql.kill()
        psql.communicate()


def test_the_text_has_the_figures_of_the_view_and_fits_a_terminal(exact, frozen, totals):
    text = exact.sql(f"SELECT rheap_report({frozen})")
    assert max(map(len, text.splitlines())) <= 120
    for section in ("LEAKS", "WHAT HOLDS MOST", "MOST CALLS TO", "MOST TEMPORARY", "TOTALS", "MEMORY CONTEXTS", "OUTSIDE CONTEXTS"):
        assert f"\n{section}" in text
    row = lambda name: re.search(rf"^{name} +([\d,]+) allocations", text, re.M)[1].replace(",", "")
    assert int(row("allocated")) == totals["allocations"]
    assert int(row("freed again")) == totals["temporary"]
    assert int(row("alive")) == totals["live_count"]
    assert re.search(r"^LEAK \(\d+ %\): leaky_leak at \S*leaky\.c:\d+\n  2.29 MB in 2,400 allocations; client backend", text, re.M)
    assert "nothing of 2400 allocations freed" in text


def test_the_text_marks_what_was_inlined(exact):
    session = exact.session()
    session("SELECT leaky_sites(1, 5, 100000)")
    session("SELECT 1")
    text = exact.sql(f"SELECT rheap_report({session.pid})")
    report = json.loads(exact.sql(f"SELECT rheap_report_json({session.pid})"))
    session.close()
    # The module has debug information on every server here: of its functions some are inlined into others.
    assert re.search(r"^ +site_step_\d+ at \S*leaky\.c:\d+\s+\[inlined\]$", text, re.M), text
    assert re.search(r"^ +site_(odd|even)_\d+ at \S*leaky\.c:\d+$", text, re.M), text
    # All of them are marked in the report for programs too, the server's own on 17 among them.
    marked = set(re.findall(r"^ +(\w+) at \S+\s+\[inlined\]$", text, re.M))
    assert marked <= {f["function"] for f in report["frames"] if f["inlined"]}
    assert not {name for name in marked if re.match("site_(odd|even)_|leaky_sites$|main$", name)}


def test_json_is_as_its_schema_says_and_as_the_views_say(exact, frozen, totals):
    import jsonschema

    schema = json.loads((HERE.parent / "docs/report.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    for pid in (frozen, "NULL"):
        report = json.loads(exact.sql(f"SELECT rheap_report_json({pid})"))
        jsonschema.Draft7Validator(schema).validate(report)
    report = json.loads(exact.sql(f"SELECT rheap_report_json({frozen})"))
    t = report["totals"]
    assert (t["live_bytes"], t["live_count"], t["alloc_bytes"], t["alloc_count"], t["free_count"]) == tuple(
        totals[m] for m in ("live", "live_count", "allocated", "allocations", "temporary")
    )
    sites = exact.rows(f"SELECT * FROM rheap_call_sites({frozen})")
    key = lambda s: (s["function"], s["location"], s["context"], s["live_bytes"], s["alloc_count"], s["verdict"], s["reason"])
    assert sorted(map(key, report["call_sites"])) == sorted(map(key, sites))
    leaks = exact.rows(f"SELECT * FROM rheap_leaks({frozen})")
    assert leaks and list(map(key_of_leak, report["leaks"])) == list(map(key_of_leak, leaks))
    contexts = exact.rows(f"SELECT path, used_bytes, growth_bytes FROM rheap_contexts({frozen})")
    assert [{k: c[k] for k in ("path", "used_bytes", "growth_bytes")} for c in report["contexts"]] == contexts
    [process] = exact.rows(f"SELECT own_bytes, captures, mode FROM rheap_processes({frozen})")
    assert {k: report["processes"][0][k] for k in process} == process
    # Stacks are indexes; together with `frames` they say what the view says.
    describe = lambda f: f"{f['function']} at {f['location']}" if f["function"] else f["address"]
    stacks = sorted([describe(report["frames"][i]) for i in s["stack"]] for s in report["call_sites"])
    assert stacks == sorted(s["stack"] for s in sites)


def test_memory_for_reports_is_given_back(exact):
    reader = exact.session()
    reports = "SELECT length(rheap_html()), length(rheap_pprof()), length(rheap_flamegraph()), length(rheap_report())"

    def anonymous():
        return int(open(f"/proc/{reader.pid}/status").read().split("RssAnon:")[1].split()[0])

    reader(reports)
    reader(reports)
    before = anonymous()
    for _ in range(5):
        reader(reports)
    assert anonymous() - before < 4096, "kB that five more rounds cost the asking backend"
    reader.close()

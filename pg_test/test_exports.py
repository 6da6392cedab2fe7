"""Reports and files for other tools: opened by the real tools, and all of one mind at one moment."""

import gzip
import json
import os
import re
import signal
import subprocess
import threading
import time
import xml.etree.ElementTree as xml

import pytest
from cluster import HERE, SqlError

METRICS = {
    "live": "sum(live_bytes)",
    "live_count": "sum(live_count)",
    "allocated": "sum(alloc_bytes)",
    "allocations": "sum(alloc_count)",
    "temporary": "sum(free_count)",
    "growth": "sum(round(greatest(growth_bytes_per_s, 0)))",
}


def tool(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def frozen(exact):
    """The pid of a session that leaks, churns, and is stopped: its figures stand still."""
    session = exact.session()
    for _ in range(12):
        session("SELECT leaky_leak(200, 1000), leaky_churn(300, 50)")
        time.sleep(0.05)
    session("SELECT leaky_sites(1, 20, 40)")
    session("SELECT pg_sleep(0.3)")
    session("SELECT 1")
    os.kill(session.pid, signal.SIGSTOP)
    yield session.pid
    os.kill(session.pid, signal.SIGCONT)
    session.close()


@pytest.fixture(scope="module")
def totals(exact, frozen):
    columns = ", ".join(f"{sum}::int8 AS {name}" for name, sum in METRICS.items())
    [row] = exact.rows(f"SELECT {columns} FROM rheap_call_sites({frozen})")
    return row


def folded_sum(text):
    return sum(int(line.rsplit(" ", 1)[1]) for line in text.splitlines())


def saved(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pprof_file(cluster, pid, folder):
    return saved(folder, "rheap.pb.gz", bytes.fromhex(cluster.sql(f"SELECT encode(rheap_pprof({pid}), 'hex')")))


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


# --- pprof ---


def test_pprof_agrees_with_the_view(exact, frozen, totals, tmp_path):
    file = pprof_file(exact, frozen, tmp_path)
    for index, metric in (
        ("inuse_space", "live"), ("inuse_objects", "live_count"), ("alloc_space", "allocated"), ("alloc_objects", "allocations")
    ):
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


# --- The page ---


@pytest.fixture(scope="module")
def page(exact, frozen, tmp_path_factory):
    from browser import Browser

    file = saved(tmp_path_factory.mktemp("page"), "report.html", exact.sql(f"SELECT rheap_html({frozen})"))
    with Browser() as browser:
        browser.open(file)
        browser.file = file
        yield browser


def cells(page, column):
    return page.run(f"return [...document.querySelectorAll('#site-table tbody tr')].map(r => r.children[{column}].textContent)")


def test_the_page_loads_without_a_complaint_and_asks_no_one(page, frozen):
    assert page.log() == []
    assert str(frozen) in page.run("return document.querySelector('h1').textContent")
    assert page.run("return performance.getEntriesByType('resource').length") == 0


def test_the_page_shows_the_leak_with_its_reason_and_growth(page):
    [leak] = page.run("return [...document.querySelectorAll('.leak')].map(l => l.textContent)")
    assert "leaky_leak" in leak and "nothing of 2400 allocations freed" in leak and "2.29 MB" in leak
    charts = page.run("return [...document.querySelectorAll('.chart polyline')].map(l => l.getAttribute('points').split(' ').length)")
    assert charts and min(charts) > 1
    assert "TopMemoryContext" in page.run("return document.querySelector('.chart').textContent")


def test_the_table_sorts_and_filters_by_mouse_and_keyboard(page):
    head = "#site-table th:nth-child({}) button"
    values = "const key = arguments[0]; return data.call_sites.map(s => s[key]).sort((a, b) => b - a)"
    assert page.run("return document.querySelector('#site-table th:nth-child(3)').getAttribute('aria-sort')") == "descending"
    page.click(head.format(6))
    most = page.run(values, "alloc_count")
    number = lambda text: int(text.replace(",", "").replace("~", ""))
    assert [number(c) for c in cells(page, 5)] == most[:200]
    page.keys(head.format(6), "\ue007")  # Enter: the other way round
    assert [number(c) for c in cells(page, 5)] == most[::-1][:200]
    page.keys("#filter", "leaky_leak topmemory")
    assert [c.split("\n")[0] for c in cells(page, 1)] == ["leaky_leak"]
    page.click("#site-table details summary")
    page.find("#site-table ol.stack")
    assert "main at" in page.run("return document.querySelector('#site-table ol.stack').textContent")
    page.run("document.querySelector('#filter').value = ''; document.querySelector('#filter').dispatchEvent(new Event('input'))")
    assert page.log() == []


def test_the_flame_graph_zooms_and_searches_by_mouse_and_keyboard(page):
    widths = "const all = {}; for (const f of document.querySelectorAll('#graph .frame')) all[f.node.name] = f.getBoundingClientRect().width; return all"
    full = page.run("return document.querySelector('#graph').clientWidth")
    before = page.run(widths)
    assert before["all"] == pytest.approx(full, abs=2) and before["leaky_leak"] < full - 10
    page.run("[...document.querySelectorAll('#graph .frame')].find(f => f.node.name === 'leaky_leak').click()")
    assert page.run(widths)["leaky_leak"] == pytest.approx(full, abs=2)
    page.keys("#graph", "\ue00c")  # Escape
    assert page.run(widths) == before
    # Arrow down twice, Enter: the backend type's child.
    page.keys("#graph", "\ue015\ue015\ue007")
    assert page.run("return zoomed.depth") == 2
    page.click("#zoom-out")
    page.keys("#flame-search", "leaky_leak")
    assert page.run("return [...document.querySelectorAll('.frame.found')].map(f => f.node.name)") == ["leaky_leak"]
    assert "found in" in page.run("return document.querySelector('#flame-status').textContent")
    assert page.log() == []


def test_every_metric_of_the_page_has_the_views_sum(page, totals):
    for index, metric in enumerate(METRICS):
        page.run("const m = document.querySelector('#metric'); m.selectedIndex = arguments[0]; m.dispatchEvent(new Event('change'))", index)
        assert page.run("return flameRoot.value") == totals[metric], metric
    page.run("const m = document.querySelector('#metric'); m.selectedIndex = 0; m.dispatchEvent(new Event('change'))")


def test_the_page_is_light_or_dark_and_fits_a_phone(page):
    paper = "return getComputedStyle(document.body).backgroundColor"
    page.prefer("light")
    light = page.run(paper)
    page.prefer("dark")
    assert page.run(paper) != light
    page.click("#theme")
    assert page.run(paper) == light
    page.narrow(390, 800)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    assert page.log() == []


def test_the_svg_searches_and_zooms_in_a_browser(exact, frozen, tmp_path):
    from browser import Browser

    file = saved(tmp_path, "flame.svg", exact.sql(f"SELECT rheap_flamegraph({frozen})"))
    with Browser() as browser:
        browser.open(file)
        box = "const g = [...document.querySelectorAll('#frames g')].find(g => g.querySelector('title').textContent.startsWith('leaky_leak '));"
        width = box + "return g.querySelector('rect').getBoundingClientRect().width"
        before = browser.run(width)
        browser.run(box + "g.querySelector('rect').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
        assert browser.run(width) > before * 1.05
        browser.run("search('leaky_leak')")
        assert "%" in browser.run("return document.getElementById('matched').textContent")
        assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []

"""The page and the picture, in a browser."""

import json
import re
import time

import pytest
from browser import Browser
from cluster import HERE, Cluster
from reports import METRICS, frozen, saved, totals  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def page(exact, frozen, tmp_path_factory):
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
    page.wide()
    assert page.log() == []


def test_the_table_of_processes_is_the_views(exact, frozen, page):
    [process] = exact.rows(f"SELECT pid, backend_type, mode, allocations, captures, dropped, walks FROM rheap_processes({frozen})")
    rows = page.run("return [...document.querySelectorAll('#process-table tbody tr')].map(r => [...r.children].map(c => c.textContent))")
    [[pid, kind, mode, *sizes, allocations, captures, dropped, walks]] = rows
    number = lambda text: int(text.replace(",", ""))
    assert process == {
        "pid": int(pid), "backend_type": kind, "mode": mode, "allocations": number(allocations), "captures": number(captures),
        "dropped": number(dropped), "walks": number(walks),
    }
    assert len(sizes) == 4 and all(re.fullmatch(r"[\d.]+ (B|kB|MB)", size) for size in sizes)
    assert page.run("return document.querySelector('#process-count').textContent") == "1 of 1 processes"


def test_paper_is_light_and_has_all_of_the_width(page):
    page.prefer("dark")
    page.command("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.narrow(718, 1000)  # A4 without its margins
    try:
        assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for hidden in ("nav", "#theme", "#zoom-out", "#filter"):
            assert page.run("return document.querySelector(arguments[0]).offsetParent", hidden) is None, hidden
        assert page.run("return document.documentElement.scrollWidth") <= 718
        # Tables are not cut off at a scroll bar, and neither is the flame graph.
        for box in ("#site-table", "#process-table", "#graph .frame"):
            assert page.run("return document.querySelector(arguments[0]).getBoundingClientRect().right", box) <= 718, box
        assert page.command("Page.printToPDF")["data"].startswith("JVBERi0")  # %PDF-
    finally:
        page.command("Emulation.setEmulatedMedia", media="", features=[])
        page.wide()
    assert page.log() == []


def with_data(page, folder, change):
    """A copy of the page with other data."""
    head, rest = page.file.read_text().split('type="application/json">', 1)
    data, tail = rest.split("</script>", 1)
    data = json.loads(data)
    change(data)
    data = json.dumps(data).replace("<", "\\u003c")
    return saved(folder, "changed.html", f'{head}type="application/json">{data}</script>{tail}')


def test_many_leaks_and_long_names_stay_readable(page, tmp_path):
    def multiply(data):
        [leak] = data["leaks"]
        data["leaks"] = [{**leak, "function": f"leak_{i}_" + "x" * 300, "context": "Top/" + "y" * 300} for i in range(500)]
        data["call_sites"] = [{**site, "function": "z" * 300} for site in data["call_sites"] for _ in range(100)]
        [process] = data["processes"]
        data["processes"] = [{**process, "pid": pid} for pid in range(1, 301)]

    page.open(with_data(page, tmp_path, multiply))
    try:
        names = "return [...document.querySelectorAll('.leak h3')].map(l => l.textContent.match(/leak_[0-9]+/)[0])"
        assert page.run(names) == [f"leak_{i}" for i in range(20)], "the order of the data is kept: the worst first"
        said = "return document.querySelector(arguments[0]).textContent"
        assert page.run(said, "#leak-count") == "20 of 500, the worst first; and 480 more"
        assert page.run("return document.querySelectorAll('#process-table tbody tr').length") == 100
        assert page.run(said, "#process-count") == "100 of 300 processes; and 200 more"
        for width in (320, 390):
            page.narrow(width, 800)
            assert page.run("return document.documentElement.scrollWidth") <= width
        page.wide()
        page.click("#more-leaks")
        assert len(page.run(names)) == 120 and page.run(said, "#leak-count").startswith("120 of 500")
        page.click("#leak-list article:nth-child(120) summary")
        page.find("#leak-list article:nth-child(120) ol.stack li.culprit")
        for _ in range(4):
            page.click("#more-leaks")
        assert page.run(names) == [f"leak_{i}" for i in range(500)]
        assert page.run("return document.querySelector('#more-leaks').hidden") is True
        assert page.run(said, "#leak-count") == "500 of 500, the worst first"
        page.click("#more-processes")
        assert page.run(said, "#process-count") == "300 of 300 processes"
        assert page.log() == []
    finally:
        page.wide()
        page.open(page.file)


def test_what_people_write_is_shown_and_does_nothing(exact, frozen, page, tmp_path):
    reason = "E'one\\ntwo\\x1b[31m</script><b id=injected>\\u202e'"
    exact.sql(f"SELECT rheap_suppress('leaky_leak', {reason})")
    try:
        html = exact.sql(f"SELECT rheap_html({frozen})")
    finally:
        exact.sql("SELECT rheap_unsuppress('leaky_leak')")
    assert "\x1b" not in html and html.isascii()
    page.open(saved(tmp_path, "hostile.html", html))
    try:
        page.keys("#filter", "leaky_leak")
        page.click("#site-table details summary")
        page.find("#site-table ol.stack")
        note = page.run("return document.querySelector('#site-table details .note').textContent")
        assert note == "suppressed by 'leaky_leak': one\\ntwo\\u001b[31m</script><b id=injected>\\u202e"
        assert page.run("return document.getElementById('injected')") is None
        assert page.log() == []
    finally:
        page.open(page.file)


def test_a_hundred_sessions_of_a_hundred_call_sites_take_seconds(slow_server, tmp_path):
    with Cluster(slow_server, rheap__mode="exact", max_connections=120) as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        sessions = [cluster.session() for _ in range(100)]
        for i, session in enumerate(sessions):
            session.send(f"SELECT leaky_sites({37 * i}, 100, 64)")
        for session in sessions:
            session.receive()
        [sums] = cluster.rows("SELECT sum(live_count) AS n, sum(live_bytes) AS b FROM rheap_call_sites() WHERE context LIKE '%/leaky sites'")
        assert sums == {"n": 10_000, "b": 640_000}
        made = {}
        for name in ("report", "report_json", "folded", "flamegraph", "html", "pprof"):
            start = time.monotonic()
            made[name] = cluster.sql(f"SELECT rheap_{name}()")
            assert time.monotonic() - start < 5, name
        assert sum(int(l.rsplit(" ", 1)[1]) for l in made["folded"].splitlines() if ";leaky_sites;" in l) == 640_000
        assert max(len(line) for line in made["report"].splitlines()) <= 110
        assert len(made["flamegraph"]) < 5 << 20 and len(made["html"]) < 20 << 20
        with Browser() as browser:
            start = time.monotonic()
            browser.open(saved(tmp_path, "large.html", made["html"]))
            assert browser.run("return document.querySelectorAll('#site-table tbody tr').length") == 200
            assert browser.run("return document.querySelectorAll('#process-table tbody tr').length") == 100
            assert re.fullmatch(r"100 of 1\d\d processes; and \d more", browser.run("return document.querySelector('#process-count').textContent"))
            assert browser.run("return data.call_sites.filter(s => s.context.endsWith('/leaky sites')).reduce((a, s) => a + s.live_count, 0)") == 10_000
            assert time.monotonic() - start < 10
            assert browser.log() == []


def test_the_svg_searches_and_zooms_in_a_browser(exact, frozen, tmp_path):
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

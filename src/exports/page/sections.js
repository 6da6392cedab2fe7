// Everything around the flame graph.
function startHead() {
  byId("subject").textContent = data.subject;
  byId("moment").textContent = data.taken_at.slice(0, 19).replace("T", " ") + " UTC, " + data.server + ", rheap " + data.rheap +
    (data.call_sites.some(s => !s.exact) ? "; figures with ~ are unbiased estimates from a sample" : "");
  const t = data.totals, sum = key => data.processes.reduce((a, p) => a + (p[key] || 0), 0);
  const tiles = [
    [bytes(t.live_bytes), "alive in " + count(t.live_count) + " allocations"],
    [count(t.alloc_count), "allocations, " + bytes(t.alloc_bytes)],
    [count(t.free_count), "freed again, " + bytes(t.free_bytes)],
    [bytes(sum("context_bytes")), "in memory contexts"],
    [bytes(sum("unattributed_bytes")), "private, outside contexts"],
    [bytes(sum("own_bytes")), "rheap's own memory"],
  ];
  byId("totals").append(...tiles.map(([number, text]) => element("div", { class: "tile" }, element("b", {}, number), element("span", {}, text))));
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

function leakCard(leak) {
  const about = leak.exact ? "" : "~";
  const facts = element("dl");
  const add = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
  add("why", leak.reason);
  add("holds", about + bytes(leak.live_bytes) + " in " + about + count(leak.live_count) + " allocations");
  add("grows", bytes(leak.growth_bytes_per_s) + " per second, " + count(leak.generations) + " generations");
  add("context", breakable(leak.context));
  add("process", leak.backend_type + ", pid " + leak.pid + (leak.processes > 1 ? ", which holds most of " + leak.processes : ""));
  if (leak.query_id) add("query id", leak.query_id);
  return element("article", { class: "leak " + leak.verdict },
    element("h3", {}, badge(leak.verdict), " " + Math.round(leak.confidence * 100) + " %: " + leak.function + " ", element("code", {}, leak.location)),
    facts,
    stackDetails("Call stack", leak));
}

// The worst first, few at a time: what rheap_leaks() has more of is counted.
function startLeaks() {
  const step = 20, leaks = data.leaks, more = byId("more-leaks");
  let shown = 0;
  const draw = () => {
    const next = leaks.slice(shown, shown === 0 ? step : shown + 5 * step);
    byId("leak-list").append(...next.map(leakCard));
    shown += next.length;
    more.hidden = shown === leaks.length;
    byId("leak-count").textContent = leaks.length === 0 ? "None: nothing here keeps growing."
      : count(shown) + " of " + count(leaks.length) + ", the worst first" + (more.hidden ? "" : "; and " + count(leaks.length - shown) + " more");
    more.textContent = "Show " + Math.min(5 * step, leaks.length - shown) + " more";
  };
  more.addEventListener("click", draw);
  draw();
}

function chart(context) {
  const box = element("figure", { class: "chart", style: "margin:0" });
  box.append(element("h3", {}, breakable(context.path)));
  box.append(element("p", {}, "pid " + context.pid + ", " + context.backend_type + "; ", badge(context.verdict),
    "; " + bytes(context.used_bytes) + ", " + signed(context.growth_bytes)));
  const points = context.series, width = 300, height = 110, left = 4, bottom = 90;
  const most = Math.max(context.baseline_bytes, ...points.map(p => p[1])) * 1.08 || 1;
  const from = points[0][0], to = points[points.length - 1][0];
  const x = t => left + (width - 2 * left) * (to > from ? (t - from) / (to - from) : 0.5);
  const y = b => bottom - (bottom - 14) * b / most;
  const svg = drawn("svg", { viewBox: "0 0 " + width + " " + height, role: "img",
    "aria-label": context.path + ": used bytes from " + bytes(points[0][1]) + " to " + bytes(points[points.length - 1][1]) });
  svg.append(drawn("line", { class: "base", x1: left, x2: width - left, y1: y(context.baseline_bytes), y2: y(context.baseline_bytes) }));
  svg.append(drawn("polyline", { points: points.map(p => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" ") }));
  svg.append(drawn("text", { x: left, y: 10 }, bytes(most / 1.08)));
  svg.append(drawn("text", { x: left, y: 106 }, seconds(-from) + " ago"), drawn("text", { x: width - left, y: 106, "text-anchor": "end" }, seconds(-to) + " ago"));
  box.append(svg);
  return box;
}

function startCharts() {
  const drawable = data.contexts.filter(c => c.series.length > 1 && c.series[0][0] < c.series[c.series.length - 1][0]), step = 12;
  let shown = Math.min(step, drawable.length);
  const draw = () => {
    byId("charts").replaceChildren(...drawable.slice(0, shown).map(chart));
    byId("growth-note").textContent = drawable.length
      ? "Used bytes at the latest walks of each process; dashed: its baseline. What grew most comes first: " + shown + " of " + drawable.length + " paths."
      : "No process has walked its contexts twice yet (rheap.walk_interval).";
    byId("more-charts").hidden = shown === drawable.length;
    byId("more-charts").textContent = "Show " + Math.min(4 * step, drawable.length - shown) + " more";
  };
  byId("more-charts").addEventListener("click", () => { shown = Math.min(shown + 4 * step, drawable.length); draw(); });
  draw();
}

function startSites() {
  const about = (site, text) => (site.exact ? "" : "~") + text;
  const order = { steady: 0, cache: 1, suspect: 2, leak: 3 };
  const stack = site => stackDetails(site.function, site, element("p", { class: "note" }, site.reason));
  const columns = [
    { title: "Verdict", value: s => order[s.verdict], show: s => badge(s.verdict) },
    { title: "Function", value: s => s.function, show: stack, path: true },
    { title: "Live bytes", value: s => s.live_bytes, show: s => about(s, bytes(s.live_bytes)), number: true },
    { title: "Live", value: s => s.live_count, show: s => about(s, count(s.live_count)), number: true },
    { title: "Growth/s", value: s => s.growth_bytes_per_s, show: s => bytes(s.growth_bytes_per_s), number: true },
    { title: "Allocations", value: s => s.alloc_count, show: s => about(s, count(s.alloc_count)), number: true },
    { title: "Freed", value: s => s.free_count, show: s => about(s, count(s.free_count)), number: true },
    { title: "Context", value: s => s.context, path: true },
    { title: "Backend type", value: s => s.backend_type },
    { title: "Location", value: s => s.location, show: s => element("code", {}, s.location), path: true },
  ];
  const step = 200;
  const made = table("site-table", columns, data.call_sites, {
    sort: 2,
    limit: step,
    filter: site => {
      const words = byId("filter").value.toLowerCase(), verdict = byId("verdict").value;
      const text = [site.function, site.context, site.backend_type, site.location].join(" ").toLowerCase();
      return (!verdict || site.verdict === verdict) && words.split(/\s+/).every(word => text.includes(word));
    },
    drawn: (found, shown) => {
      byId("site-count").textContent = count(shown) + " of " + count(found) + " call sites" + (found < data.call_sites.length ? " that match, of " + count(data.call_sites.length) : "");
      byId("more-sites").hidden = shown === found;
      byId("more-sites").textContent = "Show " + Math.min(5 * step, found - shown) + " more";
    },
  });
  byId("filter").addEventListener("input", made.draw);
  byId("verdict").addEventListener("change", made.draw);
  byId("more-sites").addEventListener("click", () => { made.settings.limit += 5 * step; made.draw(); });
  made.draw();
}

function startProcesses() {
  const size = key => ({ value: p => p[key], show: p => p[key] === null ? "?" : bytes(p[key]), number: true });
  const number = key => ({ value: p => p[key], show: p => count(p[key]), number: true });
  const step = 100, more = byId("more-processes");
  const made = table("process-table", [
    { title: "Pid", value: p => p.pid, show: p => String(p.pid), number: true },
    { title: "Backend type", value: p => p.backend_type },
    { title: "Mode", value: p => p.mode },
    { title: "rheap's own", ...size("own_bytes") },
    { title: "Contexts", ...size("context_bytes") },
    { title: "Outside", ...size("unattributed_bytes") },
    { title: "Resident", ...size("rss_bytes") },
    { title: "Allocations", ...number("allocations") },
    { title: "Stacks taken", ...number("captures") },
    { title: "Given up", ...number("dropped") },
    { title: "Walks", ...number("walks") },
  ], data.processes, {
    sort: 3,
    limit: step,
    drawn: (found, shown) => {
      byId("process-count").textContent = count(shown) + " of " + count(found) + " processes" + (shown < found ? "; and " + count(found - shown) + " more" : "");
      more.hidden = shown === found;
      more.textContent = "Show " + Math.min(5 * step, found - shown) + " more";
    },
  });
  more.addEventListener("click", () => { made.settings.limit += 5 * step; made.draw(); });
  made.draw();
}

startHead();
startLeaks();
startCharts();
startFlame();
startSites();
startProcesses();

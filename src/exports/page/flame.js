// The flame graph: root at the top, drawn for the frame that is zoomed to.
// As SQL's round does, and the other exports.
const rounded = number => number % 2 === 0.5 ? Math.floor(number) : Math.round(number);
const metrics = {
  "live bytes": s => s.live_bytes,
  "live allocations": s => s.live_count,
  "bytes allocated": s => s.alloc_bytes,
  "allocations": s => s.alloc_count,
  "allocations freed again": s => s.free_count,
  "growth in bytes per second": s => rounded(Math.max(0, s.growth_bytes_per_s)),
};
const ROW = 20;
const graph = byId("graph");
let flameRoot, zoomed, current, searched = "";

function flameTree(value) {
  const root = { name: "all", value: 0, children: new Map(), parent: null, depth: 0, start: 0 };
  for (const site of data.call_sites) {
    const amount = value(site);
    if (!amount) continue;
    let node = root;
    node.value += amount;
    const names = [site.backend_type];
    for (let i = site.stack.length - 1; i >= 0; i--) names.push(data.frames[site.stack[i]]);
    for (const step of names) {
      const name = typeof step === "string" ? step : frameName(step);
      let next = node.children.get(name);
      if (!next) {
        const place = typeof step === "string" ? "" : step.location;
        next = { name, place, inlined: step.inlined, value: 0, children: new Map(), parent: node, depth: node.depth + 1 };
        node.children.set(name, next);
      }
      next.value += amount;
      node = next;
    }
  }
  // Places on a scale of the metric's own numbers; no recursion, stacks may be deep.
  const todo = [root];
  while (todo.length) {
    const node = todo.pop();
    let start = node.start;
    node.sorted = [...node.children.values()].sort((a, b) => b.value - a.value);
    for (const child of node.sorted) { child.start = start; start += child.value; todo.push(child); }
  }
  return root;
}

const shownValue = number => byId("metric").value.includes("bytes") ? bytes(number) : count(number);
const describeNode = node => node.name + (node.place && !node.place.includes("+0x") ? " at " + node.place : "") + (node.inlined ? " (inlined)" : "") +
  ": " + shownValue(node.value) + ", " + (100 * node.value / flameRoot.value).toFixed(2) + " %";

function hue(name) {
  let sum = 0;
  for (const c of name) sum = (sum * 31 + c.codePointAt(0)) % 9973;
  return "hsl(" + (18 + sum % 38) + " " + (72 + sum % 20) + "% " + (62 + sum % 13) + "%)";
}

function drawFlame() {
  graph.replaceChildren();
  if (!flameRoot.value) {
    graph.style.height = "2rem";
    graph.append(element("p", { class: "note" }, "Nothing is recorded that has a value here."));
    return;
  }
  const width = graph.clientWidth, scale = width / zoomed.value, found = searched.toLowerCase();
  let deepest = 0, narrow = 0, matched = 0;
  const add = (node, left, size, faded) => {
    deepest = Math.max(deepest, node.depth);
    const box = element("div", { class: "frame" + (faded ? " faded" : "") });
    // In parts of the whole, so that paper, which is narrower, shows all of it.
    box.style.cssText = "left:" + 100 * left / width + "%;top:" + node.depth * ROW + "px;width:" + 100 * size / width + "%;background:" + hue(node.name);
    if (size > 28) box.textContent = node.name; else box.style.padding = "0";
    if (found && node.name.toLowerCase().includes(found)) box.classList.add("found");
    if (node === current) box.classList.add("current");
    box.title = describeNode(node);
    box.node = node;
    graph.append(box);
  };
  for (let node = zoomed.parent; node; node = node.parent) add(node, 0, width, true);
  const todo = [[zoomed, false]];
  while (todo.length) {
    const [node, within] = todo.pop();
    const hit = Boolean(found) && node.name.toLowerCase().includes(found);
    if (hit && !within) matched += node.value;
    const size = node.value * scale;
    // Narrower than half a pixel: not drawn, but counted, and still searched.
    if (size >= 0.5) add(node, (node.start - zoomed.start) * scale, size, false); else narrow += 1;
    for (const child of node.sorted) todo.push([child, within || hit]);
  }
  graph.style.height = (deepest + 1) * ROW + "px";
  byId("zoom-out").disabled = zoomed === flameRoot;
  const notes = [describeNode(current || zoomed)];
  if (found) notes.push("found in " + (100 * matched / zoomed.value).toFixed(2) + " %");
  if (narrow) notes.push(count(narrow) + " frames are too narrow to be drawn; zoom to see them");
  byId("flame-status").textContent = notes.join("; ");
}

function zoomTo(node) { zoomed = current = node; drawFlame(); }

function startFlame() {
  byId("metric").append(...Object.keys(metrics).map(name => element("option", {}, name)));
  const rebuild = () => { flameRoot = flameTree(metrics[byId("metric").value]); zoomTo(flameRoot); };
  byId("metric").addEventListener("change", rebuild);
  byId("flame-search").addEventListener("input", event => { searched = event.target.value; drawFlame(); });
  byId("zoom-out").addEventListener("click", () => zoomTo(flameRoot));
  graph.addEventListener("click", event => { if (event.target.node) zoomTo(event.target.node); });
  graph.addEventListener("mouseover", event => { if (event.target.node) byId("flame-status").textContent = describeNode(event.target.node); });
  graph.addEventListener("keydown", event => {
    const among = current.parent ? current.parent.sorted : [current];
    const next = {
      ArrowUp: current.parent, ArrowDown: current.sorted[0],
      ArrowLeft: among[among.indexOf(current) - 1], ArrowRight: among[among.indexOf(current) + 1],
    };
    if (event.key === "Enter" || event.key === " ") zoomTo(current);
    else if (event.key === "Escape") zoomTo(flameRoot);
    else if (event.key in next) { if (next[event.key]) { current = next[event.key]; drawFlame(); } }
    else return;
    event.preventDefault();
  });
  new ResizeObserver(() => { if (graph.clientWidth !== startFlame.width) { startFlame.width = graph.clientWidth; drawFlame(); } }).observe(graph);
  rebuild();
}

"use strict";
// What all sections use. Text goes into the page as text only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function bytes(number) {
  const size = Math.abs(number), sign = number < 0 ? "-" : "";
  if (size < 1024) return sign + Math.round(size) + " B";
  let value = size / 1024, unit = 0;
  const units = ["kB", "MB", "GB", "TB", "PB"];
  while (value >= 999.5 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return sign + value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0) + " " + units[unit];
}

const count = number => number === null ? "?" : Number(number).toLocaleString("en");
const signed = number => (number > 0 ? "+" : "") + bytes(number);
const seconds = milliseconds => {
  const s = Math.round(milliseconds / 1000);
  return s < 120 ? s + " s" : s < 7200 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h";
};
const frameName = frame => frame.function || frame.address;
const badge = verdict => element("span", { class: "badge " + verdict + "-word" }, verdict);

// A path may break after a slash.
const breakable = path => path.replaceAll("/", "/\u200b");

// Ten thousand stacks are not drawn before somebody wants to see them.
function stackDetails(title, site, ...first) {
  const details = element("details", {}, element("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.children.length === 1) details.append(...first, stackList(site.stack.map(index => data.frames[index]), site.culprit));
  });
  return details;
}

function stackList(frames, culprit) {
  const list = element("ol", { class: "stack" });
  frames.forEach((frame, index) => {
    const item = element("li", index === culprit ? { class: "culprit" } : {});
    item.append(frame.function ? frame.function + " at " + frame.location : frame.address);
    if (frame.inlined) item.append(" ", element("em", {}, "inlined"));
    list.append(item);
  });
  return list;
}

// A table whose columns are {title, value, show, number}. Returns a function that sorts and draws anew.
function table(target, columns, rows, options) {
  const settings = Object.assign({ sort: null, descending: true, limit: 200, details: null }, options);
  const head = element("tr");
  const body = element("tbody");
  columns.forEach((column, index) => {
    const button = element("button", { type: "button" }, column.title);
    const cell = element("th", { scope: "col", "aria-sort": "none", class: column.number ? "number" : "" }, button);
    button.addEventListener("click", () => {
      settings.descending = settings.sort === index ? !settings.descending : Boolean(column.number);
      settings.sort = index;
      draw();
    });
    head.append(cell);
  });
  byId(target).replaceChildren(element("thead", {}, head), body);

  function draw() {
    let shown = rows.filter(settings.filter || (() => true));
    if (settings.sort !== null) {
      const value = columns[settings.sort].value, way = settings.descending ? -1 : 1;
      const compare = (a, b) => a === b ? 0 : a === null ? -1 : b === null ? 1 : a < b ? -1 : 1;
      shown = shown.slice().sort((a, b) => way * compare(value(a), value(b)));
    }
    [...head.children].forEach((cell, index) =>
      cell.setAttribute("aria-sort", index !== settings.sort ? "none" : settings.descending ? "descending" : "ascending"));
    body.replaceChildren(...shown.slice(0, settings.limit).map(row => {
      const line = element("tr");
      for (const column of columns) {
        const text = column.show ? column.show(row) : column.value(row);
        line.append(element("td", { class: (column.number ? "number " : "") + (column.path ? "path" : "") }, text === null ? "?" : text));
      }
      return line;
    }));
    if (settings.drawn) settings.drawn(shown.length, Math.min(shown.length, settings.limit));
  }
  return { draw, settings };
}

// Line charts as SVG that are drawn again as a run goes on. Colours are classes of the style sheet.

import { make } from "./common.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, FLOOR] = [460, 220, 52, 450, 10, 192];
const OUTLIERS = 0.01;  // share of a faint line's points at either end that may leave the frame
const NS = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, most = 5) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(each => each * power).find(each => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}

const figure = value => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e6 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
};

function range(lines, always) {
  const values = always.concat(lines.flatMap(line => {
    const sorted = line.points.map(point => point[1]).sort((a, b) => a - b);
    const cut = line.faint ? Math.floor(sorted.length * OUTLIERS) : 0;
    return sorted.length ? [sorted[cut], sorted[sorted.length - 1 - cut]] : [];
  }));
  const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [low - room, high + room];
}

// A figure with title and unit; `show(lines)` draws lines of {label, name, points, faint} in it, and hides it without.
// always: values that the frame shows whatever is drawn. where, tick: a point in words, behind its figures and at the axis.
export function chart(title, { log = false, always = [], where = step => ` at step ${step}`, tick: named = String } = {}) {
  const reading = make("p", { className: "note" });
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
  const made = make("figure", { hidden: true }, make("figcaption", {}, title), reading, svg);
  let lines = [], place = null, cursor = null, steps = [], at = null;

  const seen = value => (log ? Math.log10(value) : value);

  function show(given) {
    lines = given.map(line => ({ ...line, points: line.points.filter(point => !log || point[1] > 0) })).filter(line => line.points.length);
    made.hidden = !lines.length;
    if (!lines.length) {
      svg.replaceChildren();
      svg.setAttribute("aria-label", `${title}: nothing yet`);
      reading.textContent = "nothing yet";
      return;
    }
    steps = [...new Set(lines.flatMap(line => line.points.map(point => point[0])))].sort((a, b) => a - b);
    const [low, high] = range(lines.map(line => ({ ...line, points: line.points.map(([x, y]) => [x, seen(y)]) })), always);
    const first = steps[0], last = Math.max(steps.at(-1), first + 1);
    const x = step => LEFT + (RIGHT - LEFT) * (step - first) / (last - first);
    const y = value => FLOOR - (FLOOR - TOP) * (Math.min(high, Math.max(low, seen(value))) - low) / (high - low);
    place = { x, y };
    const parts = [];
    for (const tick of ticks(low, high)) {
      const value = log ? 10 ** tick : tick, height = y(value);
      parts.push(shape("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: height, y2: height }));
      parts.push(shape("text", { class: "tick", x: LEFT - 6, y: height + 4, "text-anchor": "end" }, figure(value)));
    }
    for (const step of ticks(first, last).filter(Number.isInteger)) {
      parts.push(shape("text", { class: "tick", x: x(step), y: FLOOR + 18, "text-anchor": "middle" }, named(step)));
    }
    for (const line of [...lines].sort((a, b) => (b.faint ? 1 : 0) - (a.faint ? 1 : 0))) {
      const path = line.points.map(([step, value], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
      parts.push(shape("path", { class: `${line.name}${line.faint ? " faint" : ""}`, d: path }));
      if (line.points.length === 1) parts.push(shape("circle", { class: line.name, cx: x(line.points[0][0]), cy: y(line.points[0][1]), r: 3 }));
    }
    cursor = shape("g", {});
    svg.replaceChildren(...parts, cursor);
    read(at);
  }

  // The figures at a step, or the last ones.
  function read(step) {
    at = step;
    const named = lines.filter(line => !line.faint);
    const found = named.map(line => [line, line.points.findLast(point => step === null || point[0] <= step)]).filter(pair => pair[1]);
    reading.textContent = found.map(([line, [, value]]) => (named.length > 1 ? `${line.label} ` : "") + figure(value)).join(" · ")
      + (step === null ? "" : where(step));
    svg.setAttribute("aria-label", `${title}: ${reading.textContent}`);
    cursor.replaceChildren();
    if (step === null) return;
    cursor.append(shape("line", { class: "axis", x1: place.x(step), x2: place.x(step), y1: TOP, y2: FLOOR }));
    for (const [line, [x, y]] of found) cursor.append(shape("circle", { class: line.name, cx: place.x(x), cy: place.y(y), r: 3 }));
  }

  svg.addEventListener("pointermove", event => {
    if (!lines.length) return;
    const box = svg.getBoundingClientRect(), wanted = (event.clientX - box.left) / box.width * WIDTH;
    read(steps.reduce((best, step) => (Math.abs(place.x(step) - wanted) < Math.abs(place.x(best) - wanted) ? step : best), steps[0]));
  });
  svg.addEventListener("pointerleave", () => read(null));
  svg.addEventListener("blur", () => read(null));
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !lines.length) return;
    event.preventDefault();
    const index = at === null ? steps.length : steps.indexOf(at) + by;
    read(steps[Math.max(0, Math.min(steps.length - 1, index))]);
  });
  return { made, show };
}

"use strict";

// Curves over time: lines are the model's, dots on them mark scans, diamonds are what was drawn on a scan.

const AXIS_NAMES = ["to the left", "to posterior", "to the head"];
const AXIS_COLOURS = ["#62b8ff", "#a5e065", "#ff6b6b"];
const SVG = "http://www.w3.org/2000/svg";

function svgElement(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// About `count` round numbers from low to high.
function roundNumbers(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const spacing = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= rough);
  const numbers = [];
  for (let k = Math.ceil(low / spacing - 1e-9); k * spacing <= high + 1e-9 * spacing; k++) numbers.push(+(k * spacing).toPrecision(12));
  return numbers;
}

// Lines over time: [{ colour, name, line: [[t, value], ...], dots: [...], drawn: [...] }].
function drawGraph(svg, curves) {
  const { width, height } = svg.getBoundingClientRect();
  svg.replaceChildren();
  if (width < 40 || height < 40) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const values = curves.flatMap((curve) => [...curve.line, ...curve.drawn].map(([, value]) => value));
  let low = Math.min(...values), high = Math.max(...values);
  if (!Number.isFinite(low)) return;
  const margin = Math.max((high - low) * 0.08, Math.abs(high) * 1e-3, 1e-3);
  low -= margin;
  high += margin;
  const box = { left: 44, right: width - 12, top: 10, bottom: height - 24 };
  const X = (t) => box.left + ((t - FIRST) / (END - FIRST)) * (box.right - box.left);
  const Y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  for (const value of roundNumbers(low, high, Math.max(2, (box.bottom - box.top) / 45))) {
    svg.append(svgElement("line", { class: "rule", x1: box.left, x2: box.right, y1: Y(value), y2: Y(value) }));
    const text = String(value).replace("-", "−");
    svg.append(svgElement("text", { x: box.left - 6, y: Y(value) + 4, "text-anchor": "end" }, text));
  }
  svg.append(svgElement("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  for (const t of roundNumbers(FIRST, END, Math.max(2, (box.right - box.left) / 60))) {
    svg.append(svgElement("line", { class: "axis", x1: X(t), x2: X(t), y1: box.bottom, y2: box.bottom + 4 }));
    svg.append(svgElement("text", { x: X(t), y: box.bottom + 17, "text-anchor": "middle" }, timeText(t)));
  }
  svg.append(svgElement("line", { class: "present", y1: box.top, y2: box.bottom }));
  for (const curve of curves) {
    const points = curve.line.map(([t, value]) => `${X(t).toFixed(1)},${Y(value).toFixed(1)}`).join(" ");
    const line = svgElement("polyline", { class: "curve", points, stroke: curve.colour });
    line.append(svgElement("title", {}, curve.name));
    svg.append(line);
    for (const [t, value] of curve.dots) svg.append(svgElement("circle", { cx: X(t), cy: Y(value), r: 3, fill: curve.colour }));
    for (const [t, value] of curve.drawn) {
      const x = X(t), y = Y(value), d = `M${x - 5} ${y}L${x} ${y - 5}L${x + 5} ${y}L${x} ${y + 5}Z`;
      svg.append(svgElement("path", { d, fill: "none", stroke: curve.colour, "stroke-width": 1.4 }));
    }
  }
  svg.graph = { X, left: box.left, right: box.right };
}

function showPresent() {
  for (const svg of document.querySelectorAll("svg")) {
    const line = svg.querySelector(".present");
    if (!line) continue;
    line.setAttribute("x1", svg.graph.X(state.t));
    line.setAttribute("x2", svg.graph.X(state.t));
  }
}

function clickGraph(svg) {
  svg.addEventListener("click", (event) => {
    if (!svg.graph) return;
    const { left, right } = svg.graph, x = event.clientX - svg.getBoundingClientRect().left;
    goTo(FIRST + ((x - left) / (right - left)) * (END - FIRST));
  });
}

const measuredTimes = new Set(page.scans.map((scan) => scan.time));

// A column of what is known of the structures that are shown.
function structureCurves(key) {
  const column = page.curves.findIndex(([name]) => name === key);
  return [...state.shown].sort((a, b) => a - b).map((k) => {
    const { name, colour, curves, drawn } = structures[k];
    const line = curves.map((row, i) => [page.curve_times[i], row[column]]).filter(([, value]) => value !== null);
    if (PERIOD !== null && line.length && line[0][0] === FIRST) line.push([END, line[0][1]]);
    const flat = drawn[key] ?? [], pairs = [];
    for (let i = 0; i < flat.length; i += 2) pairs.push([flat[i], flat[i + 1]]);
    return { name, colour, line, dots: line.filter(([t]) => measuredTimes.has(t)), drawn: pairs };
  });
}

// What is at the cross-hair now, and how far it was from there at the reference time: over all times.
function crossCurves() {
  const u = displacementsAt(state.cross).map(worldVector);
  return AXIS_NAMES.map((name, c) => {
    const line = STOPS.map((t, i) => [t, -u[i % u.length][c]]);
    return { name, colour: AXIS_COLOURS[c], line, dots: line.filter(([t]) => measuredTimes.has(t)), drawn: [] };
  });
}

function legendOf(curves) {
  return curves.map(({ name, colour }) => {
    const dash = element("i");
    dash.style.background = colour;
    return element("span", {}, dash, name);
  });
}

function drawGraphs() {
  const key = byId("curve").value;
  drawGraph(byId("graph"), key === "cross" ? crossCurves() : structureCurves(key));
  for (const svg of byId("small-graphs").querySelectorAll("svg")) drawGraph(svg, structureCurves(svg.dataset.key));
  byId("curves-legend").replaceChildren(...legendOf(structureCurves(page.curves[0][0])));
  byId("graph-legend").replaceChildren(...(key === "cross" ? legendOf(crossCurves()) : []));
  showPresent();
}

"use strict";

// The page: what is shown, how it is drawn, and what can be done to it. Names that were given from outside are only
// ever set as text.

const PLANE_COLOURS = ["#e0c04c", "#5cc98b", "#e06c75"]; // of planes across x, y and z
const COLOURS = ["#ff9646", "#3fd6bf", "#c594ff", "#ff6b9a", "#ffd84d", "#62b8ff", "#a5e065", "#ffab9e"];
const MESH_MM = 10, ARROW_PX = 20, CYCLE_SECONDS = 4;

const state = {
  t: page.reference_time,
  cross: page.start.slice(),
  compare: "nothing",
  deformation: "nothing",
  shown: new Set(page.structures.keys()),
  level: (page.window.low + page.window.high) / 2,
  width: page.window.high - page.window.low,
  playing: false,
};

const structures = page.structures.map((structure, k) => ({ ...structure, colour: COLOURS[k % COLOURS.length] }));
const panes = {};

function byId(id) { return document.getElementById(id); }

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// -- what depends on the state

function goTo(t) {
  const span = END - FIRST;
  const near = page.scans.find((scan) => Math.abs(scan.time - t) < 0.006 * span);
  state.t = near ? near.time : clampTime(t);
  show();
}

function step(direction, times) {
  const small = 1e-6 * (END - FIRST);
  const next = direction > 0 ? times.find((t) => t > state.t + small) : times.findLast((t) => t < state.t - small);
  state.t = next ?? (PERIOD === null ? state.t : direction > 0 ? times[0] : times.at(-1));
  show();
}

let waiting = false;

function show() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(async () => {
    waiting = false;
    // While a scan is unpacked, time goes on, and another may be asked for.
    for (let scan = compared(); scan && !images.has(scan.image); scan = compared()) await image(scan.image);
    draw();
  });
}

// The scan on the left of the wipe.
function compared() {
  if (state.compare === "nothing") return null;
  return state.compare === "reference" ? page.scans.find((scan) => scan.kind === "reference") : nearestScan(state.t);
}

function draw() {
  moveLattice(state.t);
  const scan = compared();
  for (const pane of Object.values(panes)) {
    const { plane, moved, values } = pane;
    pullBack(plane, state.cross[plane.through], moved);
    readAt(images.get(0), moved, values);
    paint(pane.model, values, plane);
    pane.scan.hidden = pane.wipe.hidden = pane.tagScan.hidden = pane.tagModel.hidden = !scan;
    if (scan) {
      readSlice(images.get(scan.image), plane, state.cross[plane.through], values);
      paint(pane.scan, values, plane);
      pane.tagScan.textContent = `scan, t = ${timeText(scan.time)}`;
      pane.tagModel.textContent = `model, t = ${timeText(state.t)}`;
    }
    drawOverlay(pane);
    pane.slider.value = state.cross[plane.through];
    pane.position.textContent = `${signed(worldOf(state.cross)[plane.through])} mm`;
  }
  showTime();
  showReadout(scan);
  showPresent();
}

function paint(canvas, values, plane) {
  const context = canvas.getContext("2d"), picture = plane.picture;
  const toBytes = 255 / (page.window.high - page.window.low);
  const black = (state.level - state.width / 2 - page.window.low) * toBytes;
  const gain = 255 / (state.width * toBytes);
  for (let i = 0, n = 0; i < values.length; i++, n += 4) {
    const grey = (values[i] - black) * gain + 0.5;
    picture.data[n] = picture.data[n + 1] = picture.data[n + 2] = grey < 0 ? 0 : grey > 255 ? 255 : grey | 0;
    picture.data[n + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function showTime() {
  const measured = isMeasured(state.t), slider = byId("time");
  slider.value = state.t;
  const kind = measured
    ? { reference: "the reference scan", seen: "a scan of the fit", unseen: "a scan the fit never saw" }[measured.kind]
    : "predicted, between scans";
  byId("now").textContent = `t = ${timeText(state.t)}`;
  byId("now-kind").textContent = kind;
  slider.setAttribute("aria-valuetext", `${timeText(state.t)}, ${kind}`);
  for (const tick of byId("ticks").children) {
    if (measured && tick.dataset.time === String(measured.time)) tick.setAttribute("aria-current", "true");
    else tick.removeAttribute("aria-current");
  }
  const scan = compared();
  byId("compare-hint").textContent = !scan ? "" : apart(scan.time, state.t) < 1e-9 * (END - FIRST)
    ? "Left of the line the scan, right of it the model."
    : `Left of the line the scan of t = ${timeText(scan.time)}; the model shows t = ${timeText(state.t)}.`;
}

function signed(value) { return value.toFixed(1).replace("-", "−"); }

function intensity(byte) {
  const value = page.window.low + (byte / 255) * (page.window.high - page.window.low);
  const span = page.window.high - page.window.low;
  return (span > 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "−");
}

function showReadout(scan) {
  const p = state.cross, moved = new Float32Array(3), value = new Float32Array(1);
  const u = [0, 0, 0];
  for (const [at, weight] of corners(p)) for (let c = 0; c < 3; c++) u[c] += weight * lattice.now[at + c];
  for (let c = 0; c < 3; c++) moved[c] = p[c] + u[c];
  readAt(images.get(0), moved, value);
  byId("at-position").textContent = worldOf(p).map(signed).join(", ");
  byId("at-model").textContent = intensity(value[0]);
  byId("at-scan-row").hidden = !scan;
  if (scan) {
    byId("at-scan-name").textContent = `Scan, t = ${timeText(scan.time)}`;
    byId("at-scan").textContent = intensity(images.get(scan.image)[p[0] + SIZE[0] * (p[1] + SIZE[1] * p[2])]);
  }
  byId("at-motion").textContent = `${Math.hypot(...u.map((v, c) => v * SPACING[c])).toFixed(1)} mm`;
}

// -- overlays

function drawOverlay(pane) {
  const { plane, moved, overlay } = pane;
  const context = overlay.getContext("2d");
  const kx = overlay.width / plane.width, ky = overlay.height / plane.height, dot = pane.dot;
  // Pixel centres are at whole numbers.
  const X = (x) => (x + 0.5) * kx, Y = (y) => (y + 0.5) * ky;
  const line = (x0, y0, x1, y1) => {
    context.moveTo(X(x0), Y(y0));
    context.lineTo(X(x1), Y(y1));
  };
  context.clearRect(0, 0, overlay.width, overlay.height);
  context.lineCap = context.lineJoin = "round";
  if (state.deformation === "mesh") {
    context.strokeStyle = "#7fd4ffa0";
    context.lineWidth = dot;
    context.beginPath();
    const field = new Float32Array(plane.width * plane.height);
    for (const axis of [plane.across, plane.down]) {
      for (let i = 0; i < field.length; i++) field[i] = moved[3 * i + axis];
      const spacing = MESH_MM / SPACING[axis], first = ((SIZE[axis] - 1) / 2) % spacing;
      isolines(field, plane.width, plane.height, first, spacing, line);
    }
    context.stroke();
  } else if (state.deformation === "arrows") {
    drawArrows(pane, context, X, Y);
  }
  for (const [k, field] of carried(plane, moved, state.shown)) {
    context.beginPath();
    isolines(field, plane.width, plane.height, 0.5, Infinity, line);
    context.strokeStyle = "#000a";
    context.lineWidth = 3 * dot;
    context.stroke();
    context.strokeStyle = structures[k].colour;
    context.lineWidth = 1.6 * dot;
    context.stroke();
  }
  drawCross(pane, context, X, Y);
}

// From where tissue was at the reference time to where it is now, to scale, within the slice.
function drawArrows(pane, context, X, Y) {
  const { plane, moved, dot } = pane;
  const every = Math.max(1, Math.round((ARROW_PX * dot) / (pane.overlay.width / plane.width)));
  const everyDown = Math.max(1, Math.round((ARROW_PX * dot) / (pane.overlay.height / plane.height)));
  context.beginPath();
  for (let j = everyDown >> 1; j < plane.height; j += everyDown) {
    for (let i = every >> 1; i < plane.width; i += every) {
      const n = 3 * (j * plane.width + i), v = moved[n + plane.down];
      const x1 = X(i), y1 = Y(j), x0 = X(moved[n + plane.across]), y0 = Y(plane.upwards ? plane.height - 1 - v : v);
      const long = Math.hypot(x1 - x0, y1 - y0);
      if (long < 1.5 * dot) continue;
      const head = Math.min(long * 0.6, 5 * dot), ux = (x1 - x0) / long, uy = (y1 - y0) / long;
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
      context.moveTo(x1 - head * (ux - 0.5 * uy), y1 - head * (uy + 0.5 * ux));
      context.lineTo(x1, y1);
      context.lineTo(x1 - head * (ux + 0.5 * uy), y1 - head * (uy - 0.5 * ux));
    }
  }
  context.strokeStyle = "#000a";
  context.lineWidth = 3 * dot;
  context.stroke();
  context.strokeStyle = "#ffd84d";
  context.lineWidth = 1.3 * dot;
  context.stroke();
}

function drawCross(pane, context, X, Y) {
  const { plane, overlay, dot } = pane;
  const [i, j] = pixelOf(plane), x = X(i), y = Y(j), gap = 9 * dot;
  context.lineWidth = dot;
  const stroke = (axis, ...lines) => {
    context.strokeStyle = PLANE_COLOURS[axis] + "b0";
    context.beginPath();
    for (const [x0, y0, x1, y1] of lines) {
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
    }
    context.stroke();
  };
  stroke(plane.across, [x, 0, x, y - gap], [x, y + gap, x, overlay.height]);
  stroke(plane.down, [0, y, x - gap, y], [x + gap, y, overlay.width, y]);
}

function pixelOf(plane) {
  const v = state.cross[plane.down];
  return [state.cross[plane.across], plane.upwards ? plane.height - 1 - v : v];
}

// -- layout

function layOut() {
  const desk = byId("desk"), narrow = matchMedia("(max-width: 860px)").matches;
  const mm = (axis) => SIZE[axis] * SPACING[axis];
  const wide = desk.clientWidth - (narrow ? 0 : 262);
  // One scale for all slices: two beside each other, two above each other, and below them the time line.
  const above = desk.getBoundingClientRect().top + scrollY, captions = 24;
  const tall = Math.max(innerHeight - above - 94, 380) - 2 * captions - 6;
  const scale = Math.min((wide - 6) / (mm(0) + mm(1)), tall / (mm(1) + mm(2)));
  for (const pane of Object.values(panes)) {
    const { plane, stage, overlay } = pane;
    const own = narrow ? Math.min(wide / mm(plane.across), (0.8 * innerHeight) / mm(plane.down)) : scale;
    const width = Math.round(own * mm(plane.across)), height = Math.round(own * mm(plane.down));
    stage.parentElement.style.width = `${width}px`;  // the caption's too: it makes no column wider
    stage.style.height = `${height}px`;
    pane.dot = devicePixelRatio || 1;
    overlay.width = Math.round(width * pane.dot);
    overlay.height = Math.round(height * pane.dot);
    pane.ruler.style.width = `${(50 * width) / mm(plane.across)}px`;
  }
  const graph = document.querySelector(".graph");
  graph.style.width = narrow ? "" : `${Math.round(scale * mm(1))}px`;
  graph.style.height = narrow ? "" : `${Math.round(scale * mm(1)) + captions}px`;
  drawGraphs();
  show();
}

// -- controls

function makePanes() {
  for (const [name, plane] of Object.entries(PLANES)) {
    const figure = document.querySelector(`[data-plane=${name}]`), find = (what) => figure.querySelector(what);
    const { width, height } = plane;
    plane.picture = new ImageData(width, height);
    const pane = {
      plane, stage: find(".stage"), model: find(".model"), scan: find(".scan"), overlay: find(".overlay"),
      wipe: find(".wipe"), tagScan: find(".tag-scan"), tagModel: find(".tag-model"), ruler: find(".ruler i"),
      slider: find(".slice"), position: find("output"), dot: 1,
      moved: new Float32Array(3 * width * height), values: new Float32Array(width * height),
    };
    for (const canvas of [pane.model, pane.scan]) Object.assign(canvas, { width, height });
    find(".ruler b").textContent = "50 mm";
    ["at-left", "at-right", "at-top", "at-bottom"].forEach((at, i) => { find(`.${at}`).textContent = plane.sides[i]; });
    pane.slider.max = SIZE[plane.through] - 1;
    pane.slider.style.accentColor = PLANE_COLOURS[plane.through];
    pane.slider.addEventListener("input", () => {
      state.cross[plane.through] = +pane.slider.value;
      crossMoved();
    });
    panes[name] = pane;
    pointAt(pane);
  }
}

function crossMoved() {
  if (byId("curve").value === "cross") drawGraphs();
  show();
}

// Click or drag: the cross-hair, or the wipe by its handle. Wheel: other slices.
function pointAt(pane) {
  const { stage, plane, wipe } = pane;
  let dragged = null;
  const follow = (event) => {
    const box = stage.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    if (dragged === "wipe") return setWipe(100 * x);
    const within = (part, count) => Math.min(Math.max(Math.floor(part * count), 0), count - 1);
    const j = within(y, plane.height);
    state.cross[plane.across] = within(x, plane.width);
    state.cross[plane.down] = plane.upwards ? plane.height - 1 - j : j;
    return crossMoved();
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    dragged = event.target === wipe ? "wipe" : "cross";
    stage.setPointerCapture(event.pointerId);
    if (dragged === "cross") follow(event);
  });
  stage.addEventListener("pointermove", (event) => { if (dragged) follow(event); });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => { dragged = null; });
  stage.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.deltaY === 0) return;
    event.preventDefault();
    const k = state.cross[plane.through] - Math.sign(event.deltaY);
    state.cross[plane.through] = Math.min(Math.max(k, 0), SIZE[plane.through] - 1);
    crossMoved();
  }, { passive: false });
}

function setWipe(percent) {
  const value = Math.min(Math.max(percent, 0), 100);
  byId("panes").style.setProperty("--wipe", value);
  byId("wipe").value = value;
}

function makeTime() {
  const slider = byId("time"), ticks = byId("ticks"), span = END - FIRST;
  Object.assign(slider, { min: FIRST, max: END });
  slider.addEventListener("input", () => goTo(+slider.value));
  // Labels only where they don't run into each other.
  let labelled = -Infinity;
  for (const scan of page.scans) {
    const part = (scan.time - FIRST) / span, label = `${+scan.time.toPrecision(12)}`;
    const room = part - labelled > Math.max(0.03, 0.008 * label.length);
    if (room) labelled = part;
    const kind = { reference: "the reference", seen: "scan", unseen: "scan, never seen by the fit" }[scan.kind];
    const tick = element("button", {
      type: "button", className: scan.kind, tabIndex: -1, textContent: room ? label : "",
      title: `t = ${timeText(scan.time)}: ${kind}`,
    });
    tick.dataset.time = scan.time;
    tick.style.left = `${100 * part}%`;
    tick.setAttribute("aria-label", tick.title);
    tick.addEventListener("click", () => goTo(scan.time));
    ticks.append(tick);
  }
  byId("play").addEventListener("click", () => setPlaying(!state.playing));
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const own = event.target.closest?.("select, input:not(#time), summary, .scroll");
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      if (own) return;
      event.preventDefault();
      setPlaying(false);
      step(event.key === "ArrowRight" ? 1 : -1, event.shiftKey ? page.scans.map((scan) => scan.time) : STOPS);
    } else if (event.key === " " && !own && !event.target.closest?.("button")) {
      event.preventDefault();
      setPlaying(!state.playing);
    }
  });
}

function setPlaying(playing) {
  if (playing === state.playing) return;
  state.playing = playing;
  const button = byId("play");
  button.setAttribute("aria-pressed", playing);
  button.setAttribute("aria-label", playing ? "Stop" : "Play");
  if (!playing) return;
  let before = null;
  const frame = (now) => {
    if (!state.playing) return;
    if (before !== null) {
      const t = state.t + (Math.min(now - before, 200) / 1000 / CYCLE_SECONDS) * (END - FIRST);
      state.t = t > END ? FIRST + (t - END) % (END - FIRST) : t;
      show();
    }
    before = now;
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}

function makeChoices() {
  for (const name of ["compare", "deformation"]) {
    byId(name).addEventListener("change", (event) => {
      state[name] = event.target.value;
      show();
    });
  }
  const without = page.scans.every((scan) => scan.image === null);
  for (const input of byId("compare").querySelectorAll("input")) input.disabled = without && input.value !== "nothing";
  byId("wipe").addEventListener("input", (event) => setWipe(+event.target.value));
  byId("compare-hint").textContent = "";
}

function makeStructures() {
  byId("contour-box").hidden = !structures.length;
  structures.forEach(({ name, colour }, k) => {
    const box = element("input", { type: "checkbox", checked: true }), dash = element("i");
    dash.style.background = colour;
    box.addEventListener("change", () => {
      if (box.checked) state.shown.add(k);
      else state.shown.delete(k);
      structuresChanged();
    });
    byId("structures").append(element("label", { title: name }, box, dash, element("span", { textContent: name })));
  });
  byId("all-contours").addEventListener("click", () => {
    const all = state.shown.size === 0;
    state.shown = new Set(all ? structures.keys() : []);
    for (const box of byId("structures").querySelectorAll("input")) box.checked = all;
    structuresChanged();
  });
}

function structuresChanged() {
  byId("all-contours").textContent = state.shown.size ? "none" : "all";
  drawGraphs();
  show();
}

function makeWindow() {
  const { low, high, presets } = page.window, level = byId("level"), width = byId("width"), preset = byId("preset");
  const step = (high - low) / 250;
  Object.assign(level, { min: low, max: high, step });
  Object.assign(width, { min: step, max: high - low, step });
  const choices = { "all of the model's": [low, high], ...presets };
  for (const name of Object.keys(choices)) preset.append(element("option", { value: name, textContent: name }));
  byId("preset-row").hidden = Object.keys(choices).length < 2;
  const write = () => {
    Object.assign(level, { value: state.level });
    Object.assign(width, { value: state.width });
    const text = (value) => ((high - low) > 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "−");
    byId("level-text").textContent = text(state.level);
    byId("width-text").textContent = text(state.width);
    show();
  };
  preset.addEventListener("change", () => {
    const [from, to] = choices[preset.value];
    state.level = (from + to) / 2;
    state.width = to - from;
    write();
  });
  level.addEventListener("input", () => { state.level = +level.value; write(); });
  width.addEventListener("input", () => { state.width = +width.value; write(); });
  write();
}

function makeGraphs() {
  const choice = byId("curve");
  choice.append(element("option", { value: "cross", textContent: "Displacement at the cross-hair (mm)" }));
  if (structures.length) {
    for (const [key, title] of page.curves) choice.append(element("option", { value: key, textContent: title }));
    choice.value = page.curves[0][0];
    byId("curves").hidden = false;
  }
  choice.addEventListener("change", drawGraphs);
  document.querySelector(".graph").append(element("p", { className: "legend", id: "graph-legend" }));
  clickGraph(byId("graph"));
  for (const [key, title] of structures.length ? page.curves : []) {
    const svg = svgElement("svg", { role: "img", "aria-label": `${title} over time` });
    svg.dataset.key = key;
    clickGraph(svg);
    byId("small-graphs").append(element("figure", {}, element("figcaption", { textContent: title }), svg));
  }
}

async function main() {
  await unpackAll();
  makePanes();
  makeTime();
  makeChoices();
  makeStructures();
  makeGraphs();
  byId("loading").hidden = true;
  byId("desk").hidden = false;
  makeWindow();
  setWipe(50);
  layOut();
  addEventListener("resize", layOut);
}

main().catch((error) => {
  byId("loading").hidden = true;
  byId("problem").hidden = false;
  byId("problem").textContent = `The viewer can't start: ${error.message}`;
  console.error(error);
});

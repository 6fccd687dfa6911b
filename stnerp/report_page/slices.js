"use strict";

// What is in the page, and what it shows at time t and voxel p: the reference at p + u_t(p).
//
// The displacement u, target to reference, is a sum of shapes on a lattice whose weights change over time. Points are
// (x, y, z) in voxels of the page's grid, whose axes run to the patient's left (L), back (P) and head (S). Volumes are
// one byte a voxel, x fastest.

const page = JSON.parse(document.getElementById("page-data").textContent);
const SIZE = page.size, SPACING = page.spacing_mm;
const FIRST = page.frames[0], END = page.end, PERIOD = page.period;
// Where time stops: every frame, and of a cycle the beginning once more as its end.
const STOPS = PERIOD === null ? page.frames : [...page.frames, END];

// Each plane as it is seen in radiology: the patient's right on the left, front or head on top.
const PLANES = {
  axial: { across: 0, down: 1, through: 2, upwards: false, sides: ["R", "L", "A", "P"] },
  coronal: { across: 0, down: 2, through: 1, upwards: true, sides: ["R", "L", "S", "I"] },
  sagittal: { across: 1, down: 2, through: 0, upwards: true, sides: ["A", "P", "S", "I"] },
};
for (const plane of Object.values(PLANES)) Object.assign(plane, { width: SIZE[plane.across], height: SIZE[plane.down] });

const images = new Map(); // number -> bytes, once unpacked: 0 is the reference as the model has it, then the scans
const labels = []; // bytes, by source
let shapes = null; // of the displacement, 16-bit steps, (shape, z, y, x, 3)

// -- unpacking

async function unpacked(id) {
  const text = atob(document.getElementById(id).textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function image(number) {
  if (!images.has(number)) images.set(number, await unpacked(`image-${number}`));
  return images.get(number);
}

async function unpackAll() {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser can't unpack its images; use one of 2023 or newer");
  }
  shapes = new Int16Array((await unpacked("shapes")).buffer);
  await image(0);
  for (let k = 0; k < page.sources.length; k++) labels.push(await unpacked(`labels-${k}`));
}

// -- time

function clampTime(t) { return Math.min(Math.max(t, FIRST), END); }

function isMeasured(t) { return page.scans.find((scan) => apart(scan.time, t) < 1e-9 * (END - FIRST)); }

function apart(a, b) {
  const d = Math.abs(a - b);
  return PERIOD === null ? d : Math.min(d, PERIOD - d);
}

function nearestScan(t) {
  return page.scans.reduce((best, scan) => (apart(scan.time, t) < apart(best.time, t) ? scan : best));
}

// The two frames around a time, and how far it is from the first to the second.
function framesAround(t) {
  let k = STOPS.length - 2;
  while (k > 0 && STOPS[k] > t) k--;
  const part = (t - STOPS[k]) / (STOPS[k + 1] - STOPS[k]);
  return [k, (k + 1) % page.frames.length, Math.min(Math.max(part, 0), 1)];
}

// Of a scan every digit; between scans no finer than about a thousandth of the whole.
const TIME_STEP = 10 ** Math.floor(Math.log10((END - FIRST) / 300));
function timeText(t) {
  const shown = isMeasured(t) ? t : Math.round(t / TIME_STEP) * TIME_STEP;
  return `${+shown.toPrecision(12)}${page.unit ? " " + page.unit : ""}`;
}

// -- motion on the lattice

const lattice = {
  size: page.lattice,
  stride: [3, 3 * page.lattice[0], 3 * page.lattice[0] * page.lattice[1]],
  now: new Float32Array(3 * page.lattice[0] * page.lattice[1] * page.lattice[2]), // at the time shown, in voxels
  shownAt: null,
  // For each voxel along each axis: the lattice point before it, and how far it is to the next.
  lower: [0, 1, 2].map((axis) => Int32Array.from({ length: SIZE[axis] }, (_, i) => onLattice(axis, i)[0])),
  part: [0, 1, 2].map((axis) => Float32Array.from({ length: SIZE[axis] }, (_, i) => onLattice(axis, i)[1])),
};

function onLattice(axis, i) {
  const points = page.lattice[axis], place = SIZE[axis] > 1 ? (i * (points - 1)) / (SIZE[axis] - 1) : 0;
  const lower = Math.min(Math.floor(place), Math.max(points - 2, 0));
  return [lower, place - lower];
}

function moveLattice(t) {
  if (lattice.shownAt === t) return;
  const [a, b, part] = framesAround(t), n = lattice.now.length;
  const toVoxels = SPACING.map((mm) => page.step_mm / mm);
  lattice.now.fill(0);
  for (let k = 0; k * n < shapes.length; k++) {
    const weight = page.weights[a][k] * (1 - part) + page.weights[b][k] * part;
    const [x, y, z] = toVoxels.map((voxels) => voxels * weight);
    for (let i = 0, from = k * n; i < n; i += 3, from += 3) {
      lattice.now[i] += x * shapes[from];
      lattice.now[i + 1] += y * shapes[from + 1];
      lattice.now[i + 2] += z * shapes[from + 2];
    }
  }
  lattice.shownAt = t;
}

// Eight lattice points around a voxel, and their weights.
function corners(p) {
  const found = [];
  for (let corner = 0; corner < 8; corner++) {
    let at = 0, weight = 1;
    for (let axis = 0; axis < 3; axis++) {
      const upper = (corner >> axis) & 1, part = lattice.part[axis][p[axis]];
      at += Math.min(lattice.lower[axis][p[axis]] + upper, lattice.size[axis] - 1) * lattice.stride[axis];
      weight *= upper ? part : 1 - part;
    }
    found.push([at, weight]);
  }
  return found;
}

// Displacement target -> reference at a voxel, in mm, at every frame.
function displacementsAt(p) {
  const around = corners(p), n = lattice.now.length;
  const here = page.weights[0].map((_, k) => [0, 1, 2].map((c) => (
    around.reduce((sum, [at, weight]) => sum + weight * shapes[k * n + at + c], 0) * page.step_mm)));
  return page.weights.map((weights) => [0, 1, 2].map((c) => (
    weights.reduce((sum, weight, k) => sum + weight * here[k][c], 0))));
}

// Where every pixel of slice k of a plane comes from: p + u(p), three numbers a pixel.
function pullBack(plane, k, moved) {
  const { across, down, through, upwards, width, height } = plane;
  const { stride, now, size } = lattice;
  const row = new Float32Array(3 * size[across]), start = [0, 0, 0];
  const step = (axis) => (size[axis] > 1 ? stride[axis] : 0);
  for (let j = 0, out = 0; j < height; j++) {
    const v = upwards ? height - 1 - j : j;
    const b = lattice.part[down][v], c = lattice.part[through][k];
    const base = lattice.lower[down][v] * stride[down] + lattice.lower[through][k] * stride[through];
    const ways = [[base, (1 - b) * (1 - c)], [base + step(down), b * (1 - c)],
      [base + step(through), (1 - b) * c], [base + step(down) + step(through), b * c]];
    row.fill(0);
    for (const [from, weight] of ways) {
      if (weight === 0) continue;
      for (let i = 0; i < size[across]; i++) {
        for (let n = 0; n < 3; n++) row[3 * i + n] += weight * now[from + i * stride[across] + n];
      }
    }
    start[down] = v;
    start[through] = k;
    for (let i = 0; i < width; i++, out += 3) {
      const lower = 3 * lattice.lower[across][i], a = lattice.part[across][i];
      const upper = size[across] > 1 ? lower + 3 : lower;
      start[across] = i;
      moved[out] = start[0] + row[lower] * (1 - a) + row[upper] * a;
      moved[out + 1] = start[1] + row[lower + 1] * (1 - a) + row[upper + 1] * a;
      moved[out + 2] = start[2] + row[lower + 2] * (1 - a) + row[upper + 2] * a;
    }
  }
}

// -- images

// A volume at points, read linearly; beyond its border, what is at the border.
function readAt(volume, points, values) {
  const [nx, ny, nz] = SIZE, nxy = nx * ny;
  for (let i = 0, n = 0; i < values.length; i++, n += 3) {
    const x = Math.min(Math.max(points[n], 0), nx - 1);
    const y = Math.min(Math.max(points[n + 1], 0), ny - 1);
    const z = Math.min(Math.max(points[n + 2], 0), nz - 1);
    const x0 = Math.min(x | 0, Math.max(nx - 2, 0)), y0 = Math.min(y | 0, Math.max(ny - 2, 0));
    const z0 = Math.min(z | 0, Math.max(nz - 2, 0));
    const a = x - x0, b = y - y0, c = z - z0;
    const dx = nx > 1 ? 1 : 0, dy = ny > 1 ? nx : 0, dz = nz > 1 ? nxy : 0;
    const at = x0 + nx * y0 + nxy * z0;
    const front = (volume[at] * (1 - a) + volume[at + dx] * a) * (1 - b)
      + (volume[at + dy] * (1 - a) + volume[at + dx + dy] * a) * b;
    const back = (volume[at + dz] * (1 - a) + volume[at + dx + dz] * a) * (1 - b)
      + (volume[at + dy + dz] * (1 - a) + volume[at + dx + dy + dz] * a) * b;
    values[i] = front * (1 - c) + back * c;
  }
}

// Slice k of a volume as it is.
function readSlice(volume, plane, k, values) {
  const p = [0, 0, 0];
  p[plane.through] = k;
  for (let j = 0, i = 0; j < plane.height; j++) {
    p[plane.down] = plane.upwards ? plane.height - 1 - j : j;
    for (p[plane.across] = 0; p[plane.across] < plane.width; p[plane.across]++, i++) {
      values[i] = volume[p[0] + SIZE[0] * (p[1] + SIZE[1] * p[2])];
    }
  }
}

function worldOf(p) {
  return page.to_world_mm.map((row) => row[0] * p[0] + row[1] * p[1] + row[2] * p[2] + row[3]);
}

// A vector in mm along the page's axes, which may be oblique, in world LPS.
function worldVector(mm) {
  return page.to_world_mm.map((row) => mm.reduce((sum, length, axis) => sum + (row[axis] / SPACING[axis]) * length, 0));
}

// -- contours

// How much of each of these structures every pixel holds, 0 to 1: number of the structure -> values.
function carried(plane, moved, chosen) {
  const found = new Map(), pixels = plane.width * plane.height;
  labels.forEach((voxels, source) => {
    const numbers = new Map(); // value in the label volume -> number of the structure
    for (const k of chosen) if (page.structures[k].source === source) numbers.set(page.structures[k].value, k);
    if (!numbers.size) return;
    const { size: [nx, ny, nz], from_page: [X, Y, Z] } = page.sources[source], nxy = nx * ny;
    for (let i = 0, n = 0; i < pixels; i++, n += 3) {
      const p = moved[n], q = moved[n + 1], r = moved[n + 2];
      const x = X[0] * p + X[1] * q + X[2] * r + X[3];
      if (!(x >= 0 && x < nx - 1)) continue;
      const y = Y[0] * p + Y[1] * q + Y[2] * r + Y[3];
      if (!(y >= 0 && y < ny - 1)) continue;
      const z = Z[0] * p + Z[1] * q + Z[2] * r + Z[3];
      if (!(z >= 0 && z < nz - 1)) continue;
      const x0 = x | 0, y0 = y | 0, z0 = z | 0, a = x - x0, b = y - y0, c = z - z0;
      const at = x0 + nx * y0 + nxy * z0;
      for (let corner = 0; corner < 8; corner++) {
        const value = voxels[at + (corner & 1) + (corner & 2 ? nx : 0) + (corner & 4 ? nxy : 0)];
        if (value === 0 || !numbers.has(value)) continue;
        const k = numbers.get(value);
        if (!found.has(k)) found.set(k, new Float32Array(pixels));
        found.get(k)[i] += (corner & 1 ? a : 1 - a) * (corner & 2 ? b : 1 - b) * (corner & 4 ? c : 1 - c);
      }
    }
  });
  return found;
}

// Lines along which a field of a slice has the values level, level + spacing, ...; drawn through `line(x, y, x, y)`.
function isolines(field, width, height, level, spacing, line) {
  const x = new Float64Array(4), y = new Float64Array(4);
  for (let j = 0; j < height - 1; j++) {
    for (let i = 0; i < width - 1; i++) {
      const at = j * width + i, a = field[at], b = field[at + 1], c = field[at + width + 1], d = field[at + width];
      const low = Math.min(a, b, c, d), high = Math.max(a, b, c, d);
      if (low === high) continue;
      let L = level + (Number.isFinite(spacing) ? Math.ceil((low - level) / spacing) * spacing : 0);
      for (; L <= high; L += spacing) {
        let n = 0;
        if (a < L !== b < L) { x[n] = i + (L - a) / (b - a); y[n++] = j; }
        if (b < L !== c < L) { x[n] = i + 1; y[n++] = j + (L - b) / (c - b); }
        if (d < L !== c < L) { x[n] = i + (L - d) / (c - d); y[n++] = j + 1; }
        if (a < L !== d < L) { x[n] = i; y[n++] = j + (L - a) / (d - a); }
        if (n > 1) line(x[0], y[0], x[1], y[1]);
        if (n > 3) line(x[2], y[2], x[3], y[3]);
      }
    }
  }
}

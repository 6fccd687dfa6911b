"""One HTML page of a fitted patient: slices at any time, beside the scans, with contours, motion and curves.

The page is one file that needs no network. It draws R(p + u_t(p)) itself: it holds the reference image R
(8 bits) and the displacement u on a lattice, u_t = Σₖ wₖ(t) Uₖ with a few shapes Uₖ and their weights at many
times, and reads both linearly, in space and in time. The model's own picture differs by what the lattice, the
page's voxels and the 8 bits leave out; the page says by how much. Contours are pulled back in the same way, from
the voxels they were drawn on. The page itself, HTML, CSS and JavaScript, is in report_page/.

What goes in, besides the images: names of structures, tables and settings as they are given. Names of files and
of the patient don't, unless they are in there, as `named` says.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from jinja2 import Environment, StrictUndefined
from scipy.ndimage import map_coordinates

from stnerp.errors import InputError
from stnerp.geometry import Grid, index_points
from stnerp.metrics import roi_measures
from stnerp.model import STNeRP
from stnerp.series import Series
from stnerp.time_basis import time_text
from stnerp.window import PRESETS, Window

Row = Mapping[str, Any]

#: Of all images in the page, as text: the voxels get as coarse as that needs.
IMAGE_BYTES = 14_000_000
BYTES_PER_VOXEL = 0.85  # of a noisy CT, compressed, as text
#: Of the lattice of the displacement, and the most points that it has.
LATTICE_MM, LATTICE_POINTS = 6.0, 120_000
#: To which displacements are rounded, and how far, at most, the sum of the shapes may be off before.
STEP_MM, TOLERANCE_MM = 0.02, 0.1
#: About how many times hold a displacement, between which it is interpolated, and how many a point of the curves.
FRAMES, CURVE_POINTS = 40, 20
MOST_STRUCTURES = 255

#: What is drawn over time, of `stnerp.monitor`, and its title.
CURVES = {
    "volume_change_percent": "Volume, change (%)",
    "volume_ml": "Volume (ml)",
    "shift_x_mm": "Centroid, to the left (mm)",
    "shift_y_mm": "Centroid, to posterior (mm)",
    "shift_z_mm": "Centroid, to the head (mm)",
    "surface_p95_mm": "Surface displacement, 95 % (mm)",
    "density_change_percent": "Density, by the change of volume (%)",
}
PACKAGES = ("stnerp", "torch", "numpy", "SimpleITK")


@dataclass(frozen=True, eq=False)
class Structure:
    """A label that is drawn on the reference.

    Attributes:
        name: as it is shown.
        mask: label image in the reference's world space, on any grid.
        label: its value in the mask.
        drawn: label images of other times in which the same value is the same structure, drawn there: they are
            measured, to be shown beside what the model says.
    """

    name: str
    mask: sitk.Image
    label: int = 1
    drawn: Mapping[float, sitk.Image] = field(default_factory=dict)


def write_html_report(
    path: str | Path,
    model: STNeRP,
    *,
    series: Series | None = None,
    structures: Sequence[Structure] = (),
    tables: Mapping[str, Sequence[Row]] | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "Anatomy in space and time",
    spacing_mm: float | None = None,
    named: bool = False,
) -> Path:
    """Write the page of a model.

    Args:
        path: where to write; what is there is replaced.
        model: fitted.
        series: the scans, to be shown beside the model, those that the fit didn't see included; None: the
            model alone.
        structures: whose contours are shown, and followed over time.
        tables: title -> rows, shown as they are.
        settings: name -> value, likewise.
        title: of the page.
        spacing_mm: of the page's voxels, where the reference's aren't coarser; None: as fine as the images
            together stay below `IMAGE_BYTES`.
        named: what is given may name files or the patient; the page then doesn't say that they are left out.

    Returns:
        The path written.

    Raises:
        InputError: a series of another patient's grid, a structure that isn't in its mask or is there twice, a
            spacing that isn't positive, a path that can't be written.
    """
    path = Path(path)
    if series is not None and not series.grid.is_close(model.grid):
        raise InputError("series: its reference is not on the model's grid; give the series of the fit")
    if spacing_mm is not None and not 0 < spacing_mm < math.inf:
        raise InputError(f"spacing_mm: {spacing_mm} must be a positive number")
    grid, images = _images(model, series, spacing_mm)
    keys = _key_times(model, series)
    times, curve_times = (_times(keys, model.period, count) for count in (FRAMES, CURVE_POINTS))
    lattice = _coarser(grid, max(LATTICE_MM, _spacing_of(grid, LATTICE_POINTS)))
    weights, shapes, step_mm = _modes(np.stack([_axis_mm(model, t, lattice) for t in times]))
    motion_mm = np.tensordot(weights, shapes * step_mm, axes=1)
    sources, shown = _structures(model, structures, curve_times, grid)
    data = {
        "size": list(grid.size),
        "spacing_mm": list(grid.spacing_mm),
        "to_world_mm": _affine(grid.index_to_world),
        "window": {"low": model.window.low, "high": model.window.high, "presets": _window_presets(model.window)},
        "frames": times,
        "end": times[0] + model.period if model.period is not None else times[-1],
        "period": model.period,
        "unit": model.time_unit or "",
        "scans": _scans(model, series),
        "reference_time": model.reference_time,
        "lattice": list(lattice.size),
        "weights": weights.tolist(),
        "step_mm": step_mm,
        "sources": [{key: source[key] for key in ("size", "from_page")} for source in sources],
        "structures": shown,
        "curves": list(CURVES.items()),
        "curve_times": curve_times,
        "start": _start(grid, structures, lattice, motion_mm),
    }
    blobs = {f"image-{i}": _packed(image) for i, image in enumerate(images)}
    blobs |= {"shapes": _packed(shapes)}
    blobs |= {f"labels-{i}": _packed(source["labels"]) for i, source in enumerate(sources)}
    text = _page(
        title=title,
        data=_finite(data),
        blobs=blobs,
        facts=_facts(model, series, motion_mm),
        fidelity=_fidelity(model, grid, images[0], lattice, motion_mm, times),
        tables={name: _table(rows) for name, rows in (tables or {}).items() if rows},
        settings={name: _text(value) for name, value in (settings or {}).items()},
        versions={name: metadata.version(name) for name in PACKAGES},
        created=date.today().isoformat(),
        follow_up=model.period is None,
        blended=model.flow is not None,
        named=named,
        voxel_mm=" × ".join(f"{s:.3g}" for s in grid.spacing_mm),
        lattice_mm=" × ".join(f"{s:.3g}" for s in lattice.spacing_mm),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another place") from error
    return path


# -- images


def _images(model: STNeRP, series: Series | None, spacing_mm: float | None) -> tuple[Grid, list[np.ndarray]]:
    """The page's grid, and on it, 8 bits in the window: what the model makes of the reference, then all scans."""
    whole = _upright(model.grid)
    count = 1 if series is None else 1 + len(series)
    spacing = spacing_mm or _spacing_of(whole, IMAGE_BYTES / BYTES_PER_VOXEL / count)
    while True:
        grid = _coarser(whole, spacing)
        images = [_grey(model.image(model.reference_time, grid), model.window)]
        if series is not None:
            there, outside = grid.image(np.zeros(grid.shape, np.uint8)), model.window.low
            for scan in series.images:
                drawn = sitk.Resample(scan, there, sitk.Transform(), sitk.sitkLinear, outside, sitk.sitkFloat32)
                images.append(_grey(drawn, model.window))
        excess = sum(len(_packed(image)) for image in images) / IMAGE_BYTES
        if spacing_mm is not None or excess <= 1:
            return grid, images
        spacing = 1.02 * spacing * excess ** (1 / 3)


def _upright(grid: Grid) -> Grid:
    """The same voxels with axes in the order L, P, S; of an oblique grid, each axis nearest to one of these."""
    return Grid.of(sitk.DICOMOrient(grid.image(np.zeros(grid.shape, np.uint8)), "LPS"))


def _coarser(grid: Grid, spacing_mm: float) -> Grid:
    x, y, z = (max(s, spacing_mm) for s in grid.spacing_mm)
    return grid.with_spacing((x, y, z))


def _spacing_of(grid: Grid, voxels: float) -> float:
    """The spacing at which a grid has no more than so many voxels."""
    spacing_mm = min(grid.spacing_mm)
    while _coarser(grid, spacing_mm).voxels > voxels:
        spacing_mm *= 1.02
    return spacing_mm


def _grey(image: sitk.Image, window: Window) -> np.ndarray:
    return np.rint(255 * window.normalise(sitk.GetArrayViewFromImage(image))).astype(np.uint8)


def _scans(model: STNeRP, series: Series | None) -> list[dict[str, Any]]:
    """Measured times in order: what the fit knows of each, and which of the images shows it (None: none)."""
    times = model.times if series is None else series.times
    return [
        {
            "time": t,
            "kind": "reference" if t == model.reference_time else "seen" if t in model.times else "unseen",
            "image": None if series is None else i + 1,
        }
        for i, t in enumerate(times)
    ]


def _window_presets(window: Window) -> dict[str, list[float]]:
    """The windows by which a CT is read that lie within the model's own."""
    if window.name not in PRESETS:
        return {}
    inside = {name: pair for name, pair in PRESETS.items() if window.low <= pair[0] and pair[1] <= window.high}
    return {name.replace("_", " "): list(pair) for name, pair in inside.items() if name != window.name}


# -- times and motion


def _key_times(model: STNeRP, series: Series | None) -> list[float]:
    """Every time of a scan, in order."""
    return sorted({*model.times, *(() if series is None else series.times)})


def _times(keys: Sequence[float], period: float | None, count: int) -> list[float]:
    """All key times and enough between them for about `count` in all; of a periodic series one cycle without its
    end, which is its beginning."""
    stops = [*keys, keys[0] + period] if period is not None else list(keys)
    step = (stops[-1] - stops[0]) / count
    times = []
    for before, after in pairwise(stops):
        parts = max(1, math.ceil((after - before) / step - 1e-9))
        times += [before + (after - before) * k / parts for k in range(parts)]
    return times if period is not None else [*times, stops[-1]]


def _axis_mm(model: STNeRP, t: float, lattice: Grid) -> np.ndarray:
    """The displacement target -> reference, mm along the lattice's axes, (z, y, x, 3)."""
    return lattice.vectors_from_world(sitk.GetArrayFromImage(model.displacement(t, lattice)))


def _modes(motion_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Displacements (T, z, y, x, 3) as weights (T, K) of a few shapes (K, z, y, x, 3), int16, and their step, mm.

    A motion with three harmonics has about ten shapes, whatever the number of times.
    """
    flat = motion_mm.reshape(len(motion_mm), -1)
    left, values, right = np.linalg.svd(flat, full_matrices=False)
    wrong_mm = flat.copy()
    for count in range(len(values)):
        if np.abs(wrong_mm).max() <= TOLERANCE_MM:
            break
        wrong_mm -= values[count] * np.outer(left[:, count], right[count])
    else:
        count = len(values)
    count = max(count, 1)
    # Each shape is as large as its largest contribution, so that a step means the same in all of them.
    weights = left[:, :count] * values[:count]
    largest = np.abs(weights).max(axis=0)
    largest[largest == 0] = 1
    shapes_mm = largest[:, None] * right[:count]
    step_mm = max(STEP_MM, float(np.abs(shapes_mm).max()) / np.iinfo(np.int16).max)
    shapes = np.rint(shapes_mm / step_mm).astype("<i2")
    return weights / largest, shapes.reshape(count, *motion_mm.shape[1:]), step_mm


def _fidelity(
    model: STNeRP, grid: Grid, reference: np.ndarray, lattice: Grid, motion_mm: np.ndarray, times: Sequence[float]
) -> dict[str, float]:
    """How far the page's drawing is from the model's, at the scan that moved most: mean and 99th percentile."""
    largest = {i: float((motion_mm[i] ** 2).sum()) for i, t in enumerate(times) if t in model.times}
    i = max(largest, key=lambda frame: largest[frame])
    index = np.moveaxis(index_points(grid.shape), -1, 0)  # x, y, z
    ratio = (np.array(lattice.size) - 1) / np.maximum(np.array(grid.size) - 1, 1)
    on_lattice = (index * ratio[:, None, None, None])[::-1]
    here_mm = np.stack(
        [map_coordinates(motion_mm[i, ..., c], on_lattice, order=1, mode="nearest") for c in range(3)]
    )
    moved = index + here_mm / np.array(grid.spacing_mm)[:, None, None, None]
    drawn = map_coordinates(reference.astype(np.float32), moved[::-1], order=1, mode="nearest")
    answered = model.window.normalise(sitk.GetArrayFromImage(model.image(times[i], grid)))
    wrong = np.abs(drawn - 255 * answered)
    wrong_mm = np.linalg.norm(np.moveaxis(_axis_mm(model, times[i], grid), -1, 0) - here_mm, axis=0)
    return {
        "time": times[i],
        "image_mean_percent": float(wrong.mean()) / 2.55,
        "image_p99_percent": float(np.percentile(wrong, 99)) / 2.55,
        "displacement_mean_mm": float(wrong_mm.mean()),
        "displacement_p99_mm": float(np.percentile(wrong_mm, 99)),
    }


# -- structures


def _structures(
    model: STNeRP, structures: Sequence[Structure], times: Sequence[float], grid: Grid
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The label volumes, one a mask, and the structures with their curves."""
    if len(structures) > MOST_STRUCTURES:
        raise InputError(f"structures: {len(structures)}, a page holds {MOST_STRUCTURES}; choose some")
    sources: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    masks = list({id(structure.mask): structure.mask for structure in structures}.values())
    for mask in masks:
        own = [structure for structure in structures if structure.mask is mask]
        labels, cropped = _cropped(mask, own)
        rows = model.monitor(cropped.image(labels), times, name=", ".join(s.name for s in own))
        for number, structure in enumerate(own, start=1):
            shown.append(
                {
                    "name": structure.name,
                    "source": len(sources),
                    "value": number,
                    "curves": [[row[key] for key in CURVES] for row in rows if row["label"] == number],
                    "drawn": _drawn(structure),
                }
            )

        def from_page(points: np.ndarray, cropped: Grid = cropped) -> np.ndarray:
            return cropped.world_to_index(grid.index_to_world(points))

        sources.append({"size": list(cropped.size), "from_page": _affine(from_page), "labels": labels})
    return sources, shown


def _cropped(mask: sitk.Image, structures: Sequence[Structure]) -> tuple[np.ndarray, Grid]:
    """The part of a mask that holds these structures, numbered from 1, with a rim of background, and its grid."""
    array, grid = sitk.GetArrayViewFromImage(mask), Grid.of(mask)
    numbers = np.zeros(grid.shape, np.uint8)
    for number, structure in enumerate(structures, start=1):
        inside = array == structure.label
        if not inside.any():
            raise InputError(f"structure {structure.name}: its mask has no voxel of value {structure.label}")
        if numbers[inside].any():
            raise InputError(f"structure {structure.name}: another has the same mask and label; leave one out")
        numbers[inside] = number
    axes = [np.flatnonzero(numbers.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    part = np.pad(numbers[tuple(slice(found[0], found[-1] + 1) for found in axes)], 1)
    return part, grid.part([found[0] - 1 for found in reversed(axes)], [found[-1] + 1 for found in reversed(axes)])


def _drawn(structure: Structure) -> dict[str, list[float]]:
    """What a structure measures where it was drawn, as far as `CURVES` has it: key -> [time, value, time, ...]."""
    if not structure.drawn:
        return {}
    at_rest = roi_measures(structure.mask, structure.label)
    keys = ("volume_ml", "volume_change_percent", "shift_x_mm", "shift_y_mm", "shift_z_mm")
    found: dict[str, list[float]] = {key: [] for key in keys}
    for t, labels in structure.drawn.items():
        measures = roi_measures(labels, structure.label)
        if measures["volume_ml"] > 0:
            found["volume_ml"] += [t, measures["volume_ml"]]
            change = measures["volume_ml"] / at_rest["volume_ml"] - 1
            found["volume_change_percent"] += [t, 100 * change]
            for axis in "xyz":
                key = f"centroid_{axis}_mm"
                found[f"shift_{axis}_mm"] += [t, measures[key] - at_rest[key]]
    return found


def _start(grid: Grid, structures: Sequence[Structure], lattice: Grid, motion_mm: np.ndarray) -> list[int]:
    """Voxel (x, y, z) of the cross-hair at first: in the first structure, else where most moves."""
    if structures:
        mask, label = structures[0].mask, structures[0].label
        centre = Grid.of(mask).index_to_world(
            np.argwhere(sitk.GetArrayViewFromImage(mask) == label)[:, ::-1].mean(axis=0)
        )
        index = grid.world_to_index(centre)
    else:
        weight = (motion_mm**2).sum(axis=(0, -1)) + 1e-12
        points = index_points(lattice.shape)
        index = grid.world_to_index(lattice.index_to_world(np.average(points.reshape(-1, 3), 0, weight.ravel())))
    return np.clip(np.rint(index), 0, np.array(grid.size) - 1).astype(int).tolist()


# -- words and numbers


def _facts(model: STNeRP, series: Series | None, motion_mm: np.ndarray) -> list[tuple[str, str]]:
    unit = f" {model.time_unit}" if model.time_unit else ""
    times = _key_times(model, series)
    unseen = sum(t not in model.times for t in times)
    first, last, reference = map(time_text, (times[0], times[-1], model.reference_time))
    cycle = "" if model.period is None else f", period {time_text(model.period)}{unit}"
    return [
        ("Scans", f"{len(times)}" + (f", {unseen} held out" if unseen else "")),
        ("t", f"{first} to {last}{unit}{cycle}"),
        ("Reference", f"t = {reference}{unit}"),
        ("Voxels", " × ".join(f"{s:.3g}" for s in model.grid.spacing_mm) + " mm"),
        ("Largest displacement", f"{np.linalg.norm(motion_mm, axis=-1).max():.1f} mm"),
    ]


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Columns in the order they first appear, and the cells as text: four significant digits, times with all."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    digits = {column: 15 if column == "time" else 4 for column in columns}
    cells = [[_text(row.get(column), n) for column, n in digits.items()] for row in rows]
    return {"columns": [_heading(column) for column in columns], "rows": cells}


def _heading(column: str) -> str:
    """tre_mean_mm -> tre mean (mm)"""
    name, _, unit = column.rpartition("_")
    written = {"mm": "mm", "ml": "ml", "db": "dB", "percent": "%", "seconds": "s"}.get(unit)
    return f"{name} ({written})".replace("_", " ") if name and written else column.replace("_", " ")


def _text(value: object, digits: int = 4) -> str:
    """A value as it is shown; numbers, and texts that are plain decimals, with so many significant digits."""
    if value is None:
        return ""
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d*)\.\d+", value):
        value = float(value)  # a decimal of a table; 007 and 2024_01 are names
    if not isinstance(value, float | np.floating) or not math.isfinite(value):
        return str(value)
    number = float(value)
    if 0 < abs(number) < 1e-4:
        return f"{number:.{digits}g}"
    whole = abs(number) >= 10**digits
    return np.format_float_positional(number, precision=0 if whole else digits, fractional=whole, trim="-")


# -- the file


def _page(*, data: Any, blobs: Mapping[str, str], **values: Any) -> str:
    """The page from its template. Everything that is put in is escaped, in HTML and in JSON; only the page's own
    scripts and styles are obeyed, those whose fingerprints its security policy names."""
    folder = resources.files("stnerp") / "report_page"
    template, styles, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("template.html", "page.css", "slices.js", "curves.js", "page.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        data=data, blobs=blobs, styles=styles, scripts=scripts, fingerprints=_fingerprints, **values
    )


def _fingerprints(texts: Sequence[str]) -> str:
    """Of scripts or styles, as a security policy names them."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), mtime=0)).decode()


def _affine(transform: Any) -> list[list[float]]:
    """Rows (x, y, z) of the 3 x 4 matrix of a map of points that is affine."""
    origin = transform(np.zeros(3))
    columns = transform(np.eye(3)) - origin
    return [[*columns[:, axis].tolist(), float(origin[axis])] for axis in range(3)]


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""python docs/draw_pictures.py

Draws docs/pictures/: what docs/coordinates.md says about direction, axes, voxels and time, from the answers of a
model that is fitted to a small phantom, and of a grid.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

from stnerp import Grid, STNeRP, fit_deformation, load_series
from stnerp.motion import Longitudinal
from stnerp.phantom import BOX_MM, TUMOUR_CENTRE_MM, Phantom

FOLDER = Path(__file__).parent / "pictures"
TARGET, REFERENCE, THIRD = "#e6550d", "#1c7ed6", "#1f9e89"
LEVELS = [(8, 12, 60), (6, 6, 60)]


def fitted(phantom: Phantom, times: list[float], period: float | None) -> STNeRP:
    """A model of the phantom at these times, without a Ref-Net; the first one is the reference."""
    series = load_series([phantom.image(t) for t in times], times, period=period)
    return fit_deformation(series, None, levels=LEVELS, align="none", progress=False)


def coronal(image: sitk.Image, y_mm: float) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A slice (z, x) and its extent, left, right, bottom, top: LPS mm of the outer faces."""
    grid = Grid.of(image)
    y = round(float(grid.world_to_index(np.array([0.0, y_mm, 0.0]))[1]))
    low = grid.index_to_world(np.array([-0.5, 0.0, -0.5]))
    high = grid.index_to_world(np.array(grid.size) - 0.5)
    return sitk.GetArrayFromImage(image)[:, y, :], (float(low[0]), float(high[0]), float(low[2]), float(high[2]))


def show(panel: Any, image: sitk.Image, y_mm: float) -> None:
    """A coronal slice as a radiologist looks at it: the patient's right on the left, the head up."""
    pixels, extent = coronal(image, y_mm)
    panel.imshow(
        pixels, cmap="gray", vmin=-1000, vmax=400, extent=extent, origin="lower", interpolation="bilinear"
    )
    panel.set_xlabel("x, mm (to the patient's left)")


def draw_direction(model: STNeRP, t: float, y_mm: float = -10.0) -> Figure:
    """The target beside the reference, a voxel p of the target, and where φ(p) lies."""
    figure = Figure((9.0, 3.2), dpi=90, layout="constrained")
    target, reference = figure.subplots(1, 2, sharex=True, sharey=True)
    show(target, model.image(t), y_mm)
    show(reference, model.image(model.reference_time), y_mm)
    points = np.array([[x, y_mm, z] for x in np.arange(-120, 121, 40) for z in np.arange(-60, 61, 24)], float)
    moved = model.map_points(points, t)
    target.quiver(
        points[:, 0], points[:, 2], moved[:, 0] - points[:, 0], moved[:, 2] - points[:, 2], color="#ffd43b",
        angles="xy", scale_units="xy", scale=1, width=0.006,
    )  # fmt: skip
    (p,) = points[np.argsort(np.linalg.norm(moved - points, axis=1))[-1:]]
    (q,) = model.map_points(p[None], t)
    for panel, at, name, colour in ((target, p, "p", TARGET), (reference, q, "φₜ(p) = p + uₜ(p)", REFERENCE)):
        panel.plot(at[0], at[2], "o", color=colour, markeredgecolor="white", markersize=8)
        panel.annotate(
            name, (at[0], at[2]), (8, -12), textcoords="offset points", color="white", weight="bold",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 2},
        )  # fmt: skip
    reference.plot(p[0], p[2], "+", color="white", markersize=9)
    curve: dict[str, Any] = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.15", "mutation_scale": 16}
    ends: dict[str, Any] = {"axesA": target, "axesB": reference, "shrinkA": 5, "shrinkB": 5}
    there, here = (q[0], q[2]), (p[0], p[2])
    figure.add_artist(ConnectionPatch(here, there, "data", "data", **ends, **curve, color=TARGET, linewidth=2))
    target.set_title(f"target: the anatomy at t = {t:g}; arrows: uₜ")
    reference.set_title(f"reference, t = {model.reference_time:g}; +: p, unmoved")
    target.set_ylabel("z, mm (to the head)")
    return figure


def draw_axes(image: sitk.Image) -> Figure:
    """One array, its three planes, and the names of the axes."""
    grid, array = Grid.of(image), sitk.GetArrayFromImage(image)
    low, high = (grid.index_to_world(at) for at in (np.full(3, -0.5), np.array(grid.size) - 0.5))
    z, y, x = (n // 2 for n in array.shape)
    planes = {
        f"axial: array[{z}, :, :]": (array[z], 0, 1, True),
        f"coronal: array[:, {y}, :]": (array[:, y], 0, 2, False),
        f"sagittal: array[:, :, {x}]": (array[:, :, x], 1, 2, False),
    }
    ends = (("R", "L"), ("A", "P"), ("F", "H"))
    figure = Figure((10.0, 3.0), dpi=90, layout="constrained")
    for panel, (title, (pixels, across, up, downwards)) in zip(figure.subplots(1, 3), planes.items(), strict=True):
        extent = (low[across], high[across], low[up], high[up])
        panel.imshow(pixels, cmap="gray", vmin=-1000, vmax=400, extent=extent, origin="lower")
        if downwards:
            panel.invert_yaxis()
        panel.set_title(title, family="monospace", fontsize=9)
        for axis, name in ((panel.xaxis, "xyz"[across]), (panel.yaxis, "xyz"[up])):
            first, last = ends["xyz".index(name)]
            axis.set_label_text(f"{first}  ← {name}, mm →  {last}")
    return figure


def draw_voxels() -> Figure:
    """A row of voxels in the three frames."""
    grid = Grid((5, 4, 3), (4.0, 4.0, 4.0), (-10.0, 0.0, 0.0))
    figure = Figure((8.0, 2.6), dpi=100, layout="constrained")
    panel = figure.subplots()
    centres = grid.index_to_world(np.array([[i, 0.0, 0.0] for i in range(grid.size[0])]))[:, 0]
    for i, x in enumerate(centres):
        panel.add_patch(Rectangle((x - 2, -0.5), 4, 1, facecolor="#e9ecef", edgecolor="#868e96"))
        panel.plot(x, 0, "o", color=REFERENCE)
        cube = grid.world_to_cube(np.array([[x, 0.0, 0.0]]))[0, 0]
        for y, text, colour in (
            (0.85, f"{i}", REFERENCE),
            (-0.9, f"{x:g}", "black"),
            (-1.4, f"{cube:+g}", TARGET),
        ):
            panel.text(x, y, text, color=colour, ha="center", va="center")
    first, last = grid.index_to_world(np.array([[-0.5, 0, 0], [grid.size[0] - 0.5, 0, 0]]))[:, 0]
    for x, index in ((first, "−0.5"), (last, "4.5")):
        panel.text(x, 0.85, index, color="#868e96", ha="center", va="center")
    for y, text, colour in ((0.85, "index", REFERENCE), (-0.9, "world, mm", "black"), (-1.4, "cube", TARGET)):
        panel.text(first - 1, y, text, color=colour, ha="right", va="center")
    panel.set_xlim(first - 4.5, last + 1)
    panel.set_ylim(-1.8, 1.3)
    panel.set_axis_off()
    return figure


def draw_time(breathing: STNeRP, weeks: STNeRP, phantoms: tuple[Phantom, Phantom]) -> Figure:
    """How far a point of the reference is from its place, over time: a cycle, and a row of scans."""
    figure = Figure((9.0, 3.0), dpi=90, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, model, phantom, unit in zip(panels, (breathing, weeks), phantoms, ("phase", "day"), strict=True):
        first, last = model.times[0], model.times[-1]
        over = (last - first) * (1.0 if model.period is not None else 0.25)
        times = np.linspace(first - over / 2, last + over, 121)
        # A landmark that four of five move less than.
        landmarks = phantom.landmarks(model.reference_time)
        far_mm = np.linalg.norm(phantom.landmarks(model.times[len(model.times) // 2]) - landmarks, axis=1)
        point = landmarks[np.argsort(far_mm)[len(far_mm) * 4 // 5]]
        at = np.concatenate([model.map_points(point[None], t, inverse=True) for t in times])
        away_mm = np.linalg.norm(at - point, axis=1)
        true_mm = [np.linalg.norm(phantom.map_points(point[None], t, inverse=True) - point) for t in model.times]
        inside = (times >= first) & (times <= (first + model.period if model.period else last))
        panel.plot(times, away_mm, color=THIRD, linestyle=":")
        panel.plot(times[inside], away_mm[inside], color=THIRD, label="model")
        panel.plot(model.times, true_mm, "o", color=TARGET, label="truth, at the scans")
        panel.axvline(model.reference_time, color=REFERENCE, linewidth=1)
        panel.set_xlabel(f"t, {unit}")
        panel.set_title("not periodic: straight on beyond the scans" if model.period is None
                        else f"period = {model.period:g}: the same again")  # fmt: skip
    panels[0].set_ylabel("distance from the reference, mm")
    panels[0].legend(frameon=False)
    return figure


def main(folder: Path = FOLDER) -> None:
    size, spacing_mm = (60, 46, 30), 6.0
    breath = Phantom(size, spacing_mm, noise_hu=10.0)
    breathing = fitted(breath, [0.0, 0.2, 0.4, 0.6, 0.8], 1.0)
    change = Longitudinal(*BOX_MM, TUMOUR_CENTRE_MM, duration=30.0, shift_mm=12.0)
    therapy = Phantom(size, spacing_mm, change, noise_hu=10.0)
    weeks = fitted(therapy, [0.0, 9.0, 16.0, 30.0], None)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {
        "direction": draw_direction(breathing, 0.5),
        "axes": draw_axes(breathing.image(0.0)),
        "voxels": draw_voxels(),
        "time": draw_time(breathing, weeks, (breath, therapy)),
    }.items():
        figure.savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Regions of interest over continuous time: volume, place, extent, motion of the surface, density.

The tissue of a label is followed: a point q of the reference is at φₜ⁻¹(q) at time t, and its volume element
dV has become dV / |∂φₜ/∂p|. Integrals over the reference's voxels need no label image at time t, and change
smoothly where a count of voxels jumps. Anything that maps points can be monitored: a model, a known motion.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.errors import InputError
from stnerp.field_of_view import saw
from stnerp.geometry import Grid
from stnerp.io.image import to_labels
from stnerp.labels import carried_labels
from stnerp.metrics import roi_measures
from stnerp.series import Series
from stnerp.time_basis import index_at
from stnerp.warp import sample

logger = logging.getLogger(__name__)

Row = dict[str, Any]

MARGIN_MM = 10.0  # around a carried ROI, when it is cut out to be counted
MOST_POINTS = 100_000  # of a label that are followed: for an integral over a lung, every twentieth voxel will do


class Moving(Protocol):
    """What can be monitored: `map_points` takes points (..., 3), LPS mm, from time t to the reference, or back."""

    @property
    def grid(self) -> Grid: ...

    def map_points(self, points_mm: np.ndarray, t: float, inverse: bool = False) -> np.ndarray: ...


def monitor(
    moving: Moving,
    roi: sitk.Image,
    times: Iterable[float],
    *,
    measured: Sequence[float] = (),
    period: float | None = None,
    series: Series | None = None,
    name: str = "roi",
) -> list[Row]:
    """Each label of a ROI at each time, in order of time. Lengths in mm, positions and axes in world LPS.

    Args:
        moving: a fitted model, or a known motion.
        roi: labels drawn on the reference, on any grid in its world space.
        times: any, in the user's unit.
        measured: times of scans, to be marked.
        period: of these, if they repeat.
        series: the scans, for `intensity_change` and `covered_percent` at their times.
        name: of the ROI; of several labels, the rows say which ("gtv label 2").

    Returns:
        Rows, one a time and label:
        `roi`, `label`: name, and value in the label image; `time`; `measured`: whether there is a scan of it.
        `volume_ml`: ∫ dV / |∂φ/∂p| over the label in the reference; `voxel_volume_ml`: the voxels of the carried
        label, counted; `volume_change_percent`: of the former, against the reference.
        `centroid_x_mm`, ...: of the volume; `shift_x_mm`, ..., `shift_mm`: from the reference's.
        `extent_x_mm`, ...: from the first to the last point of the surface along each axis.
        `surface_mean_mm`, `surface_p95_mm`, `surface_max_mm`: displacement of `surface_points`. The place of the
        whole patient in the scanner counts: φ goes from scan to scan.
        `density_change_percent`: what the change of volume alone explains, where tissue keeps its mass: the
        geometric mean of |∂φ/∂p| over the label's tissue, minus 1. A lung that expands gets less dense.
        With `series`, at its times: `intensity_change`, mean over the carried label of the scan minus the
        reference at the same tissue, where both show it, in the scan's unit (HU for CT); and `covered_percent`,
        part of the volume that lies inside the scan. None at other times.
        What needs the volume is NaN where φ folds inside the label.

    Raises:
        InputError: a ROI that is empty, outside the reference image, or not of whole numbers, or no time.
    """
    wanted = sorted({float(t) for t in times})
    if not wanted:
        raise InputError("times: none given; give one or more")
    check_roi(roi, moving.grid, name)
    labels = [int(label) for label in np.unique(sitk.GetArrayViewFromImage(roi)) if label != 0]
    names = {label: name if len(labels) == 1 else f"{name} label {label}" for label in labels}
    reference = None if series is None else series.reference_image
    regions = [_Region(roi, label, names[label], reference) for label in labels]
    surface_mm = np.concatenate([region.surface_mm for region in regions])
    rows = []
    for t in wanted:
        grid = around(moving.map_points(surface_mm, t, inverse=True), Grid.of(roi))
        carried = carried_labels(roi, grid, partial(moving.map_points, t=t))
        i = None if series is None else index_at(series.times, t, series.period)
        scan = None if series is None or i is None else series.images[i]
        is_measured = index_at(measured, t, period) is not None
        for region in regions:
            row = {"roi": region.name, "label": region.label, "time": t, "measured": is_measured}
            rows.append(row | region.at(moving, t, carried, scan))
    return rows


def check_roi(roi: sitk.Image, grid: Grid, name: str) -> None:
    """Refuse a ROI that is empty or outside the reference image; warn of one that is partly outside.

    Raises:
        InputError: that, or values that aren't whole numbers.
    """
    inside = grid.contains(label_points(to_labels(roi, name)))
    if inside.size == 0:
        raise InputError(f"{name}: is empty; draw the ROI, or export it again")
    if not inside.any():
        raise InputError(
            f"{name}: lies outside the reference image altogether; is it drawn on the reference, of this patient?"
        )
    if not inside.all():
        logger.warning("%s: %.1f %% of it lies outside the reference image", name, 100 * (1 - inside.mean()))


def label_points(roi: sitk.Image, label: int | None = None) -> np.ndarray:
    """Centres of the voxels of a label (None: of any), (N, 3), LPS mm."""
    voxels = sitk.GetArrayViewFromImage(roi)
    chosen = voxels != 0 if label is None else voxels == label
    return Grid.of(roi).index_to_world(np.argwhere(chosen)[:, ::-1].astype(float))


def surface_points(roi: sitk.Image, label: int) -> np.ndarray:
    """Half-way between each voxel of a label and its neighbours outside, (N, 3), LPS mm.

    They lie on the voxels' faces, so that a box of n voxels is n spacings long.
    """
    inside = np.pad(sitk.GetArrayViewFromImage(roi) == label, 1)
    faces = []
    for axis in range(3):
        index = np.argwhere(np.diff(inside, axis=axis)) - 1.0
        index[:, axis] += 0.5
        faces.append(index[:, ::-1])
    return Grid.of(roi).index_to_world(np.concatenate(faces))


def jacobian_at(moving: Moving, points_mm: np.ndarray, t: float, step_mm: float) -> np.ndarray:
    """|∂φ_t/∂p| at points (N, 3) of time t, (N,): central differences over `step_mm` to both sides."""
    columns = [
        (moving.map_points(points_mm + step, t) - moving.map_points(points_mm - step, t)) / (2 * step_mm)
        for step in step_mm * np.eye(3)
    ]
    return np.linalg.det(np.stack(columns, axis=-1))


def around(points_mm: np.ndarray, grid: Grid) -> Grid:
    """Voxels of a grid, continued past its edges, that hold these points and a margin: no more is computed."""
    index = grid.world_to_index(points_mm)
    margin = MARGIN_MM / np.asarray(grid.spacing_mm)
    start = np.floor(index.min(0) - margin).astype(int)
    end = np.ceil(index.max(0) + margin).astype(int)
    return grid.part(start, end)


class _Region:
    """One label of the reference, and the points of it that are followed."""

    def __init__(self, roi: sitk.Image, label: int, name: str, reference: sitk.Image | None) -> None:
        self.label, self.name = label, name
        points_mm = label_points(roi, label)
        # An odd step drifts across rows of voxels, whose lengths are mostly even, instead of taking some columns.
        self.points_mm = points_mm[:: len(points_mm) // MOST_POINTS | 1]
        self.surface_mm = surface_points(roi, label)
        self.volume_ml = len(points_mm) * math.prod(roi.GetSpacing()) / 1000
        self.step_mm = min(roi.GetSpacing()) / 2
        self.intensity = None if reference is None else _read(reference, self.points_mm)

    def at(self, moving: Moving, t: float, carried: sitk.Image, scan: sitk.Image | None) -> Row:
        """What is said of it at time t."""
        there_mm = moving.map_points(self.points_mm, t, inverse=True)
        density = jacobian_at(moving, there_mm, t, self.step_mm)
        density[density <= 0] = np.nan
        growth = 1 / density
        volume_ml = self.volume_ml * float(growth.mean())
        centroid_mm = (growth[:, None] * there_mm).mean(0) / growth.mean()
        shift_mm = centroid_mm - self.points_mm.mean(0)
        surface_mm = moving.map_points(self.surface_mm, t, inverse=True)
        moved_mm = np.linalg.norm(surface_mm - self.surface_mm, axis=1)
        row: Row = {
            "volume_ml": volume_ml,
            "voxel_volume_ml": roi_measures(carried, self.label)["volume_ml"],
            "volume_change_percent": 100 * (volume_ml / self.volume_ml - 1),
            **_by_axis("centroid", centroid_mm),
            **_by_axis("shift", shift_mm),
            "shift_mm": float(np.linalg.norm(shift_mm)),
            **_by_axis("extent", np.ptp(surface_mm, axis=0)),
            "surface_mean_mm": float(moved_mm.mean()),
            "surface_p95_mm": float(np.percentile(moved_mm, 95)),
            "surface_max_mm": float(moved_mm.max()),
            "density_change_percent": 100 * math.expm1(float(np.log(density).mean())),
        }
        if self.intensity is not None:
            row |= {"intensity_change": None, "covered_percent": None}
            if scan is not None:
                intensity = _read(scan, there_mm)
                change = intensity - self.intensity
                both, inside = np.isfinite(change), np.isfinite(intensity)
                mean = np.average(change[both], weights=growth[both]) if both.any() else math.nan
                row["intensity_change"] = float(mean)
                row["covered_percent"] = 100 * float(growth[inside].sum() / growth.sum())
        return row


def _by_axis(name: str, vector_mm: np.ndarray) -> Row:
    return {f"{name}_{axis}_mm": float(value) for axis, value in zip("xyz", vector_mm, strict=True)}


def _read(image: sitk.Image, points_mm: np.ndarray) -> np.ndarray:
    """An image, read linearly at points (N, 3), (N,); NaN outside it and outside its round field of view."""
    cube = torch.from_numpy(Grid.of(image).world_to_cube(points_mm))
    voxels = torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.float32))
    values = sample(voxels[None, None], cube[None])[0, 0]
    return np.where(saw(image, points_mm), values.double().numpy(), np.nan)

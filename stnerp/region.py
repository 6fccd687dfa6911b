"""Where there is something to see: the part of the reference that Def-Net covers.

A field of view of 50 cm is mostly air and couch. Nothing of it moves that anyone asks about, and a fit of it
would take as long as one of the patient. So a fit looks at the box that holds the patient at all times. Around
that, the motion at the box's faces fades away (`around`).

Only Hounsfield units tell air from faint tissue; of other images all is covered. The patient is what is not air,
thick parts of it alone: a couch is a shell of thin sheets, thinner than the wall of any chest. And what contours
and landmarks mark.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from stnerp.geometry import Grid, apply_affine
from stnerp.series import Series
from stnerp.window import is_ct

FOAM_HU = -800.0  # above air and foam
# Between the voxels that are looked at; less in a small field of view, for a hand. What is thinner than three of
# them is no part of a patient.
LOOK_MM, LOOKS = 2.0, 256
SMALL = 0.05  # of the largest part: what is smaller is none either
MARGIN_MM = 20.0  # beyond the patient: a window of the local correlation, and what opening rounds off
NEARLY_ALL = 0.8  # of the voxels: leaving out the rest would save little
FADE_MM = 60.0


def patient_region(series: Series, alignments: np.ndarray) -> Grid:
    """The part of the reference's grid that holds the patient at all times, and `MARGIN_MM` around.

    Args:
        series: the images, with what masks and landmarks mark.
        alignments: (T, 4, 4), reference point -> point of the image at each time.

    Returns:
        A box of its voxels; all of them where that isn't much less, where the reference shows nothing, or where
        an image is no CT.
    """
    grid = series.grid
    if not all(is_ct(image) for image in series.images):
        return grid
    found = [patient_corners(image) for image in series.images]
    if found[series.reference] is None:
        return grid
    marked = [
        None if mask is None else _corners(sitk.GetArrayViewFromImage(mask) != 0, Grid.of(mask))
        for mask in series.masks
    ]
    every = np.concatenate(
        [
            grid.world_to_index(apply_affine(np.linalg.inv(alignment), points))
            for known in (found, marked, series.landmarks)
            for points, alignment in zip(known, alignments, strict=True)
            if points is not None
        ]
    )
    margin = MARGIN_MM / np.asarray(grid.spacing_mm)
    first = np.clip(np.floor(every.min(axis=0) - margin), 0, np.asarray(grid.size) - 1).astype(int)
    last = np.clip(np.ceil(every.max(axis=0) + margin), 0, np.asarray(grid.size) - 1).astype(int)
    region = grid.part(first, last)
    return region if region.voxels < NEARLY_ALL * grid.voxels else grid


def patient_corners(image: sitk.Image) -> np.ndarray | None:
    """The corners (8, 3), LPS mm, of the box along a CT's axes around the patient; None: it shows none."""
    own = Grid.of(image)
    look_mm = min(LOOK_MM, max(own.extent_mm) / LOOKS)
    strides = [max(1, round(look_mm / s)) for s in own.spacing_mm]
    seen = sitk.Shrink(image, strides) > FOAM_HU
    radii = [min(round(look_mm / s), (n - 1) // 4) for s, n in zip(seen.GetSpacing(), seen.GetSize(), strict=True)]
    parts = sitk.ConnectedComponent(sitk.BinaryMorphologicalOpening(seen, radii, sitk.sitkBall))
    sizes = np.bincount(sitk.GetArrayViewFromImage(parts).ravel())
    sizes[0] = 0
    kept = np.flatnonzero(sizes > SMALL * sizes.max())
    patient = np.isin(sitk.GetArrayViewFromImage(parts), kept)
    return _corners(patient, Grid.of(parts))


def _corners(inside: np.ndarray, grid: Grid) -> np.ndarray | None:
    """The corners (8, 3), LPS mm, of the box along a grid's axes around what is inside; None: nothing is."""
    sides = []
    for axis in (2, 1, 0):
        index = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
        if len(index) == 0:
            return None
        sides.append((index[0] - 0.5, index[-1] + 0.5))
    return grid.index_to_world(np.array([[x, y, z] for x in sides[0] for y in sides[1] for z in sides[2]]))


def around(lattice: Grid, grid: Grid) -> tuple[Grid, tuple[int, ...]]:
    """A lattice of a region continued until it covers a grid of the same axes.

    Returns:
        The lattice, and how many points more it has before and after x, y and z, as `F.pad` takes them.
    """
    ends = lattice.world_to_index(grid.cube_to_world(np.array([[-1.0] * 3, [1.0] * 3])))
    # A grid of one slice has its only one at -1; rounding must not add a point.
    before = np.ceil(np.maximum(-ends[0], 0) - 1e-6).astype(int)
    after = np.ceil(np.maximum(ends[1] - (np.asarray(lattice.size) - 1), 0) - 1e-6).astype(int)
    after[np.asarray(grid.size) == 1] = 0
    more = [int(n) for pair in zip(before, after, strict=True) for n in pair]
    return lattice.part(-before, np.asarray(lattice.size) - 1 + after), tuple(more)


def faded(velocity_mm: torch.Tensor, spacing_mm: Sequence[float], more: Sequence[int]) -> torch.Tensor:
    """A velocity (1, 3, z, y, x) continued by so many points: its border's, which fades over `FADE_MM`."""
    if not any(more):
        return velocity_mm
    whole = F.pad(velocity_mm, tuple(more), mode="replicate")
    for axis in range(3):
        before, after = more[2 * axis : 2 * axis + 2]
        n = whole.shape[4 - axis]
        index = torch.arange(n, dtype=torch.float64)
        outside = (before - index).clamp(min=0) + (index - (n - 1 - after)).clamp(min=0)
        weight = 0.5 * (1 + torch.cos(torch.pi * (outside * spacing_mm[axis] / FADE_MM).clamp(max=1)))
        shape = [1] * 5
        shape[4 - axis] = n
        whole = whole * weight.to(whole).reshape(shape)
    return whole

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

NO_POINTS = np.empty((0, 3))


def patient_points(series: Series) -> list[np.ndarray] | None:
    """Of the image at each time, points (N, 3), LPS mm, that a box must hold to hold the patient; N may be 0.

    Corners of boxes around what images show and masks mark, and landmarks. None, which is for all of the
    reference: an image is no CT, or the reference shows nothing.
    """
    if not all(is_ct(image) for image in series.images):
        return None
    shown = [patient_corners(image) for image in series.images]
    if len(shown[series.reference]) == 0:
        return None
    marked = [
        NO_POINTS if mask is None else _corners(sitk.GetArrayViewFromImage(mask) != 0, Grid.of(mask))
        for mask in series.masks
    ]
    landmarks = [NO_POINTS if points is None else points for points in series.landmarks]
    return [np.concatenate(points) for points in zip(shown, marked, landmarks, strict=True)]


def box_around(points_mm: Sequence[np.ndarray] | None, grid: Grid, alignments: np.ndarray) -> Grid:
    """The part of the reference's grid that holds points of all times, and `MARGIN_MM` around.

    Args:
        points_mm: of the image at each time, (N, 3), LPS mm (`patient_points`); None: a box of all there is.
        grid: the reference's.
        alignments: (T, 4, 4), reference point -> point of the image at each time.

    Returns:
        A box of its voxels; all of them where that isn't much less.
    """
    if points_mm is None:
        return grid
    back = np.linalg.inv(alignments)
    every = grid.world_to_index(np.concatenate([apply_affine(*one) for one in zip(back, points_mm, strict=True)]))
    margin = MARGIN_MM / np.asarray(grid.spacing_mm)
    first = np.clip(np.floor(every.min(axis=0) - margin), 0, np.asarray(grid.size) - 1).astype(int)
    last = np.clip(np.ceil(every.max(axis=0) + margin), 0, np.asarray(grid.size) - 1).astype(int)
    region = grid.part(first, last)
    return region if region.voxels < NEARLY_ALL * grid.voxels else grid


def part_around(region: Grid, grid: Grid, alignment: np.ndarray) -> Grid:
    """The part of an image's grid where pre-alignment has a region of the reference; a voxel at least.

    Args:
        alignment: (4, 4), reference point -> the image's point.
    """
    there, beyond = grid.world_to_index(apply_affine(alignment, region.corners_world())), 1e-3
    ends = np.asarray(grid.size) - 1
    first = np.floor(there.min(axis=0) + beyond).clip(0, ends)
    last = np.ceil(there.max(axis=0) - beyond).clip(first, ends)
    return grid.part(first, last)


def patient_corners(image: sitk.Image) -> np.ndarray:
    """The corners (8, 3), LPS mm, of the box along a CT's axes around the patient; (0, 3): it shows none."""
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


def _corners(inside: np.ndarray, grid: Grid) -> np.ndarray:
    """The corners (8, 3), LPS mm, of the box along a grid's axes around what is inside; (0, 3): nothing is."""
    if not inside.any():
        return NO_POINTS
    sides = [np.flatnonzero(inside.any(axis=others)) for others in ((0, 1), (0, 2), (1, 2))]  # x, y, z
    return grid.part([side[0] for side in sides], [side[-1] for side in sides]).corners_world(0.5)


def around(lattice: Grid, grid: Grid) -> Grid:
    """A lattice of a region continued until it covers a grid of the same axes."""
    corners = lattice.world_to_index(grid.corners_world())
    beyond = 1e-6  # rounding must not add a point
    first = np.minimum(np.floor(corners.min(0) + beyond), 0)
    last = np.maximum(np.ceil(corners.max(0) - beyond), np.asarray(lattice.size) - 1)
    return lattice.part(first, last)


def faded(velocity_mm: torch.Tensor, lattice: Grid, whole: Grid) -> torch.Tensor:
    """A velocity (1, 3, z, y, x) on a lattice, continued on the whole that this is a part of (`around`).

    It is the border's, and fades over `FADE_MM`.
    """
    if lattice.size == whole.size:
        return velocity_mm
    inside = lattice.within(whole)
    more = [n for s, size in zip(reversed(inside), whole.size, strict=True) for n in (s.start, size - s.stop)]
    continued = F.pad(velocity_mm, more, mode="replicate")
    for axis, (there, n, step_mm) in enumerate(zip(inside, whole.shape, reversed(whole.spacing_mm), strict=True)):
        index = torch.arange(n, dtype=torch.float64)
        outside_mm = step_mm * ((there.start - index).clamp(min=0) + (index - (there.stop - 1)).clamp(min=0))
        weight = 0.5 * (1 + torch.cos(torch.pi * (outside_mm / FADE_MM).clamp(max=1)))
        continued = continued * weight.to(continued).reshape([-1 if a == axis else 1 for a in range(3)])
    return continued

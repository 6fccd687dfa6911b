"""Where there is something to see: the part of the reference that Def-Net covers.

A field of view of 50 cm is mostly air and couch. Nothing of it moves that anyone asks about, and a fit of it
would take as long as one of the patient. So a fit looks at the box that holds the patient at all times. Around
that, the motion at the box's faces fades away (`around`).

The patient is what is not air, thick parts of it alone: a couch is a shell of thin sheets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from stnerp.geometry import Grid, apply_affine
from stnerp.series import Series
from stnerp.window import Window, is_ct

FOAM_HU = -800.0  # above the air and the foam in a CT
FAINT = (
    0.03  # of the window of another image: above what is left of noise in air, not of what a PET shows of muscle
)
# Between the voxels that are looked at; less in a small field of view, for a hand. What is thinner than three of
# them is no part of a patient.
LOOK_MM, LOOKS = 4.0, 128
SMALL = 0.05  # of the largest part: what is smaller is none either
MARGIN_MM = 20.0  # beyond the patient: a window of the local correlation, and what opening rounds off
NEARLY_ALL = 0.8  # of the voxels: leaving out the rest would save little
FADE_MM = 60.0


def patient_region(series: Series, alignments: np.ndarray) -> Grid:
    """The part of the reference's grid that holds the patient at all times, and `MARGIN_MM` around.

    Args:
        series: the images.
        alignments: (T, 4, 4), reference point -> point of the image at each time.

    Returns:
        A box of its voxels; all of them where that isn't much less, or where the reference shows nothing.
    """
    grid = series.grid
    found = [patient_corners(image, series.window) for image in series.images]
    if found[series.reference] is None:
        return grid
    every = np.concatenate(
        [
            grid.world_to_index(apply_affine(np.linalg.inv(alignment), corners))
            for corners, alignment in zip(found, alignments, strict=True)
            if corners is not None
        ]
    )
    margin = MARGIN_MM / np.asarray(grid.spacing_mm)
    first = np.clip(np.floor(every.min(axis=0) - margin), 0, np.asarray(grid.size) - 1).astype(int)
    last = np.clip(np.ceil(every.max(axis=0) + margin), 0, np.asarray(grid.size) - 1).astype(int)
    region = grid.part(first, last)
    return region if region.voxels < NEARLY_ALL * grid.voxels else grid


def patient_corners(image: sitk.Image, window: Window) -> np.ndarray | None:
    """The corners (8, 3), LPS mm, of the box along an image's axes around what it shows; None: nothing."""
    own = Grid.of(image)
    look_mm = min(LOOK_MM, max(own.extent_mm) / LOOKS)
    x, y, z = strides = [max(1, round(look_mm / s)) for s in own.spacing_mm]
    looked_at = sitk.GetArrayViewFromImage(image)[::z, ::y, ::x]
    seen = looked_at > FOAM_HU if is_ct(image) else window.normalise(looked_at) > FAINT
    radii = [
        min(round(look_mm / (stride * s)), (n - 1) // 4)
        for stride, s, n in zip(strides, own.spacing_mm, seen.shape[::-1], strict=True)
    ]
    thick = sitk.BinaryMorphologicalOpening(sitk.GetImageFromArray(seen.astype(np.uint8)), radii, sitk.sitkBall)
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(thick))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = np.isin(parts, np.flatnonzero(sizes > SMALL * sizes.max()))
    if not kept.any():
        return None
    index = np.argwhere(kept)[:, ::-1] * strides
    low, high = index.min(axis=0), index.max(axis=0)
    sides = np.stack([low, np.minimum(high + strides, np.asarray(own.size) - 1)])
    corners = [[sides[a, 0], sides[b, 1], sides[c, 2]] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    return own.index_to_world(np.array(corners, float))


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

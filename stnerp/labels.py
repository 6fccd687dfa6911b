"""Labels of the reference, drawn where a deformation carries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError
from stnerp.geometry import Grid, slabs
from stnerp.io.image import to_labels

Interpolation = Literal["majority", "nearest"]


def carried_labels(
    mask: sitk.Image,
    grid: Grid,
    target_to_reference: Callable[[np.ndarray], np.ndarray],
    interpolation: Interpolation = "majority",
) -> sitk.Image:
    """A mask of the reference pulled back through a deformation; 0 where it has nothing to say.

    Args:
        mask: labels in the reference's world space, on any grid.
        grid: where to draw them.
        target_to_reference: points (..., 3) to points (..., 3), LPS mm.
        interpolation: which of the eight labels around φ(p) a voxel p gets. "majority": the one with
            the largest trilinear weight; for a binary mask, linear interpolation cut at one half.
            "nearest": the nearest voxel's (the paper's Eq. 7, 8).

    Returns:
        A label image on `grid`, in the mask's type.

    Raises:
        InputError: an unknown interpolation, or a mask that isn't one whole number per voxel.
    """
    if interpolation not in ("majority", "nearest"):
        raise InputError(f"interpolation: unknown {interpolation!r}; give majority or nearest")
    source = Grid.of(mask)
    if mask.GetNumberOfComponentsPerPixel() != 1:
        raise InputError("mask: expected one label per voxel")
    to_labels(mask, "mask")  # refuses probabilities
    labels = sitk.GetArrayViewFromImage(mask)
    read = nearest_label if interpolation == "nearest" else majority_label
    carried = np.zeros(grid.shape, labels.dtype)
    for part, points_mm in slabs(grid):
        reference_mm = target_to_reference(points_mm)
        inside = source.contains(reference_mm)
        carried[part][inside] = read(labels, source.world_to_index(reference_mm[inside]))
    return grid.image(carried)


def nearest_label(labels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Labels (z, y, x) at the voxels nearest to continuous indices (N, 3)."""
    last = np.array(labels.shape[::-1]) - 1
    x, y, z = np.clip(np.rint(index), 0, last).astype(int).T
    return labels[z, y, x]


def majority_label(labels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Labels (z, y, x) at continuous indices (N, 3): of the eight around each, that with the largest weight."""
    last = np.array(labels.shape[::-1]) - 1
    lower = np.floor(index).astype(int)
    fraction = index - lower
    corners = [(dx, dy, dz) for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)]
    around = np.empty((8, len(index)), labels.dtype)
    weight = np.empty((8, len(index)))
    for k, corner in enumerate(corners):
        x, y, z = np.clip(lower + corner, 0, last).T
        around[k] = labels[z, y, x]
        weight[k] = np.prod(np.where(corner, fraction, 1 - fraction), axis=1)
    best, most = around[0].copy(), np.zeros(len(index))
    for k in range(8):
        votes = (weight * (around == around[k])).sum(0)
        better = votes > most
        best[better], most[better] = around[k][better], votes[better]
    return best

"""What of an image its scanner saw: a round field of view, padded to fill a square.

Where the circle cuts the body, as in cone beam CT, its edge is no edge of the body: what lies beyond hasn't been
seen, and where images are compared it mustn't count. Padding is told from air by being the same in all slices, up
to a circle along which tissues change. (Around a sphere or a cylinder in an image without noise there is a circle
too, but along it nothing changes.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from stnerp.geometry import Grid

EDGE = 1.5  # voxels inside the circle that interpolation may have mixed with padding
ON_THE_CIRCLE = 0.75  # voxels, by which nearly all of the padding's border may be off
RADII = (0.2, 0.75)  # of the longer and of the shorter side: a circle that leaves all four corners
ACROSS = 1.6  # how much longer than wide a voxel may be across the circle
RIM = 3  # voxels wide, within the circle
TOUCHED = 0.4  # of the rim that isn't padding's value, which air that was clipped has too
ALL_SEEN = 0.999  # of what a point between voxels is read from
SECTORS = 24  # in which noise averages out
CHANGES = 0.1  # of what tells the rim from padding: along it there is more than one thing, and more than noise


@dataclass(frozen=True, eq=False)
class RoundView:
    """The part of an image that was seen: a cylinder along one axis.

    Attributes:
        axis: of the array (z, y, x), along which slices follow each other.
        circle: (rows, columns) of a slice, bool.
        slices: those that aren't padding as a whole.
    """

    axis: int
    circle: np.ndarray
    slices: slice

    def seen(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Which voxels were seen, bool (z, y, x)."""
        seen = np.zeros(shape, dtype=bool)
        np.moveaxis(seen, self.axis, 0)[self.slices] = self.circle
        return seen

    def continued(self, array: np.ndarray) -> np.ndarray:
        """The image (z, y, x) with the nearest value that was seen where nothing was: padding makes no edges."""
        nearest = ndimage.distance_transform_edt(~self.circle, return_distances=False, return_indices=True)
        slices = np.moveaxis(array, self.axis, 0)
        rows = np.clip(np.arange(len(slices)), self.slices.start, self.slices.stop - 1)
        return np.ascontiguousarray(np.moveaxis(slices[(rows[:, None, None], *nearest)], 0, self.axis))


def round_view(image: sitk.Image) -> RoundView | None:
    """The round field of view in a 3D image; None: the image isn't padded around a circle."""
    array, grid = sitk.GetArrayViewFromImage(image), Grid.of(image)
    for axis in range(3):
        slices = np.moveaxis(array, axis, 0)
        padding = slices[0, 0, 0]
        spacing_mm = np.delete(grid.spacing_mm[::-1], axis)
        if spacing_mm.max() > ACROSS * spacing_mm.min():
            continue
        if not all((slices[:, row, column] == padding).all() for row in (0, -1) for column in (0, -1)):
            continue
        circle = _circle(np.logical_and.reduce(slices == padding, axis=0), spacing_mm)
        if circle is None:
            continue
        filled = np.flatnonzero((slices[:, circle] != padding).any(axis=1))
        if filled.size == 0:
            continue  # the wall of an empty tube
        view = RoundView(axis, circle, slice(int(filled[0]), int(filled[-1]) + 1))
        rim = circle & ~ndimage.binary_erosion(circle, iterations=RIM)
        if _is_cut(slices[view.slices, rim].astype(float) - float(padding), _sectors(rim)):
            return view
    return None


def saw(image: sitk.Image, points_mm: np.ndarray) -> np.ndarray:
    """Whether points (..., 3), LPS mm, lie in an image, and in its round field of view if there is one."""
    grid, view = Grid.of(image), round_view(image)
    inside = grid.contains(points_mm)
    if view is None:
        return inside
    index = np.moveaxis(grid.world_to_index(points_mm)[..., ::-1], -1, 0)
    seen = view.seen(grid.shape).astype(np.float32)
    within: np.ndarray = ndimage.map_coordinates(seen, index, order=1, mode="nearest") > ALL_SEEN
    return inside & within


def _is_cut(rim: np.ndarray, sectors: np.ndarray) -> bool:
    """Whether what is next to a circle (slices, voxels), less the padding, goes on beyond it."""
    in_each_slice = (rim != 0).mean(axis=1) > TOUCHED  # a ball touches its circle in few slices
    means = np.stack([np.bincount(sectors, values) for values in rim]) / np.bincount(sectors)
    low, high = np.quantile(means, (0.1, 0.9))
    return bool(in_each_slice.mean() > 0.9 and high - low > CHANGES * max(abs(low), abs(high)))


def _sectors(rim: np.ndarray) -> np.ndarray:
    """Which of `SECTORS` parts of a ring each of its voxels lies in, numbered without gaps."""
    y, x = (np.argwhere(rim) - np.argwhere(rim).mean(axis=0)).T
    return np.unique(np.floor(np.arctan2(y, x) / (2 * np.pi) * SECTORS), return_inverse=True)[1]


def _circle(padded: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray | None:
    """The inside of the circle that the padding in a slice's corners leaves free; None: that is no circle."""
    parts, _ = ndimage.label(padded)
    padding = np.isin(parts, parts[[0, 0, -1, -1], [0, -1, 0, -1]])
    free, count = ndimage.label(~padding)
    if count > 1:  # of the others all but the largest part are damaged pixels, or text
        padding = free != 1 + np.argmax(np.bincount(free.ravel())[1:])
    border = np.argwhere(padding & ndimage.binary_dilation(~padding)) * spacing_mm
    if len(border) < 4:
        return None
    # |p|² = 2 c·p + (r² − |c|²) for each of its points p (Kåsa 1976)
    unknowns = np.column_stack([2 * border, np.ones(len(border))])
    (*centre, rest), *_ = np.linalg.lstsq(unknowns, (border**2).sum(axis=1), rcond=None)
    radius = np.sqrt(max(rest + np.square(centre).sum(), 0.0))
    voxel_mm, sides_mm = spacing_mm.max(), np.asarray(padded.shape) * spacing_mm
    off_mm = np.abs(np.linalg.norm(border - centre, axis=1) - radius)
    is_round = np.quantile(off_mm, 0.95) < ON_THE_CIRCLE * spacing_mm.min()
    if not (is_round and RADII[0] * sides_mm.max() < radius < RADII[1] * sides_mm.min()):
        return None
    y, x = (np.arange(n) * step_mm for n, step_mm in zip(padded.shape, spacing_mm, strict=True))
    inside: np.ndarray = np.hypot(y[:, None] - centre[0], x - centre[1]) < radius - EDGE * voxel_mm
    return inside if (inside & ~padding).any() else None

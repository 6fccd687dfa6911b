"""Closed planar contours and the masks that they bound: both ways, on grids of any orientation.

Contours are drawn slice by slice. In a plane they combine by the even-odd rule: a contour within another one
is a hole, one within that an island; DICOM's keyhole (a hole joined to the outside by a channel that is walked
there and back) comes out right too. Between planes the shape is interpolated through its signed distances
(Raya & Udupa, IEEE TMI 9, 1990), which leaves it as drawn where a slice of the grid is a contours' plane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates
from skimage.measure import find_contours

from stnerp.errors import InputError
from stnerp.geometry import Grid, slabs

#: How far points may lie off their plane, and contours of one plane from another: coordinates are rounded.
FLAT_MM = 0.1
#: Planes farther apart than this are never neighbours: a contour doesn't say that much about its surroundings.
LARGEST_GAP_MM = 10.0
# A slice this near to a contours' plane, in slice distances, shows the contours as drawn.
_SAME_SLICE = 0.01


def contour_mask(contours: Sequence[np.ndarray], grid: Grid, thickness_mm: float | None = None) -> np.ndarray:
    """Whether the centre of each voxel lies inside the contours of one structure.

    Two planes are neighbours, with the shape interpolated between them, if at most one plane is missing
    between them (they lie at most twice as far apart as the nearest two, and at most `LARGEST_GAP_MM`).
    Where more is missing the parts are taken for separate. The first and the last plane of a part reach
    half a thickness further, as a slice of the scan does.

    Args:
        contours: closed polygons (N, 3), LPS mm, each in a plane, all planes parallel; the first point isn't
            repeated.
        grid: of any orientation and spacing.
        thickness_mm: what one plane stands for if the contours don't tell it, being in one plane or far
            apart. None: the grid's own slice distance.

    Returns:
        bool (z, y, x).

    Raises:
        InputError: no contours, a contour that isn't planar, or planes that aren't parallel.
    """
    stack, axis = _stack(contours, grid, thickness_mm)
    inside = np.zeros(grid.shape, bool)
    box = _box(stack, grid)
    if box is None:
        return inside
    (x, y, z), part = box, _part(grid, box)
    inside[z, y, x] = _sampled(stack, part) if axis is None else _slice_by_slice(stack, part, axis)
    return inside


def plane_distance_mm(contours: Sequence[np.ndarray]) -> float | None:
    """The smallest distance between neighbouring planes; None where there is one plane, or none nearer than
    `LARGEST_GAP_MM`.

    Raises:
        InputError: as `contour_mask`.
    """
    gaps = np.diff(_planes(contours, _normal(contours))[0])
    near = gaps[gaps <= LARGEST_GAP_MM]
    return float(near.min()) if len(near) else None


def mask_contours(mask: np.ndarray, grid: Grid) -> list[list[np.ndarray]]:
    """The contours of a mask in each slice of its grid, where it crosses one half.

    They run midway between voxel centres inside and outside, so that a mask is found again exactly on its own
    grid, and cut corners: an outline surrounds half a pixel less than its pixels do.

    Args:
        mask: (z, y, x); bool, or values from 0 to 1, whose contours are finer than a voxel.
        grid: of the mask.

    Returns:
        For each slice its closed polygons (N, 3), LPS mm, first point not repeated; outlines and holes alike,
        to be combined by the even-odd rule.

    Raises:
        InputError: a mask that doesn't fit the grid.
    """
    if mask.shape != grid.shape:
        raise InputError(f"mask: shape {mask.shape} does not fit the grid's {grid.shape}")
    return [list(_outlines(values, k, grid)) for k, values in enumerate(mask)]


def _outlines(values: np.ndarray, k: int, grid: Grid) -> Iterator[np.ndarray]:
    if not np.any(values > 0.5):
        return
    # Air all around closes what reaches the image's border.
    for outline in find_contours(np.pad(np.asarray(values, float), 1), 0.5):
        row, column = outline[:-1].T - 1
        yield grid.index_to_world(np.stack([column, row, np.full(len(row), float(k))], axis=-1))


# -- contours in parallel planes


@dataclass(frozen=True)
class _Stack:
    """Contours by plane.

    Attributes:
        normal: unit vector (3,).
        offsets_mm: of the planes along the normal, increasing, (P,).
        planes: the polygons (N, 3), LPS mm, of each.
        thickness_mm: that a plane stands for.
    """

    normal: np.ndarray
    offsets_mm: np.ndarray
    planes: tuple[tuple[np.ndarray, ...], ...]
    thickness_mm: float

    def between(self, offset_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where positions along the normal lie: 2.5 is midway between planes 2 and 3; and whether the
        structure reaches there at all."""
        last = len(self.offsets_mm) - 1
        lower = np.clip(np.searchsorted(self.offsets_mm, offset_mm, side="right") - 1, 0, last)
        upper = np.minimum(lower + 1, last)
        gap = self.offsets_mm[upper] - self.offsets_mm[lower]
        # Above the last plane the gap is 0, and the fraction too.
        fraction = np.clip((offset_mm - self.offsets_mm[lower]) / np.where(gap > 0, gap, np.inf), 0, 1)
        apart = gap > min(2 * self.thickness_mm, LARGEST_GAP_MM) + FLAT_MM
        fraction = np.where(apart, np.rint(fraction), fraction)
        beyond = offset_mm - self.offsets_mm[np.where(fraction > 0.5, upper, lower)]
        # Half-open, so that two slices midway between planes are never both counted.
        nudged = beyond - FLAT_MM * 1e-3
        half = self.thickness_mm / 2
        within = (fraction > 0) & (fraction < 1) | (-half <= nudged) & (nudged < half)
        return lower + fraction, within


def _stack(contours: Sequence[np.ndarray], grid: Grid, thickness_mm: float | None) -> tuple[_Stack, int | None]:
    """The contours by plane, and the axis of the grid that is normal to the planes, or None."""
    if not contours:
        raise InputError("contours: there are none")
    axes = np.reshape(grid.direction, (3, 3)).T
    off_plane = [_off_plane_mm(contours, along) for along in axes]
    axis = int(np.argmin(off_plane))
    aligned = off_plane[axis] <= FLAT_MM and np.allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    normal = axes[axis] if aligned else _normal(contours)
    offsets_mm, planes = _planes(contours, normal)
    gaps = np.diff(offsets_mm)
    near = gaps[gaps <= LARGEST_GAP_MM]
    if len(near):
        thickness_mm = float(near.min())
    elif thickness_mm is None:
        thickness_mm = grid.spacing_mm[int(np.argmax(np.abs(axes @ normal)))]
    return _Stack(normal, offsets_mm, planes, thickness_mm), axis if aligned else None


def _normal(contours: Sequence[np.ndarray]) -> np.ndarray:
    """Of the planes that the contours lie in."""
    centred = np.concatenate([points - points.mean(0) for points in contours])
    normal = np.linalg.svd(centred, full_matrices=False)[2][-1]
    off_plane_mm = _off_plane_mm(contours, normal)
    if off_plane_mm > FLAT_MM:
        raise InputError(
            f"contours: they don't lie in parallel planes, points are up to {off_plane_mm:.2g} mm off; "
            "export them as closed planar contours"
        )
    return normal


def _off_plane_mm(contours: Sequence[np.ndarray], normal: np.ndarray) -> float:
    return max(float(np.abs((points - points.mean(0)) @ normal).max()) for points in contours)


def _planes(
    contours: Sequence[np.ndarray], normal: np.ndarray
) -> tuple[np.ndarray, tuple[tuple[np.ndarray, ...], ...]]:
    """Offsets (P,) along the normal, increasing, and the polygons of each plane."""
    offsets = np.array([float((points @ normal).mean()) for points in contours])
    order = np.argsort(offsets, kind="stable")
    starts = np.flatnonzero(np.diff(offsets[order], prepend=-np.inf) > FLAT_MM)
    groups = np.split(order, starts[1:])
    planes = tuple(tuple(contours[i] for i in group) for group in groups)
    return np.array([offsets[group].mean() for group in groups]), planes


# -- on a grid


def _box(stack: _Stack, grid: Grid) -> tuple[slice, slice, slice] | None:
    """The voxels x, y, z around the contours, or None if they lie outside the grid."""
    points = np.concatenate([polygon for plane in stack.planes for polygon in plane])
    reach = stack.normal * stack.thickness_mm / 2
    index = grid.world_to_index(np.concatenate([points - reach, points + reach]))
    first = np.clip(np.floor(index.min(0)).astype(int) - 1, 0, None)
    stop = np.clip(np.ceil(index.max(0)).astype(int) + 2, None, grid.size)
    if np.any(first >= stop):
        return None
    x, y, z = (slice(int(i), int(j)) for i, j in zip(first, stop, strict=True))
    return x, y, z


def _part(grid: Grid, box: tuple[slice, slice, slice]) -> Grid:
    x, y, z = box
    ox, oy, oz = grid.index_to_world(np.array([x.start, y.start, z.start], float)).tolist()
    size = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
    return Grid(size, grid.spacing_mm, (ox, oy, oz), grid.direction)


def _slice_by_slice(stack: _Stack, grid: Grid, axis: int) -> np.ndarray:
    """On a grid whose slices, across any of its axes, are parallel to the planes."""
    u, v = (other for other in range(3) if other != axis)
    shape = grid.size[v], grid.size[u]
    spacing = grid.spacing_mm[v], grid.spacing_mm[u]
    drawn = [_even_odd([grid.world_to_index(polygon)[:, [v, u]] for polygon in plane], shape)
             for plane in stack.planes]  # fmt: skip
    slices_mm = float(np.array(grid.origin_mm) @ stack.normal) + np.arange(grid.size[axis]) * grid.spacing_mm[axis]
    place, within = stack.between(slices_mm)
    inside = np.zeros((grid.size[axis], *shape), bool)
    for k in np.flatnonzero(within):
        nearest = round(place[k])
        if abs(place[k] - nearest) < _SAME_SLICE:
            inside[k] = drawn[nearest]
        else:
            lower = int(place[k])
            below, above = (_distance_mm(drawn[i], spacing) for i in (lower, lower + 1))
            inside[k] = below + (place[k] - lower) * (above - below) > 0
    # From (axis, v, u) to (z, y, x).
    order = (axis, v, u)
    return inside.transpose([order.index(i) for i in (2, 1, 0)])


def _sampled(stack: _Stack, grid: Grid) -> np.ndarray:
    """On an oblique grid: distances on a lattice in the planes, twice as fine as the grid, read at its voxels."""
    step = min(grid.spacing_mm) / 2
    u = np.cross(stack.normal, np.eye(3)[np.argmin(np.abs(stack.normal))])
    u /= np.linalg.norm(u)
    across = np.stack([np.cross(stack.normal, u), u])  # v, u
    flat = [[polygon @ across.T for polygon in plane] for plane in stack.planes]
    every = np.concatenate([points for plane in flat for points in plane])
    corner = every.min(0) - 2 * step
    rows, columns = (np.ceil((every.max(0) - corner) / step).astype(int) + 3).tolist()
    distances_mm = np.stack(
        [
            _distance_mm(_even_odd([(points - corner) / step for points in plane], (rows, columns)), (step, step))
            for plane in flat
        ]
    )
    inside = np.empty(grid.shape, bool)
    for part, points_mm in slabs(grid):
        place, within = stack.between(points_mm @ stack.normal)
        where = [place, *np.moveaxis((points_mm @ across.T - corner) / step, -1, 0)]
        inside[part] = within & (map_coordinates(distances_mm, where, order=1, mode="nearest") > 0)
    return inside


def _even_odd(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside an odd number of polygons (N, 2) of rows and columns.

    Row by row, by the number of borders to the left of a pixel: a hundred times quicker than to ask of every
    pixel whether it lies in a polygon. Borders are half-open, so that a pixel between two polygons belongs to one.
    """
    borders = np.zeros((shape[0], shape[1] + 1), np.int32)
    for polygon in polygons:
        edges = np.stack([polygon, np.roll(polygon, -1, axis=0)])
        # The same from either side: a keyhole's channel, walked there and back, must cancel to the last digit.
        low, high = np.take_along_axis(edges, np.argsort(edges[..., :1], axis=0), axis=0)
        first, stop = (np.ceil(ends[:, 0]).astype(int).clip(0, shape[0]) for ends in (low, high))
        count = stop - first
        edge = np.repeat(np.arange(len(count)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
        along = (row - low[edge, 0]) / (high[edge, 0] - low[edge, 0])
        column = low[edge, 1] + along * (high[edge, 1] - low[edge, 1])
        np.add.at(borders, (row, np.ceil(column).astype(int).clip(0, shape[1])), 1)
    return np.cumsum(borders, axis=1)[:, :-1] % 2 == 1


def _distance_mm(inside: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """About the distance to the border, (rows, columns), float32: positive inside, negative outside."""
    far = float(np.hypot(*(np.array(inside.shape) * spacing_mm)))
    if not inside.any() or inside.all():
        return np.full(inside.shape, far if inside.any() else -far, np.float32)
    half = min(spacing_mm) / 2  # the border lies between the pixels
    within = distance_transform_edt(inside, sampling=spacing_mm) - half
    beyond = distance_transform_edt(~inside, sampling=spacing_mm) - half
    return np.where(inside, within, -beyond).astype(np.float32)

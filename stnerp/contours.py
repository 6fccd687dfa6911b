"""Closed planar contours and the masks that they bound: both ways, on grids of any orientation.

Contours are drawn slice by slice. In a plane they combine by the even-odd rule: a contour within another one
is a hole, one within that an island; DICOM's keyhole (a hole joined to the outside by a channel that is walked
there and back) comes out right too. Between planes the shape is interpolated through its signed distances
(Raya & Udupa, IEEE TMI 9, 1990), which leaves it as drawn where a slice of the grid is a contours' plane.

Masks know a border to half a voxel. `Solid` knows it to a fraction of that, and so do the contours of it that
`carried_contours` draws where a deformation takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates
from scipy.spatial import cKDTree
from skimage.measure import find_contours

from stnerp.errors import InputError
from stnerp.geometry import Grid, slabs

#: How far points may lie off their plane, and contours of one plane from another: coordinates are rounded.
FLAT_MM = 0.1
#: Planes farther apart than this are never neighbours: a contour doesn't say that much about its surroundings.
LARGEST_GAP_MM = 10.0
# Contours nearer to a plane than this share of the planes' distance belong to it, unless both are sections of the
# structure: they have so much of the larger one's area in common.
_STRAY, _SAME_SECTION = 1 / 3, 1 / 4
# A slice this near to a contours' plane, in slice distances, shows the contours as drawn.
_SAME_SLICE = 0.01
# Steps of a solid's lattice across a structure: finer ones are kept for small structures only.
_LATTICE = 256
# Borders are looked for this far around the carried contours' points: between them the border may bulge.
_MARGIN_MM = 10.0


def contour_mask(contours: Sequence[np.ndarray], grid: Grid, thickness_mm: float | None = None) -> np.ndarray:
    """Whether the centre of each voxel lies inside the contours of one structure.

    Two planes are neighbours, with the shape interpolated between them, if at most one plane is missing
    between them: they lie at most twice as far apart as most are or as those next to them, and at most
    `LARGEST_GAP_MM`. Where more is missing the parts are taken for separate. The first and the last plane of a
    part reach half a thickness further, as a slice of the scan does; the median distance is the thickness.
    Stray contours beside a plane, less than a third of a thickness off, belong to it.

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
    points, reach_mm = stack.points(), stack.normal * stack.thickness_mm / 2
    part = _around(np.concatenate([points - reach_mm, points + reach_mm]), grid)
    if part is None:
        return inside
    where = part.within(grid)
    if axis is not None:
        inside[where] = _slice_by_slice(stack, part, axis)
        return inside
    solid = Solid(stack, min(grid.spacing_mm) / 2)
    for slices, points_mm in slabs(part):
        inside[where][slices] = solid.distance_mm(points_mm) > 0
    return inside


def plane_distance_mm(contours: Sequence[np.ndarray]) -> float | None:
    """The median distance between neighbouring planes; None where there is one plane, or none nearer than
    `LARGEST_GAP_MM`.

    Raises:
        InputError: as `contour_mask`.
    """
    return _distance_apart_mm(_planes(contours, _normal(contours))[0])


def contour_volume(contours: Sequence[np.ndarray], thickness_mm: float) -> tuple[float, np.ndarray]:
    """Volume in ml and centroid (3,), LPS mm, of what contours bound, without any voxels.

    Each plane's area counts for half the way to its neighbours, as `contour_mask` has them, and at the ends for
    half a thickness.

    Args:
        contours: as of `contour_mask`.
        thickness_mm: what one plane stands for if the contours don't tell it.

    Raises:
        InputError: as `contour_mask`.
    """
    if not contours:
        raise InputError("contours: there are none")
    stack = _Stack.of(contours, _normal(contours), thickness_mm)
    ways_mm = np.where(stack.joined, np.diff(stack.offsets_mm), stack.thickness_mm)
    ways_mm = np.pad(ways_mm, 1, constant_values=stack.thickness_mm)
    volume, moment = 0.0, np.zeros(3)
    heights_mm = (ways_mm[:-1] + ways_mm[1:]) / 2
    for height_mm, offset_mm, plane in zip(heights_mm, stack.offsets_mm, stack.planes, strict=True):
        area, middle = _area_and_moment([polygon @ stack.across.T for polygon in plane])
        volume += area * height_mm
        moment += height_mm * (middle @ stack.across + area * offset_mm * stack.normal)
    return volume / 1000, moment / volume if volume > 0 else np.full(3, np.nan)


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


def keyholes(outlines: Sequence[np.ndarray], grid: Grid) -> list[np.ndarray]:
    """The same area by polygons without holes: each hole is joined to the outline around it.

    The channel between them, where they are nearest, is walked there and back and so has no width. Holes run
    against the outline: the area is the same by the even-odd and by the non-zero rule.

    Args:
        outlines: closed polygons (N, 3), LPS mm, that don't cross, of one slice; combined by the even-odd rule.
        grid: whose slices are parallel to theirs.

    Returns:
        Polygons (N, 3) of which none lies in another's area, in the order of their outlines.
    """
    if len(outlines) < 2:
        return list(outlines)
    flat = [grid.world_to_index(points)[:, :2] for points in outlines]
    within = _nested(flat)
    depth = _depth(within)

    def holes(i: int) -> list[np.ndarray]:
        inner = [j for j in np.flatnonzero(within[:, i]).tolist() if depth[j] == depth[i] + 1]
        return [outlines[j] if _area(flat[j]) * _area(flat[i]) < 0 else outlines[j][::-1] for j in inner]

    return [_joined(outlines[i], holes(i)) for i in range(len(outlines)) if depth[i] % 2 == 0]


def _joined(outline: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """One walk (N, 3) along an outline and its holes. The nearest hole comes first, so that no channel crosses
    another hole."""
    while holes:
        ways = [cKDTree(outline).query(hole) for hole in holes]
        nearest = int(np.argmin([distances.min() for distances, _ in ways]))
        distances, where = ways[nearest]
        start = int(distances.argmin())
        at = int(where[start])
        hole = np.roll(holes[nearest], -start, axis=0)
        outline = np.concatenate([outline[: at + 1], hole, hole[:1], outline[at:]])
        holes = holes[:nearest] + holes[nearest + 1 :]
    return outline


def _nested(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Whether polygon i lies in polygon j, (N, N), of polygons (N, 2) that don't cross."""
    low, high = (np.array([extreme(points, axis=0) for points in polygons]) for extreme in (np.min, np.max))
    starts = np.array([points[0] for points in polygons])
    within = np.all((low <= starts[:, None]) & (starts[:, None] <= high), axis=-1)
    np.fill_diagonal(within, False)
    for i, j in np.argwhere(within):
        within[i, j] = _contains(polygons[j], starts[i])
    return within


def _depth(nested: np.ndarray) -> list[int]:
    """In how many others each polygon lies: holes in an odd number."""
    return nested.sum(1).tolist()


def _contains(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Whether a point lies in a polygon (N, 2): an odd number of its edges cross the ray to the right."""
    x, y = point
    ends = np.roll(polygon, -1, axis=0)
    crossing = (polygon[:, 1] > y) != (ends[:, 1] > y)
    (x0, y0), (x1, y1) = polygon[crossing].T, ends[crossing].T
    return bool(np.count_nonzero(x < x0 + (y - y0) / (y1 - y0) * (x1 - x0)) % 2)


def _area(polygon: np.ndarray) -> float:
    """Of a polygon (N, 2), signed: the other sign the other way round."""
    x, y = polygon.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _area_and_moment(polygons: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Area and first moment (2,) of what lies inside an odd number of polygons (N, 2), whatever way they run.

    Exact where they don't cross: between two corners borders are straight, and two rows there (Gauss) do for the
    moments' squares. Where they cross it is right but for a strip, one of 256 or more.
    """
    corners = np.concatenate(polygons)[:, 0]
    corners = np.unique(np.append(corners, np.linspace(corners.min(), corners.max(), 257)))
    half = np.diff(corners)[:, None] / 2
    rows = (corners[:-1, None] + half + half * [-1, 1] / np.sqrt(3)).ravel()
    row, column = _crossings(polygons, rows)
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    # From one border to the next it is inside, to the one after that outside.
    length = half[row // 2, 0] * np.resize([-1, 1], len(row)) * column
    return float(length.sum()), np.array([length @ rows[row], length @ column / 2])


def _crossings(polygons: Sequence[np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows, increasing, the borders of polygons (N, 2) of rows and columns cross, and in which columns.

    Borders are half-open, so that they cross each row an even number of times.
    """
    edges = np.stack([np.concatenate(polygons), np.concatenate([np.roll(p, -1, axis=0) for p in polygons])])
    # The same from either side: a keyhole's channel, walked there and back, must cancel to the last digit.
    low, high = np.take_along_axis(edges, np.argsort(edges[..., :1], axis=0), axis=0)
    first, stop = (np.searchsorted(rows, ends[:, 0]) for ends in (low, high))
    count = stop - first
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
    along = (rows[row] - low[edge, 0]) / (high[edge, 0] - low[edge, 0])
    return row, low[edge, 1] + along * (high[edge, 1] - low[edge, 1])


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

    @staticmethod
    def of(contours: Sequence[np.ndarray], normal: np.ndarray, thickness_mm: float) -> _Stack:
        """`thickness_mm`: where the planes' distances don't tell it."""
        offsets_mm, planes = _planes(contours, normal)
        return _Stack(normal, offsets_mm, planes, _distance_apart_mm(offsets_mm) or thickness_mm)

    @property
    def across(self) -> np.ndarray:
        """Two unit vectors in the planes, (2, 3)."""
        return _across(self.normal)

    @property
    def joined(self) -> np.ndarray:
        """Whether a plane and the next one are neighbours, (P - 1,): at most one plane is missing."""
        gaps_mm = np.diff(self.offsets_mm)
        near_mm = np.pad(np.where(gaps_mm <= LARGEST_GAP_MM, gaps_mm, 0), 1)
        # Where the distance changes, the larger one counts.
        usual_mm = np.maximum(np.maximum(near_mm[:-2], near_mm[2:]), self.thickness_mm)
        return gaps_mm <= np.minimum(2 * usual_mm, LARGEST_GAP_MM) + FLAT_MM

    def points(self) -> np.ndarray:
        """Of all contours, (N, 3), LPS mm."""
        return np.concatenate([polygon for plane in self.planes for polygon in plane])

    def between(self, offset_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where positions along the normal lie: 2.5 is midway between planes 2 and 3; and how far in mm the
        structure reaches beyond them (infinitely between planes, negative where it doesn't get there)."""
        last = len(self.offsets_mm) - 1
        lower = np.clip(np.searchsorted(self.offsets_mm, offset_mm, side="right") - 1, 0, last)
        upper = np.minimum(lower + 1, last)
        gap = self.offsets_mm[upper] - self.offsets_mm[lower]
        # Above the last plane the gap is 0, and the fraction too.
        fraction = np.clip((offset_mm - self.offsets_mm[lower]) / np.where(gap > 0, gap, np.inf), 0, 1)
        fraction = np.where(np.append(self.joined, True)[lower], fraction, np.rint(fraction))
        beyond = offset_mm - self.offsets_mm[np.where(fraction > 0.5, upper, lower)]
        # Half-open, so that two slices midway between planes are never both counted.
        nudged = beyond - FLAT_MM * 1e-3
        reach_mm = np.where((fraction > 0) & (fraction < 1), np.inf, self.thickness_mm / 2 - np.abs(nudged))
        return lower + fraction, reach_mm


def _stack(contours: Sequence[np.ndarray], grid: Grid, thickness_mm: float | None) -> tuple[_Stack, int | None]:
    """The contours by plane, and the axis of the grid that is normal to the planes, or None."""
    if not contours:
        raise InputError("contours: there are none")
    axes = np.reshape(grid.direction, (3, 3)).T
    off_plane = [_off_plane_mm(contours, along) for along in axes]
    axis = int(np.argmin(off_plane))
    aligned = off_plane[axis] <= FLAT_MM and np.allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    normal = axes[axis] if aligned else _normal(contours)
    if thickness_mm is None:
        thickness_mm = grid.spacing_mm[int(np.argmax(np.abs(axes @ normal)))]
    return _Stack.of(contours, normal, thickness_mm), axis if aligned else None


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
    """Offsets (P,) along the normal, increasing, and the polygons of each plane, with stray ones beside it."""
    offsets = np.array([float((points @ normal).mean()) for points in contours])
    order = np.argsort(offsets, kind="stable")
    starts = np.flatnonzero(np.diff(offsets[order], prepend=-np.inf) > FLAT_MM)
    groups = np.split(order, starts[1:])
    offsets_mm = [float(offsets[group].mean()) for group in groups]
    planes = [tuple(contours[i] for i in group) for group in groups]
    stray_mm, i = _STRAY * (_distance_apart_mm(np.array(offsets_mm)) or 0.0), 0
    while i + 1 < len(planes):
        near = offsets_mm[i + 1] - offsets_mm[i] < stray_mm
        larger = _completed(planes[i], planes[i + 1], _across(normal)) if near else None
        if larger is None:
            i += 1
        else:
            offsets_mm[i : i + 2] = [offsets_mm[i + larger]]
            planes[i : i + 2] = [planes[i] + planes[i + 1]]
    return np.array(offsets_mm), tuple(planes)


def _completed(first: Sequence[np.ndarray], second: Sequence[np.ndarray], across: np.ndarray) -> int | None:
    """Which of two planes, 0 or 1, the other one's contours belong to; None: both are the structure's sections."""
    areas = [_area_and_moment([polygon @ across.T for polygon in plane])[0]
             for plane in (first, second, [*first, *second])]  # fmt: skip
    shared = (areas[0] + areas[1] - areas[2]) / 2
    return None if shared >= _SAME_SECTION * max(areas[:2]) else int(areas[1] > areas[0])


def _distance_apart_mm(offsets_mm: np.ndarray) -> float | None:
    """Of planes from their neighbours, the median, which a stray one leaves as it is."""
    gaps_mm = np.diff(offsets_mm)
    near_mm = gaps_mm[gaps_mm <= LARGEST_GAP_MM].tolist()
    return median_low(near_mm) if near_mm else None


def _across(normal: np.ndarray) -> np.ndarray:
    """Two unit vectors (2, 3) at right angles to one."""
    u = np.cross(normal, np.eye(3)[np.argmin(np.abs(normal))])
    u /= np.linalg.norm(u)
    return np.stack([np.cross(normal, u), u])


# -- finer than a voxel


class Solid:
    """What contours bound, known at any point by a signed distance.

    In a plane it is the distance to the border, between planes it is interpolated as by `contour_mask`, and the
    ends are flat: where the outermost contours are cut off.

    Args:
        stack: the contours, by plane.
        step_mm: of the lattice in each plane on which distances are kept; it doesn't see what is thinner.
        near_mm: how far from the border its nodes know the exact distance; None: two steps. Farther it is
            known to half a step.
    """

    def __init__(self, stack: _Stack, step_mm: float, near_mm: float | None = None) -> None:
        self._stack, self._step_mm = stack, step_mm
        flat = [[polygon @ stack.across.T for polygon in plane] for plane in stack.planes]
        every = np.concatenate([points for plane in flat for points in plane])
        near = 2.0 if near_mm is None else near_mm / step_mm
        self._corner = every.min(0) - near * step_mm
        rows, columns = (np.ceil((every.max(0) - self._corner) / step_mm + near).astype(int) + 1).tolist()
        self._steps = np.stack(
            [
                _distance([(points - self._corner) / step_mm for points in plane], (rows, columns), near)
                for plane in flat
            ]
        )

    @staticmethod
    def of(contours: Sequence[np.ndarray], thickness_mm: float | None = None, pixel_mm: float = 1.0) -> Solid:
        """The solid of one structure.

        Args:
            contours: as of `contour_mask`.
            thickness_mm: what one plane stands for if the contours don't tell it; None: a pixel.
            pixel_mm: of the slices in which the contours are to be drawn, its longer side. The lattice's step,
                for a small structure a fraction of it.

        Raises:
            InputError: as `contour_mask`.
        """
        if not contours:
            raise InputError("contours: there are none")
        stack = _Stack.of(contours, _normal(contours), pixel_mm if thickness_mm is None else thickness_mm)
        extent_mm = float(np.ptp(stack.points(), axis=0).max())
        return Solid(stack, float(np.clip(extent_mm / _LATTICE, pixel_mm / 4, pixel_mm)), 2 * pixel_mm)

    @property
    def points_mm(self) -> np.ndarray:
        """Of all contours, and above and below where the ends are flat, (N, 3), LPS mm."""
        points, reach = self._stack.points(), self._stack.normal * self._stack.thickness_mm / 2
        return np.concatenate([points - reach, points + reach])

    def distance_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Signed distance (...,) of points (..., 3), LPS mm: positive inside. Outside the lattice it stays what it
        is at its edge, about `near_mm`."""
        return np.minimum(*self.parts_mm(points_mm))

    def parts_mm(self, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance to the border that the contours make, and to the ends where they are cut off."""
        place, reach_mm = self._stack.between(points_mm @ self._stack.normal)
        where = [place, *np.moveaxis((points_mm @ self._stack.across.T - self._corner) / self._step_mm, -1, 0)]
        return map_coordinates(self._steps, where, order=1, mode="nearest") * self._step_mm, reach_mm


def carried_contours(
    solid: Solid,
    grid: Grid,
    target_to_reference: Callable[[np.ndarray], np.ndarray],
    reference_to_target: Callable[[np.ndarray], np.ndarray],
) -> list[np.ndarray]:
    """The contours of a structure of the reference, drawn in the slices of a target's grid.

    The solid tells each voxel's centre, taken to the reference, how far it is from the border, so that borders
    lie between voxels where they should; nothing is rasterised on the way.

    Args:
        solid: of the structure, in the reference's space.
        grid: of the target.
        target_to_reference: points (N, 3) to points (N, 3), LPS mm: the deformation.
        reference_to_target: its inverse; only tells where to look.

    Returns:
        Closed polygons (N, 3), LPS mm, from the first slice to the last, to be combined by the even-odd rule in
        each; none where the structure lies outside the grid or between two slices.
    """
    part = _around(reference_to_target(solid.points_mm), grid, _MARGIN_MM)
    if part is None:
        return []
    columns, rows, _ = part.size
    pixel_mm = max(grid.spacing_mm[:2])
    contours: list[np.ndarray] = []
    for slices, points_mm in slabs(part):
        reference_mm = target_to_reference(points_mm.reshape(-1, 3)).reshape(points_mm.shape)
        side_mm, end_mm = solid.parts_mm(reference_mm)
        # The ends, four times as steep, leave pixels beside the border as they are in the last slice too.
        distance_mm = np.minimum(side_mm, 4 * end_mm)
        # From 0 to 1 within two pixels of the border to either side, where it is linear.
        inside = np.clip(0.5 + distance_mm / (4 * pixel_mm), 0, 1)
        slab = part.part((0, 0, slices.start), (columns - 1, rows - 1, slices.stop - 1))
        contours += (outline for outlines in mask_contours(inside, slab) for outline in outlines)
    return contours


def _distance(polygons: Sequence[np.ndarray], shape: tuple[int, int], exact_to: float) -> np.ndarray:
    """Signed distance to the border of polygons (N, 2), rows and columns of a lattice, in its steps; exact up to
    so many, beyond to half a step."""
    distance = _distance_mm(_even_odd(polygons, shape), (1.0, 1.0))
    border = _border(polygons)
    if len(border):
        near = np.abs(distance) < exact_to
        exact = cKDTree(border).query(np.argwhere(near))[0]
        # Not where the lattice sees no border, of what is thinner than a step.
        seen = np.abs(exact - np.abs(distance[near])) < 1
        exact = np.copysign(np.maximum(exact, 1e-3), distance[near])
        distance[near] = np.where(seen, exact, distance[near])
    return distance


def _border(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Points (M, 2) an eighth apart along polygons, but for what is walked there and back: a keyhole's channel,
    or a side that two neighbours share. The nearest is at most a sixteenth farther than the border."""
    starts = np.concatenate(polygons)
    along = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons]) - starts
    length = np.linalg.norm(along, axis=1)
    count = np.maximum(np.ceil(8 * length).astype(int), 1)
    edge = np.repeat(np.arange(len(count)), count)
    fraction = (np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)) / count[edge]
    points = starts[edge] + fraction[:, None] * along[edge]
    direction = (along / np.maximum(length, 1e-12)[:, None])[edge]
    first, second = cKDTree(points).query_pairs(0.1, output_type="ndarray").T
    back = np.einsum("ij,ij->i", direction[first], direction[second]) < -0.99
    border = np.ones(len(points), bool)
    border[first[back]] = border[second[back]] = False
    return points[border]


# -- on a grid


def _around(points_mm: np.ndarray, grid: Grid, margin_mm: float = 0.0) -> Grid | None:
    """The part of a grid around points (N, 3), or None if they lie outside it."""
    index, margin = grid.world_to_index(points_mm), margin_mm / np.asarray(grid.spacing_mm)
    first = np.clip(np.floor(index.min(0) - margin).astype(int) - 1, 0, None)
    last = np.clip(np.ceil(index.max(0) + margin).astype(int) + 1, None, np.asarray(grid.size) - 1)
    return grid.part(first, last) if np.all(first <= last) else None


def _slice_by_slice(stack: _Stack, grid: Grid, axis: int) -> np.ndarray:
    """On a grid whose slices, across any of its axes, are parallel to the planes."""
    u, v = (other for other in range(3) if other != axis)
    shape = grid.size[v], grid.size[u]
    spacing = grid.spacing_mm[v], grid.spacing_mm[u]
    drawn = [_even_odd([grid.world_to_index(polygon)[:, [v, u]] for polygon in plane], shape)
             for plane in stack.planes]  # fmt: skip
    slices_mm = float(np.array(grid.origin_mm) @ stack.normal) + np.arange(grid.size[axis]) * grid.spacing_mm[axis]
    place, reach_mm = stack.between(slices_mm)
    inside = np.zeros((grid.size[axis], *shape), bool)
    for k in np.flatnonzero(reach_mm > 0):
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


def _even_odd(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside an odd number of polygons (N, 2) of rows and columns.

    Row by row, by the number of borders to the left of a pixel: a hundred times quicker than to ask of every
    pixel whether it lies in a polygon. Borders are half-open, so that a pixel between two polygons belongs to one.
    """
    borders = np.zeros((shape[0], shape[1] + 1), np.int32)
    row, column = _crossings(polygons, np.arange(shape[0]))
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

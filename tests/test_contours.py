"""Contours to masks and back: exact on a grid's own slices in every orientation, and near the truth elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DIRECTIONS, make_grid
from skimage.measure import grid_points_in_poly

from stnerp.contours import (
    Solid,
    carried_contours,
    contour_mask,
    contour_volume,
    keyholes,
    mask_contours,
    plane_distance_mm,
)
from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.phantom import LABELS, TUMOUR_CENTRE_MM, Phantom


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def polygon(grid: Grid, corners: list[tuple[float, float]], k: float, axis: int = 2) -> np.ndarray:
    """Corners in voxels along the two other axes, in the plane of index k across an axis; LPS mm."""
    points = np.full((len(corners), 3), float(k))
    points[:, [other for other in range(3) if other != axis]] = corners
    return grid.index_to_world(points)


def box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def flatten(slices: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [outline for outlines in slices for outline in outlines]


def rings(centre: np.ndarray, radius_mm: float, heights: np.ndarray, count: int = 200) -> list[np.ndarray]:
    """A sphere's axial contours."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=-1)
    cuts = [(z - centre[2], radius_mm**2 - (z - centre[2]) ** 2) for z in heights]
    return [centre + [0, 0, z] + np.sqrt(square) * circle for z, square in cuts if square > 0]


# -- exact


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_covers_its_voxels_and_no_other(any_grid: Grid, axis: int) -> None:
    # Sizes differ along all axes, and the corners lie midway between voxels: a swapped axis, a shift by half a
    # voxel (which would put a corner onto centres) or a slice's slip gives other voxels.
    first, last = (1, 0), (2, 2)
    planes = [1, 2]
    contours = [polygon(any_grid, box(0.6, -0.4, 2.4, 2.4), k, axis) for k in planes]
    expected = np.zeros(any_grid.shape, bool)
    where: list[slice] = [slice(0)] * 3
    where[axis] = slice(planes[0], planes[-1] + 1)
    for other, i, j in zip([a for a in range(3) if a != axis], first, last, strict=True):
        where[other] = slice(i, j + 1)
    expected[where[2], where[1], where[0]] = True
    np.testing.assert_array_equal(contour_mask(contours, any_grid), expected)
    # Neither the order of the contours nor the direction of the points matters.
    np.testing.assert_array_equal(contour_mask([c[::-1] for c in contours[::-1]], any_grid), expected)


def test_a_millimetre_is_not_lost(any_grid: Grid) -> None:
    """A border a tenth of a voxel to either side of a row of centres excludes or includes that row."""
    columns = [contour_mask([polygon(any_grid, box(-0.3, -0.3, x, 2.3), 1)], any_grid)[1, :3].sum(1)
               for x in (1.9, 2.1, 2.9, 3.1)]  # fmt: skip
    assert [row.tolist() for row in columns] == [[2] * 3, [3] * 3, [3] * 3, [4] * 3]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_masks_come_back_exactly(any_grid: Grid, density: float) -> None:
    # Random voxels: holes, islands in holes, diagonal neighbours and all borders of the image.
    mask = np.random.default_rng(0).random(any_grid.shape) < density
    again = contour_mask(flatten(mask_contours(mask, any_grid)), any_grid)
    np.testing.assert_array_equal(again, mask)


def test_masks_come_back_on_a_larger_grid() -> None:
    small, large = Grid((5, 4, 3), (1, 2, 3), (10, 20, 30)), Grid((9, 8, 7), (1, 2, 3), (8, 16, 24))
    mask = np.random.default_rng(1).random(small.shape) < 0.5
    expected = np.zeros(large.shape, bool)
    expected[2:5, 2:6, 2:7] = mask
    np.testing.assert_array_equal(contour_mask(flatten(mask_contours(mask, small)), large), expected)


def test_an_outline_surrounds_half_a_pixel_less_than_its_pixels() -> None:
    # Every corner cuts off an eighth, and an outline has four outward corners more than inward ones.
    grid = Grid((9, 8, 3), (0.5, 2.0, 3.0))
    mask = np.zeros(grid.shape, bool)
    mask[1, 2:6, 1:8] = True
    mask[1, 5, 1:3] = False
    (outline,) = flatten(mask_contours(mask, grid))
    x, y, z = outline.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert area == pytest.approx((mask.sum() - 0.5) * 0.5 * 2.0)
    assert set(z) == {3.0}
    # Midway between voxels inside and outside.
    np.testing.assert_allclose([x.min(), x.max(), y.min(), y.max()], [0.25, 3.75, 3.0, 11.0])


def test_even_odd() -> None:
    grid = Grid((20, 20, 3), (1, 1, 1))
    outer, hole, island = (polygon(grid, box(a, a, 19 - a, 19 - a), 1) for a in (1.5, 4.5, 7.5))
    counts = [contour_mask(part, grid)[1].sum() for part in ([outer], [outer, hole], [outer, hole, island])]
    assert counts == [16**2, 16**2 - 10**2, 16**2 - 10**2 + 4**2]
    assert contour_mask([island, outer, hole], grid)[1, 9, 9]
    # Apart in the same plane: both.
    assert contour_mask([polygon(grid, box(0.5, 0.5, 3.5, 3.5), 1), island], grid)[1].sum() == 9 + 16


@pytest.mark.parametrize("seam", [9.0, 9.37])  # through voxel centres, and beside them
def test_keyhole(seam: float) -> None:
    grid = Grid((20, 20, 3), (1, 1, 1))
    outer = [(seam, 1.5), (17.5, 1.5), (17.5, 17.5), (1.5, 17.5), (1.5, 1.5), (seam, 1.5)]
    inner = [(seam, 4.5), (4.5, 4.5), (4.5, 14.5), (14.5, 14.5), (14.5, 4.5), (seam, 4.5)]
    mask = contour_mask([polygon(grid, outer + inner, 1)], grid)
    expected = np.zeros((20, 20), bool)
    expected[2:18, 2:18] = True
    expected[5:15, 5:15] = False
    np.testing.assert_array_equal(mask[1], expected)


def test_neighbours_share_no_voxel_and_lose_none() -> None:
    # Their common border runs through voxel centres: each belongs to one of the two.
    grid = Grid((20, 20, 3), (1, 1, 1))
    left, right = polygon(grid, box(2.5, 2.5, 9, 9.5), 1), polygon(grid, box(9, 2.5, 15.5, 9.5), 1)
    both = contour_mask([left, right], grid)[1]
    assert both.sum() == 13 * 7
    assert contour_mask([left], grid).sum() + contour_mask([right], grid).sum() == 13 * 7


def test_the_same_pixels_as_a_test_of_each_point() -> None:
    # Random polygons that cross themselves, also beyond the image; no centre lies on a border.
    draw = np.random.default_rng(0)
    grid = Grid((23, 17, 3), (1, 1, 1))
    for _ in range(20):
        corners = draw.uniform(-6, 28, (draw.integers(3, 30), 2))
        expected = grid_points_in_poly((17, 23), corners[:, ::-1])
        found = contour_mask([polygon(grid, [(x, y) for x, y in corners], 1)], grid)
        np.testing.assert_array_equal(found[1], expected)


# -- holes joined to their outlines


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_keyholes_cover_the_same_voxels_by_any_rule(any_grid: Grid, density: float) -> None:
    # Random voxels: holes, islands in holes, several holes in one outline.
    mask = np.random.default_rng(0).random(any_grid.shape) < density
    for k, outlines in enumerate(mask_contours(mask, any_grid)):
        joined = keyholes(outlines, any_grid)
        alone = [contour_mask([points], any_grid)[k] for points in joined]
        # Even-odd, and each polygon by itself: some programs take the union.
        np.testing.assert_array_equal(np.sum(alone, axis=0), mask[k])
        # The non-zero rule too: what a polygon walks around, it walks around once and in one direction.
        flat = [any_grid.world_to_index(points) for points in joined]
        areas = [float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 for x, y, _ in (points.T for points in flat)]
        assert len({area > 0 for area in areas}) <= 1
        parts = [any_grid.world_to_index(points).T for points in outlines]
        assert abs(sum(areas)) == pytest.approx(
            abs(sum(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 for x, y, _ in parts))
        )


def test_a_keyhole_goes_the_shortest_way_there_and_back() -> None:
    grid = Grid((30, 20, 3), (1, 2, 3), (5, 6, 7))
    outer, first, second = (
        polygon(grid, box(*corners), 1)
        for corners in ((0.5, 0.5, 28.5, 18.5), (3.5, 4.5, 8.5, 9.5), (10, 5, 15, 9))
    )
    island = polygon(grid, box(5, 6, 7, 8), 1)
    # Holes of either direction; the outline's first.
    walk, alone = keyholes([outer, first[::-1], second, island], grid)
    np.testing.assert_array_equal(alone, island)
    assert len(walk) == 4 + 4 + 4 + 2 * 2
    steps = np.roll(walk, -1, axis=0) - walk
    there_and_back = [
        (i, j)
        for i in range(len(walk))
        for j in range(i)
        if np.allclose(steps[i], -steps[j]) and np.allclose(walk[i], walk[j] + steps[j])
    ]
    assert len(there_and_back) == 2
    # From the corner (0.5, 0.5) to (3.5, 4.5), 2 mm high voxels, and from hole to hole: (8.5, 4.5) to (10, 5).
    lengths = sorted(np.linalg.norm(steps[i]) for i, _ in there_and_back)
    np.testing.assert_allclose(lengths, [np.hypot(1.5, 1), np.hypot(3, 8)])
    assert keyholes([], grid) == []
    assert keyholes([outer], grid)[0] is outer


# -- finer than a voxel: solids, and contours that a deformation carries


def disc(centre: np.ndarray, radius_mm: float, grid: Grid, k: float, count: int = 200) -> np.ndarray:
    """A circle in the plane of index k of a grid; its centre is (x, y) mm from the plane's, along the axes."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    middle = (np.array(grid.size[:2]) - 1) / 2
    in_plane_mm = centre[:2] + radius_mm * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return grid.index_to_world(np.column_stack([middle + in_plane_mm / grid.spacing_mm[:2], np.full(count, k)]))


def same(points: np.ndarray) -> np.ndarray:
    return points


def radii(points: np.ndarray, centre: np.ndarray, grid: Grid) -> np.ndarray:
    """Distance of points to the centre that `disc` takes, in their plane."""
    index = grid.world_to_index(points)[:, :2]
    return np.linalg.norm((index - (np.array(grid.size[:2]) - 1) / 2) * grid.spacing_mm[:2] - centre[:2], axis=1)


def test_the_distance_to_a_box() -> None:
    grid = Grid((30, 30, 9), (1, 1, 3), (-4, 5, 6))
    contours = [polygon(grid, box(5.3, 6.1, 20.7, 18.4), k) for k in (3, 4, 5)]
    solid = Solid.of(contours)
    index = np.array([[5.8, 12, 4], [5.0, 12, 4], [20.7, 12, 3], [12, 18.0, 4.5], [12, 6.0, 5.4]])
    expected = [0.5, -0.3, 0.0, 0.4, -0.1]
    # Exact at the lattice's nodes and linear between: of points beside a straight border to a sixteenth.
    np.testing.assert_allclose(solid.distance_mm(grid.index_to_world(index)), expected, atol=0.07)
    # The ends are flat, half a slice beyond the last contours.
    ends = grid.index_to_world(np.array([[12, 12, 5.4], [12, 12, 5.6], [12, 12, 2.4], [12, 12, 1.0]]))
    np.testing.assert_allclose(solid.distance_mm(ends), [0.3, -0.3, -0.3, -4.5], atol=1e-3)


def test_between_two_planes_the_distances_are_mixed() -> None:
    grid = Grid((40, 40, 3), (1, 1, 4))
    zero = np.zeros(2)
    solid = Solid.of([disc(zero, 8.0, grid, 0), disc(zero, 12.0, grid, 1)], pixel_mm=0.5)
    at = disc(zero, 11.0, grid, 0.75)
    # Far from a border, as from the smaller circle here, the lattice knows the distance to half a step.
    np.testing.assert_allclose(solid.distance_mm(at), 0.0, atol=0.25 / 2)


def test_a_keyholes_channel_is_no_border() -> None:
    grid = Grid((60, 60, 5), (1, 1, 2))
    centre = np.array([0.3, -0.2])
    # As our own keyhole, and as some systems write it: with a channel of a hundredth of a millimetre.
    outer, inner = disc(centre, 20.0, grid, 2), disc(centre, 7.0, grid, 2)[::-1]
    (own,) = keyholes([outer, inner], grid)
    ajar = own.copy()
    repeated = [i for i in range(len(own)) if (own == own[i]).all(1).sum() > 1]
    assert len(repeated) == 4
    ajar[repeated[2:], 1] += 0.01
    points = grid.index_to_world(np.stack(np.meshgrid(np.arange(5, 55, 0.25), np.arange(5, 55, 0.25), [2.0]), -1))
    apart = Solid.of([outer, inner], 2.0).distance_mm(points)
    for keyhole in (own, ajar):
        distance = Solid.of([keyhole], 2.0).distance_mm(points)
        # The hole stays a hole, and no line is cut through the ring.
        np.testing.assert_array_equal(distance > 0, apart > 0)
        drawn = carried_contours(Solid.of([keyhole], 2.0), grid, same, same)
        assert sorted(round(radii(part, centre, grid).mean()) for part in drawn) == [7, 20]


def test_what_is_not_moved_stays_where_it_is(any_grid: Grid) -> None:
    grid = Grid((60, 52, 9), any_grid.spacing_mm, any_grid.origin_mm, any_grid.direction)
    centre = np.array([1.2, -0.7])
    contours = [disc(centre, 14.0, grid, k) for k in (2, 3, 4)]
    drawn = carried_contours(Solid.of(contours, pixel_mm=0.8), grid, same, same)
    assert [round(float(grid.world_to_index(points)[:, 2].mean()), 6) for points in drawn] == [2, 3, 4]
    errors = np.abs(np.concatenate([radii(points, centre, grid) for points in drawn]) - 14.0)
    # A voxel's corner is 0.85 mm from its centre; a mask's contours are a quarter of that off on average.
    assert errors.mean() < 0.02
    assert errors.max() < 0.1


def test_a_shift_moves_contours_by_as_much() -> None:
    grid = Grid((60, 60, 16), (1.0, 1.3, 2.0), (10, 20, 30))
    centre, shift = np.array([0.0, 0.0]), np.array([3.4, -2.6, 6.0])
    contours = [disc(centre, 9.0, grid, k) for k in (3, 4, 5, 6)]
    drawn = carried_contours(Solid.of(contours), grid, lambda p: p - shift, lambda p: p + shift)
    # The target's point p comes from p - shift: the wrong direction would be 8 mm and six slices away.
    assert [round(float(points[0, 2]), 6) for points in drawn] == [30 + 2 * k + 6 for k in (3, 4, 5, 6)]
    errors = np.concatenate([radii(points, centre + shift[:2], grid) for points in drawn]) - 9.0
    assert np.abs(errors).max() < 0.1


def test_what_turns_is_drawn_in_the_targets_slices() -> None:
    # A sphere about its centre: from axial slices 1 mm apart to oblique ones.
    centre = np.array([-12.3, 33.4, 87.6])
    source = rings(centre, 14.0, np.arange(70, 106, 1.0))
    target = make_grid(DIRECTIONS["oblique"], (46, 50, 20), (0.9, 0.8, 2.1))
    moved = target.index_to_world(np.array([22.0, 25.0, 9.3]))
    turn = np.reshape(DIRECTIONS["sagittal"], (3, 3))
    drawn = carried_contours(
        Solid.of(source, pixel_mm=0.8),
        target,
        lambda p: (p - moved) @ turn + centre,
        lambda p: (p - centre) @ turn.T + moved,
    )
    points = np.concatenate(drawn)
    index = target.world_to_index(points)[:, 2]
    np.testing.assert_allclose(index, np.rint(index), atol=1e-6)
    away = np.linalg.norm(points - moved, axis=1) - 14.0
    # But for the sphere's ends, which its first and last contours cap.
    assert np.abs(np.mean(away)) < 0.1
    assert np.percentile(np.abs(away), 95) < 0.4


def test_what_leaves_the_target_is_cut_off_at_its_border() -> None:
    grid = Grid((40, 40, 6), (1, 1, 2))
    solid = Solid.of([disc(np.zeros(2), 8.0, grid, k) for k in (2, 3)])
    away = np.array([20.0, 0, 0])
    (first, second) = carried_contours(solid, grid, lambda p: p - away, lambda p: p + away)
    assert first[:, 0].max() == second[:, 0].max() == 39.5
    assert first[:, 0].min() == pytest.approx(39.5 - 8, abs=0.1)
    far = 10 * away
    assert carried_contours(solid, grid, lambda p: p - far, lambda p: p + far) == []
    # A single contour that falls between two slices more than its thickness apart.
    thin = Solid.of([disc(np.zeros(2), 8.0, grid, 2)], 0.5)
    lift = np.array([0, 0, 1.0])
    assert carried_contours(thin, grid, lambda p: p - lift, lambda p: p + lift) == []


def test_a_solid_of_nothing() -> None:
    with pytest.raises(InputError, match="there are none"):
        Solid.of([])


# -- near the truth


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("distance_mm", [1.0, 3.0])
def test_axial_contours_of_a_sphere_on_any_grid(direction: np.ndarray, distance_mm: float) -> None:
    centre, radius_mm = np.array([-12.3, 33.4, 87.6]), 14.0
    spacing = (1.0, 0.8, 1.3)
    corner = centre - direction @ (np.array([24, 27, 18]) * spacing)
    grid = Grid((50, 56, 38), spacing, tuple(corner), tuple(direction.ravel()))
    contours = rings(centre, radius_mm, np.arange(70, 106, distance_mm))
    mask = contour_mask(contours, grid)
    points = grid.points_world()
    truth = np.linalg.norm(points - centre, axis=-1) < radius_mm
    # Of planes 3 mm apart the sphere's ends are cut or capped (0.98); else only the border's voxels differ.
    assert dice(mask, truth) > (0.99 if distance_mm == 1 else 0.975)
    # Planes aren't symmetric about the centre; across them nothing may shift: a tenth of half a voxel.
    shift = points[mask].mean(0) - points[truth].mean(0)
    assert np.abs(shift[:2]).max() < 0.05
    assert abs(shift[2]) < 0.2


def test_contours_of_oblique_planes_on_an_axial_grid() -> None:
    grid = make_grid(DIRECTIONS["oblique"], (40, 44, 48), (1.0, 0.9, 0.8))
    centre = grid.centre_mm + np.array([0.3, -0.2, 0.1])
    drawn = np.linalg.norm(grid.points_world() - centre, axis=-1) < 14
    axial = Grid((60, 60, 60), (0.9, 0.8, 1.1), tuple(centre - [27.3, 24.1, 31.7]))
    mask = contour_mask(flatten(mask_contours(drawn, grid)), axial)
    points = axial.points_world()
    truth = np.linalg.norm(points - centre, axis=-1) < 14
    assert dice(mask, truth) > 0.985
    assert np.abs(points[mask].mean(0) - centre).max() < 0.05


def test_round_trip_at_1_mm() -> None:
    """Contour -> mask -> contour -> mask, of a sphere of 14 mm and of the phantom's tumour."""
    centre = np.array([3.3, -7.1, 12.4])
    grid = Grid((40, 40, 40), (1, 1, 1), tuple(np.floor(centre) - 20))
    sphere = np.linalg.norm(grid.points_world() - centre, axis=-1) < 14
    from_circles = contour_mask(rings(centre, 14, np.arange(-8, 33)), grid)
    assert dice(from_circles, sphere) > 0.999
    around = Grid((44, 44, 44), (1, 1, 1), tuple(np.array(TUMOUR_CENTRE_MM) - 21.7))
    tumour = sitk.GetArrayFromImage(Phantom(grid=around).labels(0.0)) == LABELS["tumour"]
    for mask, on in ((from_circles, grid), (tumour, around)):
        again = contour_mask(flatten(mask_contours(mask, on)), on)
        assert mask.sum() > 10_000
        np.testing.assert_array_equal(again, mask)  # better than a Dice of 0.98: the same


# -- between the planes


def test_the_shape_is_interpolated_between_planes() -> None:
    grid = Grid((41, 41, 9), (1, 1, 1))
    below, above = polygon(grid, box(14.5, 14.5, 25.5, 25.5), 2), polygon(grid, box(10.5, 10.5, 29.5, 29.5), 6)
    mask = contour_mask([below, above], grid)
    widths = mask[:, 20].sum(1)
    # From 11 to 19 in four steps; the ends reach half the distance of 4 mm further, of which one border counts.
    assert widths.tolist() == [0, 11, 11, 13, 15, 17, 19, 19, 19]


def test_the_interpolated_border_lies_where_it_should() -> None:
    # 5.5 mm from the centre at z = 0 and 6.5 mm at z = 2; at 0.8 mm it is 5.9, short of the pixel 6 mm away.
    grid, lattice = Grid((41, 41, 3), (1, 1, 2)), Grid((41, 41, 3), (1, 1, 0.8))
    contours = [polygon(grid, box(20 - a, 20 - a, 20 + a, 20 + a), k) for k, a in ((0, 5.5), (1, 6.5))]
    assert contour_mask(contours, lattice)[:, 20].sum(1).tolist() == [11, 11, 13]


def test_one_missing_plane_is_filled_and_two_are_not() -> None:
    grid = Grid((21, 21, 15), (1, 1, 2))

    def reach(planes: list[int]) -> list[int]:
        mask = contour_mask([polygon(grid, box(4.5, 4.5, 12.5, 12.5), k) for k in planes], grid)
        return np.flatnonzero(mask.any((1, 2))).tolist()

    assert reach([3, 4, 6, 7]) == [3, 4, 5, 6, 7]
    assert reach([3, 4, 7, 8]) == [3, 4, 7, 8]
    # Drawn on every second slice throughout: that is the distance, and nothing is missing. 12 mm is too far.
    assert reach([2, 4, 6]) == [2, 3, 4, 5, 6, 7]
    assert reach([2, 8]) == [2, 8]


@pytest.mark.parametrize("beside", [0.0, 33.0])  # within the sphere, where it is a hole, and apart
@pytest.mark.parametrize("off_mm", [0.11, 0.3, 0.9, -0.9])
def test_a_stray_contour_beside_a_plane_belongs_to_it(off_mm: float, beside: float) -> None:
    heights = np.arange(-24, 25, 3.0)
    stray = rings(np.array([beside, 0, 0]), 4.0, np.array([0.0])) + np.array([0, 0, off_mm])
    contours = [*rings(np.zeros(3), 25.0, heights), *stray]
    assert plane_distance_mm(contours) == pytest.approx(3)
    grid = Grid((80, 60, 60), (1, 1, 1), (-30, -30, -30.4))
    drawn = carried_contours(Solid.of(contours), grid, same, same)
    # The sphere has 65.4 ml; the disc of 3 mm 0.15.
    for volume_ml in (contour_mask(contours, grid).sum() / 1000, contour_volume(contours, 3.0)[0],
                      contour_volume(drawn, 1.0)[0]):  # fmt: skip
        assert volume_ml == pytest.approx(65.4, abs=0.5)
    # The slice of the plane shows what was drawn.
    own = Grid((80, 60, 17), (1, 1, 3), (-30, -30, -24))
    inside = contour_mask(contours, own)[8]
    np.testing.assert_array_equal(inside, contour_mask([contours[8], stray[0] - [0, 0, off_mm]], own)[8])


@pytest.mark.parametrize("fine", [24, 34])  # mm of 50 that are drawn at 1 mm
@pytest.mark.parametrize("coarse_mm", [3.0, 5.0])
def test_planes_of_mixed_distances_reach_half_way(coarse_mm: float, fine: int) -> None:
    heights = np.concatenate([np.arange(24 - fine, -24.1, -coarse_mm)[::-1], np.arange(25.0 - fine, 25)])
    contours = rings(np.array([3.0, 2.0, 0.0]), 25.0, heights)
    grid = Grid((60, 60, 60), (1, 1, 1), (-27, -28, -30.4))
    volumes_ml = [contour_mask(contours, grid).sum() / 1000, contour_volume(contours, 1.0)[0]]
    # The ends reach half a millimetre, whatever the distance there.
    np.testing.assert_allclose(volumes_ml, 65.4, rtol=0.02 if coarse_mm == 3 else 0.04)
    # A gap stays a gap: 4 mm in planes of 1 mm.
    apart = [points for points in rings(np.zeros(3), 25.0, np.arange(-9.0, 10)) if not 0 < points[0, 2] < 4]
    assert not contour_mask(apart, Grid((60, 60, 1), (1, 1, 1), (-30, -30, 2))).any()


def test_sections_near_each_other_are_no_strays() -> None:
    # Two runs of planes 3 mm apart that meet 0.8 mm apart: taken for one plane, they would cancel to a thin ring.
    contours = rings(np.zeros(3), 25.0, np.concatenate([np.arange(-24, 1, 3.0), np.arange(0.8, 24, 3)]))
    grid = Grid((60, 60, 60), (1, 1, 1), (-30, -30, -30.4))
    volumes_ml = [contour_mask(contours, grid).sum() / 1000, contour_volume(contours, 3.0)[0]]
    np.testing.assert_allclose(volumes_ml, 65.4, rtol=0.015)


def test_a_plane_alone_is_as_thick_as_is_said() -> None:
    grid = Grid((21, 21, 21), (1, 1, 1))
    contours = [polygon(grid, box(4.5, 4.5, 12.5, 12.5), 10)]
    for thickness_mm, slices in ((None, 1), (3.0, 3), (5.0, 5), (0.4, 1)):
        assert contour_mask(contours, grid, thickness_mm).any((1, 2)).sum() == slices
    assert plane_distance_mm(contours) is None


def test_slices_midway_between_planes_are_counted_once() -> None:
    # A grid shifted by half a slice: the volume stays, no end is counted twice.
    scan, shifted = Grid((21, 21, 12), (1, 1, 2)), Grid((21, 21, 12), (1, 1, 2), (0, 0, 1))
    contours = [polygon(scan, box(4.5, 4.5, 12.5, 12.5), k) for k in (3, 4, 5, 6)]
    assert contour_mask(contours, scan).sum() == contour_mask(contours, shifted).sum() == 4 * 64


def test_volume_and_centroid_of_a_box_with_a_hole(any_grid: Grid) -> None:
    grid = Grid((20, 20, 9), (1.0, 2.0, 3.0), any_grid.origin_mm, any_grid.direction)
    outer, hole, island = (
        [polygon(grid, box(*corners), k) for k in (3, 4, 5)]
        for corners in ((2.5, 3.5, 12.5, 9.5), (3.5, 4.5, 6.5, 6.5), (4.5, 5.5, 5.5, 6.0))
    )
    # In ml: 10 x 12 mm, three slices of 3 mm; the hole 3 x 4 mm; the island 1 x 1 mm.
    expected = [(120 * 9e-3, [7.5, 6.5, 4]), (12 * 9e-3, [5, 5.5, 4]), (9e-3, [5, 5.75, 4])]
    for contours, (volume_ml, middle) in zip((outer, hole, island), expected, strict=True):
        found = contour_volume(contours, 1.0)
        assert found[0] == pytest.approx(volume_ml)
        np.testing.assert_allclose(found[1], grid.index_to_world(np.array(middle)), atol=1e-9)
    signs = np.array([1, -1, 1])
    volumes = signs * [volume for volume, _ in expected]
    middles = (volumes @ np.array([middle for _, middle in expected])) / volumes.sum()
    joined = [points for k in range(3) for points in keyholes([outer[k], hole[k][::-1], island[k]], grid)]
    for contours in ([*island, *outer, *hole[::-1]], joined):  # in any order, or as keyholes
        found = contour_volume(contours, 1.0)
        assert found[0] == pytest.approx(volumes.sum())
        np.testing.assert_allclose(found[1], grid.index_to_world(middles), atol=1e-9)


def test_the_volume_is_of_what_the_mask_covers() -> None:
    """By the even-odd rule, whatever way contours run."""
    grid = Grid((60, 60, 3), (0.5, 0.5, 3.0))
    outer, inner = polygon(grid, box(4.5, 4.5, 44.5, 44.5), 1), polygon(grid, box(10.5, 9.5, 30.5, 29.5), 1)
    beside = polygon(grid, box(24.5, 29.5, 54.5, 39.5), 1)
    (keyhole,) = keyholes([outer, inner], grid)
    same_way = np.concatenate([outer, outer[:1], inner, inner[:1]])
    bow_tie = polygon(grid, [(4.5, 4.5), (24.5, 24.5), (24.5, 4.5), (4.5, 24.5)], 1)
    for contours, pixels, off in (
        ([keyhole], 1600 - 400, 0),
        ([same_way], 1600 - 400, 0),
        ([outer, beside], 1600 + 300 - 2 * 200, 0),
        ([outer, outer[::-1], inner], 400, 0),
        ([bow_tie], 200, 20),  # its diagonals run through voxels: a pixel a row
    ):
        assert contour_volume(contours, 3.0)[0] == pytest.approx(pixels * 0.75e-3, rel=1e-4)
        assert contour_mask(contours, grid).sum() == pytest.approx(pixels, abs=off)
    np.testing.assert_allclose(contour_volume([same_way], 3.0)[1], contour_volume([outer, inner], 3.0)[1])


def test_the_volume_of_planes_apart() -> None:
    grid = Grid((21, 21, 15), (1, 1, 2))

    def volume_ml(planes: list[int], thickness_mm: float = 1.0) -> float:
        return contour_volume([polygon(grid, box(4.5, 4.5, 14.5, 14.5), k) for k in planes], thickness_mm)[0]

    # 100 mm² in each, 2 mm apart; one that is missing is filled, two aren't; one alone is as thick as said.
    assert volume_ml([3, 4, 5]) == pytest.approx(0.6)
    assert volume_ml([3, 4, 6, 7]) == pytest.approx(1.0)
    assert volume_ml([3, 4, 8, 9]) == pytest.approx(0.8)
    assert volume_ml([3], 2.5) == pytest.approx(0.25)
    ball = rings(np.array([1.0, 2.0, 3.0]), 14.0, np.arange(-12, 18, 0.5), 400)
    found = contour_volume(ball, 0.5)
    assert found[0] == pytest.approx(4 / 3 * np.pi * 14**3 / 1000, rel=1e-3)
    np.testing.assert_allclose(found[1], [1, 2, 3], atol=1e-6)
    with pytest.raises(InputError, match="there are none"):
        contour_volume([], 1.0)


def test_distance_of_planes() -> None:
    grid = Grid((21, 21, 15), (1, 1, 2.5))
    contours = [polygon(grid, box(4.5, 4.5, 12.5, 12.5), k) for k in (9, 3, 4, 3)]
    assert plane_distance_mm(contours) == pytest.approx(2.5)
    assert plane_distance_mm([contours[0], contours[1] - [0, 0, 20]]) is None


# -- refused


def test_contours_elsewhere_cover_nothing() -> None:
    grid = Grid((5, 6, 7), (1, 1, 1))
    assert not contour_mask([polygon(grid, box(0.5, 0.5, 3.5, 3.5), 3) + np.array([0, 0, 100])], grid).any()
    assert not contour_mask([polygon(grid, box(0.5, 0.5, 3.5, 3.5), 3) + np.array([50, 0, 0])], grid).any()
    # Partly outside: the part that is inside.
    assert contour_mask([polygon(grid, box(-9, -9, 1.5, 2.5), 3)], grid).sum() == 2 * 3


def test_what_is_no_stack_of_planes_is_refused() -> None:
    grid = Grid((21, 21, 21), (1, 1, 1))
    flat = polygon(grid, box(4.5, 4.5, 12.5, 12.5), 10)
    with pytest.raises(InputError, match="there are none"):
        contour_mask([], grid)
    bent = flat + np.array([[0, 0, 0], [0, 0, 3], [0, 0, 0], [0, 0, 3]])
    with pytest.raises(InputError, match="parallel planes"):
        contour_mask([bent], grid)
    with pytest.raises(InputError, match="parallel planes"):
        contour_mask([flat, polygon(grid, box(4.5, 4.5, 12.5, 12.5), 10, axis=0)], grid)
    with pytest.raises(InputError, match="does not fit"):
        mask_contours(np.zeros((2, 3, 4), bool), grid)


def test_rounded_coordinates_stay_planar(any_grid: Grid) -> None:
    # 0.01 mm, as some systems write: a tenth of what is allowed.
    contours = [np.round(polygon(any_grid, box(0.6, -0.4, 2.4, 2.4), k), 2) for k in (1, 2)]
    exact = [polygon(any_grid, box(0.6, -0.4, 2.4, 2.4), k) for k in (1, 2)]
    np.testing.assert_array_equal(contour_mask(contours, any_grid), contour_mask(exact, any_grid))

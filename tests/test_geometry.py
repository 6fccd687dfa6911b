"""Frames against SimpleITK's, on grids of every orientation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ORIGIN, SIZE, SPACING

from stnerp.errors import InputError
from stnerp.geometry import (
    Grid,
    affine_points,
    apply_affine,
    cube_points,
    index_points,
    random_slabs,
    slab_count,
    slab_slices,
)

# float64 throughout: coordinates of about 100 mm carry rounding errors near 1e-14, sums of a few near 1e-13.
EXACT = 1e-11


def blank(grid: Grid) -> sitk.Image:
    return grid.image(np.zeros(grid.shape, np.float32))


def some_indices(count: int = 50) -> np.ndarray:
    """Continuous indices in and around the grid of conftest."""
    return np.random.default_rng(0).uniform(-2, 8, (count, 3))


# -- points


def test_index_to_world_is_simpleitk_s(any_grid: Grid) -> None:
    image, indices = blank(any_grid), some_indices()
    expected = [image.TransformContinuousIndexToPhysicalPoint(index) for index in indices.tolist()]
    assert np.abs(any_grid.index_to_world(indices) - expected).max() < EXACT
    assert np.abs(any_grid.world_to_index(np.array(expected)) - indices).max() < EXACT


def test_voxel_centres_are_simpleitk_s_in_array_order(any_grid: Grid) -> None:
    image, points = blank(any_grid), any_grid.points_world()
    assert points.shape == (*any_grid.shape, 3)
    for x, y, z in np.ndindex(any_grid.size):
        assert np.abs(points[z, y, x] - image.TransformIndexToPhysicalPoint((x, y, z))).max() < EXACT


def test_grid_of_image_is_the_grid(any_grid: Grid) -> None:
    assert Grid.of(blank(any_grid)).is_close(any_grid, 1e-9)
    assert any_grid.shape == any_grid.size[::-1]
    assert any_grid.voxels == np.prod(any_grid.size)


def test_round_trips(any_grid: Grid) -> None:
    points = some_indices()
    assert np.abs(any_grid.world_to_index(any_grid.index_to_world(points)) - points).max() < EXACT
    assert np.abs(any_grid.world_to_cube(any_grid.cube_to_world(points)) - points).max() < EXACT


def test_first_and_last_voxel_centres_are_the_corners_of_the_cube(any_grid: Grid) -> None:
    last = np.asarray(any_grid.size, float) - 1
    for corner in np.ndindex(2, 2, 2):
        cube = any_grid.world_to_cube(any_grid.index_to_world(np.array(corner) * last))
        assert np.abs(cube - (2 * np.array(corner) - 1)).max() < EXACT
    assert np.abs(any_grid.centre_mm - any_grid.index_to_world(last / 2)).max() < EXACT


def test_cube_points_are_the_voxels_of_an_array(any_grid: Grid) -> None:
    cube = cube_points(any_grid.shape, dtype=torch.float64)
    assert np.abs(any_grid.cube_to_world(cube.numpy()) - any_grid.points_world()).max() < EXACT
    # A landmark normalised by n instead of n - 1 (FACTS: trap 2) is up to a voxel away.
    wrong = 2 * index_points(any_grid.shape) / np.asarray(any_grid.size) - 1
    assert np.abs(any_grid.cube_to_world(wrong) - any_grid.points_world()).max() > 0.9 * min(any_grid.spacing_mm)


def test_tensors_and_arrays_give_the_same_answer(any_grid: Grid) -> None:
    points = some_indices()
    for convert in (
        any_grid.index_to_world,
        any_grid.world_to_index,
        any_grid.cube_to_world,
        any_grid.world_to_cube,
        any_grid.vectors_from_cube,
        any_grid.vectors_to_world,
        any_grid.vectors_from_world,
    ):
        converted = convert(torch.from_numpy(points))
        assert converted.dtype == torch.float64
        assert np.abs(converted.numpy() - convert(points)).max() < EXACT


def test_leading_axes_of_points_are_kept(any_grid: Grid) -> None:
    points = some_indices(24)
    there = any_grid.cube_to_world(points.reshape(2, 3, 4, 3))
    assert np.array_equal(there.reshape(-1, 3), any_grid.cube_to_world(points))
    assert np.abs(any_grid.cube_to_world(points[0]) - there[0, 0, 0]).max() < EXACT


# -- vectors


def test_vectors_are_differences_of_points(any_grid: Grid) -> None:
    points, vectors = some_indices(), np.random.default_rng(1).normal(size=(50, 3))
    expected = any_grid.cube_to_world(points + vectors) - any_grid.cube_to_world(points)
    assert np.abs(any_grid.vectors_to_world(any_grid.vectors_from_cube(vectors)) - expected).max() < EXACT
    in_cube = any_grid.world_to_cube(points + vectors) - any_grid.world_to_cube(points)
    assert np.abs(any_grid.vectors_from_cube(in_cube) - any_grid.vectors_from_world(vectors)).max() < EXACT


def test_axis_millimetres_are_millimetres(any_grid: Grid) -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 3))
    lengths = np.linalg.norm(any_grid.vectors_to_world(vectors), axis=1)
    assert np.abs(lengths - np.linalg.norm(vectors, axis=1)).max() < EXACT
    # One step along axis i is one spacing along column i of the direction.
    for i, unit in enumerate(np.eye(3)):
        step = any_grid.index_to_world(unit) - any_grid.index_to_world(np.zeros(3))
        assert np.abs(step - any_grid.vectors_to_world(any_grid.spacing_mm[i] * unit)).max() < EXACT


def test_half_extent_is_millimetres_per_cube_unit() -> None:
    grid = Grid((5, 11, 21), (2.0, 3.0, 0.5))
    assert grid.extent_mm == (8.0, 30.0, 10.0)
    assert grid.half_extent_mm.tolist() == [4.0, 15.0, 5.0]


# -- other grids


@pytest.mark.parametrize("spacing_mm", [0.7, 2.0, (1.0, 2.0, 4.0), 1000.0])
def test_with_spacing_keeps_the_corners(any_grid: Grid, spacing_mm: float | tuple[float, float, float]) -> None:
    other = any_grid.with_spacing(spacing_mm)
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    assert np.abs(other.cube_to_world(corners) - any_grid.cube_to_world(corners)).max() < EXACT
    assert min(other.size) >= 2
    for got, wanted, extent in zip(
        other.spacing_mm, np.broadcast_to(spacing_mm, 3), any_grid.extent_mm, strict=True
    ):
        # n - 1 intervals are extent / wanted rounded to a whole number, and at least one.
        intervals = max(1.0, extent / wanted)
        assert abs(extent / got - intervals) <= 0.5 + 1e-9


def test_with_the_same_spacing_is_the_same_grid(any_grid: Grid) -> None:
    assert any_grid.with_spacing(any_grid.spacing_mm).is_close(any_grid, 1e-9)


def test_axis_of_one_voxel() -> None:
    grid = Grid((6, 1, 4), (1.0, 5.0, 2.0), (1.0, 2.0, 3.0))
    cube = cube_points(grid.shape, dtype=torch.float64).numpy()
    assert (cube[..., 1] == -1).all()
    assert np.abs(grid.cube_to_world(cube) - grid.points_world()).max() < EXACT
    points = some_indices()
    assert np.abs(grid.world_to_cube(grid.cube_to_world(points)) - points).max() < EXACT
    finer = grid.with_spacing(0.5)
    assert finer.size == (11, 1, 13)
    assert finer.spacing_mm == (0.5, 5.0, 0.5)


def test_is_close() -> None:
    grid = Grid(SIZE, SPACING, ORIGIN)
    shifted = (ORIGIN[0] + 0.01, *ORIGIN[1:])
    assert grid.is_close(Grid(SIZE, SPACING, ORIGIN))
    assert not grid.is_close(Grid(SIZE, SPACING, shifted))
    assert grid.is_close(Grid(SIZE, SPACING, shifted), tolerance_mm=0.02)
    assert not grid.is_close(Grid((7, 5, 5), SPACING, ORIGIN))
    # A spacing that differs a little moves the far corner: 6 voxels of 0.001 mm.
    assert not grid.is_close(Grid(SIZE, (1.501, *SPACING[1:]), ORIGIN))
    # The same box, but the first axis runs the other way.
    mirrored = Grid(SIZE, SPACING, (ORIGIN[0] + 9.0, *ORIGIN[1:]), (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    assert not grid.is_close(mirrored)


def test_contains_ends_at_the_outer_faces_of_the_voxels(any_grid: Grid) -> None:
    last = np.asarray(any_grid.size, float) - 1
    for axis, unit in enumerate(np.eye(3)):
        inside = np.array([last / 2 - (last[axis] / 2 + 0.49) * unit, last / 2 + (last[axis] / 2 + 0.49) * unit])
        outside = np.array([last / 2 - (last[axis] / 2 + 0.51) * unit, last / 2 + (last[axis] / 2 + 0.51) * unit])
        assert any_grid.contains(any_grid.index_to_world(inside)).all()
        assert not any_grid.contains(any_grid.index_to_world(outside)).any()


# -- images


def test_image_holds_the_array_in_simpleitk_s_order(any_grid: Grid) -> None:
    array = np.arange(any_grid.voxels, dtype=np.float32).reshape(any_grid.shape)
    image = any_grid.image(array)
    assert image.GetSize() == any_grid.size
    assert all(image[x, y, z] == array[z, y, x] for x, y, z in np.ndindex(any_grid.size))
    vectors = np.random.default_rng(0).normal(size=(*any_grid.shape, 3))
    image = any_grid.image(vectors)
    assert image.GetNumberOfComponentsPerPixel() == 3
    assert image[6, 1, 2] == tuple(vectors[2, 1, 6])


def test_dict_round_trip(any_grid: Grid) -> None:
    assert Grid.from_dict(any_grid.to_dict()) == any_grid


def test_apply_affine() -> None:
    matrix = np.array([[0.0, -2.0, 0.0, 1.0], [1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, -4.0], [0.0, 0.0, 0.0, 1.0]])
    points = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    expected = np.array([[-3.0, 3.0, 5.0], [1.0, 2.0, -4.0]])
    assert np.array_equal(apply_affine(matrix, points), expected)
    assert np.array_equal(apply_affine(matrix, torch.from_numpy(points)).numpy(), expected)


# -- errors


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": (0, 4, 4)}, "size"),
        ({"size": (4, 4)}, "size"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing"),
        ({"spacing_mm": (1.0, -1.0, 1.0)}, "spacing"),
        ({"spacing_mm": (1.0, float("nan"), 1.0)}, "spacing"),
        ({"spacing_mm": (1.0, float("inf"), 1.0)}, "spacing"),
        ({"direction": (1.0, 0, 0, 1.0, 0, 0, 0, 0, 1.0)}, "direction"),
        ({"direction": (1.0, 0.0)}, "direction"),
    ],
)
def test_impossible_grids_are_refused(arguments: dict[str, tuple[float, ...]], word: str) -> None:
    with pytest.raises(InputError, match=word):
        Grid(**{"size": SIZE, "spacing_mm": SPACING, **arguments})  # type: ignore[arg-type]


def test_images_of_other_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="3 dimensions"):
        Grid.of(sitk.Image(4, 4, sitk.sitkUInt8))


def test_arrays_of_another_shape_are_refused(any_grid: Grid) -> None:
    with pytest.raises(InputError, match="shape"):
        any_grid.image(np.zeros(any_grid.size))


def test_slabs_of_one_step_show_all_slices() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        slabs = random_slabs([(30, 10, 10)] * 8, 1000, draw)
        assert len(slabs) == 8
        assert sorted({i for slab in slabs for i in range(30)[slab]}) == list(range(30))
        # Three slabs of ten slices, two more where they meet a neighbour.
        assert {(slab.start, slab.stop) for slab in slabs} == {(0, 12), (8, 22), (18, 30)}
    alone = {random_slabs([(30, 10, 10)], 1000, draw)[0].start for _ in range(50)}
    assert alone == {0, 8, 18}  # no slab is left out where a step sees one image
    assert random_slabs([(30, 10, 10)] * 2, None, draw) == [slice(0, 30)] * 2


def test_slabs_of_images_of_other_sizes() -> None:
    draw = np.random.default_rng(0)
    shapes, overlaps = [(30, 10, 10), (40, 10, 10), (9, 10, 10)], [2, 5, 1]
    drawn = [random_slabs(shapes, 1000, draw, overlaps) for _ in range(1200)]
    of_each = [Counter((slab.start, slab.stop) for slab in slabs) for slabs in zip(*drawn, strict=True)]
    assert set(of_each[0]) == {(0, 12), (8, 22), (18, 30)}
    assert set(of_each[1]) == {(0, 15), (5, 25), (15, 35), (25, 40)}
    assert set(of_each[2]) == {(0, 9)}
    # Each slab of an image as often as the others: 400 ± 16 and 300 ± 15 of 1200 draws, four standard deviations.
    assert all(abs(n - 400) < 66 for n in of_each[0].values())
    assert all(abs(n - 300) < 60 for n in of_each[1].values())
    # So with two images: a start drawn from the larger count alone would show the third slab of three 300 times.
    first = Counter(random_slabs(shapes[:2], 1000, draw, overlaps[:2])[0].start for _ in range(1200))
    assert len(first) == 3
    assert all(abs(n - 400) < 66 for n in first.values())


def test_as_many_slabs_as_are_counted() -> None:
    draw = np.random.default_rng(0)
    for shape, voxels in (((30, 10, 10), 1000), ((30, 10, 10), 1250), ((9, 50, 50), 100), ((3, 50, 50), 100)):
        drawn = {slab.start for slab in random_slabs([shape] * 200, voxels, draw)}
        assert len(drawn) == slab_count(shape, voxels)
    assert slab_count((30, 10, 10), 1000) == 3
    assert slab_count((30, 10, 10), 10**6) == slab_count((30, 10, 10), None) == 1
    assert slab_count((9, 50, 50), 100) == 2  # of four slices at least
    assert slab_count((3, 50, 50), 100) == 1


# -- affine maps as matrices


def test_matrices_are_the_maps(any_grid: Grid) -> None:
    index = some_indices()
    assert (
        np.abs(apply_affine(any_grid.index_to_world_matrix, index) - any_grid.index_to_world(index)).max() < EXACT
    )
    cube = index / 4 - 1
    assert np.abs(apply_affine(any_grid.cube_to_world_matrix, cube) - any_grid.cube_to_world(cube)).max() < EXACT


def test_an_axis_of_one_voxel_has_a_matrix_too() -> None:
    grid = Grid((5, 1, 4), (2.0, 3.0, 4.0), (1.0, 2.0, 3.0))
    world_to_cube = grid.world_to_cube_matrix
    points_mm = grid.points_world()
    assert np.abs(apply_affine(world_to_cube, points_mm) - grid.world_to_cube(points_mm)).max() < EXACT


@pytest.mark.parametrize("slab", [slice(None), slice(1, 3), slice(2, None)])
def test_affine_points_are_the_matrix_times_each_index(any_grid: Grid, slab: slice) -> None:
    matrix = np.random.default_rng(3).normal(size=(4, 4))
    matrix[3] = 0, 0, 0, 1
    points = affine_points(matrix, any_grid.shape, slab=slab).numpy()
    assert np.abs(points - apply_affine(matrix, index_points(any_grid.shape)[slab])).max() < EXACT


@pytest.mark.parametrize("shape", [(5, 3, 2), (1, 1, 1), (7, 2000, 1000)])
def test_slab_slices_are_all_slices_once(shape: tuple[int, int, int]) -> None:
    slices = [z for part in slab_slices(shape) for z in range(part.start, part.stop)]
    assert slices == list(range(shape[0]))


def test_corners_are_the_outermost_voxels_or_beyond_them(any_grid: Grid) -> None:
    centres = any_grid.points_world()[np.ix_(*([0, n - 1] for n in any_grid.shape))].reshape(8, 3)
    assert np.abs(any_grid.corners_world() - centres).max() < EXACT
    edges = any_grid.corners_world(0.5)
    assert any_grid.contains(edges + 1e-6 * (any_grid.centre_mm - edges)).all()
    assert not any_grid.contains(edges - 1e-6 * (any_grid.centre_mm - edges)).any()

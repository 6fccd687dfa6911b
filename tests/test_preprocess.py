"""Smoothing and resampling against SciPy's, and images that are moved by known maps."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from conftest import DIRECTIONS, make_grid
from scipy.spatial.transform import Rotation

from stnerp.geometry import Grid, affine_transform, apply_affine
from stnerp.preprocess import (
    gaussian_resize,
    normalised,
    on_grid,
    thicker_sigma_mm,
    thinner_sigma_mm,
)
from stnerp.window import Window


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def ramp(points_mm: np.ndarray) -> np.ndarray:
    """A linear function of world points: linear interpolation reproduces it exactly, wherever."""
    return (points_mm @ np.array([0.004, -0.003, 0.002]) + 0.5).astype(np.float32)


# Values near 1 in float32, eight weights each.
SINGLE = 2e-6


def test_normalised_is_the_window() -> None:
    image = sitk.GetImageFromArray(np.array([[[-2000, -1000, 0, 1000, 3000]]], np.int16))
    values = normalised(image, Window(-1000.0, 1000.0))
    assert values.dtype == np.float32
    assert values.tolist() == [[[0, 0, 0.5, 1, 1]]]


# -- on_grid


def test_noise_is_nearly_as_strong_between_voxels_as_at_them() -> None:
    """A registration would see where it is weaker; linear interpolation leaves an eighth of its variance."""
    grid, half = Grid((24, 24, 24), (2.0, 2.0, 2.0)), np.eye(4)
    half[:3, 3] = 1.0
    white = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    inside = (slice(4, -4),) * 3

    def share(sigma_mm: float) -> float:
        at, _ = on_grid(white, grid, grid, None, sigma_mm)
        between, _ = on_grid(white, grid, grid, half, sigma_mm)
        return float(between[inside].var() / at[inside].var())

    assert share(0.0) > 0.35  # cubic splines: 0.75 per axis
    assert share(1.2) > 0.6  # as fits do it: 0.6 voxels
    assert share(2.0) > 0.6  # linear from 0.7 voxels on


@pytest.mark.parametrize("thin", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_moved_scan_a_few_voxels_thin_is_read_within_its_values(axis: int, thin: int) -> None:
    # Of two voxels cubic splines of ITK read memory beyond the image: NaN, or another answer each time.
    size = [9, 10, 11]
    size[axis] = thin
    grid = Grid((size[0], size[1], size[2]), (2.5, 2.5, 2.5))
    array = np.random.default_rng(axis).random(grid.shape, np.float32)
    shift_mm = np.array([1.0, 0.7, -0.6])
    matrix = np.eye(4)
    matrix[:3, 3] = shift_mm
    read = [on_grid(array, grid, grid, matrix)[0] for _ in range(20)]
    assert all(np.array_equal(again, read[0]) for again in read)
    assert np.abs(read[0] - 0.5).max() < 0.8  # splines overshoot, by less than a third of a step
    if thin == 2:
        where = apply_affine(matrix, grid.points_world()) / 2.5
        linear = scipy.ndimage.map_coordinates(
            array, np.moveaxis(where[..., ::-1], -1, 0), order=1, mode="nearest"
        )
        inside = ((where >= 0) & (where <= np.array(size) - 1)).all(-1)
        assert np.abs(read[0] - linear)[inside].max() < 1e-5  # float32


def test_onto_its_own_grid_nothing_changes(any_grid: Grid) -> None:
    array = noise(any_grid.shape)
    for matrix in (None, np.eye(4)):
        values, covered = on_grid(array, any_grid, any_grid, matrix)
        assert np.array_equal(values, array)
        assert covered.all()
        assert covered.shape == any_grid.shape


def test_grids_of_other_directions_show_the_same_world(any_grid: Grid) -> None:
    grid = make_grid(DIRECTIONS["oblique"], (12, 14, 10), (2.0, 2.5, 3.0))
    to = Grid(any_grid.size, any_grid.spacing_mm, tuple(grid.centre_mm - 4.0), any_grid.direction)
    values, covered = on_grid(ramp(grid.points_world()), grid, to)
    inside = np.all(np.abs(grid.world_to_cube(to.points_world())) <= 1, axis=-1)
    assert inside.sum() > 20
    assert np.abs(values - ramp(to.points_world()))[inside].max() < SINGLE
    assert covered[inside].all()
    # Cubic splines end flat at the scan's border.
    splined, _ = on_grid(ramp(grid.points_world()), grid, to, splines=True)
    assert SINGLE < np.abs(splined - ramp(to.points_world()))[inside].max() < 1e-3


def moved_point_map() -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", [5, -10, 15], degrees=True).as_matrix() * 1.05
    # About the middle of the grid below, and then a shift.
    centre = np.array([-28.0, 63.0, 107.0])
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + [4.0, -7.0, 3.0]
    return matrix


@pytest.mark.parametrize("kind", ["shift", "affine"])
def test_known_map_is_applied_in_world_space(oblique_grid: Grid, kind: str) -> None:
    matrix = moved_point_map()
    if kind == "shift":
        matrix = np.eye(4)
        matrix[:3, 3] = [4.0, -7.0, 3.0]
    to = oblique_grid.with_spacing((4.0, 3.0, 5.0))
    there = apply_affine(matrix, to.points_world())
    values, covered = on_grid(ramp(oblique_grid.points_world()), oblique_grid, to, matrix)
    inside = np.all(np.abs(oblique_grid.world_to_cube(there)) <= 1, axis=-1)
    assert 0.3 < inside.mean() < 1
    # A point p of `to` shows the scan at matrix · p; the inverse map fails by 2 × 8 mm × 0.005. Cubic splines end
    # flat at the scan's border, an error that every voxel from there makes a quarter of.
    error = np.abs(values - ramp(there))
    assert error[inside].max() < 0.01
    far_in = np.abs(oblique_grid.world_to_cube(there)) <= 1 - 8 / np.array(oblique_grid.size)
    assert error[np.all(far_in, axis=-1)].max() < 2e-4
    back = ramp(apply_affine(np.linalg.inv(matrix), to.points_world()))
    assert np.abs(values - back)[inside].max() > 0.02
    assert np.array_equal(covered, oblique_grid.contains(there))


def test_shift_by_whole_voxels_is_exact(any_grid: Grid) -> None:
    array, matrix = noise(any_grid.shape), np.eye(4)
    matrix[:3, 3] = any_grid.index_to_world(np.array([2.0, 1.0, 1.0])) - any_grid.index_to_world(np.zeros(3))
    values, covered = on_grid(array, any_grid, any_grid, matrix)
    # Rounding of coordinates of 100 mm in double: the weights of neighbours stay below 1e-10.
    assert np.abs(values[:-1, :-1, :-2] - array[1:, 1:, 2:]).max() < SINGLE
    assert covered[:-1, :-1, :-2].all()
    assert not covered[-1].any()
    assert not covered[:, -1].any()
    assert not covered[:, :, -2:].any()
    # What isn't covered holds the nearest value.
    assert np.abs(values[-1, :-1, :-2] - array[-1, 1:, 2:]).max() < SINGLE
    assert np.abs(values[-1, -1, -1] - array[-1, -1, -1]) < SINGLE


def test_smaller_scan_covers_a_part() -> None:
    grid = Grid((10, 10, 10), (2.0, 2.0, 2.0), (10.0, 0.0, 0.0))
    to = Grid((20, 10, 10), (2.0, 2.0, 2.0))
    _, covered = on_grid(noise(grid.shape), grid, to)
    assert not covered[:, :, :5].any()
    assert covered[:, :, 5:15].all()
    assert not covered[:, :, 15:].any()


@pytest.mark.parametrize("sigma_mm", [0.0, 4.0])
def test_coarser_grid_of_the_same_corners(oblique_grid: Grid, sigma_mm: float) -> None:
    to = oblique_grid.with_spacing(8.0)
    values, covered = on_grid(noise(oblique_grid.shape), oblique_grid, to, None, sigma_mm)
    expected = gaussian_resize(
        torch.from_numpy(noise(oblique_grid.shape)), to.shape, oblique_grid.spacing_mm, (sigma_mm,) * 3
    )
    assert np.array_equal(values, expected.numpy())
    assert covered.all()
    constant, _ = on_grid(
        np.full(oblique_grid.shape, 0.3, np.float32), oblique_grid, to, moved_point_map(), sigma_mm
    )
    assert np.abs(constant - 0.3).max() < SINGLE


def test_smoothing_is_in_millimetres_on_any_grid() -> None:
    # A spot of 10 mm on a fine and on an anisotropic grid, smoothed by 8 mm, is the same spot in world space.
    def spot(points: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((points - [2.0, -3.0, 5.0]) ** 2).sum(-1) / 10**2).astype(np.float32)

    to = Grid((9, 9, 9), (6.0, 6.0, 6.0), (-24.0, -24.0, -24.0))
    fine = Grid((61, 61, 61), (2.0, 2.0, 2.0), (-60.0, -60.0, -60.0))
    other = make_grid(DIRECTIONS["sagittal"], (41, 31, 41), (3.0, 4.0, 3.0))
    shift = -other.centre_mm
    other = Grid(other.size, other.spacing_mm, tuple(np.asarray(other.origin_mm) + shift), other.direction)
    variance = 10**2 + 8**2
    expected = (10**2 / variance) ** 1.5 * np.exp(
        -0.5 * ((to.points_world() - [2.0, -3.0, 5.0]) ** 2).sum(-1) / variance
    )
    for grid in (fine, other):
        values, _ = on_grid(spot(grid.points_world()), grid, to, None, 8.0)
        # Then read linearly at up to 8 mm: h² |f''| / 8 per axis, f'' = 0.48 / 164.
        assert np.abs(values - expected).max() < 3 * 8**2 * (0.48 / 164) / 8
        assert expected.max() > 0.4


# -- two slice thicknesses


def test_thin_voxels_get_the_thickness_of_thick_ones() -> None:
    """Smooth structure averaged over 6 mm, and over 2 mm and then as the Gaussian says, are the same to 1 %."""
    thin, thick = Grid((4, 4, 150), (1.0, 1.0, 2.0)), Grid((4, 4, 50), (1.0, 1.0, 6.0), (0.0, 0.0, 2.0))
    z_mm = np.arange(0.1, 300, 0.2) - 1
    structure = np.sin(2 * np.pi * z_mm / 25)
    over_2_mm, over_6_mm = (structure.reshape(-1, n).mean(1) for n in (10, 30))
    sigma_mm = thinner_sigma_mm(thin, thick)
    assert sigma_mm == (0, 0, pytest.approx(np.sqrt(32 / 12)))
    volume = np.broadcast_to(over_2_mm[:, None, None], thin.shape).copy()
    found, _ = on_grid(volume, thin, thin, None, sigma_mm)
    inside = slice(4, -4)
    assert np.abs(found[1::3, 2, 2] - over_6_mm)[inside].max() < 0.01
    assert np.abs(volume[1::3, 2, 2] - over_6_mm)[inside].max() > 0.05
    assert thinner_sigma_mm(thick, thin) == thinner_sigma_mm(thin, thin) == (0, 0, 0)


def test_thickness_is_looked_at_along_a_grid_s_own_axes() -> None:
    axial = Grid((5, 5, 5), (1.0, 2.0, 6.0))
    coronal = Grid((5, 5, 5), (1.0, 1.0, 5.0), direction=(1, 0, 0, 0, 0, 1, 0, -1, 0))  # its third axis is y
    assert thinner_sigma_mm(axial, coronal) == (0, pytest.approx(np.sqrt(21 / 12)), 0)
    assert thinner_sigma_mm(coronal, axial) == (0, pytest.approx(np.sqrt(35 / 12)), 0)
    # Along the first grid's axes here: what the second one lacks.
    assert thicker_sigma_mm(axial, coronal) == (0, 0, pytest.approx(np.sqrt(35 / 12)))
    assert thicker_sigma_mm(coronal, axial) == (0, 0, pytest.approx(np.sqrt(21 / 12)))


# -- gaussian_resize


@pytest.mark.parametrize("sigma_mm", [3.0, 5.0])
def test_gaussian_is_scipy_s(sigma_mm: float) -> None:
    spacing_mm, volume = (1.5, 2.0, 3.0), np.random.default_rng(0).random((31, 35, 41))
    found = gaussian_resize(torch.from_numpy(volume), (31, 35, 41), spacing_mm, (sigma_mm,) * 3).numpy()
    sigma = [sigma_mm / s for s in spacing_mm[::-1]]
    expected = scipy.ndimage.gaussian_filter(volume, sigma, truncate=12, mode="constant")
    # In the interior, six sigma from any border: e^-18 = 1e-8 of the weight is beyond.
    margin = [int(np.ceil(6 * s)) for s in sigma]
    inner = tuple(slice(m, n - m) for m, n in zip(margin, volume.shape, strict=True))
    if sigma_mm == 3.0:
        assert expected[inner].size > 500
        assert np.abs(found - expected)[inner].max() < 1e-7
    # And up to the border, weights sum to one.
    weights = scipy.ndimage.gaussian_filter(np.ones_like(volume), sigma, truncate=12, mode="constant")
    assert np.abs(found - expected / weights).max() < 1e-7


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_hardly_smoothed_it_is_read_by_scipy_s_cubic_spline(sigma: float) -> None:
    volume = torch.rand(6, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth = gaussian_resize(volume, (6, 7, 9), (1.0, 1.0, 1.0), (sigma,) * 3).numpy()
    expected = scipy.ndimage.zoom(smooth, (11 / 6, 4 / 7, 1), order=3, mode="mirror")
    found = gaussian_resize(volume, (11, 4, 9), (1.0, 1.0, 1.0), (sigma,) * 3)
    assert np.abs(found.numpy() - expected).max() < 1e-12


def test_gaussian_keeps_constants_and_narrow_ones_change_nothing() -> None:
    constant = torch.full((6, 7, 9), 0.7, dtype=torch.float64)
    assert (gaussian_resize(constant, (3, 9, 5), (1.0, 2.0, 3.0), (2.5,) * 3) - 0.7).abs().max() < 1e-14
    volume = torch.rand(6, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gaussian_resize(volume, (6, 7, 9), (2.0, 2.0, 2.0), (0.5,) * 3), volume)


def test_affine_transform_is_simpleitk_s_form() -> None:
    matrix, point = moved_point_map(), (11.0, -4.0, 30.0)
    found = affine_transform(matrix).TransformPoint(point)
    assert np.abs(np.array(found) - apply_affine(matrix, np.array(point))).max() < 1e-12

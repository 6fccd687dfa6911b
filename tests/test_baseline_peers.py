"""Pairwise peers: the algebra of what they give back, and the direction and unit of each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from stnerp.baselines.ants_syn import ants_syn
from stnerp.baselines.convexadam import convexadam
from stnerp.baselines.cycle_idir import cycle_idir
from stnerp.baselines.dlir import dlir
from stnerp.baselines.elastix_bspline import elastix_bspline
from stnerp.baselines.greedy import greedy
from stnerp.baselines.idir import idir
from stnerp.baselines.pair import PairMethod, PairRegistration, peer, registration_of
from stnerp.errors import InputError, MissingDependencyError
from stnerp.geometry import Grid, apply_affine
from stnerp.window import Window

Map = Callable[[np.ndarray], np.ndarray]

SHIFT_MM = np.array([5.0, -3.0, 2.0])
AFFINE = np.array([[1.1, 0.1, 0.0, 4.0], [-0.05, 0.9, 0.1, -2.0], [0.0, 0.2, 1.0, 3.0], [0.0, 0.0, 0.0, 1.0]])


# -- what a registration is, without any peer


def shifted(points_mm: np.ndarray) -> np.ndarray:
    return points_mm + SHIFT_MM


def affine_about(grid: Grid) -> Map:
    centre = grid.centre_mm
    return lambda points_mm: centre + apply_affine(AFFINE, points_mm - centre)


def inside(grid: Grid, seed: int = 0) -> np.ndarray:
    """Points between the outermost voxel centres."""
    return grid.cube_to_world(np.random.default_rng(seed).uniform(-1, 1, (50, 3)))


def ramp(points_mm: np.ndarray) -> np.ndarray:
    """An image whose linear interpolation is exact."""
    return points_mm @ np.array([2.0, -3.0, 0.5]) + 100


def other_grid(grid: Grid) -> Grid:
    """Another size, spacing and orientation, around the same centre and larger."""
    axes = Rotation.from_euler("xyz", [-10, 15, 5], degrees=True).as_matrix()
    one = Grid((60, 50, 70), (2.0, 3.0, 1.7), (0.0, 0.0, 0.0), tuple(axes.ravel()))
    x, y, z = (float(c) for c in grid.centre_mm - one.centre_mm)
    return Grid(one.size, one.spacing_mm, (x, y, z), one.direction)


def test_images_that_tell_no_motion_are_refused_by_name() -> None:
    # ITK would look for NaN's place forever, and find one for what is the same everywhere.
    grid = Grid((8, 7, 6), (4.0, 4.0, 5.0))
    image = grid.image(np.random.default_rng(0).random(grid.shape, np.float32))
    holes = sitk.Image(image)
    holes[2, 3, 1] = float("nan")
    refused = {"1 voxels are NaN": holes, "every voxel is 0": 0 * image, "shows nothing in the window": image + 5}
    for says, other in refused.items():
        for method, at in ((idir, "target"), (cycle_idir, "target"), (dlir, "image 0")):
            with pytest.raises(InputError, match=f"^{at}: {says}"):
                method(image, other, window=Window(0, 1))
        with pytest.raises(InputError, match=f"^reference: {says}"):
            idir(other, image, window=Window(0, 1))


def test_points_follow_a_translation_everywhere(any_grid: Grid) -> None:
    found = registration_of(any_grid, shifted)
    points = np.concatenate([inside(any_grid), any_grid.cube_to_world(np.full((1, 3), 7.0))])
    assert found.map_points(points) == pytest.approx(points + SHIFT_MM, abs=1e-9)
    assert found.map_points(np.empty((0, 3))).shape == (0, 3)


def test_points_follow_an_affine_map_between_voxels(any_grid: Grid) -> None:
    # A displacement that is linear in the point is what linear interpolation keeps.
    φ, points = affine_about(any_grid), inside(any_grid)
    found = registration_of(any_grid, φ)
    assert found.map_points(points) == pytest.approx(φ(points), abs=1e-9)
    assert np.abs(found.map_points(points) - points).max() > 1


def test_the_border_s_displacement_goes_on_outside(any_grid: Grid) -> None:
    φ = affine_about(any_grid)
    outside = np.array([[1.5, 0.3, -0.2], [0.1, -4.0, 2.0]])
    border = any_grid.cube_to_world(outside.clip(-1, 1))
    outside = any_grid.cube_to_world(outside)
    expected = outside + φ(border) - border
    assert registration_of(any_grid, φ).map_points(outside) == pytest.approx(expected, abs=1e-9)


def test_the_displacement_is_what_simpleitk_takes(oblique_grid: Grid) -> None:
    found, points = registration_of(oblique_grid, affine_about(oblique_grid)), inside(oblique_grid)
    transform = sitk.DisplacementFieldTransform(sitk.Image(found.displacement))
    theirs = np.array([transform.TransformPoint(point) for point in points.tolist()])
    assert found.map_points(points) == pytest.approx(theirs, abs=1e-9)


def test_the_reference_is_drawn_where_the_target_s_voxels_come_from(oblique_grid: Grid) -> None:
    about, source = affine_about(oblique_grid), other_grid(oblique_grid)

    def φ(points_mm: np.ndarray) -> np.ndarray:  # far enough to leave the reference's field of view
        return about(points_mm) + np.array([45.0, 0.0, 0.0])

    found = registration_of(oblique_grid, φ)
    reference = source.image(ramp(source.points_world()))
    drawn = found.warp(reference)
    assert drawn.GetPixelID() == sitk.sitkFloat32
    assert Grid.of(drawn).is_close(oblique_grid, 1e-9)
    from_mm = φ(oblique_grid.points_world())
    seen = source.contains(from_mm)
    values = sitk.GetArrayFromImage(drawn)
    # Half a voxel along the rim SimpleITK repeats the last value; float32 of numbers below 1000.
    well_inside = np.all(np.abs(source.world_to_cube(from_mm)) <= 1, axis=-1)
    assert values[well_inside] == pytest.approx(ramp(from_mm[well_inside]), abs=1e-3)
    filled = sitk.GetArrayFromImage(found.warp(reference, outside=-7.0))
    assert np.array_equal(filled == -7.0, ~seen)
    assert (~seen).any()
    assert well_inside.mean() > 0.2
    assert not (values[~seen] == 0).any()  # the nearest voxel's, by default
    # Used twice: drawing does not use up the displacement.
    assert np.array_equal(sitk.GetArrayFromImage(found.warp(reference)), values)


def test_labels_move_by_whole_voxels(oblique_grid: Grid) -> None:
    # φ(p) = p + two voxels along z: what was in slice k is now in slice k - 2.
    step = oblique_grid.index_to_world(np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    found = registration_of(oblique_grid, lambda points_mm: points_mm + step[0] - step[1])
    labels = np.random.default_rng(0).integers(0, 4, oblique_grid.shape).astype(np.uint8)
    carried = sitk.GetArrayFromImage(found.propagate(oblique_grid.image(labels)))
    assert carried.dtype == np.uint8
    assert np.array_equal(carried[:-2], labels[2:])
    assert not carried[-2:].any()  # from outside the mask


def test_labels_go_to_the_majority_as_for_the_model(oblique_grid: Grid) -> None:
    # Halfway between voxels, linear interpolation of a binary mask cut at one half decides.
    mask = np.zeros(oblique_grid.shape, np.uint8)
    mask[3:-3, 4:-4, 5:-5] = 5
    found = registration_of(oblique_grid, affine_about(oblique_grid))
    carried = sitk.GetArrayFromImage(found.propagate(oblique_grid.image(mask)))
    share = sitk.GetArrayFromImage(found.warp(oblique_grid.image((mask / 5).astype(np.float32)), outside=0.0))
    clear = np.abs(share - 0.5) > 1e-4
    assert np.array_equal(carried[clear], np.where(share > 0.5, 5, 0)[clear])
    assert (carried != mask).mean() > 0.02


def test_what_is_no_registration_is_refused(oblique_grid: Grid) -> None:
    field = np.zeros((*oblique_grid.shape, 3))
    for wrong in (field.astype(np.float32), field[..., 0], field[..., :2]):
        with pytest.raises(InputError, match="float64 vectors"):
            PairRegistration(oblique_grid.image(wrong))
    found = PairRegistration(oblique_grid.image(field))
    with pytest.raises(InputError, match="points"):
        found.map_points(np.zeros((4, 2)))
    with pytest.raises(InputError, match="whole numbers"):
        found.propagate(oblique_grid.image(field[..., 0] + 0.5))


# -- the peers


def quick_elastix(*images: sitk.Image, **settings: Any) -> PairRegistration:
    few = {"iterations": 100, "linear_iterations": 100, "samples": 1500, "resolutions": 3, "grid_spacing_mm": 20.0}
    return elastix_bspline(*images, **(few | settings))


def quick_ants(*images: sitk.Image, **settings: Any) -> PairRegistration:
    return ants_syn(*images, **({"iterations": (50, 50, 20)} | settings))


def quick_greedy(*images: sitk.Image, **settings: Any) -> PairRegistration:
    return greedy(*images, **({"iterations": (50, 50, 20), "linear_iterations": (30, 10)} | settings))


def quick_convexadam(*images: sitk.Image, **settings: Any) -> PairRegistration:
    return convexadam(*images, **({"spacing_mm": 4.0, "grid_spacing": 4, "iterations": 50} | settings))


#: Method, module and package.
PEERS = {
    "elastix": (quick_elastix, "itk", "itk-elastix", "ElastixRegistrationMethod"),
    "ants": (quick_ants, "ants", "antspyx"),
    "greedy": (quick_greedy, "picsl_greedy", "picsl-greedy"),
    "convexadam": (quick_convexadam, "convexAdam", "convexadam"),
}
WINDOW = Window(0.0, 1000.0)


@pytest.fixture(params=PEERS.values(), ids=PEERS.keys())
def peer_method(request: pytest.FixtureRequest) -> PairMethod:
    method, *package = request.param
    try:
        peer(*package)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))
    return method


def blobs(centre_mm: np.ndarray) -> Map:
    """An image without symmetry, given by a formula: intensities (...) at points (..., 3)."""
    rng = np.random.default_rng(0)
    places, widths = rng.uniform(-45, 45, (40, 3)) + centre_mm, rng.uniform(6, 14, 40)
    heights = rng.uniform(100, 333, 40)

    def intensity(points_mm: np.ndarray) -> np.ndarray:
        squares = ((points_mm[..., None, :] - places) ** 2).sum(-1)
        return (heights * np.exp(-squares / (2 * widths**2))).sum(-1)

    return intensity


def bend_about(centre_mm: np.ndarray) -> Map:
    """Smooth, up to 7 mm, gone at the border."""

    def φ(points_mm: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(points_mm - centre_mm, -1, 0)
        bend = np.stack([4 * np.cos(y / 20), 3 * np.sin(z / 25), 5 * np.cos(x / 22)], axis=-1)
        return points_mm + bend * np.exp(-(x**2 + y**2 + z**2) / (2 * 35**2))[..., None]

    return φ


def pair(grid: Grid, φ: Map, apart_mm: float = 0.0) -> tuple[sitk.Image, sitk.Image, Map]:
    """Reference and target on different grids, and the map between them, target -> reference."""
    big = Grid((40, 32, 22), grid.spacing_mm, grid.origin_mm, grid.direction)
    source, intensity = other_grid(big), blobs(big.centre_mm)
    target = big.image(intensity(φ(big.points_world())).astype(np.float32))
    reference = source.image(intensity(source.points_world()).astype(np.float32))
    apart = np.array([apart_mm, -apart_mm / 2, apart_mm])
    reference.SetOrigin([float(o) for o in np.asarray(reference.GetOrigin()) + apart])
    return reference, target, lambda points_mm: φ(points_mm) + apart


def middle(image: sitk.Image) -> np.ndarray:
    """Points within 25 mm of the centre, where there is structure."""
    return np.random.default_rng(1).uniform(-25, 25, (200, 3)) + Grid.of(image).centre_mm


def error_mm(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=1).mean())


@pytest.mark.parametrize("motion", ["shift", "bend"])
def test_direction_and_unit(peer_method: PairMethod, oblique_grid: Grid, motion: str) -> None:
    φ = shifted if motion == "shift" else bend_about(Grid((40, 32, 22), *_frame(oblique_grid)).centre_mm)
    reference, target, truth = pair(oblique_grid, φ)
    found = peer_method(reference, target, window=WINDOW, align="none")
    points = middle(target)
    assert Grid.of(found.displacement).is_close(Grid.of(target), 1e-9)
    # Few iterations on coarse voxels find the motion to a millimetre or so; the inverse direction, RAS in
    # place of LPS, or voxels in place of millimetres would be off by more than the motion itself.
    assert error_mm(found.map_points(points), truth(points)) < 0.35 * error_mm(points, truth(points))
    drawn = sitk.GetArrayFromImage(found.warp(reference))
    assert np.abs(drawn - sitk.GetArrayFromImage(target)).mean() < 25  # of intensities up to 1000


@pytest.mark.parametrize("align", ["rigid", "affine"])
def test_images_far_apart_in_the_world(peer_method: PairMethod, oblique_grid: Grid, align: Any) -> None:
    reference, target, truth = pair(oblique_grid, shifted, apart_mm=80.0)
    points = middle(target)
    assert error_mm(points, truth(points)) > 100
    found = peer_method(reference, target, window=WINDOW, align=align)
    assert error_mm(found.map_points(points), truth(points)) < 2.0


@pytest.mark.parametrize("method", [elastix_bspline, ants_syn, greedy, convexadam])
def test_wrong_settings_and_missing_packages(
    method: PairMethod, oblique_grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = oblique_grid.image(np.zeros(oblique_grid.shape, np.float32))
    with pytest.raises(InputError, match="none, rigid or affine"):
        method(image, image, window=WINDOW, align="similar")  # type: ignore[arg-type]
    for name in ("itk", "ants", "picsl_greedy", "convexAdam", "convexAdam.convex_adam_MIND"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"stnerp\[peers\]"):
        method(image, image, window=WINDOW)


def _frame(grid: Grid) -> tuple[Any, Any, Any]:
    return grid.spacing_mm, grid.origin_mm, grid.direction

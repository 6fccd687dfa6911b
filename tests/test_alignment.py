"""Pre-alignment of images that are known functions, and its course over time."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from stnerp import alignment
from stnerp.alignment import affine_at, affine_between, stretch_rate
from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, apply_affine

# Blobs of different sizes and brightness, in no symmetric arrangement: centre (mm), width (mm), height.
BLOBS = [
    ((-30.0, -20.0, -15.0), 12.0, 0.9),
    ((25.0, -15.0, 10.0), 16.0, 0.6),
    ((5.0, 30.0, 20.0), 10.0, 0.8),
    ((-20.0, 15.0, 25.0), 14.0, 0.4),
    ((15.0, 10.0, -25.0), 9.0, 0.7),
]
BOX = Grid((31, 29, 27), (5.0, 5.0, 5.0), (-75.0, -70.0, -65.0))
OBLIQUE = Grid(
    (38, 36, 32),
    (4.0, 4.5, 5.0),
    tuple(Rotation.from_euler("xyz", [8, -12, 15], degrees=True).apply([-74.0, -79.0, -78.0])),  # type: ignore[arg-type]
    tuple(Rotation.from_euler("xyz", [8, -12, 15], degrees=True).as_matrix().ravel()),
)


def blobs(grid: Grid, to_target: np.ndarray) -> sitk.Image:
    """The blobs after every point of the reference has gone through `to_target`; no resampling."""
    points = apply_affine(np.linalg.inv(to_target), grid.points_world())
    values = np.zeros(grid.shape)
    for centre, width, height in BLOBS:
        values += height * np.exp(-0.5 * ((points - centre) ** 2).sum(-1) / width**2)
    return grid.image(values.astype(np.float32))


def rigid(degrees: tuple[float, float, float], shift_mm: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


RIGID = rigid((4.0, -6.0, 8.0), (9.0, -6.0, 5.0))
AFFINE = RIGID @ np.diag([1.06, 0.95, 1.04, 1.0])


def error_mm(found: np.ndarray, true: np.ndarray) -> float:
    """Largest distance over the blobs' centres."""
    centres = np.array([centre for centre, _, _ in BLOBS])
    return float(np.linalg.norm(apply_affine(found, centres) - apply_affine(true, centres), axis=1).max())


@pytest.mark.parametrize("target_grid", [BOX, OBLIQUE], ids=["same grid", "oblique grid"])
@pytest.mark.parametrize(("kind", "true"), [("rigid", RIGID), ("affine", AFFINE)])
def test_known_map_is_found_from_reference_to_target(kind: str, true: np.ndarray, target_grid: Grid) -> None:
    found = affine_between(blobs(BOX, np.eye(4)), blobs(target_grid, true), kind)  # type: ignore[arg-type]
    # Compared at 5 mm voxels by steps that end at 0.01 mm: a tenth of a voxel.
    assert error_mm(np.eye(4), true) > 10
    assert error_mm(found, true) < 0.5
    # The other direction would be twice as far off as nothing at all.
    assert error_mm(np.linalg.inv(found), true) > 15


@pytest.mark.parametrize("field", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_gain_and_bias_field_of_an_mr_with_thick_slices(kind: str, field: float) -> None:
    """Vessels and three balls in an organ that the field of view cuts, 10 mm apart."""
    true = rigid((-4.0, 3.0, -5.0), (-5.0, 4.0, -8.0))
    images = [
        organ(thick_slices(turn, centre), to_target, gain, field * np.array(bias))
        for turn, centre, to_target, gain, bias in (
            ((18, -12, 25), (0, 0, 0), np.eye(4), 0.6, (0.25, -0.2, 0.15)),
            ((22, -8, 20), (-5, 4, -8), true, 0.36, (-0.13, 0.2, -0.15)),
        )
    ]
    found = affine_between(*images, kind)  # type: ignore[arg-type]
    somewhere = np.random.default_rng(1).uniform(-20, 20, (200, 3))
    # A plain correlation along ITK's own gradients ends 0.1, 29 and 60 mm away.
    assert np.linalg.norm(apply_affine(found, somewhere) - apply_affine(true, somewhere), axis=1).mean() < 0.5


def test_a_fit_is_never_worse_than_its_start() -> None:
    """By steps of 20 mm on voxels of 40 mm the optimiser goes 86 mm away."""
    fixed, moving = (alignment._coarse(blobs(BOX, to_target), 5.0) for to_target in (np.eye(4), RIGID))
    start = sitk.AffineTransform(3)
    start.SetMatrix(RIGID[:3, :3].ravel().tolist())
    start.SetTranslation(RIGID[:3, 3].tolist())
    result = alignment._register(fixed, moving, start, shrink=(8,), spacing_mm=40.0)
    assert result is not None
    assert error_mm(alignment._matrix(result[0]), RIGID) < 0.5


def thick_slices(turn: tuple[float, ...], centre: tuple[float, ...]) -> Grid:
    size, spacing = np.array([64, 64, 20]), np.array([0.9, 0.9, 4.0])
    direction = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    origin = np.array(centre) - direction @ ((size - 1) / 2 * spacing)
    return Grid((64, 64, 20), (0.9, 0.9, 4.0), tuple(origin.tolist()), tuple(direction.ravel().tolist()))


def organ(grid: Grid, to_target: np.ndarray, gain: float, bias: np.ndarray) -> sitk.Image:
    """An MR of it in [0, 1], with noise of 0.01 and another brightness by exp(bias · x / 60 mm)."""
    draw = np.random.default_rng(0)
    points = apply_affine(np.linalg.inv(to_target), grid.points_world())
    inside = 1 / (1 + np.exp(38 * (np.linalg.norm((points - [0, 0, 5]) / [45, 40, 38], axis=-1) - 1)))
    values = 0.3 + 0.3 * inside
    for _ in range(14):
        through, along = draw.uniform(-35, 35, 3), draw.standard_normal(3)
        radius = draw.uniform(1.5, 3.5)
        off = np.linalg.norm(np.cross(points - through, along / np.linalg.norm(along)), axis=-1)
        values += 0.45 * inside / (1 + np.exp(3 * (off - radius)))
    for centre, radius, more in (((10, -8, 10), 9, -0.25), ((-14, 10, -8), 6, 0.4), ((5, 14, -18), 7, 0.25)):
        values += more / (1 + np.exp(2 * (np.linalg.norm(points - centre, axis=-1) - radius)))
    values *= gain * np.exp((grid.points_world() - grid.centre_mm) / 60 @ bias)
    values += 0.01 * np.random.default_rng(round(100 * gain)).standard_normal(values.shape)
    return grid.image(np.clip(values, 0, 1).astype(np.float32))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_a_slab_thinner_than_four_coarse_voxels(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """ITK smooths no fewer than four voxels along an axis; 9 mm are three of 4 mm."""
    slab, along = (
        Grid((31, 29, 5), (5.0, 5.0, 2.25), (-75.0, -70.0, 5.0)),
        rigid((0.0, 0.0, 0.0), (7.0, -4.0, 0.0)),
    )
    found = affine_between(blobs(slab, np.eye(4)), blobs(slab, along), kind)  # type: ignore[arg-type]
    # In the slab; how it tilts is hardly seen. Without the alignment 8 mm.
    corners = slab.cube_to_world(np.array([[x, y, 0.0] for x in (-0.5, 0.5) for y in (-0.5, 0.5)]))
    assert np.linalg.norm(apply_affine(found, corners) - apply_affine(along, corners), axis=1).max() < 1
    assert not capfd.readouterr().err  # ITK would warn of every step that leaves the slab


@pytest.mark.parametrize("scale", [0.1, 0.02])
def test_something_small_is_placed_as_well(scale: float) -> None:
    """A mouse, an embryo: the same in a tenth and a fiftieth of the length, to the same share of it."""
    box = Grid(BOX.size, (5 * scale,) * 3, (-75 * scale, -70 * scale, -65 * scale))
    smaller = np.diag([scale, scale, scale, 1.0])
    true = smaller @ RIGID @ np.linalg.inv(smaller)
    images = [box.image(sitk.GetArrayFromImage(blobs(BOX, matrix))) for matrix in (np.eye(4), RIGID)]
    found = np.linalg.inv(smaller) @ affine_between(*images, "rigid") @ smaller
    assert error_mm(np.linalg.inv(smaller) @ true @ smaller, RIGID) < 1e-9
    assert error_mm(found, RIGID) < 0.5


def test_rigid_keeps_lengths() -> None:
    found = affine_between(blobs(BOX, np.eye(4)), blobs(BOX, AFFINE), "rigid")
    assert np.abs(found[:3, :3] @ found[:3, :3].T - np.eye(3)).max() < 1e-9
    assert found[3].tolist() == [0, 0, 0, 1]


def test_another_brightness_is_forgiven() -> None:
    darker = blobs(BOX, RIGID) * 0.5 + 0.2
    assert error_mm(affine_between(blobs(BOX, np.eye(4)), darker, "rigid"), RIGID) < 0.5


def test_headers_far_apart_are_overcome() -> None:
    # The same patient on another table: 400 mm, several fields of view away.
    far = RIGID.copy()
    far[:3, 3] += [400.0, 0.0, -150.0]
    grid = Grid(BOX.size, BOX.spacing_mm, (325.0, -70.0, -215.0))
    assert error_mm(affine_between(blobs(BOX, np.eye(4)), blobs(grid, far), "rigid"), far) < 0.5


def test_the_same_image_stays_where_it_is() -> None:
    image = blobs(BOX, np.eye(4))
    assert error_mm(affine_between(image, image, "affine"), np.eye(4)) < 0.05


def test_the_same_answer_every_time() -> None:
    images = blobs(BOX, np.eye(4)), blobs(BOX, RIGID)
    assert np.array_equal(affine_between(*images, "rigid"), affine_between(*images, "rigid"))


def test_none_is_the_identity() -> None:
    assert np.array_equal(affine_between(blobs(BOX, np.eye(4)), blobs(BOX, RIGID), "none"), np.eye(4))


def test_unknown_kind_is_refused() -> None:
    image = blobs(BOX, np.eye(4))
    with pytest.raises(InputError, match="similarity"):
        affine_between(image, image, "similarity")  # type: ignore[arg-type]


def test_an_empty_image_stays_where_it_is() -> None:
    # It has no centre of mass, and no direction is better than another.
    found = affine_between(blobs(BOX, np.eye(4)), BOX.image(np.zeros(BOX.shape, np.float32)))
    assert np.array_equal(found, np.eye(4))


def test_no_overlap_from_any_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_register", lambda *args, **kwargs: None)
    with pytest.raises(FitError, match="overlap"):
        affine_between(blobs(BOX, np.eye(4)), blobs(BOX, RIGID))


# -- over time

TIMES = (0.0, 10.0, 30.0)
MATRICES = np.stack([np.eye(4), RIGID, AFFINE])


def test_what_stretches_is_found_beside_any_rotation() -> None:
    turn = rigid((20.0, -35.0, 50.0), (3.0, 4.0, 5.0))
    axes = Rotation.from_euler("xyz", (10.0, 20.0, 30.0), degrees=True).as_matrix()
    rate = axes @ np.diag([0.2, 0.0, -0.1]) @ axes.T
    stretch = np.eye(4)
    stretch[:3, :3] = axes @ np.diag(np.exp([0.2, 0.0, -0.1])) @ axes.T
    # Products of a few numbers near 1 in double.
    np.testing.assert_allclose(stretch_rate(turn @ stretch), rate, atol=1e-12)
    np.testing.assert_allclose(stretch_rate(turn), 0.0, atol=1e-12)


@pytest.mark.parametrize("i", range(3))
def test_exact_at_measured_times(i: int) -> None:
    # Logarithm and exponential of a matrix near 1, translations of 10 mm: 1e-13 or so.
    assert np.abs(affine_at(MATRICES, TIMES, TIMES[i]) - MATRICES[i]).max() < 1e-11


def test_identity_is_exact_at_the_reference() -> None:
    assert np.array_equal(affine_at(MATRICES, TIMES, 0.0), np.eye(4))
    assert np.array_equal(affine_at(np.stack([np.eye(4)] * 3), TIMES, 17.0), np.eye(4))


def test_halfway_of_a_translation_is_half_of_it() -> None:
    matrices = np.stack([np.eye(4), rigid((0, 0, 0), (8.0, -4.0, 2.0))])
    half = affine_at(matrices, (2.0, 6.0), 4.0)
    assert np.abs(half - rigid((0, 0, 0), (4.0, -2.0, 1.0))).max() < 1e-14
    quarter = affine_at(matrices, (2.0, 6.0), 3.0)
    assert np.abs(quarter[:3, 3] - [2.0, -1.0, 0.5]).max() < 1e-14


def test_halfway_of_a_rotation_is_half_the_angle() -> None:
    matrices = np.stack([np.eye(4), rigid((0, 0, 40.0), (0, 0, 0))])
    half = affine_at(matrices, (0.0, 1.0), 0.5)
    assert np.abs(half - rigid((0, 0, 20.0), (0, 0, 0))).max() < 1e-12
    # The mean of the matrices isn't a rotation: it shrinks by cos 20° = 0.94.
    assert np.abs(half - matrices.mean(0)).max() > 0.05


def test_halfway_there_twice_is_there() -> None:
    half = affine_at(np.stack([np.eye(4), AFFINE]), (0.0, 1.0), 0.5)
    assert np.abs(half @ half - AFFINE).max() < 1e-11


def test_it_stays_before_the_first_and_after_the_last_time() -> None:
    assert np.array_equal(affine_at(MATRICES, TIMES, -5.0), affine_at(MATRICES, TIMES, 0.0))
    assert np.array_equal(affine_at(MATRICES, TIMES, 99.0), affine_at(MATRICES, TIMES, 30.0))


def test_periodic_goes_on_to_the_first_time() -> None:
    matrices = np.stack([np.eye(4), rigid((0, 0, 0), (8.0, 0, 0))])
    # Times 0 and 1 of a cycle of 3: at 2, halfway back from the second to the first.
    assert np.abs(affine_at(matrices, (0.0, 1.0), 2.0, period=3.0)[0, 3] - 4.0) < 1e-12
    assert np.abs(affine_at(matrices, (0.0, 1.0), 3.5, period=3.0)[0, 3] - 4.0) < 1e-12

"""Round fields of view: found where padding around a circle cuts what an image shows, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DIRECTIONS, make_grid
from scipy.ndimage import gaussian_filter

from stnerp import Series, fit, fit_deformation, load_series, monitor, preprocess
from stnerp.agreement import agreement, windows_of, working_grid
from stnerp.errors import FitError
from stnerp.field_of_view import EDGE, RoundView, round_view, saw
from stnerp.geometry import Grid, apply_affine
from stnerp.phantom import Phantom
from stnerp.preprocess import compared, covered_on, on_grid
from stnerp.window import Window

PADDING = -1024.0


def tissue(grid: Grid, seed: int = 0) -> np.ndarray:
    """Lung, fat and muscle in no order, whole HU."""
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=grid.shape), 3)
    return np.rint(np.clip(-400 + 400 * smooth / smooth.std(), -950, 300)).astype(np.float32)


def distance_mm(grid: Grid, centre_mm: tuple[float, float] = (0.0, 0.0), axis: int = 0) -> np.ndarray:
    """From a line along an array's axis, `centre_mm` (rows, columns) beside the middle: one slice."""
    (rows, columns), (dy, dx) = np.delete(grid.shape, axis), np.delete(grid.spacing_mm[::-1], axis)
    y = (np.arange(rows) - (rows - 1) / 2) * dy - centre_mm[0]
    x = (np.arange(columns) - (columns - 1) / 2) * dx - centre_mm[1]
    return np.asarray(np.hypot(y[:, None], x))


def cut(
    array: np.ndarray,
    grid: Grid,
    radius_mm: float,
    centre_mm: tuple[float, float] = (0.0, 0.0),
    axis: int = 0,
    padding: float = PADDING,
) -> np.ndarray:
    """An image (z, y, x) with padding beyond a circle."""
    slices = np.moveaxis(array.copy(), axis, 0)
    slices[:, distance_mm(grid, centre_mm, axis) > radius_mm] = padding
    return np.ascontiguousarray(np.moveaxis(slices, 0, axis))


GRID = Grid((64, 56, 12), (1.5, 1.5, 3.0))


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS.keys())
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("padding", [-3024.0, -1024.0, 0.0])
def test_a_circle_is_found_where_it_lies(axis: int, direction: np.ndarray, padding: float) -> None:
    sizes = [64, 56]
    sizes.insert(2 - axis, 12)
    spacing_mm = [1.5, 1.0]
    spacing_mm.insert(2 - axis, 3.0)
    grid = make_grid(direction, tuple(sizes), tuple(spacing_mm))  # type: ignore[arg-type]
    centre_mm, radius_mm = (2.0, -3.0), 24.0
    view = round_view(grid.image(cut(tissue(grid), grid, radius_mm, centre_mm, axis, padding)))
    assert view is not None
    assert view.axis == axis
    # All that is `EDGE` voxels inside, give or take one that the fit of the circle may be off, and no padding.
    away_mm = distance_mm(grid, centre_mm, axis)
    np.testing.assert_array_equal(view.circle[away_mm < radius_mm - (EDGE + 1) * 1.5], True)
    np.testing.assert_array_equal(view.circle[away_mm > radius_mm], False)
    assert view.seen(grid.shape).sum() == 12 * view.circle.sum()


def test_slices_of_nothing_but_padding() -> None:
    """As a scan on the larger grid of another one has them."""
    array = cut(tissue(GRID), GRID, 35.0)
    array[:2], array[-3:] = PADDING, PADDING
    view = round_view(GRID.image(array))
    assert view is not None
    assert view.slices == slice(2, 9)
    assert not view.seen(GRID.shape)[[0, 1, 9, 10, 11]].any()
    # Beyond, the slice that comes nearest goes on.
    np.testing.assert_array_equal(view.continued(array)[0], view.continued(array)[2])
    np.testing.assert_array_equal(view.continued(array)[-1], view.continued(array)[8])


def ball(sigma: float) -> np.ndarray:
    away_mm = np.linalg.norm(GRID.points_world() - GRID.centre_mm, axis=-1)
    noise = np.random.default_rng(0).normal(0, sigma, GRID.shape)
    return np.asarray(np.where(away_mm < 17, 40 + noise, PADDING))


def test_damaged_pixels_and_text_in_the_padding() -> None:
    array = cut(tissue(GRID), GRID, 35.0)
    array[4, 3, 5], array[:, 50:53, 2:5] = 100, 3000
    clean, damaged = (round_view(GRID.image(one)) for one in (cut(tissue(GRID), GRID, 35.0), array))
    assert clean is not None
    assert damaged is not None
    np.testing.assert_array_equal(damaged.circle, clean.circle)


def test_padding_of_the_value_that_air_is_clipped_to() -> None:
    """Half of the air on the rim is then as the padding; a first and a second look must agree."""
    for seed in range(4):
        noise = np.random.default_rng(seed).normal(0, 20, GRID.shape)
        air_in_front = np.where(np.arange(56)[:, None] < 20, PADDING, tissue(GRID, seed)) + noise
        array = np.maximum(PADDING, np.rint(air_in_front)).astype(np.float32)
        assert round_view(GRID.image(cut(array, GRID, 35.0))) is not None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float64])
def test_any_kind_of_voxel(dtype: type) -> None:
    array = np.rint(cut((tissue(GRID) + 1000) / 10, GRID, 35.0, padding=0)).astype(dtype)
    assert round_view(GRID.image(array)) is not None


def cylinder(axes: tuple[float, float], noise: float, grid: Grid) -> np.ndarray:
    """A masked thing with an elliptic section, even but for noise, in zeros."""
    y, x = ((np.arange(n) - (n - 1) / 2) / a for n, a in zip(grid.shape[1:], axes, strict=True))
    values = 100 + np.random.default_rng(2).normal(0, noise, grid.shape)
    return np.asarray(np.where(np.hypot(y[:, None], x) < 1, values, 0.0))


@pytest.mark.parametrize(
    "array",
    [
        tissue(GRID),
        cylinder((20, 20), 6.0, GRID),
        cylinder((22, 20), 3.0, GRID),
        np.pad(np.random.default_rng(3).normal(100, 5, (12, 26, 30)), ((0, 0), (15, 15), (17, 17))),
        np.where(np.broadcast_to(np.abs(distance_mm(GRID) - 28) < 1, GRID.shape), 40, PADDING),
        np.maximum(-1000, tissue(GRID) - 500),  # air clipped at -1000, somewhere in the corners too
        cut(tissue(GRID), GRID, 100.0),  # a circle around the image
        cut(np.full(GRID.shape, 40.0), GRID, 35.0),  # a cylinder of water in air without noise
        ball(0.0),
        ball(20.0),
        np.where(distance_mm(Grid((64, 56, 12), (1.0, 1.6, 3.0))) < 30, tissue(GRID), PADDING),  # an ellipse
        np.where(np.abs(np.arange(56) - 28)[:, None] < 20, tissue(GRID), PADDING),  # filled up above and below
        np.where(np.add.outer(np.arange(56), np.arange(64)) > 30, tissue(GRID), PADDING),  # one corner
        np.full(GRID.shape, PADDING),
    ],
    ids=[
        "unpadded",
        "noisy cylinder",
        "noisy ellipse",
        "noisy brick",
        "empty tube",
        "clipped",
        "outside",
        "cylinder",
        "ball",
        "noisy ball",
        "ellipse",
        "bands",
        "corner",
        "empty",
    ],
)
def test_what_is_no_round_field_of_view(array: np.ndarray) -> None:
    assert round_view(GRID.image(array.astype(np.float32))) is None
    values, seen = compared(GRID.image(array.astype(np.float32)), Window(-1000, 500))
    assert seen is None
    np.testing.assert_array_equal(values, Window(-1000, 500).normalise(array.astype(np.float32)))


def test_continued_keeps_what_was_seen_and_repeats_what_is_nearest() -> None:
    array = np.arange(2 * 5 * 5, dtype=np.float32).reshape(2, 5, 5)
    circle = np.zeros((5, 5), dtype=bool)
    circle[2, 1:4] = True
    continued = RoundView(0, circle, slice(1, 2)).continued(array)
    np.testing.assert_array_equal(continued, np.broadcast_to(array[1, 2, [1, 1, 2, 3, 3]], (2, 5, 5)))


def test_what_was_not_seen_is_not_covered_on_another_grid() -> None:
    window = Window(-1000, 500)
    whole, padded = tissue(GRID), cut(tissue(GRID), GRID, 35.0)
    values, seen = compared(GRID.image(padded), window)
    assert seen is not None
    coarse = GRID.with_spacing((3.0, 3.0, 6.0))
    for to_image in (None, np.array([[1.0, 0, 0, 4], [0, 1, 0, -3], [0, 0, 1, 0], [0, 0, 0, 1]])):
        drawn, covered = on_grid(values, GRID, coarse, to_image, sigma_mm=1.5, seen=seen)
        unpadded, everywhere = on_grid(window.normalise(whole), GRID, coarse, to_image, sigma_mm=1.5)
        points_mm = coarse.points_world() if to_image is None else apply_affine(to_image, coarse.points_world())
        away_mm = np.linalg.norm((points_mm - GRID.centre_mm)[..., :2], axis=-1)
        assert not covered[away_mm > 35.0].any()
        # All within, but for the edge's voxels, that the unpadded image covers.
        within = (away_mm < 35.0 - (EDGE + 1) * 1.5) & everywhere
        assert covered[within].all()
        # Three σ from the edge nothing comes from beyond it.
        inner = (away_mm < 35.0 - (EDGE + 1) * 1.5 - 4.5) & everywhere
        np.testing.assert_allclose(drawn[inner], unpadded[inner], atol=0.01)
        assert np.array_equal(covered, covered_on(GRID, coarse, to_image, seen))
    # On its own grid, where nothing is resampled.
    _, covered = on_grid(values, GRID, GRID, seen=seen)
    np.testing.assert_array_equal(covered, seen)


def test_trust_looks_at_what_was_seen() -> None:
    padded = GRID.image(cut(tissue(GRID), GRID, 35.0))
    grid = working_grid(GRID)
    windows = windows_of(padded, Window(-1000, 500), grid)
    away_mm = np.linalg.norm((grid.points_world() - GRID.centre_mm)[..., :2], axis=-1)
    assert not windows.inside[away_mm > 35.0].any()
    assert windows.whole.any()


def test_brightness_is_read_where_it_was_seen() -> None:
    array = cut(tissue(GRID), GRID, 35.0)
    array[-2:] = PADDING
    whole, padded = GRID.image(tissue(GRID)), GRID.image(array)
    # Also half a voxel beyond the last one, and between slices.
    grid = GRID.with_spacing((1.5, 1.5, 0.9)).padded((0, 0, 1))
    points_mm = grid.points_world()
    read = monitor._read(padded, points_mm.reshape(-1, 3)).reshape(grid.shape)
    away_mm, z_mm = np.broadcast_to(distance_mm(grid), grid.shape), points_mm[..., 2]
    assert np.isnan(read[(away_mm > 35.0) | (z_mm > 9 * 3.0 + 0.01)]).all()
    inner = (away_mm < 35.0 - (EDGE + 1) * 1.5) & (z_mm < 9 * 3.0) & (z_mm >= 0)
    expected = monitor._read(whole, points_mm.reshape(-1, 3)).reshape(grid.shape)
    np.testing.assert_allclose(read[inner], expected[inner], atol=1e-2)
    np.testing.assert_array_equal(saw(padded, points_mm), np.isfinite(read))
    np.testing.assert_array_equal(saw(whole, points_mm), GRID.contains(points_mm))


@pytest.mark.parametrize("cut_one", [0, 1], ids=["reference", "scan"])
def test_what_one_of_two_did_not_see_says_nothing_about_a_fit(
    cut_one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = [GRID.image(tissue(GRID)), GRID.image(tissue(GRID))]
    scans[cut_one] = GRID.image(cut(tissue(GRID), GRID, 35.0))
    series = load_series(scans, window=(-1000, 500))
    still = fit_deformation(
        series, align="none", levels=[(15, 30, 1, None, 1e-12)], detail_mm=None, progress=False
    )
    found = agreement(still, scans[1], 1.0)
    away_mm = np.linalg.norm((found.grid.points_world() - GRID.centre_mm)[..., :2], axis=-1)
    assert found.structure.any()
    assert not found.structure[away_mm > 35.0].any()
    assert found.measures()["correlation"] > 0.999
    monkeypatch.setattr(preprocess, "round_view", lambda image: None)
    assert agreement(still, scans[1], 1.0).measures()["correlation"] < 0.9


# -- a fit


def test_nothing_in_common_is_told() -> None:
    scans = [GRID.image(cut(tissue(GRID), GRID, 20.0, (0.0, at_mm))) for at_mm in (-22.0, 22.0)]
    with pytest.raises(FitError, match=r"image 1: its round field of view .* nothing in common"):
        fit_deformation(load_series(scans), align="none", progress=False)


def cut_breath(phantom: Phantom, cut_reference: bool, cut_target: bool) -> Series:
    """Exhalation to inhalation, in a field of view that cuts the chest."""
    images = [phantom.image(t) for t in (0.0, 0.4)]
    grid = Grid.of(images[0])
    arrays = [sitk.GetArrayFromImage(image) for image in images]
    for i, is_cut in enumerate((cut_reference, cut_target)):
        if is_cut:
            arrays[i] = cut(arrays[i], grid, RADIUS_MM)
    return load_series([grid.image(array) for array in arrays], window=(-1000, 500))


RADIUS_MM = 95.0


@pytest.mark.parametrize("cut_one", ["reference", "target"])
def test_a_cut_body_moves_as_the_whole_one(
    phantom: Phantom, cut_one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid.of(phantom.image(0.0))
    points_mm = grid.points_world()[2:-2, distance_mm(grid) < RADIUS_MM - 10]
    there_mm = phantom.map_points(points_mm, 0.4)
    series = cut_breath(phantom, cut_one == "reference", cut_one == "target")

    def error_mm() -> float:
        model = fit_deformation(series, align="rigid", levels=[(20, 40, 40), (10, 20, 40)], progress=False)
        return float(np.linalg.norm(model.map_points(points_mm, 1.0) - there_mm, axis=-1).mean())

    found_mm = error_mm()
    for module in (preprocess, fit):
        monkeypatch.setattr(module, "round_view", lambda image: None)
    # In voxels of 10 mm, by a few steps: 2.9 and 2.7 mm. With the circle taken for the body's edge 6.8 and 11.4.
    assert found_mm < 4.0
    assert found_mm < 0.6 * error_mm()

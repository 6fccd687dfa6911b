"""Exact answers for every metric: shifts in mm, known overlaps, affine maps, folds made on purpose."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from skimage.metrics import structural_similarity

from stnerp import geometry, metrics
from stnerp.errors import InputError
from stnerp.geometry import Grid

# A rotation about an oblique axis, and a grid with three different spacings in it.
ROTATION = np.array([[2, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3
OBLIQUE = Grid((9, 8, 7), (0.9, 1.5, 2.5), (-20.0, 35.0, 110.0), tuple(ROTATION.ravel()))
GRIDS = {
    "LPS": Grid((9, 8, 7), (0.9, 1.5, 2.5), (-20.0, 35.0, 110.0)),
    "RAI flipped": Grid((9, 8, 7), (0.9, 1.5, 2.5), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)),
    "PIR": Grid((9, 8, 7), (0.9, 1.5, 2.5), direction=(0, 0, -1, 1, 0, 0, 0, -1, 0)),
    "left-handed": Grid((9, 8, 7), (0.9, 1.5, 2.5), direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1)),
    "oblique": OBLIQUE,
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def box_mask(grid: Grid, z: slice, y: slice, x: slice, label: int = 1) -> sitk.Image:
    array = np.zeros(grid.shape, np.uint8)
    array[z, y, x] = label
    return grid.image(array)


# -- images


def test_psnr_of_a_known_offset():
    reference = np.random.default_rng(0).random((5, 6, 7))
    # MSE 0.01 of a range of 1: 20 dB; of a range of 10: 20 dB more.
    assert metrics.psnr_db(reference + 0.1, reference) == pytest.approx(20)
    assert metrics.psnr_db(reference + 0.1, reference, data_range=10) == pytest.approx(40)
    assert metrics.psnr_db(reference, reference) == math.inf


def test_psnr_of_integers_does_not_wrap_around():
    assert metrics.psnr_db(np.zeros(4, np.uint8), np.full(4, 255, np.uint8), 255) == pytest.approx(0)


def test_psnr_counts_the_mask_only():
    reference = np.zeros((4, 4, 4))
    image = reference.copy()
    image[0] = 0.1
    image[1:] = 5
    mask = np.zeros(image.shape, bool)
    mask[0] = True
    assert metrics.psnr_db(image, reference, mask=mask) == pytest.approx(20)
    assert math.isnan(metrics.psnr_db(image, reference, mask=np.zeros_like(mask)))


def test_ssim_is_one_for_equal_images_and_known_for_constant_ones():
    image = np.random.default_rng(0).random((9, 10, 11))
    assert metrics.ssim(image, image) == pytest.approx(1)
    # Without variance SSIM is its luminance term (2ab + C1) / (a² + b² + C1), C1 = 0.01².
    a, b = np.full((8, 8, 8), 0.2), np.full((8, 8, 8), 0.6)
    assert metrics.ssim(a, b) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4))


def test_ssim_is_that_of_scikit_image_in_3d():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 9, 10, 11))
    assert metrics.ssim(a, b) == pytest.approx(structural_similarity(a, b, data_range=1.0))


def test_ssim_within_a_mask_sees_the_mask_only():
    rng = np.random.default_rng(2)
    a = rng.random((8, 8, 30))
    b = a.copy()
    b[..., 20:] = rng.random((8, 8, 10))
    mask = np.zeros(a.shape)
    mask[..., :16] = 1  # three voxels more to the changed part: half a window
    assert metrics.ssim(a, b, mask=mask) == pytest.approx(1)
    assert metrics.ssim(a, b, mask=1 - mask) < 0.7
    assert math.isnan(metrics.ssim(a, b, mask=np.zeros(a.shape)))


@pytest.mark.parametrize("shape", [(1, 20, 20), (2, 3, 4), (1, 1, 1), (20, 20)])
def test_ssim_of_small_images(shape):
    image = np.random.default_rng(3).random(shape)
    assert metrics.ssim(image, image) == pytest.approx(1)
    assert metrics.ssim(image, image, mask=np.ones(shape)) == pytest.approx(1)
    assert metrics.ssim(image, 1 - image) < 1


def test_ncc_ignores_scale_and_offset_but_not_sign():
    image = np.random.default_rng(0).random((4, 5, 6))
    assert metrics.ncc(3 * image + 2, image) == pytest.approx(1)
    assert metrics.ncc(-image, image) == pytest.approx(-1)
    assert math.isnan(metrics.ncc(np.ones_like(image), image))


@pytest.mark.parametrize("metric", [metrics.psnr_db, metrics.ssim, metrics.ncc])
def test_images_must_fit(metric):
    with pytest.raises(InputError, match="shape"):
        metric(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)))
    with pytest.raises(InputError, match="mask"):
        metric(np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), mask=np.ones((4, 4)))


@pytest.mark.parametrize("metric", [metrics.psnr_db, metrics.ssim])
def test_data_range_must_be_positive(metric):
    with pytest.raises(InputError, match="data_range"):
        metric(np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), data_range=0)


# -- contours


def test_dice_of_known_overlaps():
    grid = Grid((10, 10, 10), (1, 2, 3))
    a = box_mask(grid, slice(0, 4), slice(0, 4), slice(0, 4), label=3)
    b = box_mask(grid, slice(0, 4), slice(0, 4), slice(1, 5), label=3)
    far = box_mask(grid, slice(6, 9), slice(6, 9), slice(6, 9), label=3)
    assert metrics.dice(a, a, 3) == 1
    assert metrics.dice(a, b, 3) == pytest.approx(0.75)  # 3 of 4 layers each
    assert metrics.dice(a, far, 3) == 0
    assert metrics.dice(a, box_mask(grid, slice(0, 4), slice(0, 4), slice(0, 2), label=3), 3) == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(
    ("axis", "apart_mm"), [("x", 2 * 0.5), ("y", 2 * 1.5), ("z", 2 * 4.0)]
)  # two voxels along each axis
@pytest.mark.parametrize("direction", [Grid((1, 1, 1), (1, 1, 1)).direction, OBLIQUE.direction])
def test_surface_distance_of_parallel_planes(axis, apart_mm, direction):
    grid = Grid((30, 10, 6), (0.5, 1.5, 4.0), (5, 6, 7), direction)
    a, b = ({"z": slice(None), "y": slice(None), "x": slice(None)} | {axis: slice(n, n + 1)} for n in (1, 3))
    found = metrics.surface_distances_mm(box_mask(grid, **a), box_mask(grid, **b))
    assert found["hd95_mm"] == pytest.approx(apart_mm)
    assert found["mean_surface_distance_mm"] == pytest.approx(apart_mm)


def test_surface_distances_of_nested_boxes():
    # Rods of length 1 voxel in z and y: surface voxels are all voxels. a has x = 0..9, b has 0..19 of
    # 2 mm. a to b: all 0. b to a: ten zeros, then 2, 4, ..., 20 mm.
    grid = Grid((20, 5, 5), (2.0, 1.0, 1.0))
    a = box_mask(grid, slice(2, 3), slice(2, 3), slice(0, 10))
    b = box_mask(grid, slice(2, 3), slice(2, 3), slice(0, 20))
    for found in (metrics.surface_distances_mm(a, b), metrics.surface_distances_mm(b, a)):
        b_to_a = np.r_[np.zeros(10), 2.0 * np.arange(1, 11)]
        assert found["hd95_mm"] == pytest.approx(np.percentile(b_to_a, 95))
        assert found["mean_surface_distance_mm"] == pytest.approx(b_to_a.sum() / 30)


def test_only_surfaces_count():
    # A solid box against the same box with a hole: the outer surfaces agree, so the median is 0, but the
    # hole's surface is at its distance from the outer one, although inside the solid box.
    grid = Grid((11, 11, 11), (1.0, 1.0, 1.0))
    solid = box_mask(grid, slice(0, 11), slice(0, 11), slice(0, 11))
    hollow = solid & (box_mask(grid, slice(5, 6), slice(5, 6), slice(5, 6)) == 0)
    found = metrics.surface_distances_mm(hollow, solid)
    # Six neighbours of the hole at 4 mm, and 2 x (11³ - 9³) voxels of the outer surface at 0.
    assert found["mean_surface_distance_mm"] == pytest.approx(6 * 4 / (6 + 2 * (11**3 - 9**3)))
    assert found["hd95_mm"] == 0


def test_masks_that_are_equal_have_no_distance_even_at_the_border():
    grid = Grid((6, 6, 6), (1, 2, 3))
    mask = box_mask(grid, slice(None), slice(None), slice(None))
    assert metrics.surface_distances_mm(mask, mask) == {"hd95_mm": 0, "mean_surface_distance_mm": 0}


def test_empty_masks_are_nan_and_never_an_exception():
    grid = Grid((5, 5, 5), (1, 1, 1))
    empty, some = grid.image(np.zeros(grid.shape, np.uint8)), box_mask(grid, *[slice(1, 3)] * 3)
    assert math.isnan(metrics.dice(empty, empty, 1))
    assert metrics.dice(empty, some, 1) == metrics.dice(some, empty, 1) == 0
    for pair in [(empty, empty), (empty, some), (some, empty)]:
        assert all(math.isnan(value) for value in metrics.surface_distances_mm(*pair).values())
    measures = metrics.roi_measures(empty)
    assert measures.pop("volume_ml") == 0
    assert all(math.isnan(value) for value in measures.values())


@pytest.mark.parametrize("metric", [metrics.dice, metrics.surface_distances_mm])
def test_masks_on_different_grids_are_refused(metric):
    grid = Grid((5, 5, 5), (1, 1, 1))
    moved = Grid((5, 5, 5), (1, 1, 1), (0.5, 0, 0))
    with pytest.raises(InputError, match="grids"):
        metric(box_mask(grid, *[slice(1, 3)] * 3), box_mask(moved, *[slice(1, 3)] * 3), 1)


@every_grid
def test_roi_measures_in_world_space(grid):
    measures = metrics.roi_measures(box_mask(grid, slice(1, 4), slice(2, 7), slice(3, 5), label=7), 7)
    assert measures["volume_ml"] == pytest.approx(3 * 5 * 2 * 0.9 * 1.5 * 2.5 / 1000)
    centre_mm = grid.index_to_world(np.array([3.5, 4.0, 2.0]))
    found_mm = [measures[f"centroid_{axis}_mm"] for axis in "xyz"]
    np.testing.assert_allclose(found_mm, centre_mm, atol=1e-9)


# -- landmarks


def test_tre_of_a_known_shift():
    true_mm = np.random.default_rng(0).normal(size=(20, 3))
    np.testing.assert_allclose(metrics.tre_mm(true_mm + np.array([3, -4, 12]), true_mm), 13)


def test_tre_summary_over_landmarks():
    true_mm = np.zeros((4, 3))
    predicted_mm = np.array([[0.0, 0, 0], [0, 2, 0], [0, 0, -4], [6, 0, 0]])
    summary = metrics.tre_summary(predicted_mm, true_mm)
    assert summary == {
        "landmarks": 4,
        "tre_mean_mm": 3,
        "tre_std_over_landmarks_mm": pytest.approx(math.sqrt(5)),  # (9 + 1 + 1 + 9) / 4
        "tre_median_mm": 3,
        "tre_p95_mm": pytest.approx(5.7),  # 2.85 of the way along 0, 2, 4, 6
        "tre_max_mm": 6,
    }


@every_grid
def test_snapping_to_voxel_centres(grid):
    index = np.array([[1.0, 2, 3], [4, 5, 6], [8, 0, 2]])
    true_mm = grid.index_to_world(index)
    # Less than half a voxel off on every axis: nothing is left. More than half on x: one voxel of 0.9 mm.
    near = metrics.tre_summary(grid.index_to_world(index + np.array([0.4, -0.45, 0.3])), true_mm, grid)
    over = metrics.tre_summary(grid.index_to_world(index + np.array([0.6, 0, 0])), true_mm, grid)
    # 1e-9: rounding of world coordinates of about 100 mm.
    assert near["tre_snapped_max_mm"] == pytest.approx(0, abs=1e-9)
    assert near["tre_mean_mm"] == pytest.approx(math.hypot(0.4 * 0.9, 0.45 * 1.5, 0.3 * 2.5))
    assert over["tre_snapped_mean_mm"] == pytest.approx(0.9)
    assert over["tre_mean_mm"] == pytest.approx(0.54)


def test_snapping_does_not_pull_points_into_the_grid():
    grid = GRIDS["LPS"]
    true_mm = grid.index_to_world(np.array([[8.0, 3, 3]]))
    summary = metrics.tre_summary(true_mm + np.array([9.0, 0, 0]), true_mm, grid)
    assert summary["tre_snapped_mean_mm"] == pytest.approx(9)


def test_no_landmarks_are_nan():
    summary = metrics.tre_summary(np.zeros((0, 3)), np.zeros((0, 3)), OBLIQUE)
    assert summary.pop("landmarks") == 0
    assert all(math.isnan(value) for value in summary.values())


def test_landmarks_must_fit():
    with pytest.raises(InputError, match="landmarks"):
        metrics.tre_mm(np.zeros((4, 3)), np.zeros((5, 3)))
    with pytest.raises(InputError, match="landmarks"):
        metrics.tre_mm(np.zeros((4, 2)), np.zeros((4, 2)))


# -- deformations

AFFINE = np.array([[1.2, 0.3, -0.1], [0.05, 0.7, 0.2], [-0.4, 0.1, 1.1]])


@every_grid
def test_jacobian_of_an_affine_map_is_exact_everywhere(grid):
    displacement_mm = grid.points_world() @ (AFFINE - np.eye(3)).T + [3, -2, 1]
    jacobian = metrics.jacobian_determinant(displacement_mm, grid)
    assert jacobian.shape == grid.shape
    # 1e-10: rounding of coordinates of about 100 mm.
    np.testing.assert_allclose(jacobian, np.linalg.det(AFFINE), atol=1e-10)


@every_grid
def test_jacobian_agrees_with_simpleitk_inside(grid):
    p = grid.points_world() - grid.centre_mm
    displacement_mm = np.stack(
        [
            np.sin(p[..., 1] / 5),
            np.cos(p[..., 0] / 7) + 0.1 * p[..., 2],
            np.sin(p[..., 2] / 6 + p[..., 0] / 9),
        ],
        -1,
    )
    # SimpleITK leaves the direction out, so it is given the same vectors along the grid's axes.
    along_axes = Grid(grid.size, grid.spacing_mm).image(grid.vectors_from_world(displacement_mm))
    expected = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(along_axes))
    inside = (slice(1, -1),) * 3
    found = metrics.jacobian_determinant(displacement_mm, grid)
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-12)


def test_jacobian_of_float32_and_of_a_single_slice():
    grid = Grid((6, 5, 1), (1.0, 2.0, 3.0))
    x, y = 0.5 * grid.points_world()[..., 0], 0.2 * grid.points_world()[..., 1]
    displacement_mm = np.stack([x, y, x], -1).astype(np.float32)
    jacobian = metrics.jacobian_determinant(displacement_mm, grid)
    assert jacobian.dtype == np.float32
    np.testing.assert_allclose(jacobian, 1.5 * 1.2, rtol=1e-6)  # float32


def test_folds_made_on_purpose_are_counted():
    # u_x = -2 x within a slab turns x around there (J = -1): its inner columns have central differences
    # of -2; the two at its edges see half of it (J = 0), which counts as folded too.
    grid = Grid((12, 4, 3), (2.0, 1.0, 1.0))
    slope = np.zeros(11)
    slope[4:8] = -2
    u_x = np.concatenate([[0], np.cumsum(slope * 2.0)])
    displacement_mm = np.zeros((*grid.shape, 3))
    displacement_mm[..., 0] = u_x
    jacobian = metrics.jacobian_determinant(displacement_mm, grid)
    np.testing.assert_allclose(jacobian[0, 0], [1, 1, 1, 1, 0, -1, -1, -1, 0, 1, 1, 1], atol=1e-12)
    found = metrics.folding(jacobian)
    assert found["folded_voxels"] == 5 * 4 * 3
    assert found["folded_percent"] == pytest.approx(100 * 5 / 12)
    assert found["jacobian_min"] == pytest.approx(-1)
    assert found["sd_log_jacobian"] == pytest.approx(0)


def test_sd_log_jacobian_is_over_the_positive_ones():
    found = metrics.folding(np.array([math.e, 1 / math.e, 0.0, -3.0]))
    assert found == {
        "folded_voxels": 2,
        "folded_percent": 50,
        "sd_log_jacobian": pytest.approx(1),
        "jacobian_min": -3,
    }
    assert math.isnan(metrics.folding(np.array([-1.0]))["sd_log_jacobian"])


@pytest.mark.parametrize("slices", [1, 2, 7, 8, 9, 17, 24])
def test_jacobians_by_slabs_are_the_jacobians(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid((6, 5, slices), (0.9, 1.3, 2.5))
    displacement_mm = np.random.default_rng(0).normal(size=(*grid.shape, 3))
    at_once = metrics.jacobian_determinant(displacement_mm, grid)
    monkeypatch.setattr(geometry, "SLAB_POINTS", 8 * 6 * 5)
    assert len(geometry.slab_slices(grid.shape)) == -(-slices // 8)
    assert np.array_equal(metrics.jacobian_determinant(displacement_mm, grid), at_once)


def test_displacement_must_fit():
    with pytest.raises(InputError, match="displacement"):
        metrics.jacobian_determinant(np.zeros((*OBLIQUE.size, 3)), OBLIQUE)

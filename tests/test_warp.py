"""Reading a volume where it is known exactly: at its voxels, along ramps, for polynomials."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F

from stnerp.geometry import Grid, cube_points
from stnerp.preprocess import _gaussian_matrix
from stnerp.warp import displaced_points, interpolation_matrix, pulled_back, resize, sample, smoothed, warp

SHAPE = (5, 6, 9)
# float64: rounding of a sum of eight weighted values near 1.
EXACT = 1e-12


def volume(channels: int = 2, batch: int = 1, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, channels, *shape, generator=generator, dtype=torch.float64)


# -- sample and warp


def test_identity_is_exact_and_the_other_convention_is_not() -> None:
    image = volume()
    still = warp(image, torch.zeros(1, 3, *SHAPE, dtype=torch.float64))
    assert (still - image).abs().max() < EXACT
    # FACTS, trap 1: voxel i is read at i n / (n - 1) - 1/2, half a voxel off at the borders.
    points = cube_points(SHAPE, dtype=torch.float64)[None]
    other = F.grid_sample(image, points, padding_mode="border", align_corners=False)
    assert (other - image).abs().max() > 0.1


def test_voxel_centres_in_world_space_are_read_exactly(any_grid: Grid) -> None:
    image = volume(shape=any_grid.shape)
    points = torch.from_numpy(any_grid.world_to_cube(any_grid.points_world()))[None]
    assert (sample(image, points) - image).abs().max() < EXACT
    assert torch.equal(sample(image, points, mode="nearest"), image)


def test_ramps_are_read_as_the_points_themselves() -> None:
    # The volume holds its own coordinates (x, y, z): sampling must give back the points, in that order.
    ramp = cube_points(SHAPE, dtype=torch.float64).movedim(-1, 0)[None]
    points = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    assert (sample(ramp, points)[0].T - points[0]).abs().max() < EXACT


@pytest.mark.parametrize("inner", [(7,), (2, 3), (4, 3, 2), (2, 2, 3, 2)])
def test_points_come_in_any_shape(inner: tuple[int, ...]) -> None:
    image = volume(batch=2)
    points = torch.rand(2, *inner, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    values = sample(image, points)
    assert values.shape == (2, 2, *inner)
    flat = sample(image, points.reshape(2, -1, 3))
    assert torch.equal(values.reshape(2, 2, -1), flat)
    for b in range(2):
        assert torch.equal(sample(image[b : b + 1], points[b : b + 1])[0], values[b])


def test_beyond_the_border_is_the_border() -> None:
    image = volume()
    points = torch.tensor([[[3.0, 1.0, 1.0], [-1.0, -7.0, -1.0], [5.0, 5.0, 5.0]]], dtype=torch.float64)
    expected = torch.stack([image[0, :, -1, -1, -1], image[0, :, 0, 0, 0], image[0, :, -1, -1, -1]], dim=1)
    assert (sample(image, points)[0] - expected).abs().max() < EXACT


def test_nearest_takes_one_label_and_makes_no_new_ones() -> None:
    labels = torch.arange(9.0).reshape(1, 1, 1, 1, 9) * 10
    x = torch.tensor([0.0, 0.4, 0.6, 4.4, 7.6, 8.4, 30.0])
    points = torch.stack([2 * x / 8 - 1, torch.full_like(x, -1), torch.full_like(x, -1)], dim=-1)[None]
    assert sample(labels, points, mode="nearest").flatten().tolist() == [0, 0, 10, 40, 80, 80, 80]


def test_warp_pulls_back() -> None:
    image = volume()
    for axis in range(3):
        one_voxel = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
        one_voxel[:, axis] = 2 / (SHAPE[2 - axis] - 1)
        moved = warp(image, one_voxel)
        dim, n = 4 - axis, SHAPE[2 - axis]
        # moved(p) = image(p + u): what lay at voxel i + 1 is now at i; the border's value stays.
        assert (moved.narrow(dim, 0, n - 1) - image.narrow(dim, 1, n - 1)).abs().max() < EXACT
        assert (moved.narrow(dim, n - 1, 1) - image.narrow(dim, n - 1, 1)).abs().max() < EXACT


def test_displacement_decides_the_shape_and_the_cube_is_shared() -> None:
    ramp = cube_points(SHAPE, dtype=torch.float64).movedim(-1, 0)[None]
    displacement = torch.full((1, 3, 3, 4, 5), 0.1, dtype=torch.float64)
    points = displaced_points(displacement, (displacement.shape[2], displacement.shape[3], displacement.shape[4]))
    assert (points - cube_points((3, 4, 5), dtype=torch.float64) - 0.1).abs().max() < EXACT
    assert (warp(ramp, displacement) - points.movedim(-1, 1).clamp(max=1)).abs().max() < EXACT


# -- resize


@pytest.mark.parametrize("shape", [(5, 6, 9), (9, 11, 17), (3, 2, 4), (10, 3, 9), (2, 2, 2)])
def test_linear_is_torch_s_trilinear(shape: tuple[int, int, int]) -> None:
    image = volume()
    expected = F.interpolate(image, size=shape, mode="trilinear", align_corners=True)
    assert (resize(image, shape) - expected).abs().max() < EXACT


@pytest.mark.parametrize("order", [1, 3])
def test_given_values_are_kept_at_knots(order: int) -> None:
    image = volume()
    finer = resize(image, (9, 16, 25), order)  # 2, 3 and 3 intervals for each
    assert (finer[:, :, ::2, ::3, ::3] - image).abs().max() < EXACT


def test_order_3_reproduces_cubics_in_the_interior() -> None:
    n = 61
    knots = torch.linspace(-1, 1, n, dtype=torch.float64)
    polynomial = [0.3, -1.0, 0.7, 2.0]

    def value(x: torch.Tensor) -> torch.Tensor:
        return sum(c * x**k for k, c in enumerate(polynomial))  # type: ignore[return-value]

    fine = torch.linspace(-1, 1, 5 * n - 4, dtype=torch.float64)
    middle = (fine.abs() < 0.3).nonzero().flatten()
    for axis in range(3):
        shape, to = [1, 1, 1], [1, 1, 1]
        shape[axis], to[axis] = n, len(fine)
        resized = resize(value(knots).reshape(1, 1, *shape), (to[0], to[1], to[2]), order=3).flatten()
        # The mirrored ends are wrong by about 1, and forgotten by 2 - √3 = 0.27 per knot: 0.27^21 = 1e-12.
        assert (resized - value(fine))[middle].abs().max() < 1e-11
        linear = resize(value(knots).reshape(1, 1, *shape), (to[0], to[1], to[2]), order=1).flatten()
        assert (linear - value(fine))[middle].abs().max() > 1e-4


@pytest.mark.parametrize("order", [1, 3])
def test_constants_stay_constant(order: int) -> None:
    constant = torch.full((1, 1, *SHAPE), 0.7, dtype=torch.float64)
    assert (resize(constant, (9, 4, 20), order) - 0.7).abs().max() < EXACT


def test_axis_of_one_voxel_is_repeated() -> None:
    image = volume(shape=(1, 4, 5))
    assert (resize(image, (3, 4, 5)) - image).abs().max() < EXACT


def test_resize_is_differentiable() -> None:
    image = volume(shape=(3, 4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: resize(v, (5, 3, 9), order=3), image)


def test_float32_in_float32_out() -> None:
    assert resize(volume().float(), (7, 7, 7)).dtype == torch.float32
    assert sample(volume().float(), torch.zeros(1, 2, 3)).dtype == torch.float32


def test_grid_images_and_sampling_agree_with_simpleitk(oblique_grid: Grid) -> None:
    array = volume(channels=1, shape=oblique_grid.shape)[0, 0].numpy()
    image = oblique_grid.image(array)
    index = np.random.default_rng(2).uniform(0, np.asarray(oblique_grid.size) - 1, (30, 3))
    world = oblique_grid.index_to_world(index)
    expected = [image.EvaluateAtPhysicalPoint(point, sitk.sitkLinear) for point in world.tolist()]
    points = torch.from_numpy(oblique_grid.world_to_cube(world))[None]
    read = sample(torch.from_numpy(array)[None, None], points)[0, 0].numpy()
    assert np.abs(read - expected).max() < 1e-10


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(9, 11, 13), (5, 8, 7)])
def test_a_slab_is_a_part_of_the_whole(order: int, shape: tuple[int, int, int]) -> None:
    volume = torch.rand(1, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    slab = slice(1, 4)
    # Products of other shapes may add up in another order.
    torch.testing.assert_close(resize(volume, shape, order, slab), resize(volume, shape, order)[:, :, slab])
    whole = resize(volume, shape)
    assert torch.equal(displaced_points(whole[:, :, slab], shape, slab), displaced_points(whole, shape)[:, slab])


# -- smoothing


def test_gaussian_keeps_constants_and_ramps_away_from_the_border() -> None:
    ramp = torch.arange(30, dtype=torch.float64).expand(1, 1, 7, 8, 30).clone()
    after = smoothed(ramp, 1.5)
    assert (after - ramp)[..., 5:-5].abs().max() < EXACT * 30
    assert (smoothed(torch.ones(1, 1, 3, 1, 5), 2.0) - 1).abs().max() < 1e-6


def test_gaussian_has_its_variance() -> None:
    impulse = torch.zeros(1, 1, 1, 1, 41, dtype=torch.float64)
    impulse[..., 20] = 1
    after = smoothed(impulse, 2.0).flatten()
    offset = torch.arange(41) - 20.0
    # Cut at three standard deviations, a Gaussian has lost 2.7 % of its variance.
    assert (after * offset**2).sum().item() == pytest.approx(4.0, rel=0.03)
    assert after.sum().item() == pytest.approx(1.0)


def test_gaussian_of_one_axis_leaves_the_others() -> None:
    impulse = torch.zeros(1, 1, 9, 9, 9, dtype=torch.float64)
    impulse[..., 4, 4, 4] = 1
    after = smoothed(impulse, (0.0, 0.2, 1.0))  # 0.2 is too narrow to change anything
    torch.testing.assert_close(after[0, 0, 4, 4], smoothed(impulse, 1.0)[0, 0].sum((0, 1)))
    assert after.sum().item() == pytest.approx(1.0)
    assert after[0, 0, 4, 4].sum().item() == pytest.approx(1.0)


# -- pulled back


@pytest.mark.parametrize("sigma", [(0.0, 0.0, 0.0), (0.9, 0.7, 0.5)])
@pytest.mark.parametrize("slab", [slice(0, 4), slice(5, 9), slice(9, 12)])
def test_a_slab_pulled_back_is_that_of_the_whole(sigma: tuple[float, float, float], slab: slice) -> None:
    shape = (12, 9, 10)
    volume = torch.rand(1, 1, 12, 9, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    displacement = 0.1 * torch.rand(1, 3, 5, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = pulled_back(partial(sample, volume), displacement, shape, sigma=sigma)
    assert whole.shape == (1, 1, 12, 9, 10)
    part = pulled_back(partial(sample, volume), displacement, shape, slab, sigma)
    torch.testing.assert_close(part, whole[:, :, slab])


def test_it_is_smoothed_after_it_is_moved() -> None:
    """Where tissue shrinks to half its size, an image that was smoothed before would be half as blurred."""
    shape = (3, 3, 81)
    x = torch.linspace(-1, 1, 81, dtype=torch.float64)
    edge = (x.abs() < 0.5).double().expand(1, 1, *shape).contiguous()
    shrunk = torch.zeros(1, 3, *shape, dtype=torch.float64)
    shrunk[:, 0] = x  # p + u(p) = 2 p
    sigma = (0.0, 0.0, 2.0)
    moved = pulled_back(partial(sample, edge), shrunk, shape, sigma=sigma)
    truth = smoothed(sample(edge, displaced_points(shrunk, shape)), sigma)
    assert torch.equal(moved, truth)
    before = sample(smoothed(edge, sigma), displaced_points(shrunk, shape))
    assert (before - truth).abs().max() > 0.1


@pytest.mark.parametrize(
    "matrix",
    [interpolation_matrix(300, 599, 3), _gaussian_matrix(300, 100, 4.0)],
    ids=["cubic spline", "Gaussian"],
)
def test_no_weight_is_denormal(matrix: torch.Tensor) -> None:
    """With those a matrix product takes twenty times as long."""
    weights = matrix.to(torch.float32).abs()
    assert weights[weights > 0].min() > torch.finfo(torch.float32).tiny
    assert (weights > 0).sum(1).max() < 60
    # What is left out would be added to the rest of 300 weights, in double precision.
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), atol=3e-10, rtol=0)


def test_a_fit_may_follow_inference() -> None:
    """Matrices are kept; those first made where no gradients are wanted serve where they are."""
    shape = (7, 9, 5)  # of no other test
    with torch.inference_mode():
        smoothed(resize(torch.rand(1, 1, 3, 4, 5), shape, order=3), sigma=0.9)
    volume = torch.rand(1, 1, 3, 4, 5, requires_grad=True)
    smoothed(resize(volume, shape, order=3), sigma=0.9).sum().backward()
    assert volume.grad is not None

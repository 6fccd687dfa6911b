"""The exponential of fields whose flow is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from stnerp.geometry import cube_points
from stnerp.velocity import compose, exponential
from stnerp.warp import displaced_points, sample

SHAPE = (9, 10, 12)
EXACT = 1e-12  # float64


def points_of(shape: tuple[int, int, int]) -> torch.Tensor:
    """Cube coordinates as a field (1, 3, z, y, x)."""
    return cube_points(shape, dtype=torch.float64).movedim(-1, 0)[None]


def swirl(n: int, strength: float = 0.25) -> torch.Tensor:
    """A smooth field (1, 3, n, n, n) that is zero on the border and changes every axis."""
    x, y, z = points_of((n, n, n))[0]
    bump = (1 - x**2) * (1 - y**2) * (1 - z**2)
    return (
        strength * (bump * torch.stack([torch.cos(2 * y + z), torch.sin(3 * x) - z, torch.cos(x - 2 * y)]))[None]
    )


def test_zero_is_the_identity_exactly() -> None:
    zero = torch.zeros(2, 3, *SHAPE)
    assert torch.equal(exponential(zero), zero)


@pytest.mark.parametrize("squarings", [0, 1, 4, 7])
def test_constant_stays_constant_up_to_the_border(squarings: int) -> None:
    constant = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64).reshape(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    assert (exponential(constant, squarings) - constant).abs().max() < EXACT


def test_zeros_beyond_the_border_would_not_keep_a_constant() -> None:
    # FACTS, trap 4: the same integrator with zero padding.
    constant = torch.full((1, 3, *SHAPE), 0.5, dtype=torch.float64)
    padded = constant / 2**7
    for _ in range(7):
        warped = F.grid_sample(
            padded, displaced_points(padded, tuple(padded.shape[2:])), padding_mode="zeros", align_corners=True
        )
        padded = padded + warped
    assert (padded - constant).abs().max() > 0.1
    assert (exponential(constant) - constant).abs().max() < EXACT


def test_no_squaring_is_one_euler_step() -> None:
    v = swirl(7)
    assert torch.equal(exponential(v, 0), v)


def linear_field(matrix: torch.Tensor, n: int = 17) -> torch.Tensor:
    return torch.einsum("ij,bjzyx->bizyx", matrix, points_of((n, n, n)))


# Turns while it contracts: what is done at the border doesn't reach the middle of the cube, where Ax is exact.
MATRIX = torch.tensor([[-0.3, -0.8, 0.1], [0.7, -0.2, -0.3], [0.2, 0.4, -0.4]], dtype=torch.float64)


def linear_error(squarings: int, expected: torch.Tensor) -> float:
    points = points_of((17, 17, 17))
    found = points + exponential(linear_field(MATRIX), squarings)
    inner = (points.abs() <= 0.3).all(1)[0]
    return float((found - torch.einsum("ij,bjzyx->bizyx", expected, points))[..., inner].abs().max())


def test_linear_field_is_the_power_that_scaling_and_squaring_computes() -> None:
    # Linear interpolation of a linear field is exact: only the first step, I + A / 2ⁿ, is an approximation.
    step = torch.eye(3, dtype=torch.float64) + MATRIX / 2**5
    assert linear_error(5, torch.linalg.matrix_power(step, 32)) < EXACT


def test_linear_field_converges_to_the_matrix_exponential_at_first_order() -> None:
    errors = [linear_error(n, torch.linalg.matrix_exp(MATRIX)) for n in range(3, 9)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    # (1 + a / N)^N = exp(a) (1 - a² / 2N + ...): one squaring more halves the error.
    assert all(0.9 < order < 1.1 for order in orders)
    assert errors[4] < 2e-3  # n = 7, in units where the field is about 0.5
    # exp(-A) or the transposed matrix are far away.
    assert linear_error(7, torch.linalg.matrix_exp(-MATRIX)) > 0.3
    assert linear_error(7, torch.linalg.matrix_exp(MATRIX.T)) > 0.3


def inverse_error(n: int) -> float:
    v = swirl(n)
    return float(compose(exponential(v, 10), exponential(-v, 10)).abs().max())


def test_exp_of_minus_v_undoes_exp_of_v_at_second_order() -> None:
    errors = [inverse_error(n) for n in (9, 17, 33)]
    assert float(exponential(swirl(17)).abs().max()) > 0.2
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    # Linear interpolation errs by h² |u''| / 8 per axis; with 10 squarings the first step errs by less than that.
    assert all(order > 1.6 for order in orders)
    assert errors[-1] < 3e-3  # h = 1/16, |u''| about 2, three axes
    # Subtracting u instead, a first-order inverse, is much worse.
    v = swirl(33)
    assert float(compose(exponential(v), -exponential(v)).abs().max()) > 10 * errors[-1]


def test_flow_for_twice_the_time_is_the_flow_twice() -> None:
    v = swirl(33)
    once, twice = exponential(v, 7), exponential(2 * v, 8)
    # The very same computation with one squaring more.
    assert (compose(once, once) - twice).abs().max() < EXACT


def test_compose_applies_the_inner_map_first() -> None:
    points = points_of((9, 9, 9))
    shift, shrink = torch.full_like(points, 0.2), -0.5 * points  # p + 0.2 and p / 2
    inner = (points.abs() < 0.7).all(1)[0]
    first_shrink = (points + compose(shift, shrink))[..., inner]
    first_shift = (points + compose(shrink, shift))[..., inner]
    assert (first_shrink - (points / 2 + 0.2)[..., inner]).abs().max() < EXACT
    assert (first_shift - ((points + 0.2) / 2)[..., inner]).abs().max() < EXACT


def test_displacement_points_along_the_velocity() -> None:
    # A point carried for unit time: u(p) = exp(v)(p) - p, checked by many small steps from one point.
    v = swirl(33)
    point = torch.tensor([[[0.2, -0.3, 0.1]]], dtype=torch.float64)
    end = point.clone()
    for _ in range(2000):
        end = end + sample(v, end)[:, :, 0][:, None] / 2000
    found = sample(exponential(v, 11), point)[:, :, 0][:, None]
    # Interpolation of u between voxels errs by h² |u''| / 8 per axis, as above.
    assert (found - (end - point)).abs().max() < 3e-3
    assert (end - point).abs().max() > 0.05


def test_gradient_is_right_and_the_velocity_is_left_alone() -> None:
    # FACTS, trap 8: `v += warp(v)` in place breaks the backward pass, or the caller's field.
    v = (
        0.2 * torch.randn(1, 3, 3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).requires_grad_()
    before = v.detach().clone()
    assert torch.autograd.gradcheck(lambda field: exponential(field, 3), v)
    exponential(v, 6).square().sum().backward()
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()
    assert (v.grad != 0).all()
    assert torch.equal(v.detach(), before)


def test_fields_of_a_batch_do_not_mix() -> None:
    fields = torch.cat([swirl(9), -0.5 * swirl(9)])
    together = exponential(fields)
    assert torch.equal(together[:1], exponential(fields[:1]))
    assert torch.equal(together[1:], exponential(fields[1:]))

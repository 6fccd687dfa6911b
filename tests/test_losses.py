"""Losses against naive ones, and penalties of fields whose derivatives are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch

from stnerp import losses

SHAPE = (6, 7, 9)
SPACING = (1.5, 0.8, 3.0)  # x, y, z
EXACT = 1e-10  # float64; values near 1, divided by spacings


def image(seed: int, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points_mm(
    shape: tuple[int, int, int] = SHAPE, spacing_mm: tuple[float, float, float] = SPACING
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and z in mm, each (z, y, x)."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return x * spacing_mm[0], y * spacing_mm[1], z * spacing_mm[2]


def linear(matrix: torch.Tensor, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """u(x) = Ax in mm, (1, 3, z, y, x)."""
    return torch.einsum("ij,jzyx->izyx", matrix, torch.stack(points_mm(shape)))[None]


MATRIX = torch.tensor([[0.1, -0.2, 0.3], [0.05, 0.15, -0.1], [-0.25, 0.2, -0.05]], dtype=torch.float64)


# -- similarity


def test_mse() -> None:
    fixed = torch.tensor([0.0, 1.0, 0.5, 0.25])
    moved = torch.tensor([0.5, 1.0, 0.0, 0.75])
    assert losses.mse(fixed, moved) == 0.1875
    assert losses.mse(fixed, moved, torch.tensor([1.0, 1.0, 0.0, 0.0])) == 0.125
    assert losses.mse(fixed, moved, torch.tensor([3.0, 1.0, 0.0, 0.0])) == 0.1875


def test_global_ncc_is_numpy_s_correlation() -> None:
    a, b = image(0), image(0) + image(1)
    expected = 1 - np.corrcoef(a.flatten(), b.flatten())[0, 1]
    assert abs(float(losses.global_ncc(a, b)) - expected) < EXACT


def test_global_ncc_forgives_gain_and_offset_but_not_the_sign() -> None:
    a, weight = image(0), image(2)
    for w in (None, weight):
        # 1e-12 under the root, against variances near 0.1.
        assert abs(float(losses.global_ncc(a, 0.3 * a + 0.2, w))) < 1e-9
        assert abs(float(losses.global_ncc(a, 0.2 - 3 * a, w)) - 2) < 1e-9


def naive_local_ncc(
    fixed: np.ndarray,
    moved: np.ndarray,
    weight: np.ndarray,
    radii: tuple[int, int, int],
    noise: float,
    contrast: float,
) -> float:
    """Around each voxel: weighted covariance and variances over a box, cut off at the image's border."""
    covariance, variance_f, variance_m = np.zeros((3, *fixed.shape))
    for centre in np.ndindex(fixed.shape):
        box = tuple(slice(max(c - r, 0), c + r + 1) for c, r in zip(centre, radii, strict=True))
        f, m, w = fixed[box], moved[box], weight[box]
        if w.sum() == 0:
            continue  # nothing to compare; by itself it weighs nothing
        f, m = f - np.average(f, weights=w), m - np.average(m, weights=w)
        covariance[centre] = np.average(f * m, weights=w)
        variance_f[centre], variance_m[centre] = np.average(f * f, weights=w), np.average(m * m, weights=w)
    gain = np.sqrt(np.average(variance_f, weights=weight) / np.average(variance_m, weights=weight))
    deviation_f, deviation_m = np.sqrt(variance_f / gain**2 + noise**2), np.sqrt(variance_m + noise**2)
    correlation = (covariance / gain + noise**2) / (deviation_f * deviation_m)
    edges = np.average(np.sqrt(variance_f), weights=variance_f * weight) / gain
    return float(np.average((1 - correlation) * (deviation_f / (0.4 * edges)) ** contrast, weights=weight))


@pytest.mark.parametrize("contrast", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_local_ncc_is_the_naive_loop(weighted: bool, contrast: float) -> None:
    fixed, moved = image(0), 0.5 * image(0) + image(1)
    weight = (image(2) > 0.3).double() if weighted else None
    # A window of 5 mm: 3 voxels of 1.5 mm, 7 of 0.8 mm and, of 3 mm, the least there is: 3.
    measure = losses.LocalNCC(fixed, SPACING, 5.0, weight, noise=0.02, contrast=contrast)
    assert measure.radii == (1, 3, 1)
    plain = np.ones(SHAPE) if weight is None else weight[0, 0].numpy()
    expected = naive_local_ncc(fixed[0, 0].numpy(), moved[0, 0].numpy(), plain, (1, 3, 1), 0.02, contrast)
    assert 0.1 < expected < 0.9 / 0.4**contrast  # noise is edges everywhere
    assert abs(float(measure(moved)) - expected) < EXACT


@pytest.mark.parametrize("contrast", [0.0, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_local_ncc_of_slabs_adds_up_to_the_whole(weighted: bool, contrast: float) -> None:
    fixed, moved = image(0), image(1)
    weight = image(2) if weighted else None
    loss = losses.LocalNCC(fixed, SPACING, 3 * SPACING[2], weight, contrast=contrast)
    radius = loss.radii[0]
    assert radius == 1
    # Six slices: the first slab answers for 0 to 3 (4 is its cut face), the second for 4 and 5.
    parts = [(slice(0, 5), slice(0, 4)), (slice(3, 6), slice(4, 6))]
    counts = [
        (torch.ones_like(fixed) if weight is None else weight)[:, :, answered].sum() for _, answered in parts
    ]
    values = [loss(moved[:, :, slab], slab, gain=1.2) for slab, _ in parts]
    mean = sum(n * value for n, value in zip(counts, values, strict=True)) / sum(counts)
    assert float(mean) == pytest.approx(float(loss(moved, gain=1.2)), abs=EXACT)


def test_local_ncc_forgives_gain_and_offset() -> None:
    fixed = image(0)
    measure = losses.LocalNCC(fixed, SPACING, 5.0, noise=1e-6)
    # Noise of 1e-6 against deviations of 0.05 and more (0.3 × 0.15): (1e-6 / 0.05)² = 4e-10.
    assert abs(float(measure(0.3 * fixed + 0.4))) < 1e-8
    assert abs(float(measure(0.9 - 0.3 * fixed)) - 2) < 1e-8
    # A gain that changes smoothly over the image is forgiven nearly, which global NCC doesn't do.
    x = torch.linspace(0.2, 3, SHAPE[2], dtype=torch.float64)
    assert float(measure(x * fixed)) < 0.5 * float(losses.global_ncc(fixed, x * fixed))


@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_the_fixed_images_gain_and_offset_are_nothing_to_the_loss(contrast: float) -> None:
    """Noise included: it is the moved image's. With one noise for both, 4 % and 6 % of the loss."""
    fixed, moved = image(0), 0.5 * image(0) + image(1)
    expected = float(losses.LocalNCC(fixed, SPACING, 5.0, noise=0.1, contrast=contrast)(moved))
    for gain in (0.4, 2.5):
        brighter = losses.LocalNCC(gain * fixed + 0.1, SPACING, 5.0, noise=0.1, contrast=contrast)
        # 1e-9 of variance beside 0.08 / 0.4²: what keeps a flat image's gain a number.
        assert float(brighter(moved)) == pytest.approx(expected, rel=1e-6)
        assert float(brighter(moved, gain=1.0)) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("gain", [0.4, 2.5])
def test_another_gain_swells_nothing(gain: float) -> None:
    """A ball in air beside itself, darker or brighter: a radius a tenth of a voxel larger or smaller is worse."""
    z, y, x = np.indices((25, 25, 25)) - 12.0

    def ball(radius: float) -> torch.Tensor:
        return torch.from_numpy(0.3 / (1 + np.exp(np.sqrt(x**2 + y**2 + z**2) - radius)))[None, None]

    measure = losses.LocalNCC(gain * ball(8.0), (1.0, 1.0, 1.0), 5.0, noise=0.05, contrast=1.0)
    assert float(measure(ball(8.0))) < min(float(measure(ball(7.9))), float(measure(ball(8.1))))
    with_one_noise = [float(measure(ball(radius), gain=1.0)) for radius in (7.9, 8.0, 8.1)]
    assert with_one_noise.index(min(with_one_noise)) != 1


def test_in_noise_there_is_nothing_to_gain() -> None:
    flat, other = (0.5 + 1e-4 * (image(seed) - 0.5) for seed in (0, 1))
    measure = losses.LocalNCC(flat, SPACING, 5.0, noise=0.01)
    # Windows hold nothing but deviations of 3e-5, a thousandth of the variance of noise, whichever the noise.
    assert abs(float(measure(flat) - measure(other))) < 1e-3
    assert abs(float(losses.LocalNCC(image(0), SPACING, 5.0, noise=0.01)(image(1)))) > 0.5


@pytest.mark.parametrize(("contrast", "faint"), [(0.0, 1.0), (1.0, 0.1), (2.0, 0.01)])
def test_a_window_counts_by_its_contrast(contrast: float, faint: float) -> None:
    """Two balls apart, one of a tenth of the other's contrast; the moved image has lost one or the other."""
    z, y, x = np.indices((15, 15, 40)) - 7.0

    def ball(at: float, value: float) -> torch.Tensor:
        return torch.from_numpy(value * np.exp(-((x - at) ** 2) / 8 - (y**2 + z**2) / 8))[None, None]

    strong, weak, spacing = ball(0, 0.9), ball(25, 0.09), (1.0, 1.0, 1.0)
    measure = losses.LocalNCC(strong + weak, spacing, 5.0, noise=1e-6, contrast=contrast)
    # Windows between them, in the strong one's far tail, have next to no contrast and count alike for both.
    without_weak, without_strong = float(measure(strong)), float(measure(weak))
    assert without_weak / without_strong == pytest.approx(faint, rel=0.1)


@pytest.mark.parametrize("contrast", [0.0, 1.0, 2.0])
def test_air_around_a_body_changes_no_window(contrast: float) -> None:
    """Noise in a frame of air as wide as a window, and the same in three times the volume: what all windows
    lose together, and so each one's pull, is the same but for what rounding does to a mean."""
    fixed, moved = (torch.nn.functional.pad(image(seed), [3] * 6) for seed in (0, 1))
    padded_fixed, padded_moved = (torch.nn.functional.pad(i, (0, 0, 0, 0, 30, 0)) for i in (fixed, moved))
    sums = [
        float(losses.LocalNCC(f, SPACING, 5.0, noise=0.02, contrast=contrast)(m)) * f.numel()
        for f, m in ((fixed, moved), (padded_fixed, padded_moved))
    ]
    assert padded_fixed.numel() > 3 * fixed.numel()
    assert sums[1] == pytest.approx(sums[0], rel=EXACT)


def test_noise_in_air_hardly_changes_what_counts_one() -> None:
    """A body in nine times its volume of air: without noise, and with as much or more than `noise` expects."""
    body = np.zeros((20, 20, 90))
    body[4:16, 4:16, 4:14] = 0.7
    draw = np.random.default_rng(0)
    scales = []
    for sigma in (0.0, 0.02, 0.03):
        noisy = body + sigma * draw.standard_normal(body.shape) * (body == 0)
        measure = losses.LocalNCC(torch.from_numpy(noisy)[None, None], (1.0, 1.0, 1.0), 3.0, contrast=1.0)
        scales.append(float(measure.counts_one))
    # In nine windows of ten a deviation of 0.03 at most, beside 0.3 in those of the edge: each counts a hundredth.
    # A median over what shows more than noise falls to a tenth.
    assert scales[1:] == pytest.approx([scales[0]] * 2, rel=0.2)


def test_edges_deviation_is_the_mean_by_variance() -> None:
    variance = torch.tensor([0.0, 0.0, 0.01, 0.04], dtype=torch.float64)
    assert float(losses.edge_deviation(variance)) == pytest.approx((0.01 * 0.1 + 0.04 * 0.2) / 0.05)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert float(losses.edge_deviation(variance, weight)) == pytest.approx(0.1)
    assert float(losses.edge_deviation(0 * variance)) == 0


def test_counts_of_an_image_without_contrast_are_finite() -> None:
    """No window shows more than noise, which is the least that can count one."""
    flat = torch.full_like(image(0), 0.25)
    measure = losses.LocalNCC(flat, SPACING, 5.0, noise=0.02, contrast=1.0)
    assert 0 < float(measure(image(0))) < 1
    # To rounding of E[x²] − E[x]²: each counts one.
    alike = losses.LocalNCC(flat, SPACING, 5.0, noise=0.02)
    assert float(measure(image(0))) == pytest.approx(float(alike(image(0))), abs=1e-9)


@pytest.mark.parametrize("noise", [0.005, 0.05])
def test_local_ncc_is_best_where_both_images_are_the_same(noise: float) -> None:
    """A ball in air, of a radius of eight voxels: its edge a little further out or in is worse. With the
    covariance alone in the numerator, further out is better: windows of air gain an edge."""
    z, y, x = np.indices((25, 25, 25)) - 12.0

    def ball(radius: float) -> torch.Tensor:
        inside = np.clip(radius + 0.5 - np.sqrt(x**2 + y**2 + z**2), 0, 1)
        return torch.from_numpy(0.5 * inside)[None, None]

    measure = losses.LocalNCC(ball(8.0), (1.0, 1.0, 1.0), 3.0, noise=noise)
    assert abs(float(measure(ball(8.0)))) < EXACT
    for change in (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4):
        assert float(measure(ball(8.0 + change))) > 1e-5, change


@pytest.mark.parametrize("measure", ["mse", "global_ncc", "local_ncc"])
def test_voxels_without_weight_count_for_nothing(measure: str) -> None:
    fixed, moved = image(0), image(1)
    weight = torch.ones_like(fixed)
    weight[..., :4] = 0
    fixed_2, moved_2 = fixed.clone(), moved.clone()
    fixed_2[..., :4], moved_2[..., :4] = 0.9, image(3)[..., :4]

    def loss(f: torch.Tensor, m: torch.Tensor, w: torch.Tensor | None) -> float:
        if measure == "local_ncc":
            return float(losses.LocalNCC(f, SPACING, 5.0, w)(m))
        return float(getattr(losses, measure)(f, m, w))

    assert abs(loss(fixed, moved, weight) - loss(fixed_2, moved_2, weight)) < EXACT
    assert abs(loss(fixed, moved, None) - loss(fixed_2, moved_2, None)) > 1e-3


@pytest.mark.parametrize("measure", ["mse", "global_ncc", "local_ncc"])
def test_weights_of_one_are_no_weights(measure: str) -> None:
    fixed, moved = image(0), image(1)
    ones = torch.ones_like(fixed)
    if measure == "local_ncc":
        plain = losses.LocalNCC(fixed, SPACING, 5.0)(moved)
        weighted = losses.LocalNCC(fixed, SPACING, 5.0, ones)(moved)
    else:
        plain, weighted = getattr(losses, measure)(fixed, moved), getattr(losses, measure)(fixed, moved, ones)
    assert abs(float(plain - weighted)) < EXACT


def test_local_ncc_in_float32_is_close_to_float64() -> None:
    fixed, moved = image(0), image(1)
    single = losses.LocalNCC(fixed.float(), SPACING, 5.0)(moved.float())
    # E[x²] − E[x]² of values below 0.5: rounding of 1e-7 against variances near 0.08.
    assert abs(float(single) - float(losses.LocalNCC(fixed, SPACING, 5.0)(moved))) < 1e-5


def test_similarities_are_differentiable() -> None:
    fixed, moved = image(0, (3, 4, 5)), image(1, (3, 4, 5)).requires_grad_()
    local = losses.LocalNCC(fixed, (1.0, 1.0, 1.0), 3.0)
    assert torch.autograd.gradcheck(lambda m: local(m, gain=1.1), moved)  # the gain itself has no gradient
    assert torch.autograd.gradcheck(lambda m: losses.global_ncc(fixed, m), moved)


@pytest.mark.parametrize("radii", [(1, 1, 1), (0, 2, 3), (2, 0, 1), (5, 6, 8)])
def test_box_mean_is_scipy_s_uniform_filter(radii: tuple[int, int, int]) -> None:
    volume = image(0)
    expected = scipy.ndimage.uniform_filter(
        volume[0, 0].numpy(), [2 * r + 1 for r in radii], mode="constant", cval=0.0
    )
    assert np.abs(losses.box_mean(volume, radii)[0, 0].numpy() - expected).max() < EXACT
    both = torch.cat([volume, 2 * volume], dim=1)
    assert torch.equal(losses.box_mean(both, radii)[:, :1], losses.box_mean(volume, radii))


def test_box_radii_are_of_each_axis() -> None:
    volume = (20, 30, 40)
    # 8 mm: 5 voxels of 1.5 mm (7.5), 9 or 11 of 0.8 mm (7.2 or 8.8), 3 of 3 mm (9).
    assert losses.box_radii(volume, (1.5, 0.8, 3.0), 8.0) == (1, 4, 2)
    assert losses.box_radii(volume, (20.0, 20.0, 20.0), 8.0) == (1, 1, 1)
    assert losses.box_radii((1, 3, 40), (1.0, 1.0, 1.0), 9.0) == (0, 2, 4)


# -- smoothness

PENALTIES = {
    "diffusion": losses.diffusion,
    "bending": losses.bending,
    "total_variation": losses.total_variation,
    "folding": losses.folding_penalty,
    "volume": losses.volume_penalty,
}


def test_diffusion_of_a_linear_field_is_the_squared_norm_of_its_matrix() -> None:
    found = losses.diffusion(linear(MATRIX), SPACING)
    assert abs(float(found - MATRIX.square().sum())) < EXACT


def test_total_variation_of_a_linear_field_is_the_norm_of_its_matrix() -> None:
    found = losses.total_variation(linear(MATRIX), SPACING, epsilon=1e-6)
    # √(a² + ε²) − ε differs from a by at most ε.
    assert abs(float(found - MATRIX.norm())) < 2e-6
    assert abs(float(losses.total_variation(torch.zeros(1, 3, *SHAPE), SPACING))) < 1e-9


def test_bending_of_a_linear_field_is_zero() -> None:
    assert float(losses.bending(linear(MATRIX), SPACING)) < EXACT


@pytest.mark.parametrize(
    ("power", "expected"),
    [((2, 0, 0), 4.0), ((0, 2, 0), 4.0), ((0, 0, 2), 4.0), ((1, 1, 0), 2.0), ((0, 1, 1), 2.0), ((1, 0, 1), 2.0)],
)
def test_bending_of_a_quadratic_field(power: tuple[int, int, int], expected: float) -> None:
    x, y, z = points_mm()
    field = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    field[:, 1] = x ** power[0] * y ** power[1] * z ** power[2]
    # x²: (∂²/∂x²)² = 4 everywhere. xy: the mixed derivative counts twice.
    assert abs(float(losses.bending(field, SPACING)) - expected) < 1e-9


def test_a_translation_costs_nothing() -> None:
    field = torch.full((1, 3, *SHAPE), 12.0, dtype=torch.float64)
    for penalty in PENALTIES.values():
        assert float(penalty(field, SPACING)) < EXACT


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_do_not_depend_on_batch_size(name: str) -> None:
    # FACTS, trap 3: a mean divided by the batch size once more.
    field = 4 * torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = PENALTIES[name](field, SPACING)
    assert float(one) > 1e-3
    assert abs(float(PENALTIES[name](field.expand(5, -1, -1, -1, -1), SPACING) / one) - 1) < EXACT


def wave(intervals: int) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """The same wave in a box of 60 × 80 × 40 mm, on a grid of that many intervals along each axis."""
    spacing_mm = (60 / intervals, 80 / intervals, 40 / intervals)
    x, y, z = points_mm((intervals + 1,) * 3, spacing_mm)
    phase = 2 * np.pi * torch.stack([x / 60 + y / 80, z / 40 - x / 60, y / 80 + z / 40])
    return torch.sin(phase)[None] * torch.tensor([5.0, 8.0, 6.0], dtype=torch.float64)[
        :, None, None, None
    ], spacing_mm


@pytest.mark.parametrize("name", ["diffusion", "bending", "total_variation", "volume", "folding"])
def test_penalties_do_not_depend_on_resolution(name: str) -> None:
    coarse, fine = (float(PENALTIES[name](*wave(n))) for n in (24, 48))
    # A wave of 24 voxels: second differences see 1 − (2π/24)² / 12 = 0.6 % less of each derivative, central ones
    # up to 1.1 %, and there are two in a square and four in bending's; borders weigh 1/24 or 1/48.
    assert abs(coarse / fine - 1) < 0.1
    # In voxels instead of mm, they'd differ by factors of 2 to 16.
    assert fine > 1e-3


def test_diffusion_of_a_wave_is_the_integral() -> None:
    field, spacing_mm = wave(48)
    k = 2 * np.pi / np.array([60, 80, 40])
    squared = 25 * (k[0] ** 2 + k[1] ** 2) + 64 * (k[2] ** 2 + k[0] ** 2) + 36 * (k[1] ** 2 + k[2] ** 2)
    # Mean of cos²: 1/2. Forward differences over 1/48 of a wave see 0.14 % less, (2π/48)² / 12, squared 0.3 %.
    assert abs(float(losses.diffusion(field, spacing_mm)) / (squared / 2) - 1) < 0.005


def test_jacobian_of_an_affine_map_is_its_determinant() -> None:
    expected = torch.linalg.det(torch.eye(3, dtype=torch.float64) + MATRIX)
    found = losses.jacobian_determinant(linear(MATRIX), SPACING)
    assert found.shape == (1, *SHAPE)
    assert (found - expected).abs().max() < EXACT
    mirrored = linear(torch.diag(torch.tensor([-2.0, 0.0, 0.0], dtype=torch.float64)))
    assert (losses.jacobian_determinant(mirrored, SPACING) + 1).abs().max() < EXACT


def test_folding_is_seen_on_a_folded_field_and_nowhere_else() -> None:
    # FACTS, trap 5: a count that can't fail. φ = x − 1.5 x reverses the first axis: J = −0.5.
    folded = linear(torch.diag(torch.tensor([-1.5, 0.0, 0.0], dtype=torch.float64)))
    assert abs(float(losses.folding_penalty(folded, SPACING)) - 0.5) < EXACT
    assert float(losses.folding_penalty(linear(MATRIX), SPACING)) == 0
    squeezed = linear(torch.diag(torch.tensor([-0.9, 0.0, 0.0], dtype=torch.float64)))
    assert float(losses.folding_penalty(squeezed, SPACING)) == 0
    assert abs(float(losses.folding_penalty(squeezed, SPACING, margin=0.3)) - 0.2) < EXACT


def test_a_fold_in_one_place_is_seen() -> None:
    x, _, _ = points_mm()
    field = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    field[:, 0] = torch.where(x > 6, -2 * (x - 6), 0.0 * x)
    assert (losses.jacobian_determinant(field, SPACING) < 0).any()
    assert float(losses.folding_penalty(field, SPACING)) > 0


def test_volume_penalty_is_the_same_for_growth_and_shrinkage() -> None:
    for scale in (1.1, 1.5, 2.0):
        grown, shrunk = (linear((s - 1) * torch.eye(3, dtype=torch.float64)) for s in (scale, 1 / scale))
        expected = scale**3 + scale**-3 - 2
        assert abs(float(losses.volume_penalty(grown, SPACING)) - expected) < 1e-9
        assert abs(float(losses.volume_penalty(shrunk, SPACING)) - expected) < 1e-9
    folded = linear(torch.diag(torch.tensor([-1.5, 0.0, 0.0], dtype=torch.float64)))
    assert abs(float(losses.volume_penalty(folded, SPACING)) - 8.1) < EXACT  # at J = 0.1: 0.1 + 10 − 2


def test_penalties_are_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(1, 3, 3, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    for penalty in (losses.diffusion, losses.bending, losses.total_variation, losses.volume_penalty):
        assert torch.autograd.gradcheck(lambda f, p=penalty: p(f, SPACING), 0.1 * field.detach().requires_grad_())
    losses.folding_penalty(4 * field, SPACING).backward()
    assert field.grad is not None
    assert field.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 1, 4), (3, 4, 1)])
def test_total_variation_has_its_derivative_by_hand(shape: tuple[int, int, int]) -> None:
    """Against finite differences, one-sided ones at ends and slices included; and what autograd makes of it."""
    field = torch.randn(
        2, 3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: losses.total_variation(f, SPACING, 0.1), field)
    slopes = torch.stack([losses.gradient(field, axis, SPACING) for axis in range(3)])
    expected = (slopes.square().sum((0, 2)) + 0.1**2).sqrt().mean() - 0.1
    found = losses.total_variation(field, SPACING, 0.1)
    assert abs(float(found.detach() - expected.detach())) < EXACT
    by_hand, by_autograd = (torch.autograd.grad(value, field)[0] for value in (found, expected))
    assert (by_hand - by_autograd).abs().max() < EXACT


def test_slices_have_no_derivative_across() -> None:
    x, y, _ = points_mm((1, 7, 9))
    field = torch.stack([0.2 * x + 0.1 * y, 0.3 * y, 0 * x])[None]
    assert abs(float(losses.diffusion(field, SPACING)) - 0.14) < EXACT
    assert (losses.jacobian_determinant(field, SPACING) - 1.2 * 1.3).abs().max() < EXACT


def test_every_axis_and_component_weighs_the_same() -> None:
    for axis, component in itertools.product(range(3), range(3)):
        matrix = torch.zeros(3, 3, dtype=torch.float64)
        matrix[component, axis] = 0.5
        assert abs(float(losses.diffusion(linear(matrix), SPACING)) - 0.25) < EXACT

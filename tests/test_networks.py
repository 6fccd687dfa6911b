"""The networks' formulas, their start, and that nothing is lost with a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from stnerp.networks import FeatureGrid, FourierFeatures, Sine, in_chunks, siren


def points(count: int = 50, inputs: int = 3) -> torch.Tensor:
    return torch.rand(count, inputs, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_fourier_features_are_equation_2() -> None:
    gamma = FourierFeatures(3, 5, sigma=2.0)
    p = points()
    expected = [[2 * math.pi * float(row @ q) for row in gamma.B] for q in p]
    found = gamma(p)
    assert found.shape == (50, 10)
    # float32 phases of up to 50 carry errors of 50 × 6e-8 and a few more from the sum.
    assert (found[:, :5] - torch.tensor(expected).cos()).abs().max() < 2e-5
    assert (found[:, 5:] - torch.tensor(expected).sin()).abs().max() < 2e-5


def test_frequencies_have_the_standard_deviation_asked_for() -> None:
    b = FourierFeatures(3, 4000, sigma=3.0).B
    # 12 000 numbers: the standard deviation is known to 1 / √24000 = 0.65 %.
    assert abs(float(b.std()) / 3 - 1) < 0.03
    assert abs(float(b.mean())) < 0.1


def test_frequencies_are_saved_and_not_trained() -> None:
    # FACTS, trap 7: a plain tensor B is lost with the checkpoint, and a network loaded into another B is noise.
    first, second = (
        siren(3, 1, layers=3, width=8, fourier_width=4),
        siren(3, 1, layers=3, width=8, fourier_width=4),
    )
    assert "0.B" in first.state_dict()
    assert not any(name == "0.B" for name, _ in first.named_parameters())
    p = points()
    assert not torch.equal(first(p), second(p))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(p), second(p))
    assert first.to(torch.float64)[0].B.dtype == torch.float64


def test_sine_layer_is_its_formula() -> None:
    layer, x = Sine(3, 6, omega=7.0), points()
    expected = torch.sin(7.0 * (x @ layer.linear.weight.T + layer.linear.bias))
    assert (layer(x) - expected).abs().max() < 1e-5  # rounding of arguments of up to 10


@pytest.mark.parametrize("omega", [5.0, 30.0])
def test_siren_starts_within_the_bounds_of_its_paper(omega: float) -> None:
    net = siren(3, 2, layers=4, width=64, omega=omega, fourier_width=32, output_scale=0.5)
    _, first, second, third, last = net
    hidden = math.sqrt(6 / 64) / omega
    expected = [(first.linear, 1 / 64), (second.linear, hidden), (third.linear, hidden), (last, 0.5 * hidden)]
    for linear, bound in expected:
        largest = float(linear.weight.detach().abs().max())
        # 128 uniform numbers and more: the largest is above 90 % of the bound but for 1e-6.
        assert 0.9 * bound < largest <= bound
    assert (last.bias == 0).all()


def test_hidden_layers_keep_the_spread_of_their_inputs() -> None:
    # Sitzmann et al., theorem 1.8: sines of evenly spread phases (variance 1/2) become arguments of variance 1.
    for omega in (5.0, 30.0):
        layer = Sine(256, 256, omega)
        sines = torch.sin(2 * math.pi * torch.rand(500, 256))
        arguments = omega * sines @ layer.linear.weight.detach().T
        # 256 rows, each of a variance that is known to about 10 %: 0.6 % for all.
        assert abs(float(arguments.std()) - 1) < 0.05


def test_siren_has_the_layers_asked_for() -> None:
    net = siren(4, 3, layers=8, width=256, fourier_width=256)
    assert [type(part).__name__ for part in net] == ["FourierFeatures", *7 * ["Sine"], "Linear"]
    assert net[1].linear.in_features == 512
    assert net(torch.zeros(7, 4)).shape == (7, 3)
    # The paper's network: 512 × 256 + 6 × 256² + 256 × 3 weights and 7 × 256 + 3 biases.
    assert sum(p.numel() for p in net.parameters()) == 131072 + 393216 + 768 + 1795


def test_small_output_scale_starts_near_zero() -> None:
    full, small = (siren(3, 3, layers=4, width=32, omega=8.0, output_scale=s) for s in (1.0, 1e-2))
    assert small(points()).abs().max() < 0.05 * full(points()).abs().max()
    assert small(points()).abs().max() > 0


# -- feature grids


def one_grid(shape: tuple[int, int, int]) -> FeatureGrid:
    """One channel, and a decoder that hands it on: relu(f + 5) − 5 of the first unit."""
    net = FeatureGrid([shape], features=1, width=4)
    with torch.no_grad():
        for parameter in net.decoder.parameters():
            parameter.zero_()
        net.decoder[0].weight[0, 0], net.decoder[0].bias[0] = 1, 5
        net.decoder[2].weight[0, 0] = 1
        net.decoder[4].weight[0, 0], net.decoder[4].bias[0] = 1, -5
    return net


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_feature_grid_reads_a_ramp(axis: int) -> None:
    shape = (4, 5, 7)
    net = one_grid(shape)
    ramp = torch.linspace(-1, 1, shape[2 - axis]).reshape([-1 if d == 2 - axis else 1 for d in range(3)])
    with torch.no_grad():
        net.grids[0].copy_(ramp.expand(1, 1, *shape))
    p = (0.99 * points()).requires_grad_()
    values = net(p)
    assert values.shape == (50, 1)
    assert (values[:, 0] - p[:, axis]).abs().max() < 1e-5
    values.sum().backward()
    assert p.grad is not None
    expected = torch.zeros(50, 3)
    expected[:, axis] = 1
    assert (p.grad - expected).abs().max() < 1e-4  # differences of neighbours, 1e-7, times half the size


def test_feature_grid_keeps_points_and_grids_in_order() -> None:
    net = FeatureGrid([(2, 2, 2), (3, 4, 5)], features=3, width=8)
    p = points(20)
    together = net(p)
    apart = torch.cat([net(q[None]) for q in p])
    assert together.shape == (20, 1)
    assert (together - apart).abs().max() < 1e-6
    assert net.decoder[0].in_features == 6
    assert {"grids.0", "grids.1"} <= set(net.state_dict())


# -- chunks


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    net = siren(3, 2, layers=3, width=16, omega=5.0, fourier_width=8, fourier_sigma=1.0).double()
    results = []
    for run in (lambda p: net(p), lambda p: in_chunks(net, p, chunk)):
        net.zero_grad()
        p = points().double().requires_grad_()
        values = run(p)
        values.square().sum().backward()
        results.append([values.detach(), p.grad, *(w.grad.clone() for w in net.parameters())])
    for whole, pieces in zip(*results, strict=True):
        # Sums of 50 points in another order, float64.
        assert (whole - pieces).abs().max() < 1e-12 * max(1, float(whole.abs().max()))
    with torch.no_grad():
        assert (in_chunks(net, points().double(), chunk) - results[0][0]).abs().max() < 1e-12

"""Def-Net: units, directions of axes, and a velocity of zero at the reference time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from stnerp import def_net
from stnerp.def_net import DefNet, FactorisedDefNet, SpaceTimeDefNet, def_net_of
from stnerp.geometry import Grid, cube_points
from stnerp.presets import DefNetSettings
from stnerp.time_basis import TimeBasis

GRID = Grid((7, 5, 4), (10.0, 20.0, 30.0))  # half extents of 30, 40 and 45 mm
TIMES = (2.0, 3.0, 7.0, 12.0)
BASIS = TimeBasis(TIMES, 3.0)
SMALL = DefNetSettings(layers=3, width=16, fourier_width=8)


def make(form: str) -> DefNet:
    torch.manual_seed(0)
    return def_net_of(GRID, BASIS, dataclasses.replace(SMALL, form=form))  # type: ignore[arg-type]


def some_points(count: int = 30) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("form", "kind"), [("factorised", FactorisedDefNet), ("space_time", SpaceTimeDefNet)])
def test_form_and_shapes(form: str, kind: type[DefNet]) -> None:
    net = make(form)
    assert type(net) is kind
    assert net(some_points(), [2.0, 5.0]).shape == (2, 30, 3)
    assert net.lattice_velocity((2, 3, 6), [2.0, 5.0, 9.0]).shape == (3, 3, 2, 3, 6)


@pytest.mark.parametrize("form", ["factorised", "space_time"])
def test_lattice_is_the_network_at_its_points(form: str) -> None:
    net, shape = make(form), (3, 4, 6)
    field = net.lattice_velocity(shape, [2.0, 5.0])
    at_points = net(cube_points(shape).reshape(-1, 3), [2.0, 5.0])
    for z, y, x in np.ndindex(shape):
        assert torch.equal(field[:, :, z, y, x], at_points[:, (z * shape[1] + y) * shape[2] + x])


@pytest.mark.parametrize("form", ["factorised", "space_time"])
def test_starts_near_the_identity(form: str) -> None:
    speed_mm = make(form).lattice_velocity((4, 5, 7), TIMES).detach().abs().max()
    assert 0 < speed_mm < 5


@pytest.mark.parametrize("form", ["factorised", "space_time"])
def test_times_do_not_mix(form: str) -> None:
    net, points = make(form), some_points()
    together = net(points, TIMES)
    for row, t in enumerate(TIMES):
        assert (together[row] - net(points, [t])[0]).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["factorised", "space_time"])
def test_chunks_change_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, points = make(form), some_points()
    whole = net(points, [2.0, 5.0])
    monkeypatch.setattr(def_net, "CHUNK", 7)
    assert (net(points, [2.0, 5.0]) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["factorised", "space_time"])
def test_saved_weights_bring_the_same_velocity(form: str) -> None:
    net = make(form)
    torch.manual_seed(5)
    other = def_net_of(GRID, BASIS, net_settings := dataclasses.replace(SMALL, form=form))  # type: ignore[arg-type]
    assert net_settings.form == form
    assert not torch.equal(other(some_points(), [5.0]), net(some_points(), [5.0]))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(some_points(), [5.0]), net(some_points(), [5.0]))


# -- factorised


@pytest.mark.parametrize("period", [None, 12.0])
def test_zero_at_the_reference_time_exactly(period: float | None) -> None:
    net = FactorisedDefNet(GRID, TimeBasis(TIMES, 3.0, period), SMALL)
    assert not net.lattice_velocity((4, 5, 7), [3.0]).any()
    assert net.lattice_velocity((4, 5, 7), [2.0]).any()


class Known(nn.Module):
    """In place of the network: modes Vₖ of isotropic coordinates p, V₀ = p, V₁ = (1, 2, 3), V₂ = 0."""

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        constant = torch.tensor([1.0, 2.0, 3.0]).expand(len(p), 3)
        return torch.cat([p, constant, torch.zeros(len(p), 3)], dim=1)


def test_velocity_is_the_sum_over_modes_in_millimetres() -> None:
    net = FactorisedDefNet(GRID, BASIS, dataclasses.replace(SMALL, length_mm=100.0, velocity_mm=5.0))
    net.modes = Known()
    points, t = some_points(), 5.0
    a = BASIS(t) @ BASIS.mixing
    # Space in units of 100 mm from the grid's centre: a cube unit is 30, 40 or 45 mm.
    isotropic = points * torch.tensor([0.3, 0.4, 0.45])
    expected = 5.0 * (a[0] * isotropic + a[1] * torch.tensor([1.0, 2.0, 3.0]))
    assert (net(points, [t])[0] - expected).abs().max() < 1e-5


def test_spacing_does_not_change_the_velocity_in_space() -> None:
    # The same box in other voxels is the same patient.
    torch.manual_seed(0)
    net = FactorisedDefNet(GRID, BASIS, SMALL)
    torch.manual_seed(0)
    finer = FactorisedDefNet(GRID.with_spacing(5.0), BASIS, SMALL)
    assert torch.equal(net(some_points(), [7.0]), finer(some_points(), [7.0]))


# -- detail

FINE = (8, 9, 7)  # finer than a network on 20 mm, which has 5 x 5 x 4 points over this grid


def detailed(mm: float = 10.0) -> FactorisedDefNet:
    """A net whose free velocities, of a lattice of 10 mm, are those of one impulse."""
    torch.manual_seed(0)
    net = FactorisedDefNet(GRID, BASIS, dataclasses.replace(SMALL, network_mm=20.0, detail_mm=mm))
    assert net.detail is not None
    assert not net.detail.any()
    with torch.no_grad():
        net.detail[0, 3, 4, 4, 3] = 1.0  # x component of the second mode
    return net


def test_detail_is_added_where_the_lattice_has_room() -> None:
    net, plain = detailed(), detailed()
    plain.detail = None
    coarse = GRID.with_spacing(20.0).shape
    assert torch.equal(net.lattice_velocity(coarse, [5.0]), plain.lattice_velocity(coarse, [5.0]))
    shape, b = net.detail_grid.shape, BASIS(5.0) @ BASIS.mixing
    added = (net.lattice_velocity(shape, [5.0]) - plain.lattice_velocity(shape, [5.0]))[0]
    assert not added[1:].any()
    # A Gaussian of one spacing keeps the sum; its peak is (0.3991)^3, the discrete kernel's.
    assert added[0].sum().item() == pytest.approx(b[1], rel=1e-4)
    assert added[0, 4, 4, 3].item() == pytest.approx(0.3991**3 * b[1], rel=1e-3)


def test_detail_is_resolved_where_no_axis_is_coarser() -> None:
    net = detailed(10.0)
    z, y, x = net.detail_grid.shape
    assert all(net.resolves_detail(shape) for shape in ((z, y, x), (z + 1, 2 * y, x)))
    assert not any(net.resolves_detail(shape) for shape in ((z - 1, 2 * y, 2 * x), (2 * z, y, x - 1)))
    net.detail = None
    assert not net.resolves_detail((z, y, x))


def test_detail_at_points_is_the_lattice() -> None:
    net = detailed()
    plain = detailed()
    plain.detail = None
    shape, points = net.detail_grid.shape, cube_points(net.detail_grid.shape).reshape(-1, 3)
    at_points = (net(points, [5.0]) - plain(points, [5.0]))[0].T.reshape(3, *shape)
    lattice = (net.lattice_velocity(shape, [5.0]) - plain.lattice_velocity(shape, [5.0]))[0]
    assert (at_points - lattice).abs().max() < 1e-5


def test_a_net_written_before_the_time_basis_was_mixed() -> None:
    net = FactorisedDefNet(GRID, BASIS, dataclasses.replace(SMALL, detail_mm=None))
    weights = {name: value for name, value in net.state_dict().items() if name != "mixing"}
    net.load_weights(weights)
    assert torch.equal(net.mixing, torch.eye(3, dtype=torch.float64))


# -- space and time


class Linear(nn.Module):
    """In place of the network: velocity (x + t, 2 y, 3 z) of inputs (x, y, z, t)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x, y, z, t = inputs.T
        return torch.stack([x + t, 2 * y, 3 * z], dim=1)


def test_space_time_speaks_the_units_of_the_paper() -> None:
    net = SpaceTimeDefNet(GRID, BASIS, SMALL)
    net.network = Linear()
    # Coordinates and times are in [0, 1]: the first corner at the first time, the last at the last.
    corners = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    first, last = net(corners, [2.0, 12.0])
    assert first[0].tolist() == [0, 0, 0]
    # One unit of the paper's cube is the whole extent: 60, 80 and 90 mm.
    assert last[1].tolist() == [120, 160, 270]
    assert net(corners, [7.0])[0, 0].tolist() == [30, 0, 0]


@pytest.mark.parametrize("form", ["factorised", "space_time"])
def test_a_cycle_later_is_the_same_phase(form: str) -> None:
    torch.manual_seed(0)
    basis = TimeBasis((0.0, 3.0, 5.0), 0.0, period=10.0)
    net = def_net_of(GRID, basis, dataclasses.replace(SMALL, form=form))  # type: ignore[arg-type]
    now, later = net(some_points(), [3.0, 13.0])
    torch.testing.assert_close(now, later)


def test_whole_cycles_later_is_the_first_phase_however_they_round() -> None:
    """2.4 % 0.8 is 0.7999…, the far end of what the network's time is."""
    basis = TimeBasis((0.0, 0.2, 0.4, 0.6), 0.0, 0.8)
    net = SpaceTimeDefNet(GRID, basis, SMALL)
    for t in (0.8, 2.4, 4.0, 4.8, -0.8, -1e-17):
        assert net._unit_time(t) == pytest.approx(0, abs=1e-9)
    assert net._unit_time(0.7) == pytest.approx(0.7 / 0.6)

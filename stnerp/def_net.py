"""Def-Net D(p, t): the stationary velocity that carries time t to the reference (Eq. 4).

Two forms of the same idea. `SpaceTimeDefNet` is the paper's: one network of (x, y, z, t).
`FactorisedDefNet` splits it into v(x, t) = Σₖ aₖ(t) Vₖ(x): one pass over space serves every time,
and the velocity at the reference time is zero exactly.

Both return velocities in mm along the axes of the reference grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from stnerp.geometry import Grid, cube_points
from stnerp.networks import in_chunks, siren
from stnerp.presets import DefNetSettings
from stnerp.time_basis import TimeBasis
from stnerp.warp import resize

CHUNK = 2**16  # points per pass of a network
Shape = tuple[int, int, int]


class DefNet(nn.Module, ABC):
    """A velocity at every point of the reference grid's cube and at every time."""

    def __init__(self, grid: Grid, time_basis: TimeBasis) -> None:
        super().__init__()
        self.grid = grid
        self.time_basis = time_basis

    @abstractmethod
    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        """Velocity (T, N, 3) in axis mm at cube points (N, 3) and T times."""

    def lattice_velocity(self, shape: Shape, times: Sequence[float]) -> torch.Tensor:
        """Velocity (T, 3, z, y, x) in axis mm on a lattice of that shape over the reference grid."""
        device = next(self.parameters()).device
        velocity = self(cube_points(shape, device).reshape(-1, 3), times)
        return velocity.transpose(1, 2).reshape(len(times), 3, *shape)


class FactorisedDefNet(DefNet):
    """v(x, t) = Σₖ aₖ(t) Vₖ(x), with V from a small, low-frequency SIREN.

    Space is measured in mm from the grid's centre, so that the network's smoothness is that of
    tissue and not of the field of view.

    settings.length_mm is the unit of space, settings.velocity_mm that of the network's output. A lattice
    finer than settings.network_mm is filled by cubic splines between points that far apart: the network
    is smooth, and its evaluation is the dearest part of a step.
    """

    def __init__(self, grid: Grid, time_basis: TimeBasis, settings: DefNetSettings) -> None:
        super().__init__(grid, time_basis)
        self.length_mm, self.velocity_mm = settings.length_mm, settings.velocity_mm
        self.network_mm = settings.network_mm
        self.modes = _siren(3, 3 * time_basis.size, settings)

    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        modes = self._modes(points).reshape(len(points), -1, 3)
        return torch.einsum("tk,nkc->tnc", self._coefficients(times).to(modes), modes)

    def lattice_velocity(self, shape: Shape, times: Sequence[float]) -> torch.Tensor:
        coarse = shape
        if self.network_mm is not None:
            coarse = _smaller(self.grid.with_spacing(self.network_mm).shape, shape)
        modes = self._modes(cube_points(coarse, next(self.parameters()).device).reshape(-1, 3))
        modes = resize(modes.T.reshape(1, -1, *coarse), shape, order=3).reshape(-1, 3, *shape)
        return torch.einsum("tk,kczyx->tczyx", self._coefficients(times).to(modes), modes)

    def _modes(self, points: torch.Tensor) -> torch.Tensor:
        """Vₖ in axis mm at cube points (N, 3): (N, 3 K)."""
        isotropic = self.grid.vectors_from_cube(points) / self.length_mm
        return in_chunks(self.modes, isotropic, CHUNK) * self.velocity_mm

    def _coefficients(self, times: Sequence[float]) -> torch.Tensor:
        """aₖ(t), (T, K)."""
        return torch.from_numpy(np.stack([self.time_basis(t) for t in times]))


class SpaceTimeDefNet(DefNet):
    """v(x, t) from one network of (x, y, z, t), all in [0, 1]: the paper's."""

    def __init__(self, grid: Grid, time_basis: TimeBasis, settings: DefNetSettings) -> None:
        super().__init__(grid, time_basis)
        self.network = _siren(4, 3, settings)

    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        unit = (points + 1) / 2
        velocities = []
        for t in times:
            time = unit.new_full((len(unit), 1), self._unit_time(t))
            velocities.append(in_chunks(self.network, torch.cat([unit, time], dim=1), CHUNK))
        # The network speaks in units of the cube [0, 1]³, half of ours.
        return self.grid.vectors_from_cube(2 * torch.stack(velocities))

    def _unit_time(self, t: float) -> float:
        first, last = self.time_basis.measured_range
        if self.time_basis.period is not None:  # the network doesn't know that the cycle closes
            t = first + (t - first) % self.time_basis.period
        return (t - first) / (last - first)


def def_net_of(grid: Grid, time_basis: TimeBasis, settings: DefNetSettings) -> DefNet:
    """A new Def-Net of the form that the settings name."""
    form = FactorisedDefNet if settings.form == "factorised" else SpaceTimeDefNet
    return form(grid, time_basis, settings)


def _smaller(a: Shape, b: Shape) -> Shape:
    z, y, x = (min(m, n) for m, n in zip(a, b, strict=True))
    return z, y, x


def _siren(inputs: int, outputs: int, settings: DefNetSettings) -> nn.Module:
    return siren(
        inputs,
        outputs,
        layers=settings.layers,
        width=settings.width,
        omega=settings.omega,
        fourier_width=settings.fourier_width,
        fourier_sigma=settings.fourier_sigma,
        output_scale=1e-2,  # so that the deformation starts at the identity, nearly
    )

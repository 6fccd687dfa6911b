"""Def-Net D(p, t): the stationary velocity that carries time t to the reference (Eq. 4).

Two forms of the same idea. `SpaceTimeDefNet` is the paper's: one network of (x, y, z, t).
`FactorisedDefNet` splits it into v(x, t) = Σₖ bₖ(t) (Vₖ(x) + Wₖ(x)): one pass over space serves every time,
and the velocity at the reference time is zero exactly.

Both return velocities in mm along the axes of the reference grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import nn

from stnerp.geometry import Grid, cube_points
from stnerp.networks import in_chunks, siren
from stnerp.presets import DefNetSettings
from stnerp.time_basis import TimeBasis
from stnerp.warp import resize, sample, smoothed

CHUNK = 2**16  # points per pass of a network
Shape = tuple[int, int, int]
VelocityAt = Callable[[Sequence[float]], torch.Tensor]  # times -> (T, 3, z, y, x)


class DefNet(nn.Module, ABC):
    """A velocity at every point of a grid's cube, the reference's or a part of it, and at every time."""

    def __init__(self, grid: Grid, time_basis: TimeBasis) -> None:
        super().__init__()
        self.grid = grid
        self.time_basis = time_basis

    @abstractmethod
    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        """Velocity (T, N, 3) in axis mm at cube points (N, 3) and T times."""

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the weights of a net of the same settings."""
        self.load_state_dict(weights)

    def lattice_velocity(self, shape: Shape, times: Sequence[float]) -> torch.Tensor:
        """Velocity (T, 3, z, y, x) in axis mm on a lattice of that shape over the net's grid."""
        return self.on_lattice(shape)(times)

    def on_lattice(self, shape: Shape) -> VelocityAt:
        """`lattice_velocity` for many steps of a fit: what doesn't depend on weights is computed once."""
        points = cube_points(shape, next(self.parameters()).device).reshape(-1, 3)
        return lambda times: self(points, times).transpose(1, 2).reshape(len(times), 3, *shape)


class FactorisedDefNet(DefNet):
    """v(x, t) = Σₖ bₖ(t) (Vₖ(x) + Wₖ(x)), with V from a small, low-frequency SIREN and W free.

    Space is measured in mm from the grid's centre, so that the network's smoothness is that of tissue and not
    of the field of view. bₖ is the time basis, recombined so that its functions are alike in size
    (`TimeBasis.mixing`).

    settings.length_mm is the unit of space, settings.velocity_mm that of the network's output. A lattice
    finer than settings.network_mm is filled by cubic splines between points that far apart: the network
    is smooth, and its evaluation is the dearest part of a step.

    W, `detail`, is a lattice of its own of settings.detail_mm, smoothed by a Gaussian of one spacing and read
    by cubic splines. It is added to lattices that are finer than settings.network_mm; coarser ones have no room.
    A fit frees it where `resolves_detail`, or on its last level: on coarser lattices it follows noise.
    """

    def __init__(self, grid: Grid, time_basis: TimeBasis, settings: DefNetSettings) -> None:
        super().__init__(grid, time_basis)
        self.length_mm, self.velocity_mm = settings.length_mm, settings.velocity_mm
        self.network_shape = None if settings.network_mm is None else grid.with_spacing(settings.network_mm).shape
        self.modes = _siren(3, 3 * time_basis.size, settings)
        self.register_buffer("mixing", torch.from_numpy(time_basis.mixing))
        self.mixing: torch.Tensor
        extent = torch.tensor(grid.half_extent_mm, dtype=torch.float32) / settings.length_mm
        self.register_buffer("half_extent", extent, persistent=False)  # in units of length
        self.half_extent: torch.Tensor
        self.detail: nn.Parameter | None = None
        if settings.detail_mm is not None:
            self.detail_grid = grid.with_spacing(settings.detail_mm)
            self.detail = nn.Parameter(torch.zeros(1, 3 * time_basis.size, *self.detail_grid.shape))

    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        modes = self._modes(points)
        if self.detail is not None:
            modes = modes + sample(self.smooth_detail(), points[None])[0].T
        return torch.einsum("tk,nkc->tnc", self._coefficients(times).to(modes), modes.reshape(len(points), -1, 3))

    def on_lattice(self, shape: Shape) -> VelocityAt:
        coarse = shape if self.network_shape is None else _smaller(self.network_shape, shape)
        fourier, layers = self.modes[0], self.modes[1:]
        with torch.no_grad():  # nothing in them is trained
            points = cube_points(coarse, self.half_extent.device).reshape(-1, 3) * self.half_extent
            features = in_chunks(fourier, points, CHUNK)

        def velocity(times: Sequence[float]) -> torch.Tensor:
            values = in_chunks(layers, features, CHUNK) * self.velocity_mm
            modes = resize(values.T.reshape(1, -1, *coarse), shape, order=3)
            if self.carries_detail(shape):
                modes = modes + resize(self.smooth_detail(), shape, order=3)
            coefficients = self._coefficients(times).to(modes)
            return torch.einsum("tk,kczyx->tczyx", coefficients, modes.reshape(-1, 3, *shape))

        return velocity

    def carries_detail(self, shape: Shape) -> bool:
        """Whether there is any, and a lattice of that shape is finer than the network's."""
        finer = self.network_shape is None or _smaller(self.network_shape, shape) != shape
        return self.detail is not None and finer

    def resolves_detail(self, shape: Shape) -> bool:
        """Whether there is any, and a lattice of that shape is no coarser than its own, along any axis."""
        return self.detail is not None and _smaller(self.detail_grid.shape, shape) == self.detail_grid.shape

    def smooth_detail(self) -> torch.Tensor:
        """W in axis mm on `detail_grid`, (1, 3 K, z, y, x)."""
        assert self.detail is not None
        return smoothed(self.detail, sigma=1.0)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        # Nets of 0.1.0 were written with the time basis as it is.
        self.load_state_dict({"mixing": torch.eye(self.time_basis.size, dtype=torch.float64), **weights})

    def _modes(self, points: torch.Tensor) -> torch.Tensor:
        """Vₖ in axis mm at cube points (N, 3): (N, 3 K)."""
        return in_chunks(self.modes, points * self.half_extent, CHUNK) * self.velocity_mm

    def _coefficients(self, times: Sequence[float]) -> torch.Tensor:
        """bₖ(t), (T, K)."""
        where, dtype = self.mixing.device, self.mixing.dtype
        values = [_basis_values(self.time_basis, t, where, dtype) for t in times]
        return torch.stack(values) @ self.mixing


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
        if (period := self.time_basis.period) is not None:  # the network doesn't know that the cycle closes
            t = first + (t - first) % period
            if first + period - t < 1e-9 * period:  # whole cycles later, but for rounding
                t = first
        return (t - first) / (last - first)


def def_net_of(grid: Grid, time_basis: TimeBasis, settings: DefNetSettings) -> DefNet:
    """A new Def-Net of the form that the settings name."""
    form = FactorisedDefNet if settings.form == "factorised" else SpaceTimeDefNet
    return form(grid, time_basis, settings)


@lru_cache(maxsize=256)
def _basis_values(basis: TimeBasis, t: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """aₖ(t), (K,), made once: each copy to a GPU would wait for it."""
    with torch.inference_mode(False):  # see `warp.placed`
        return torch.from_numpy(basis(t)).to(device, dtype)


def _smaller(a: Shape, b: Shape) -> Shape:
    z, y, x = (min(m, n) for m, n in zip(a, b, strict=True))
    return z, y, x


def _siren(inputs: int, outputs: int, settings: DefNetSettings) -> nn.Sequential:
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

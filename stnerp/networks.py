"""The networks: Fourier features (Eq. 2), SIREN, and a multi-resolution feature grid.

All map points (N, D) to values (N, C). None knows what its points or values mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stnerp.device import tensor_cores
from stnerp.warp import sample


class FourierFeatures(nn.Module):
    """γ(p) = [cos 2πBp, sin 2πBp], B ~ N(0, σ²) (Eq. 2; Tancik et al. 2020).

    B is a buffer: it is saved with the network and never trained.

    Args:
        inputs: D.
        width: rows of B; 2 · width features come out.
        sigma: standard deviation of the frequencies, in cycles per unit of p.
    """

    def __init__(self, inputs: int, width: int, sigma: float) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(width, inputs) * sigma)
        self.B: torch.Tensor

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        with tensor_cores(points.device, allowed=False):
            phase = 2 * math.pi * points @ self.B.T
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


class Sine(nn.Module):
    """One SIREN layer, sin(ω₀ (Wx + b)), with the initialisation of Sitzmann et al. 2020, sec. 3.2."""

    def __init__(self, inputs: int, outputs: int, omega: float, first: bool = False) -> None:
        super().__init__()
        self.omega = omega
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / omega
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # ω₀ multiplies the weights, of which there are few, and not what comes out, of which there is much.
        return torch.sin(F.linear(x, self.omega * self.linear.weight, self.omega * self.linear.bias))


def siren(
    inputs: int,
    outputs: int,
    *,
    layers: int = 8,
    width: int = 256,
    omega: float = 30.0,
    fourier_width: int = 256,
    fourier_sigma: float = 3.0,
    output_scale: float = 1.0,
) -> nn.Sequential:
    """Fourier features followed by a SIREN of `layers` layers, the last one linear.

    `output_scale` shrinks the last layer's start: near zero for a deformation that starts at the identity.
    """
    sines = [Sine(2 * fourier_width, width, omega, first=True)]
    sines += [Sine(width, width, omega) for _ in range(layers - 2)]
    last = nn.Linear(width, outputs)
    bound = output_scale * math.sqrt(6 / width) / omega
    nn.init.uniform_(last.weight, -bound, bound)
    nn.init.zeros_(last.bias)
    return nn.Sequential(FourierFeatures(inputs, fourier_width, fourier_sigma), *sines, last)


class FeatureGrid(nn.Module):
    """Dense feature grids at several resolutions, read trilinearly and decoded by a small MLP.

    A multi-resolution encoding in the spirit of Müller et al. 2022, without hashing: a medical
    volume is dense. Points are cube coordinates (N, 3), values (N, 1).

    Args:
        shapes: (z, y, x) of each grid, coarse to fine.
        features: channels of each grid.
        width: hidden units of the decoder.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], features: int = 4, width: int = 64) -> None:
        super().__init__()
        self.grids = nn.ParameterList(
            nn.Parameter(torch.empty(1, features, *shape).uniform_(-1e-2, 1e-2)) for shape in shapes
        )
        self.decoder = nn.Sequential(
            nn.Linear(features * len(shapes), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        encoded = torch.cat([sample(grid, points[None])[0] for grid in self.grids])  # (features, N)
        return self.decoder(encoded.T)


def in_chunks(network: nn.Module, points: torch.Tensor, chunk: int) -> torch.Tensor:
    """network(points) by pieces of `chunk` points; with gradients, each piece is recomputed in the backward
    pass, so that memory is bounded by the piece and not by the image. On a GPU with much memory pieces are larger.
    """
    chunk *= _pieces_at_once(points.device)
    if len(points) <= chunk:
        return network(points)
    pieces = points.split(chunk)
    if not torch.is_grad_enabled():
        return torch.cat([network(piece) for piece in pieces])
    again = partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn
    return torch.cat([again(piece) for piece in pieces])


def _pieces_at_once(device: torch.device) -> int:
    """How many pieces of 2¹⁶ points a GPU takes at a time: one for each 8 GiB, of which the paper's networks need
    1.7, and no more than 8: small kernels are over before the next ones are launched."""
    if device.type != "cuda":
        return 1
    return max(1, min(8, torch.cuda.get_device_properties(device).total_memory // 2**33))

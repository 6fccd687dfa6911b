"""DLIR: a cascade of small CNNs that answer with B-spline control points (de Vos et al., Med Image Anal 2019).

Every network averages its two images down to the spacing of the control points, 32 kernels a layer, and has no
way back up: the displacement is the uniform cubic B-spline of its outputs. Trained by normalised
cross-correlation, here in windows, and the bending energy.

Of the paper we leave out the affine network: pre-alignment is the same for every method here. Its authors
train on a cohort; so can we, see `stnerp.baselines.cascade`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import nn

from stnerp.baselines.cascade import Training, convolution, register, starting_at_zero
from stnerp.baselines.pair import Align, PairRegistration
from stnerp.geometry import Triple
from stnerp.losses import LocalNCC, bending
from stnerp.warp import Shape
from stnerp.window import Window

WINDOWS = 3  # voxels that a window of the correlation reaches over
SMOOTHNESS = 0.3  # weight of the bending energy, mm²/mm⁴


def dlir(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    cohort: str | None = None,
    align: Align = "affine",
    seed: int = 0,
    spacings_mm: tuple[float, ...] = (16.0, 8.0, 4.0),
    iterations: tuple[int, ...] = (100, 100, 100),
    learning_rate: float = 1e-3,
    simulated: float = 0.0,
    motion_mm: float = 6.0,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> PairRegistration:
    """Register a pair by DLIR.

    Args:
        reference, target: scalar 3D images of one world, on any grids.
        window: intensities that matter.
        cohort: a folder with a folder of images per patient, see `cohort_files`, to train on, with thousands of
            iterations; None: the pair itself.
        align: pre-alignment, part of the displacement that is returned.
        spacings_mm, iterations, learning_rate, simulated, motion_mm, seed: see `Training`.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: unknown names, numbers out of range, a folder that isn't a cohort.
        FitError: no overlap to align, or a loss that is not a number.
    """
    how = Training(tuple(spacings_mm), tuple(iterations), learning_rate, simulated, motion_mm, seed)
    return register(
        ConvNet,
        loss,
        "DLIR",
        [target, reference],
        window=window,
        cohort=cohort,
        align=align,
        how=how,
        device=device,
        progress=progress,
    )


def loss(fixed: torch.Tensor, moved: torch.Tensor, u_mm: torch.Tensor, spacing_mm: Triple) -> torch.Tensor:
    """1 − local NCC where both images are seen, and the bending energy. Images: see `Scans`."""
    seen = fixed[:, 1:2] * moved[:, 1:2].detach()
    correlation = LocalNCC(fixed[:, :1], spacing_mm, WINDOWS * max(spacing_mm), seen)
    return correlation(moved[:, :1]) + SMOOTHNESS * bending(u_mm, spacing_mm)


class ConvNet(nn.Module):
    """Images (1, 2, z, y, x) -> displacement (1, 3, z, y, x), voxels: cubic B-splines, knots 2^poolings apart."""

    def __init__(self, poolings: int = 2, kernels: int = 32) -> None:
        super().__init__()
        self.apart = 2**poolings
        down: list[nn.Module] = []
        for k in range(poolings):
            down += [convolution(kernels if k else 2, kernels), nn.AvgPool3d(2)]
        level = [
            convolution(kernels, kernels),
            convolution(kernels, kernels),
            convolution(kernels, kernels, size=1),
        ]
        self.layers = nn.Sequential(*down, *level, starting_at_zero(nn.Conv3d(kernels, 3, 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        z, y, x = images.shape[2:]
        whole_cells = [0, -x % self.apart, 0, -y % self.apart, 0, -z % self.apart]
        knots = self.layers(F.pad(images, whole_cells, mode="replicate"))
        return self.apart * b_spline(F.pad(knots, [2] * 6, mode="replicate"), (z, y, x), self.apart)


def b_spline(knots: torch.Tensor, shape: Shape, apart: int) -> torch.Tensor:
    """The uniform cubic B-spline of knots (n, c, z', y', x'), at voxels (n, c, z, y, x).

    Knot 2 + i lies in the middle of voxels i·apart to (i + 1)·apart − 1: where averaging puts it. The two
    before and after reach in from outside.
    """
    for dim, n in enumerate(shape, start=2):
        knots = torch.movedim(torch.movedim(knots, dim, -1) @ _b_spline_matrix(n, apart).to(knots).T, -1, dim)
    return knots


@lru_cache(maxsize=64)
def _b_spline_matrix(n: int, apart: int) -> torch.Tensor:
    knots = apart * torch.arange(-2, math.ceil(n / apart) + 2, dtype=torch.float64) + (apart - 1) / 2
    d = ((torch.arange(n, dtype=torch.float64)[:, None] - knots) / apart).abs()
    return torch.where(d < 1, 2 / 3 - d**2 + d**3 / 2, (2 - d).clamp(min=0) ** 3 / 6)

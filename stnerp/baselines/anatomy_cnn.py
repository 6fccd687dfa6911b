"""A cascade of U-Nets with anatomical constraints (Hering et al., Med Image Anal 2021: "CNN-based lung CT
registration with multiple anatomical constraints").

Normalised gradient fields compare the images, the displacement's curvature keeps it smooth, a penalty holds
volumes where they are, and the lungs' masks must meet. Masks serve the training alone: a trained network
registers images without any.

Of the paper we leave out the loss on automatic keypoints, which needs a detector of its own; the networks start
from the affine pre-alignment that every method here is given.
"""

from __future__ import annotations

import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import nn

from stnerp.baselines.cascade import Training, convolution, register, starting_at_zero
from stnerp.baselines.pair import Align, PairRegistration
from stnerp.errors import InputError
from stnerp.geometry import Triple
from stnerp.losses import JACOBIAN_LIMITS, gradient, jacobian_determinant, volume_change
from stnerp.window import Window

EDGE = 0.01  # per mm: gradients below are noise
CURVATURE, VOLUME, MASKS = 1.0, 0.1, 1.0  # weights


def anatomy_cnn(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    reference_mask: sitk.Image | None = None,
    target_mask: sitk.Image | None = None,
    cohort: str | None = None,
    align: Align = "affine",
    seed: int = 0,
    spacings_mm: tuple[float, ...] = (16.0, 8.0, 4.0),
    iterations: tuple[int, ...] = (100, 100, 40),
    learning_rate: float = 1e-3,
    simulated: float = 0.0,
    motion_mm: float = 6.0,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> PairRegistration:
    """Register a pair by the anatomically constrained CNN.

    Args:
        reference, target: scalar 3D images of one world, on any grids.
        window: intensities that matter.
        reference_mask, target_mask: non-zero in the lungs, each on its image's grid. Both or neither; without,
            the images alone decide. Of no use with a cohort.
        cohort: a folder with a folder of images (and masks) per patient, see `cohort_files`, to train on, with
            thousands of iterations; None: the pair itself.
        align: pre-alignment, part of the displacement that is returned.
        spacings_mm, iterations, learning_rate, simulated, motion_mm, seed: see `Training`.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: unknown names, numbers out of range, one mask without the other, a mask on another grid, a
            folder that isn't a cohort.
        FitError: no overlap to align, or a loss that is not a number.
    """
    how = Training(tuple(spacings_mm), tuple(iterations), learning_rate, simulated, motion_mm, seed)
    if (reference_mask is None) != (target_mask is None):
        raise InputError("reference_mask, target_mask: give both or neither")
    masks = None if target_mask is None or reference_mask is None else [target_mask, reference_mask]
    return register(
        UNet,
        loss,
        "anatomy CNN",
        [target, reference],
        masks,
        window=window,
        cohort=cohort,
        align=align,
        how=how,
        device=device,
        progress=progress,
    )


# -- what it is trained by


def loss(fixed: torch.Tensor, moved: torch.Tensor, u_mm: torch.Tensor, spacing_mm: Triple) -> torch.Tensor:
    """Gradient fields (where both images are seen), curvature, volume, and masks if there are. Images: `Scans`."""
    seen = fixed[:, 1:2] * moved[:, 1:2].detach()
    total = gradient_fields(fixed[:, :1], moved[:, :1], spacing_mm, seen)
    total = total + CURVATURE * curvature(u_mm, spacing_mm) + VOLUME * volume_control(u_mm, spacing_mm)
    if fixed.shape[1] > 2:
        total = total + MASKS * (fixed[:, 2:3] - moved[:, 2:3]).square().mean()
    return total


def gradient_fields(
    fixed: torch.Tensor, moved: torch.Tensor, spacing_mm: Triple, weight: torch.Tensor
) -> torch.Tensor:
    """Mean of 1 − (∇f·∇m + ε²)² / ((|∇f|² + ε²)(|∇m|² + ε²)): edges that don't run along each other."""
    f = torch.cat([gradient(fixed, axis, spacing_mm) for axis in range(3)], dim=1)
    m = torch.cat([gradient(moved, axis, spacing_mm) for axis in range(3)], dim=1)

    def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(dim=1, keepdim=True) + EDGE**2

    apart = 1 - inner(f, m).square() / (inner(f, f) * inner(m, m))
    return (apart * weight).sum() / weight.sum().clamp(min=1e-6)


def curvature(u_mm: torch.Tensor, spacing_mm: Triple) -> torch.Tensor:
    """Mean of |Δu|² inside the border, of a displacement (1, 3, z, y, x) in mm."""
    inside = [slice(1, -1) if n > 2 else slice(None) for n in u_mm.shape[2:]]
    laplacian = torch.zeros_like(u_mm[(..., *inside)])
    for axis in range(3):
        dim = 4 - axis
        if u_mm.shape[dim] > 2:
            others = [slice(None) if d == dim - 2 else part for d, part in enumerate(inside)]
            laplacian = laplacian + u_mm[(..., *others)].diff(n=2, dim=dim) / spacing_mm[axis] ** 2
    return laplacian.square().sum(dim=1).mean()


def volume_control(u_mm: torch.Tensor, spacing_mm: Triple) -> torch.Tensor:
    """Mean of J + 1/J − 2, carried on by its tangent where J is below its limit: folds are unfolded."""
    jacobian = jacobian_determinant(u_mm, spacing_mm)
    lowest = JACOBIAN_LIMITS[0]
    return volume_change(jacobian) + (1 / lowest**2 - 1) * (lowest - jacobian).clamp(min=0).mean()


# -- the network


class UNet(nn.Module):
    """Images (1, 2, z, y, x) -> displacement (1, 3, z, y, x), voxels; two convolutions a level."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 32)) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip((2, *channels), channels, strict=False):
            self.down.append(nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs)))
        for above, below in zip(channels[-2::-1], channels[:0:-1], strict=True):
            self.up.append(nn.Sequential(convolution(above + below, above), convolution(above, above)))
        self.last = starting_at_zero(nn.Conv3d(channels[0], 3, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        z, y, x = images.shape[2:]
        cell = 2 ** len(self.up)
        h = F.pad(images, [0, -x % cell, 0, -y % cell, 0, -z % cell], mode="replicate")
        levels = []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool3d(h, 2) if k else h)
            levels.append(h)
        levels.pop()
        for block in self.up:
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0), levels.pop()], dim=1))
        return self.last(h)[..., :z, :y, :x]

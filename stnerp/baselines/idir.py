"""IDIR: a displacement as a SIREN, fitted to one pair of images (Wolterink et al., MIDL 2022).

The network maps points of the target to displacements, both in the reference's corner-aligned cube after
affine pre-alignment. Each step draws points from a mask, compares the images there by their global
correlation, and penalises derivatives of the network, which are exact: no grid, no finite differences.

Written from the paper. Two habits of the authors' code change numbers and are corrected here; with
`as_published=True` they are back: landmarks, counted from 1, normalised by 2p/n − 1 where the images, counted
from 0, are by 2p/(n − 1) − 1, and a bending energy that is divided by the number of points once more than a mean
is (and counts ∂²/∂x∂y once instead of twice).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn
from tqdm.auto import tqdm

from stnerp.alignment import affine_between
from stnerp.baselines.pair import Align, PairRegistration, check_align, in_window, registration_of
from stnerp.device import device_of
from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, apply_affine, index_points
from stnerp.losses import global_ncc
from stnerp.seeding import own_random_numbers, start_random_numbers
from stnerp.warp import sample
from stnerp.window import Window

Regulariser = Literal["jacobian", "hyperelastic", "bending"]
# The authors' weights; theirs of the bending energy is 10, divided by 10 000 points a step.
WEIGHTS: dict[Regulariser, float] = {"jacobian": 0.05, "hyperelastic": 0.25, "bending": 1e-3}
PUBLISHED_BENDING_WEIGHT = 10.0

WIDTHS = (3, 256, 256, 256, 3)
OMEGA = 32.0
CHUNK = 2**16  # points that the fitted network answers at a time


@own_random_numbers
def idir(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    mask: sitk.Image | None = None,
    align: Align = "affine",
    seed: int = 0,
    iterations: int = 2500,
    points_per_step: int = 10_000,
    learning_rate: float = 1e-4,
    regulariser: Regulariser = "jacobian",
    weight: float | None = None,
    as_published: bool = False,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> PairRegistration:
    """Register a pair by IDIR.

    Args:
        reference, target: scalar 3D images of one world, on any grids.
        window: intensities that matter; the authors' re-tuned lung window is -944 to -124 HU.
        mask: on the target's grid, non-zero where points are drawn, such as the lungs; None: everywhere
            that the reference covers. Elsewhere the displacement is what the network happens to say.
        align: pre-alignment, part of the displacement that is returned.
        seed: of the network's start and of the points.
        learning_rate: of Adam; the paper's is 1e-5, others found 1e-4 to be better.
        regulariser: "jacobian", mean ||J| − 1|; "hyperelastic" (Burger et al. 2013); "bending".
        weight: of the regulariser; None: the authors'.
        as_published: see the top of this file.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: unknown names, numbers that aren't positive, a mask on another grid or without a voxel
            that the reference covers.
        FitError: no overlap to align, or a loss that is not a number.
    """
    check_settings(iterations, points_per_step, learning_rate)
    if regulariser not in WEIGHTS:
        raise InputError(f"regulariser: unknown {regulariser!r}; give one of {', '.join(WEIGHTS)}")
    penalty = penalty_of(regulariser, weight, as_published)
    where = device_of(device)
    pair = AlignedPair.of(reference, target, window, align, where)
    points, intensities = pair.points_of_target(mask)
    start_random_numbers(seed)
    network = Siren().to(where)

    def loss() -> torch.Tensor:
        drawn = torch.randint(len(points), (points_per_step,), device=where)
        x = points[drawn]
        u, derivatives = network.with_derivatives(x, second=regulariser == "bending")
        return global_ncc(intensities[drawn], pair.reference_at(x + u)) + penalty(*derivatives)

    minimise(loss, network, iterations, learning_rate, "IDIR", progress)
    cube = published_cube(pair.grid) if as_published else pair.grid
    return registration_of(Grid.of(target), lambda points_mm: mapped(network, cube, pair.aligned(points_mm)))


# -- the network and its derivatives


class Siren(nn.Module):
    """u(x) of points x (N, 3), both in cube units: sines of ω (W h + b), the last layer linear.

    Weights start as in Sitzmann et al. 2020, the last layer's too.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, omega: float = OMEGA) -> None:
        super().__init__()
        self.omega = omega
        self.linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.layers = nn.ModuleList(self.linears)
        for i, linear in enumerate(self.linears):
            bound = 1 / linear.in_features if i == 0 else math.sqrt(6 / linear.in_features) / omega
            nn.init.uniform_(linear.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *hidden, last = self.linears
        for linear in hidden:
            x = torch.sin(self.omega * linear(x))
        return last(x)

    def with_derivatives(
        self, x: torch.Tensor, second: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """u (N, 3), and (∂u/∂x,) or (∂u/∂x, ∂²u/∂x²), carried through the layers beside u by the chain rule.

        Returns:
            u; ∂u/∂x as (3, N, 3), [j, n, i] = ∂uᵢ/∂xⱼ; ∂²u/∂x² as (6, N, 3) in the order of `PAIRS`.
        """
        *hidden, last = self.linears
        h = x
        dh = torch.eye(3, dtype=x.dtype, device=x.device)[:, None, :]
        ddh = x.new_zeros(6, 1, 3)
        for linear in hidden:
            ωW = self.omega * linear.weight.T
            a, da = self.omega * linear(h), dh @ ωW
            sin, cos = a.sin(), a.cos()
            if second:
                j, k = PAIRS.T
                ddh = cos * (ddh @ ωW) - sin * da[j] * da[k]
            h, dh = sin, cos * da
        du = dh @ last.weight.T
        return last(h), (du, ddh @ last.weight.T) if second else (du,)


PAIRS = torch.tensor([(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)])  # of axes, xx to yz


@torch.no_grad()
def mapped(network: nn.Module, cube: Grid, points_mm: np.ndarray) -> np.ndarray:
    """φ = id + u of world points (..., 3), where the network's u is in a grid's cube."""
    x = cube.world_to_cube(points_mm)
    flat = torch.from_numpy(x.reshape(-1, 3)).to(next(network.parameters()).device, torch.float32)
    u = torch.cat([network(piece) for piece in flat.split(CHUNK)])
    return cube.cube_to_world(x + u.cpu().double().numpy().reshape(x.shape))


# -- penalties of derivatives


def penalty_of(regulariser: Regulariser, weight: float | None, as_published: bool) -> Callable[..., torch.Tensor]:
    """The weighted penalty of (∂u/∂x,) or, for "bending", of (∂u/∂x, ∂²u/∂x²)."""
    if regulariser == "bending":
        bending = published_bending_penalty if as_published else bending_penalty
        α = (PUBLISHED_BENDING_WEIGHT if as_published else WEIGHTS["bending"]) if weight is None else weight
        return lambda du, ddu: α * bending(ddu)
    measure = jacobian_penalty if regulariser == "jacobian" else hyperelastic_penalty
    α = WEIGHTS[regulariser] if weight is None else weight
    return lambda du: α * measure(du)


def jacobian_of(du: torch.Tensor) -> torch.Tensor:
    """∂φ/∂x of φ = id + u from ∂u/∂x, both (3, N, 3): the derivatives by x, by y and by z."""
    return du + torch.eye(3, dtype=du.dtype, device=du.device)[:, None, :]


def determinant(du: torch.Tensor) -> torch.Tensor:
    """|∂φ/∂x| of φ = id + u, (N,), from ∂u/∂x (3, N, 3)."""
    a, b, c = jacobian_of(du)
    return (a * torch.linalg.cross(b, c)).sum(-1)


def cofactors(du: torch.Tensor) -> torch.Tensor:
    """Cofactors of ∂φ/∂x of φ = id + u, in the places of its entries, from ∂u/∂x, both (3, N, 3)."""
    a, b, c = jacobian_of(du)
    return torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)])


def jacobian_penalty(du: torch.Tensor) -> torch.Tensor:
    """Mean of ||J| − 1|."""
    return (determinant(du) - 1).abs().mean()


def hyperelastic_penalty(du: torch.Tensor) -> torch.Tensor:
    """Mean of ½ |∇u|² + Σᵢ max(0, Σⱼ cof(∇φ)ⱼᵢ² − 1)² + (|J| − 1)⁴ / |J|²: length, area, volume."""
    area = (cofactors(du).square().sum(-1) - 1).clamp(min=0).square()
    volume = determinant(du)
    length = 0.5 * du.square().sum((0, 2))
    return (length + area.sum(0) + (volume - 1) ** 4 / volume**2).mean()


def bending_penalty(ddu: torch.Tensor) -> torch.Tensor:
    """Mean of the squared second derivatives (6, N, 3), mixed ones twice, over points and components."""
    xx, yy, zz, xy, xz, yz = ddu.square().mean((1, 2))
    return xx + yy + zz + 2 * (xy + xz + yz)


def published_bending_penalty(ddu: torch.Tensor) -> torch.Tensor:
    """As the authors' code has it: ∂²/∂x∂y once, and divided by the number of points a second time."""
    xx, yy, zz, xy, xz, yz = ddu.square().mean((1, 2))
    return (xx + yy + zz + xy + 2 * (xz + yz)) / ddu.shape[1]


# -- the two images in the networks' coordinates


@dataclass(frozen=True)
class AlignedPair:
    """Both images seen from the cube of the reference's grid, the target through its pre-alignment.

    No image is resampled: voxels are read linearly, wherever points lie.

    Attributes:
        grid, target_grid: of the reference and of the target.
        alignment: (4, 4), a world point of the reference -> that of the target.
        reference, target: (1, 1, z, y, x) in [0, 1].
    """

    grid: Grid
    target_grid: Grid
    alignment: np.ndarray
    reference: torch.Tensor
    target: torch.Tensor

    @staticmethod
    def of(
        reference: sitk.Image, target: sitk.Image, window: Window, align: Align, device: torch.device
    ) -> AlignedPair:
        check_align(align)
        reference, target = in_window(reference, window, "reference"), in_window(target, window, "target")
        return AlignedPair(
            Grid.of(reference),
            Grid.of(target),
            affine_between(reference, target, align),
            torch.from_numpy(sitk.GetArrayFromImage(reference)).to(device)[None, None],
            torch.from_numpy(sitk.GetArrayFromImage(target)).to(device)[None, None],
        )

    def aligned(self, points_mm: np.ndarray) -> np.ndarray:
        """World points (..., 3) of the target, where the alignment puts them in the reference's world."""
        return apply_affine(np.linalg.inv(self.alignment), points_mm)

    def reference_at(self, x: torch.Tensor) -> torch.Tensor:
        """The reference's intensities at cube points (N, 3), (N,)."""
        return sample(self.reference, x[None])[0, 0]

    def target_at(self, x: torch.Tensor) -> torch.Tensor:
        """The target's intensities at cube points (N, 3) of the reference, (N,)."""
        points_mm = apply_affine(self.alignment, self.grid.cube_to_world(x))
        return sample(self.target, self.target_grid.world_to_cube(points_mm)[None])[0, 0]

    def points_of_target(self, mask: sitk.Image | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's voxels in a mask, where the reference covers them: cube points (N, 3), intensities (N,)."""
        inside = voxels_in(mask, self.target_grid, "mask")
        points_mm = self.aligned(self.target_grid.index_to_world(index_points(self.target_grid.shape)[inside]))
        return self._points(points_mm, self.grid.contains(points_mm), self.target[0, 0].cpu()[inside], "mask")

    def points_of_reference(self, mask: sitk.Image | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the reference's voxels, where the target covers them."""
        inside = voxels_in(mask, self.grid, "reference_mask")
        points_mm = self.grid.index_to_world(index_points(self.grid.shape)[inside])
        covered = self.target_grid.contains(apply_affine(self.alignment, points_mm))
        return self._points(points_mm, covered, self.reference[0, 0].cpu()[inside], "reference_mask")

    def _points(
        self, points_mm: np.ndarray, covered: np.ndarray, intensities: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if np.count_nonzero(covered) < 2:
            raise InputError(f"{name}: none of its voxels lies in the other image; check mask and alignment")
        device = self.reference.device
        x = torch.from_numpy(self.grid.world_to_cube(points_mm[covered]))
        return x.to(device, torch.float32), intensities[covered].to(device)


def voxels_in(mask: sitk.Image | None, grid: Grid, name: str) -> np.ndarray:
    """Where a mask is non-zero, (z, y, x); everywhere without one."""
    if mask is None:
        return np.ones(grid.shape, dtype=bool)
    if not grid.is_close(Grid.of(mask)):
        raise InputError(f"{name}: not on its image's grid; resample it onto the image first")
    return sitk.GetArrayViewFromImage(mask) != 0


def published_cube(grid: Grid) -> Grid:
    """A grid whose cube coordinates are 2p/n − 1 at voxel p, counted from 1: the authors' for landmarks.

    The first voxel is read a voxel further on, the last one where it is.
    """
    x, y, z = (float(one) for one in grid.index_to_world(np.full(3, -1.0)))
    nx, ny, nz = grid.size
    return replace(grid, size=(nx + 1, ny + 1, nz + 1), origin_mm=(x, y, z))


# -- the fit


def check_settings(iterations: int, points_per_step: int, learning_rate: float) -> None:
    """Raises InputError unless all are positive (two points at least: one has no correlation)."""
    if iterations < 1 or points_per_step < 2 or not learning_rate > 0:
        raise InputError(
            f"iterations {iterations}, points_per_step {points_per_step}, learning_rate {learning_rate}: must be "
            "positive, and at least 2 points"
        )


def minimise(
    loss: Callable[[], torch.Tensor],
    network: nn.Module,
    iterations: int,
    learning_rate: float,
    name: str,
    progress: bool,
) -> None:
    """Adam on a loss that draws its own points.

    Raises:
        FitError: the loss is not a number.
    """
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for step in tqdm(range(1, iterations + 1), desc=name, disable=not progress):
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimiser.step()
        if (step % 10 == 0 or step == iterations) and not bool(value.isfinite()):  # reading waits for the GPU
            raise FitError(f"{name}: the loss is {float(value.detach())} at step {step}; lower learning_rate")

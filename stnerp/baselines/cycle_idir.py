"""Cycle-consistent IDIR: two networks that undo each other (van Harten et al., IEEE TMI 2023).

One network takes points of the target to the reference, the other back; both compare the images, and
what is left after going there and back is penalised in mm². The answer is the mean of the forward field
and of the backward field's inverse, to first order; how much the two differ says how far to trust it.

Written from the paper; coordinates and `as_published` as in `idir`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn

from stnerp.baselines.idir import (
    CHUNK,
    AlignedPair,
    Siren,
    check_settings,
    cofactors,
    determinant,
    minimise,
    published_cube,
)
from stnerp.baselines.pair import Align, PairRegistration
from stnerp.device import device_of
from stnerp.geometry import Grid, affine_transform, slabs
from stnerp.losses import JACOBIAN_LIMITS, global_ncc, volume_change
from stnerp.seeding import own_random_numbers, start_random_numbers
from stnerp.window import Window


@dataclass(frozen=True, kw_only=True)
class CycleRegistration(PairRegistration):
    """What two networks agree on, and how much they don't.

    Attributes:
        uncertainty_mm: distance between the two answers at every voxel of the target, float32.
    """

    uncertainty_mm: sitk.Image


@own_random_numbers
def cycle_idir(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    mask: sitk.Image | None = None,
    reference_mask: sitk.Image | None = None,
    align: Align = "affine",
    seed: int = 0,
    iterations: int = 2500,
    points_per_step: int = 10_000,
    learning_rate: float = 1e-4,
    jacobian_weight: float = 0.05,
    cycle_weight: float = 1e-3,
    as_published: bool = False,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> CycleRegistration:
    """Register a pair by cycle-consistent IDIR.

    Args:
        mask, reference_mask: on each image's own grid, non-zero where points are drawn; without
            `reference_mask`, `mask` as the pre-alignment puts it on the reference.
        jacobian_weight: of mean |J| + 1/|J| − 2, both ways.
        cycle_weight: of the mean squared component, in mm², of what is left after there and back, both ways.
        as_published: landmarks as 2p/n − 1 has them, see `idir`, and the cycle per voxel², not mm².
        Others: as for `idir`.

    Raises:
        InputError, FitError: as `idir`.
    """
    check_settings(iterations, points_per_step, learning_rate)
    where = device_of(device)
    pair = AlignedPair.of(reference, target, window, align, where)
    if mask is not None and reference_mask is None:
        to_target = affine_transform(pair.alignment)
        reference_mask = sitk.Resample(mask, reference, to_target, sitk.sitkNearestNeighbor, 0.0)
    target_points, target_intensities = pair.points_of_target(mask)
    reference_points, reference_intensities = pair.points_of_reference(reference_mask)
    cube = published_cube(pair.grid) if as_published else pair.grid
    unit_mm = np.asarray(cube.spacing_mm) if as_published else np.ones(3)
    half_extent = torch.tensor(cube.half_extent_mm / unit_mm, dtype=torch.float32, device=where)
    start_random_numbers(seed)
    forward, backward = Siren().to(where), Siren().to(where)

    def there_and_back(x: torch.Tensor, u: torch.Tensor, back: Siren) -> torch.Tensor:
        return ((u + back(x + u)) * half_extent).square().mean()

    def loss() -> torch.Tensor:
        drawn = torch.randint(len(target_points), (points_per_step,), device=where)
        x, x_intensities = target_points[drawn], target_intensities[drawn]
        drawn = torch.randint(len(reference_points), (points_per_step,), device=where)
        y, y_intensities = reference_points[drawn], reference_intensities[drawn]
        u, (du,) = forward.with_derivatives(x)
        v, (dv,) = backward.with_derivatives(y)
        similarity = global_ncc(x_intensities, pair.reference_at(x + u)) + global_ncc(
            y_intensities, pair.target_at(y + v)
        )
        volume = balanced_jacobian_penalty(du) + balanced_jacobian_penalty(dv)
        cycle = there_and_back(x, u, backward) + there_and_back(y, v, forward)
        return similarity + jacobian_weight * volume + cycle_weight * cycle

    minimise(
        loss, nn.ModuleList([forward, backward]), iterations, learning_rate, "cycle-consistent IDIR", progress
    )

    grid = Grid.of(target)
    displacement = np.empty((*grid.shape, 3))
    uncertainty = np.empty(grid.shape, np.float32)
    for part, points_mm in slabs(grid):
        x = torch.from_numpy(cube.world_to_cube(pair.aligned(points_mm)).reshape(-1, 3)).to(where, torch.float32)
        answers = [consensus(forward, backward, piece) for piece in x.split(CHUNK)]
        midpoint, apart = (torch.cat(tensors).cpu().double() for tensors in zip(*answers, strict=True))
        mapped_mm = cube.cube_to_world(midpoint).numpy()
        displacement[part] = mapped_mm.reshape(points_mm.shape) - points_mm
        apart_mm = cube.vectors_from_cube(apart).norm(dim=-1).numpy()
        uncertainty[part] = apart_mm.reshape(points_mm.shape[:-1])
    return CycleRegistration(grid.image(displacement), uncertainty_mm=grid.image(uncertainty))


class Field(Protocol):
    """A displacement field as `Siren` is one: u(x), and u with ∂u/∂x."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def with_derivatives(
        self, x: torch.Tensor, second: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]: ...


@torch.no_grad()
def consensus(forward: Field, backward: Field, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where two fields, one there and one back, together send points x (N, 3).

    From y = x + u(x), backward's inverse is one Newton step away: y − J⁻¹ (y + v(y) − x), with J the
    Jacobian of backward at y. The answer is halfway.

    Returns:
        The points (N, 3) they are sent to, and the vectors (N, 3) between the two answers: zero where the
        fields undo each other. In the units of x.
    """
    u = forward(x)
    v, (dv,) = backward.with_derivatives(x + u)
    # Where backward (nearly) folds, its inverse says nothing: the step is then that of a translation.
    jacobian = determinant(dv)
    newton = ((cofactors(dv) * (u + v)).sum(-1) / jacobian).T
    step = torch.where(jacobian[:, None] > JACOBIAN_LIMITS[0], newton, u + v)
    return x + u - step / 2, step


def balanced_jacobian_penalty(du: torch.Tensor) -> torch.Tensor:
    """`losses.volume_change` of φ = id + u, from ∂u/∂x (3, N, 3)."""
    return volume_change(determinant(du))

"""ConvexAdam: a discrete search that is made smooth by convex steps, refined by Adam, on MIND-SSC features.

Siebert, Großbröhmer, Hansen, Heinrich: ConvexAdam: self-configuring dual-optimization-based 3D multitask medical
image registration, TMI 2024. Works on voxels that both images share, so the linear alignment is stnerp's own.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.alignment import affine_between
from stnerp.baselines.pair import Align, PairRegistration, check_align, in_window, peer, registration_of
from stnerp.errors import InputError
from stnerp.geometry import Grid, apply_affine
from stnerp.preprocess import on_grid
from stnerp.window import Window


def convexadam(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    align: Align = "affine",
    seed: int = 0,
    spacing_mm: float = 1.5,
    mind_radius: int = 1,
    mind_dilation: int = 2,
    grid_spacing: int = 6,
    search_radius: int = 4,
    adam_grid_spacing: int = 2,
    iterations: int = 80,
    smoothness: float = 1.25,
) -> PairRegistration:
    """The package's own settings for MIND-SSC, on isotropic voxels.

    Args:
        reference, target: 3D images in one world, on any grids.
        window: intensities that matter, as [0, 1].
        align: `stnerp.alignment.affine_between` before the search.
        seed: has no effect, nothing is random.
        spacing_mm: of the voxels that both images are resampled to.
        mind_radius, mind_dilation: of the features, in these voxels.
        grid_spacing: of the discrete search, in voxels.
        search_radius: how far it looks in each direction, in units of its grid.
        adam_grid_spacing: of the refinement, in voxels.
        iterations: of Adam.
        smoothness: weight of the diffusion penalty.

    Raises:
        MissingDependencyError: convexadam isn't installed.
        InputError: an unknown `align`, or a spacing that isn't positive.
        FitError: the linear alignment found no overlap.
    """
    check_align(align)
    if not spacing_mm > 0:
        raise InputError(f"spacing_mm: {spacing_mm} must be positive")
    package = peer("convexAdam.convex_adam_MIND", "convexadam")
    fixed, moving = in_window(target, window, "target"), in_window(reference, window, "reference")
    target_to_linear = np.linalg.inv(affine_between(moving, fixed, align))

    grid = Grid.of(target)
    # Smoothing sees zeros beyond the border: three cells of each stage keep them away from the image.
    cell = math.lcm(grid_spacing, adam_grid_spacing)
    work = _padded(grid, spacing_mm, margin=3 * max(grid_spacing, adam_grid_spacing), multiple=cell)
    fixed_array, _ = on_grid(sitk.GetArrayFromImage(fixed), grid, work)
    moving_array, _ = on_grid(sitk.GetArrayFromImage(moving), Grid.of(reference), work, target_to_linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        voxels = package.convex_adam_pt(
            fixed_array,
            moving_array,
            mind_r=mind_radius,
            mind_d=mind_dilation,
            lambda_weight=smoothness,
            grid_sp=grid_spacing,
            disp_hw=search_radius,
            selected_niter=iterations,
            grid_sp_adam=adam_grid_spacing,
            dtype=torch.float32,
        )
    # From voxels along (z, y, x), fixed -> moving, to LPS mm.
    cells = np.asarray(work.shape) // adam_grid_spacing
    # Adam's n cells are sampled as if there were n - 1 between the borders, so its unit is that much longer.
    voxels = voxels * (cells / (cells - 1)) if iterations > 0 else voxels
    axis_mm = voxels[..., ::-1] * np.asarray(work.spacing_mm)
    inner = PairRegistration(work.image(np.ascontiguousarray(work.vectors_to_world(axis_mm))))

    def target_to_reference(points_mm: np.ndarray) -> np.ndarray:
        return apply_affine(target_to_linear, inner.map_points(points_mm))

    return registration_of(grid, target_to_reference)


def _padded(grid: Grid, spacing_mm: float, margin: int, multiple: int) -> Grid:
    """Isotropic voxels along the grid's axes that cover it and `margin` voxels more on each side.

    The number of voxels along each axis is a `multiple`, so that cells of several voxels fill the grid.
    """
    needed = [math.ceil(extent / spacing_mm) + 1 + 2 * margin for extent in grid.extent_mm]
    x, y, z = (multiple * math.ceil(n / multiple) for n in needed)
    corner = Grid((x, y, z), (spacing_mm,) * 3, grid.origin_mm, grid.direction)
    ox, oy, oz = (float(c) for c in corner.index_to_world(np.full(3, -float(margin))))
    return Grid(corner.size, corner.spacing_mm, (ox, oy, oz), grid.direction)

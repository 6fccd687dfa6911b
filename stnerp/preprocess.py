"""From the scans as they came to the arrays that a fit compares: windowed, aligned, at one resolution.

Only the resolution that a level of the fit needs is made, and only while it needs it.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.field_of_view import round_view
from stnerp.geometry import Grid, Triple, affine_transform
from stnerp.warp import NARROW, interpolation_matrix, placed, without_dust
from stnerp.window import Window

#: From this σ on, in voxels, a Gaussian leaves as much noise between voxels as at them.
EVEN_NOISE = 0.7


def normalised(image: sitk.Image, window: Window) -> np.ndarray:
    """Array (z, y, x) of a scan through its window: float32 in [0, 1]."""
    return window.normalise(sitk.GetArrayViewFromImage(image))


def compared(
    image: sitk.Image, window: Window, scan: sitk.Image | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """`normalised`, continued beyond a round field of view; and which voxels (z, y, x) were seen, None: all.

    Args:
        scan: what `image` is a picture of; it says better where its field of view ends. None: the image itself.
    """
    values, view = normalised(image, window), round_view(image if scan is None else scan)
    return (values, None) if view is None else (view.continued(values), view.seen(values.shape))


def on_grid(
    array: np.ndarray,
    grid: Grid,
    to: Grid,
    to_image: np.ndarray | None = None,
    sigma_mm: float | Triple = 0.0,
    device: torch.device | str = "cpu",
    splines: bool = False,
    seen: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A scan smoothed, moved and resampled onto another grid, in world space.

    By cubic splines where it is hardly smoothed and is moved or the grids share their corners, else linearly.
    Between voxels linear interpolation averages noise away, at voxels it doesn't, and a registration sees that
    pattern.

    Args:
        array: (z, y, x) on `grid`.
        grid: where the scan lies.
        to: where it is wanted.
        to_image: (4, 4), a world point of `to` -> the scan's world point; None: the same point.
        sigma_mm: width of a Gaussian that is applied first, against aliasing; three: along the scan's x, y and z.
        device: where that is computed.
        splines: read by cubic splines between voxels of another grid, too, as if it were moved.
        seen: (z, y, x) on `grid`, where the scan has something to say (`compared`); None: everywhere.

    Returns:
        The values (z, y, x) on `to`, float32, and whether the scan covers each voxel (bool).
        Voxels that it doesn't cover hold the nearest covered value.
    """
    sigmas_mm = sigma_mm if isinstance(sigma_mm, tuple) else (sigma_mm,) * 3
    coarse = grid.with_spacing(_smoothed_spacing(grid, to, sigmas_mm))
    whole = torch.from_numpy(array).to(device)
    smooth = gaussian_resize(whole, coarse.shape, grid.spacing_mm, sigmas_mm).cpu().numpy()
    moved = to_image is not None and not np.allclose(to_image, np.eye(4))
    at_voxels = not moved and coarse.is_close(to)
    if at_voxels and seen is None:
        return smooth, np.ones(to.shape, dtype=bool)
    covered = covered_on(grid, to, to_image, seen)
    if at_voxels:
        return smooth, covered
    resampler = _resampler(to, to_image)
    if (moved or splines) and any(s < EVEN_NOISE * h for s, h in zip(sigmas_mm, coarse.spacing_mm, strict=True)):
        resampler.SetInterpolator(cubic_interpolator(coarse))
    resampler.SetUseNearestNeighborExtrapolator(True)
    return sitk.GetArrayFromImage(resampler.Execute(coarse.image(smooth))), covered


def covered_on(
    grid: Grid, to: Grid, to_image: np.ndarray | None = None, seen: np.ndarray | None = None
) -> np.ndarray:
    """Whether a scan on `grid` covers each voxel (z, y, x) of another grid, bool; arguments as of `on_grid`."""
    there = np.ones(grid.shape, np.uint8) if seen is None else seen.astype(np.uint8)
    covered: np.ndarray = sitk.GetArrayFromImage(_resampler(to, to_image).Execute(grid.image(there))) > 0
    return covered


def _resampler(to: Grid, to_image: np.ndarray | None) -> sitk.ResampleImageFilter:
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(to.size)
    resampler.SetOutputSpacing(to.spacing_mm)
    resampler.SetOutputOrigin(to.origin_mm)
    resampler.SetOutputDirection(to.direction)
    if to_image is not None and not np.allclose(to_image, np.eye(4)):
        resampler.SetTransform(affine_transform(to_image))
    resampler.SetInterpolator(sitk.sitkLinear)
    return resampler


def cubic_interpolator(grid: Grid) -> int:
    """SimpleITK's cubic B-splines; linear where an axis has no more than two voxels.

    Of an axis of two they read what lies beyond the image in memory.
    """
    return sitk.sitkBSpline if min(grid.size) > 2 else sitk.sitkLinear


def thinner_sigma_mm(grid: Grid, other: Grid) -> Triple:
    """σ along a grid's x, y and z of a Gaussian that makes its voxels as thick as another's; 0 where they are.

    A voxel averages over its width h, and a box that wide has a standard deviation of h/√12: so √((h'² − h²)/12).
    """
    return _root_over_12(_squares_along(grid, other) - np.square(grid.spacing_mm))


def thicker_sigma_mm(grid: Grid, other: Grid) -> Triple:
    """σ along a grid's x, y and z of a Gaussian that makes another's voxels as thick as its own, likewise."""
    return _root_over_12(np.square(grid.spacing_mm) - _squares_along(grid, other))


def _squares_along(grid: Grid, other: Grid) -> np.ndarray:
    """Squared width (3,), mm², of another grid's voxels along a grid's x, y and z: as boxes, by their variance."""
    cosines = np.reshape(grid.direction, (3, 3)).T @ np.reshape(other.direction, (3, 3))
    squares_mm: np.ndarray = cosines**2 @ np.square(other.spacing_mm)
    return squares_mm


def _root_over_12(variances_mm: np.ndarray) -> Triple:
    x, y, z = np.sqrt(np.maximum(variances_mm, 0) / 12).tolist()
    return x, y, z


def gaussian_resize(
    array: torch.Tensor, shape: tuple[int, int, int], spacing_mm: Triple, sigma_mm: Triple
) -> torch.Tensor:
    """A volume (z, y, x) smoothed by a Gaussian and read at another shape of the same corners.

    Separable: per axis one matrix, which is smoothing and reading in one: Gaussian weights, or, between voxels
    that are hardly smoothed, those of the cubic spline through the smoothed values.
    """
    for axis in range(3):
        n_from, n_to = array.shape[axis], shape[axis]
        sigma = sigma_mm[2 - axis] / spacing_mm[2 - axis]
        if n_from == n_to and sigma < NARROW:
            continue
        if n_from != n_to and sigma < EVEN_NOISE:
            matrix = placed(interpolation_matrix, array.device, array.dtype, n_from, n_to, 3)
            if sigma >= NARROW:
                matrix = matrix @ _gaussian_matrix(n_from, n_from, sigma).to(array)
        else:
            matrix = _gaussian_matrix(n_from, n_to, sigma).to(array)
        array = torch.movedim(torch.movedim(array, axis, -1) @ matrix.T, -1, axis)
    return array.contiguous()


def _gaussian_matrix(n_from: int, n_to: int, sigma: float) -> torch.Tensor:
    """(n_to, n_from), float64: normalised weights of a Gaussian of `sigma` voxels at n_to even positions."""
    positions = torch.linspace(0, n_from - 1, n_to, dtype=torch.float64)
    distance = positions[:, None] - torch.arange(n_from, dtype=torch.float64)[None, :]
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    return without_dust(weights / weights.sum(1, keepdim=True))


def _smoothed_spacing(grid: Grid, to: Grid, sigma_mm: Triple) -> Triple:
    """A spacing for the smoothed scan: the wanted one if both grids share their corners, else its own, or σ."""
    same_corners = grid.with_spacing(to.spacing_mm).is_close(to)
    if same_corners:
        return to.spacing_mm
    x, y, z = (max(s, sigma) for s, sigma in zip(grid.spacing_mm, sigma_mm, strict=True))
    return x, y, z

"""Read a volume at other points: sampling, warping, and resizing on the corner-aligned cube.

Volumes are (B, C, z, y, x); points are cube coordinates (..., 3) ordered (x, y, z), see `geometry`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from stnerp.geometry import cube_points

Shape = tuple[int, int, int]
WHOLE = slice(None)
FEWEST_POINTS = 4096  # a piece of fewer is hardly worth a thread
MOST_PIECES = 8
NARROW = 0.3  # a Gaussian of a smaller σ, in voxels, changes nothing


def sample(volume: torch.Tensor, points: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Values of a volume at points; beyond its border, the border's value.

    Args:
        volume: (B, C, z, y, x).
        points: (B, ..., 3) cube coordinates.
        mode: "bilinear" (trilinear here) or "nearest" (Eq. 7).

    Returns:
        (B, C, ...).
    """
    batch, channels = volume.shape[:2]
    inner, points = points.shape[1:-1], points.reshape(batch, -1, 3).to(volume.dtype)
    count, pieces = points.shape[1], _pieces(volume, points)
    if pieces > 1:
        points = F.pad(points, (0, 0, 0, -count % pieces)).reshape(pieces, -1, 3)
        volume = volume.expand(pieces, -1, -1, -1, -1)
    values = F.grid_sample(volume, points[:, :, None, None], mode=mode, padding_mode="border", align_corners=True)
    if pieces > 1:
        values = values.movedim(0, 1).reshape(1, channels, -1)[..., :count]
    return values.reshape(batch, channels, *inner)


def _pieces(volume: torch.Tensor, points: torch.Tensor) -> int:
    """Into how many pieces points are cut: on a CPU, torch reads the volumes of a batch in parallel, and one
    volume in one thread. In the backward pass each piece has its own gradient of the volume, so they are few."""
    if volume.device.type != "cpu" or len(volume) > 1:
        return 1
    most = MOST_PIECES if volume.requires_grad else torch.get_num_threads()
    return max(1, min(torch.get_num_threads(), most, points.shape[1] // FEWEST_POINTS))


def warp(volume: torch.Tensor, displacement: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """volume(p + u(p)) for every voxel p of the displacement's grid: the pull-back through φ = id + u.

    Args:
        volume: (B, C, z, y, x), on any shape of the same cube.
        displacement: (B, 3, z, y, x) in cube units.

    Returns:
        (B, C, z, y, x) on the displacement's shape.
    """
    return sample(volume, displaced_points(displacement, _spatial(displacement)), mode)


def displaced_points(displacement: torch.Tensor, shape: Shape, slab: slice = WHOLE) -> torch.Tensor:
    """p + u(p), (B, z, y, x, 3), of a displacement (B, 3, z, y, x) in cube units.

    The displacement may cover a slab of slices only, of a volume of that shape.
    """
    identity = cube_points(shape, displacement.device, displacement.dtype, slab)
    return identity + displacement.movedim(1, -1)


def resize(volume: torch.Tensor, shape: Shape, order: int = 1, slab: slice = WHOLE) -> torch.Tensor:
    """A volume (B, C, z, y, x) interpolated on another shape of the same cube, or on a slab of its slices.

    Interpolation on a regular grid is separable: one small matrix per axis. `order` 1 is linear,
    3 the cubic spline that passes through the given values.
    """
    for axis, (n_from, n_to) in enumerate(zip(_spatial(volume), shape, strict=True), start=2):
        if n_from != n_to:
            matrix = placed(interpolation_matrix, volume.device, volume.dtype, n_from, n_to, order)
            rows = matrix[slab] if axis == 2 else matrix
            volume = _along(axis, rows, volume)
        elif axis == 2:
            volume = volume[:, :, slab]
    return volume


def smoothed(volume: torch.Tensor, sigma: float | tuple[float, float, float]) -> torch.Tensor:
    """A volume (B, C, z, y, x) after a Gaussian of `sigma` voxels; beyond its border, the border's value.

    Args:
        volume: any spatial shape.
        sigma: of all axes or of (z, y, x). One below `NARROW` leaves its axis as it is.
    """
    sigmas = sigma if isinstance(sigma, tuple) else (sigma,) * 3
    for axis, n, width in zip((2, 3, 4), _spatial(volume), sigmas, strict=True):
        if _radius(width) > 0:
            matrix = placed(_gaussian_matrix, volume.device, volume.dtype, n, width)
            volume = _along(axis, matrix, volume)
    return volume


def pulled_back(
    read: Callable[[torch.Tensor], torch.Tensor],
    displacement: torch.Tensor,
    shape: Shape,
    slab: slice = WHOLE,
    sigma: tuple[float, float, float] = (0.0, 0.0, 0.0),
    places: Callable[[slice], torch.Tensor] | None = None,
) -> torch.Tensor:
    """An image at p + u(p) for voxels p, then smoothed: what a camera fixed in the target's space would see.

    Args:
        read: values (B, C, z, y, x) at cube points (B, z, y, x, 3).
        displacement: (B, 3, z, y, x) in cube units, on any shape.
        shape: (z, y, x) of the voxels.
        slab: of their slices; beyond its cut faces more are read, so that each value is the whole image's.
        sigma: of the Gaussian, in voxels (z, y, x).
        places: of a slab of the voxels, p (B, z, y, x, 3); None: they share the displacement's corners.

    Returns:
        (B, C, slices, y, x).
    """
    first, last, _ = slab.indices(shape[0])
    reach = _radius(sigma[0])
    wide = slice(max(0, first - reach), min(shape[0], last + reach))
    if places is None:
        points = displaced_points(resize(displacement, shape, slab=wide), shape, wide)
    else:
        still = places(wide)
        points = still + sample(displacement, still).movedim(1, -1)
    moved = smoothed(read(points), sigma)
    return moved[:, :, first - wide.start : last - wide.start]


def _along(axis: int, matrix: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
    """A matrix (m, n) times a contiguous volume (B, C, z, y, x) along an axis of length n, without moving axes."""
    if axis == 4:
        return volume @ matrix.T
    if axis == 3:
        return matrix @ volume
    return (matrix @ volume.flatten(3)).unflatten(3, volume.shape[3:])


def _radius(sigma: float) -> int:
    """How many voxels a Gaussian of `sigma` voxels reaches: three σ."""
    return math.ceil(3 * sigma) if sigma >= NARROW else 0


@lru_cache(maxsize=64)
def placed(
    matrix: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, *arguments: float
) -> torch.Tensor:
    """`matrix(*arguments)` where it is needed, made once: each copy to a GPU would wait for it."""
    with torch.inference_mode(False):  # else one that is first needed there could not be differentiated through
        return matrix(*arguments).to(device, dtype)


def _gaussian_matrix(n: int, sigma: float) -> torch.Tensor:
    """(n, n), float64: rows add up to 1."""
    radius = _radius(sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    rows = torch.arange(n)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for shift, weight in zip(range(-radius, radius + 1), kernel / kernel.sum(), strict=True):
        matrix[rows, (rows + shift).clamp(0, n - 1)] += weight
    return matrix


def interpolation_matrix(n_from: int, n_to: int, order: int) -> torch.Tensor:
    """(n_to, n_from), float64: values at n_to even positions from values at n_from, ends on ends. Order 1 or 3."""
    if n_from == 1:
        return torch.ones(n_to, 1)
    positions = torch.linspace(0, n_from - 1, n_to, dtype=torch.float64)
    if order == 1 or n_from < 4:
        return _basis(positions, n_from, _hat)
    at_knots = _basis(torch.arange(n_from, dtype=torch.float64), n_from, _cubic_b_spline)
    return without_dust(torch.linalg.solve(at_knots.T, _basis(positions, n_from, _cubic_b_spline).T).T)


def without_dust(weights: torch.Tensor) -> torch.Tensor:
    """Weights that add up to 1, those below 1e-12 as zero: far from a point they are denormal numbers in float32,
    with which a processor is twenty times as slow."""
    return torch.where(weights.abs() < 1e-12, 0.0, weights)


def _basis(positions: torch.Tensor, n: int, kernel: object) -> torch.Tensor:
    """Kernel values of n knots at positions; knots past an end are folded back (mirrored)."""
    knots = torch.arange(-2, n + 2, dtype=torch.float64)
    weights = kernel(positions[:, None] - knots[None, :])  # type: ignore[operator]
    folded = torch.zeros(len(positions), n, dtype=torch.float64)
    once_round = (knots + 2 * (n - 1)).long() % (2 * (n - 1))
    return folded.index_add_(1, torch.minimum(once_round, 2 * (n - 1) - once_round), weights)


def _hat(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic_b_spline(x: torch.Tensor) -> torch.Tensor:
    x = x.abs()
    inner = 2 / 3 - x**2 + x**3 / 2
    outer = (2 - x).clamp(min=0) ** 3 / 6
    return torch.where(x < 1, inner, outer)


def _spatial(volume: torch.Tensor) -> Shape:
    z, y, x = volume.shape[-3:]
    return z, y, x

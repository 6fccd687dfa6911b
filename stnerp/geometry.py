"""Where things are: the only file that knows about axes, origins and directions.

Three frames are used, and points and vectors are always ordered (x, y, z):

world
    LPS millimetres, as in SimpleITK, DICOM and ANTs.
index
    Continuous voxel indices of a grid; the centre of the first voxel is (0, 0, 0).
cube
    The grid's corner-aligned cube: voxel *centres* of the first and last voxel lie at
    -1 and +1 on every axis. `torch.nn.functional.grid_sample(align_corners=True)` reads it.

Arrays are (z, y, x). The flip between (x, y, z) and (z, y, x) happens here and nowhere else:
`Grid.shape` is the array's shape, `cube_points(shape)` the cube coordinates of its voxels.
Vectors have frames of their own: "axis mm" are millimetres along the grid's axes (so that
lengths and gradients are physical while the grid stays axis-aligned).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.errors import InputError

Points = TypeVar("Points", np.ndarray, torch.Tensor)
Triple = tuple[float, float, float]
SLAB_POINTS = 2**20


@dataclass(frozen=True)
class Grid:
    """A regular voxel grid in world space, of any orientation.

    Attributes:
        size: voxels along x, y, z.
        spacing_mm: distance between voxel centres along x, y, z.
        origin_mm: world position (LPS) of the first voxel's centre.
        direction: 3 x 3 direction cosines, row-major; column i is the world direction of axis i.

    Raises:
        InputError: a size below one, a spacing that isn't positive, a singular direction.
    """

    size: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.size) != 3 or min(self.size) < 1:
            raise InputError(f"grid: size {self.size} must be three positive numbers (x, y, z)")
        if len(self.spacing_mm) != 3 or not all(0 < s < np.inf for s in self.spacing_mm):
            raise InputError(f"grid: spacing {self.spacing_mm} must be three positive numbers in mm")
        if len(self.direction) != 9 or not abs(np.linalg.det(self._axes)) > 1e-6:
            raise InputError(f"grid: direction {self.direction} must be a non-singular 3 x 3 matrix")

    @staticmethod
    def of(image: sitk.Image | Grid) -> Grid:
        """The grid of a 3D SimpleITK image; of a grid, itself."""
        if isinstance(image, Grid):
            return image
        if not isinstance(image, sitk.Image):
            raise InputError(
                f"image: expected a SimpleITK image (sitk.ReadImage(path)), got {type(image).__name__}"
            )
        if image.GetDimension() != 3:
            raise InputError(f"image: expected 3 dimensions, got {image.GetDimension()}")
        return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def __str__(self) -> str:
        size, spacing = (" x ".join(f"{n:.4g}" for n in numbers) for numbers in (self.size, self.spacing_mm))
        return f"{size} voxels of {spacing} mm"

    # -- shapes and lengths

    @property
    def shape(self) -> tuple[int, int, int]:
        """Array shape (z, y, x)."""
        x, y, z = self.size
        return z, y, x

    @property
    def extent_mm(self) -> Triple:
        """Distance from the first to the last voxel centre along x, y, z."""
        x, y, z = ((n - 1) * s for n, s in zip(self.size, self.spacing_mm, strict=True))
        return x, y, z

    @property
    def half_extent_mm(self) -> np.ndarray:
        """Millimetres per cube unit along x, y, z, (3,)."""
        return self._half_size * np.asarray(self.spacing_mm)

    @property
    def voxels(self) -> int:
        return int(np.prod(self.size))

    @property
    def centre_mm(self) -> np.ndarray:
        """World position of the middle of the grid, (3,)."""
        return self.cube_to_world(np.zeros(3))

    def with_spacing(self, spacing_mm: float | Triple) -> Grid:
        """The same corners with about this spacing; never fewer than two voxels where there were."""
        wanted = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
        size = [
            1 if n == 1 else max(2, round(extent / s) + 1)
            for n, extent, s in zip(self.size, self.extent_mm, wanted, strict=True)
        ]
        spacing = [
            s if n == 1 else extent / (n - 1)
            for n, extent, s in zip(size, self.extent_mm, self.spacing_mm, strict=True)
        ]
        return Grid(
            (size[0], size[1], size[2]),
            (spacing[0], spacing[1], spacing[2]),
            self.origin_mm,
            self.direction,
        )

    def padded(self, voxels: Sequence[int]) -> Grid:
        """With so many voxels more at both ends of x, y and z."""
        return self.part(-np.asarray(voxels), np.asarray(self.size) - 1 + np.asarray(voxels))

    def part(self, first: Sequence[int] | np.ndarray, last: Sequence[int] | np.ndarray) -> Grid:
        """From one voxel to another (x, y, z), both included; they may lie beyond the grid's own."""
        x, y, z = (int(b) - int(a) + 1 for a, b in zip(first, last, strict=True))
        ox, oy, oz = self.index_to_world(np.asarray(first, float)).tolist()
        return Grid((x, y, z), self.spacing_mm, (ox, oy, oz), self.direction)

    def within(self, whole: Grid) -> tuple[slice, slice, slice]:
        """Where a `part` of a grid lies in its array (z, y, x)."""
        first = np.rint(whole.world_to_index(np.asarray(self.origin_mm))).astype(int)
        x, y, z = (slice(int(a), int(a) + n) for a, n in zip(first, self.size, strict=True))
        return z, y, x

    def is_close(self, other: Grid, tolerance_mm: float = 1e-3) -> bool:
        """Whether both grids have the same voxels in world space."""
        if self.size != other.size:
            return False
        corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
        apart = self.cube_to_world(corners) - other.cube_to_world(corners)
        return bool(np.abs(apart).max() <= tolerance_mm)

    # -- points

    def index_to_world(self, points: Points) -> Points:
        """Continuous voxel indices (..., 3) to LPS mm (..., 3)."""
        return points @ _like(self._axes * self.spacing_mm, points).T + _like(self.origin_mm, points)

    def world_to_index(self, points_mm: Points) -> Points:
        """LPS mm (..., 3) to continuous voxel indices (..., 3)."""
        to_index = np.linalg.inv(self._axes * self.spacing_mm)
        return (points_mm - _like(self.origin_mm, points_mm)) @ _like(to_index, points_mm).T

    def cube_to_world(self, points: Points) -> Points:
        """Cube coordinates (..., 3) to LPS mm (..., 3)."""
        return self.index_to_world((points + 1) * _like(self._half_size, points))

    def world_to_cube(self, points_mm: Points) -> Points:
        """LPS mm (..., 3) to cube coordinates (..., 3)."""
        return self.world_to_index(points_mm) / _like(self._half_size, points_mm) - 1

    def points_world(self) -> np.ndarray:
        """World position of every voxel centre, (z, y, x, 3), float64."""
        return affine_points(self.index_to_world_matrix, self.shape).numpy()

    def corners_world(self, beyond: float = 0) -> np.ndarray:
        """Centres (8, 3) of the outermost voxels, LPS mm, or what is so many voxels beyond; 0.5: their edges."""
        ends = index_points((2, 2, 2)).reshape(8, 3)
        return self.index_to_world(ends * (np.asarray(self.size) - 1 + 2 * beyond) - beyond)

    @property
    def index_to_world_matrix(self) -> np.ndarray:
        """`index_to_world` as a (4, 4) matrix."""
        return homogeneous(self._axes * self.spacing_mm, self.origin_mm)

    @property
    def cube_to_world_matrix(self) -> np.ndarray:
        """`cube_to_world` as a (4, 4) matrix."""
        return self.index_to_world_matrix @ homogeneous(np.diag(self._half_size), self._half_size)

    @property
    def world_to_cube_matrix(self) -> np.ndarray:
        """`world_to_cube` as a (4, 4) matrix."""
        return np.linalg.inv(self.cube_to_world_matrix)

    def contains(self, points_mm: np.ndarray) -> np.ndarray:
        """Whether points (..., 3) lie within the outer faces of the voxels, (...,)."""
        index = self.world_to_index(points_mm)
        return np.all((index >= -0.5) & (index <= np.asarray(self.size) - 0.5), axis=-1)

    # -- vectors

    def vectors_from_cube(self, vectors: Points) -> Points:
        """Vectors (..., 3) in cube units to mm along the grid's axes."""
        return vectors * _like(self.half_extent_mm, vectors)

    def vectors_to_world(self, vectors_axis_mm: Points) -> Points:
        """Vectors (..., 3) in mm along the grid's axes to LPS mm."""
        return vectors_axis_mm @ _like(self._axes, vectors_axis_mm).T

    def vectors_from_world(self, vectors_mm: Points) -> Points:
        """Vectors (..., 3) in LPS mm to mm along the grid's axes."""
        return vectors_mm @ _like(np.linalg.inv(self._axes), vectors_mm).T

    # -- images

    def image(self, array: np.ndarray) -> sitk.Image:
        """A SimpleITK image of an array (z, y, x) or, for vectors (x, y, z), of (z, y, x, 3)."""
        if array.shape[:3] != self.shape:
            raise InputError(f"array: shape {array.shape} does not fit the grid's {self.shape}")
        image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
        image.SetSpacing(self.spacing_mm)
        image.SetOrigin(self.origin_mm)
        image.SetDirection(self.direction)
        return image

    # -- plain numbers, for saved models

    def to_dict(self) -> dict[str, list[float]]:
        return {
            "size": list(self.size),
            "spacing_mm": list(self.spacing_mm),
            "origin_mm": list(self.origin_mm),
            "direction": list(self.direction),
        }

    @staticmethod
    def from_dict(values: dict[str, list[float]]) -> Grid:
        x, y, z = (int(n) for n in values["size"])
        sx, sy, sz = values["spacing_mm"]
        ox, oy, oz = values["origin_mm"]
        return Grid((x, y, z), (sx, sy, sz), (ox, oy, oz), tuple(values["direction"]))

    @property
    def _axes(self) -> np.ndarray:
        return np.asarray(self.direction, dtype=float).reshape(3, 3)

    @property
    def _half_size(self) -> np.ndarray:
        # An axis of one voxel has no length: its only voxel sits at -1.
        return np.maximum(np.asarray(self.size) - 1, 1) / 2


def cube_points(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    slab: slice = slice(None),
) -> torch.Tensor:
    """Cube coordinates (x, y, z) of every voxel of an array, or of a slab of its slices, (z, y, x, 3)."""
    z, y, x = (torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in shape)
    grid_z, grid_y, grid_x = torch.meshgrid(z[slab], y, x, indexing="ij")
    return torch.stack([grid_x, grid_y, grid_z], dim=-1)


def index_points(shape: tuple[int, int, int]) -> np.ndarray:
    """Indices (x, y, z) of every voxel of an array, shape (z, y, x, 3), float64."""
    z, y, x = np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij")
    return np.stack([x, y, z], axis=-1)


def affine_points(
    matrix: np.ndarray,
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    slab: slice = slice(None),
) -> torch.Tensor:
    """A (4, 4) matrix times the index (x, y, z) of every voxel of an array, or of a slab of its slices.

    (z, y, x, 3), float64. What an affine map gives is a sum over the axes, and costs each voxel one addition.
    """
    z, y, x = affine_axes(matrix, shape, device)
    return z[slab] + y + x


def affine_axes(
    matrix: np.ndarray, shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three terms whose sum is `affine_points`: (z, 1, 1, 3), (y, 1, 3) and (x, 3), float64."""
    columns = torch.from_numpy(matrix).to(device, torch.float64)[:3].T
    z, y, x = (
        torch.arange(n, device=device, dtype=torch.float64)[:, None] * columns[axis]
        for n, axis in zip(shape, (2, 1, 0), strict=True)
    )
    return (z + columns[3])[:, None, None], y[:, None], x


def slab_slices(shape: tuple[int, int, int]) -> list[slice]:
    """An array's slices by slabs of about `SLAB_POINTS` voxels.

    What is rendered slab by slab needs no more memory for a larger image.
    """
    nz, ny, nx = shape
    thickness = max(1, SLAB_POINTS // (ny * nx))
    return [slice(z, min(z + thickness, nz)) for z in range(0, nz, thickness)]


def slabs(grid: Grid) -> Iterator[tuple[slice, np.ndarray]]:
    """A grid's world points (z, y, x, 3), float64, slab by slab (`slab_slices`)."""
    for part in slab_slices(grid.shape):
        yield part, affine_points(grid.index_to_world_matrix, grid.shape, slab=part).numpy()


def slab_count(shape: tuple[int, int, int], voxels_per_step: int | None) -> int:
    """In how many slabs of about so many voxels an array is looked at; none is thinner than four slices."""
    if voxels_per_step is None:
        return 1
    return max(1, min(round(np.prod(shape) / voxels_per_step), shape[0] // 4))


def random_slabs(
    shapes: Sequence[tuple[int, int, int]],
    voxels_per_step: int | None,
    draw: np.random.Generator,
    overlaps: Sequence[int] | int = 2,
) -> list[slice]:
    """For each of several arrays some of its slices: about so many voxels, one of a few slabs that together hold
    every slice. The arrays take different ones.

    Neighbours overlap by some slices at both ends: windows that a cut would halve lie whole in one of them.
    """
    counts = [slab_count(shape, voxels_per_step) for shape in shapes]
    if max(counts) == 1:
        return [slice(0, shape[0]) for shape in shapes]
    chosen = draw.permutation(len(shapes)) + draw.integers(math.lcm(*counts))  # of each array any slab, evenly
    reach = [overlaps] * len(shapes) if isinstance(overlaps, int) else overlaps
    return [
        slice(max(k % n * slices // n - more, 0), min((k % n + 1) * slices // n + more, slices))
        for k, n, (slices, _, _), more in zip(chosen.tolist(), counts, shapes, reach, strict=True)
    ]


def homogeneous(matrix: np.ndarray, shift: Sequence[float] | np.ndarray) -> np.ndarray:
    """x -> matrix x + shift as a (4, 4) matrix, float64."""
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = matrix, shift
    return whole


def world_points(points_mm: np.ndarray) -> np.ndarray:
    """Points (..., 3), LPS mm, as a user gave them, float64.

    Raises:
        InputError: another shape, or coordinates that aren't finite.
    """
    points = np.asarray(points_mm, dtype=float)
    if points.ndim == 0 or points.shape[-1] != 3:
        raise InputError(f"points: expected shape (..., 3), x y z in LPS mm, got {points.shape}")
    if not np.isfinite(points).all():
        raise InputError("points: some coordinates are not finite; remove them")
    return points


def apply_affine(matrix: np.ndarray, points: Points) -> Points:
    """Points (..., 3) through a homogeneous 4 x 4 matrix."""
    return points @ _like(matrix[:3, :3], points).T + _like(matrix[:3, 3], points)


def affine_transform(matrix: np.ndarray) -> sitk.AffineTransform:
    """SimpleITK's form of a homogeneous 4 x 4 matrix."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def _like(values: object, points: Points) -> Points:
    """Numbers as an array of the points' kind (and, for tensors, their device and type)."""
    if isinstance(points, torch.Tensor):
        return torch.as_tensor(np.asarray(values, dtype=float), dtype=points.dtype, device=points.device)
    return np.asarray(values, dtype=float)

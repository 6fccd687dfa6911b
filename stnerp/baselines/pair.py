"""What every pairwise method gives back, and what all of them do before and after.

A method is a function
`method(reference, target, *, window, align="affine", seed=0, **its own settings) -> PairRegistration`.
The images may lie on different grids of one world. The *target* is what registration calls fixed, the
*reference* moving: the displacement takes points of the target to the reference, as φ does everywhere. All refuse
images that show nothing or hold NaN (`in_window`).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.errors import InputError, MissingDependencyError
from stnerp.geometry import Grid, slabs, world_points
from stnerp.labels import carried_labels
from stnerp.preprocess import normalised
from stnerp.series import check_contrast, check_voxels
from stnerp.warp import sample
from stnerp.window import Window

Align = Literal["none", "rigid", "affine"]


@dataclass(frozen=True)
class PairRegistration:
    """What a pairwise method found.

    Attributes:
        displacement: φ(p) − p, target -> reference, LPS mm, at every voxel p of the target: a float64
            vector image that `sitk.DisplacementFieldTransform` takes as it is.
        reference_at: intensities of the reference at points (..., 3), LPS mm, of a method that draws it in its own
            way (a Ref-Net); None: it draws the voxels.

    Raises:
        InputError: not a 3D image of float64 vectors (x, y, z).
    """

    displacement: sitk.Image
    reference_at: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        Grid.of(self.displacement)
        if self.displacement.GetPixelID() != sitk.sitkVectorFloat64 or (
            self.displacement.GetNumberOfComponentsPerPixel() != 3
        ):
            raise InputError(
                "displacement: expected an image of float64 vectors (x, y, z) in mm, "
                f"got {self.displacement.GetPixelIDTypeAsString()}"
            )

    def map_points(self, points_mm: np.ndarray) -> np.ndarray:
        """φ of points of the target (..., 3), LPS mm, float64: points of the reference.

        Between voxels the displacement is linear; outside the target's field of view it is the border's.

        Raises:
            InputError: another shape, or coordinates that aren't finite.
        """
        return self._target_to_reference()(world_points(points_mm))

    def image(self, reference: sitk.Image) -> sitk.Image:
        """The target as the method draws it: `reference_at` at φ(p) if it has that, else the reference, warped."""
        if self.reference_at is None:
            return self.warp(reference)
        grid = Grid.of(self.displacement)
        field, values = sitk.GetArrayViewFromImage(self.displacement), np.empty(grid.shape, np.float32)
        for part, points_mm in slabs(grid):
            values[part] = self.reference_at(points_mm + field[part])
        return grid.image(values)

    def warp(self, reference: sitk.Image, outside: float | None = None) -> sitk.Image:
        """The reference drawn on the target's grid, float32, in its own intensities.

        Args:
            reference: an image in the reference's world space, on any grid; read linearly.
            outside: intensity of points that come from outside its field of view; None: that of the
                nearest voxel inside.
        """
        resampler = sitk.ResampleImageFilter()
        resampler.SetReferenceImage(self.displacement)
        resampler.SetTransform(sitk.DisplacementFieldTransform(sitk.Image(self.displacement)))
        resampler.SetInterpolator(sitk.sitkLinear)
        resampler.SetOutputPixelType(sitk.sitkFloat32)
        resampler.SetUseNearestNeighborExtrapolator(outside is None)
        resampler.SetDefaultPixelValue(0.0 if outside is None else outside)
        return resampler.Execute(reference)

    def propagate(self, mask: sitk.Image) -> sitk.Image:
        """The reference's labels on the target's grid, by majority as `STNeRP.propagate` does it.

        Raises:
            InputError: a mask that isn't one whole number per voxel.
        """
        return carried_labels(mask, Grid.of(self.displacement), self._target_to_reference())

    def _target_to_reference(self) -> Callable[[np.ndarray], np.ndarray]:
        """φ of points (..., 3), LPS mm; the field becomes a tensor once, however often φ is called."""
        grid = Grid.of(self.displacement)
        field = torch.from_numpy(sitk.GetArrayFromImage(self.displacement)).movedim(-1, 0)[None]

        def φ(points_mm: np.ndarray) -> np.ndarray:
            cube = torch.from_numpy(grid.world_to_cube(points_mm).reshape(1, -1, 3))
            return points_mm + sample(field, cube)[0].T.numpy().reshape(points_mm.shape)

        return φ


class PairMethod(Protocol):
    """The form of every pairwise method."""

    def __call__(
        self, reference: sitk.Image, target: sitk.Image, *, window: Window, align: Align = ..., seed: int = ...
    ) -> PairRegistration: ...


def registration_of(grid: Grid, target_to_reference: Callable[[np.ndarray], np.ndarray]) -> PairRegistration:
    """A map of points (..., 3), LPS mm, as the displacement at every voxel of the target's grid."""
    field = np.empty((*grid.shape, 3))
    for part, points_mm in slabs(grid):
        field[part] = target_to_reference(points_mm) - points_mm
    return PairRegistration(grid.image(field))


def in_window(image: sitk.Image, window: Window, name: str) -> sitk.Image:
    """The scan through its window: float32 in [0, 1], on its own grid.

    Raises:
        InputError: fewer than 4 voxels along an axis, or some that aren't finite, or all alike in the window: of
            these ITK finds a motion, or never ends. The message gives the name.
    """
    check_voxels(image, name)
    check_contrast(image, name, window)
    return Grid.of(image).image(normalised(image, window))


def check_align(align: str) -> None:
    if align not in ("none", "rigid", "affine"):
        raise InputError(f"align: unknown {align!r}; give none, rigid or affine")


def peer(module: str, package: str, needs: str = "") -> Any:
    """The module of an optional package; `needs`: a name in it that only this package brings.

    Raises:
        MissingDependencyError: it isn't installed.
    """
    try:
        with warnings.catch_warnings():  # some warn while they load, one turns all warnings off for good
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
            getattr(found, needs or "__name__")
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"{package} is needed for this method; install it with: pip install 'stnerp[peers]'"
        ) from error
    return found

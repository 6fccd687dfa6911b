"""Affine pre-alignment: where a scan lies relative to the reference before anything deforms.

SimpleITK does the work. The metric is the correlation, of images as they are while they look for each other, then
of images that are normalised around each voxel: that forgives another gain, another offset, and a bias field (MR),
which can lead a plain correlation 50 mm astray. On longitudinal lung scans it leaves a smaller error than that,
which was better than mutual information.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy.linalg
import SimpleITK as sitk

from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, homogeneous
from stnerp.quiet import quiet_itk

logger = logging.getLogger(__name__)

Kind = Literal["none", "rigid", "affine"]
Seen = tuple[sitk.Image | None, sitk.Image | None]
LARGEST_SCALE = 1.4  # between two scans of one person; a small field of view can mislead the fit
FEWEST_ACROSS = 24  # voxels across a field of view, on two axes of three
FEWEST_VOXELS = 8  # along an axis: ITK smooths no fewer than four, and four place a thin slab badly
AROUND = 2.5  # voxels, σ of the Gaussian in which brightness and contrast are taken
FLAT = 0.02  # of [0, 1]: a deviation around a voxel that shows noise and no more


def affine_between(
    reference: sitk.Image,
    target: sitk.Image,
    kind: Kind = "affine",
    spacing_mm: float = 4.0,
    seen: Seen = (None, None),
) -> np.ndarray:
    """The affine map that takes reference points to target points.

    Several starts (as the headers say, centres of the fields of view, centres of mass) are compared by
    a short rigid fit, the best is refined, and for "affine" the rigid result is relaxed.

    Args:
        reference: 3D image in [0, 1].
        target: 3D image in [0, 1], on any grid.
        kind: "none", "rigid" or "affine".
        spacing_mm: resolution at which the images are compared; a finer one where that leaves few voxels.
        seen: masks of what counts of either image (uint8); None: all of it.

    Returns:
        (4, 4), homogeneous, LPS mm: reference point -> target point.

    Raises:
        InputError: an unknown kind.
        FitError: no start gives overlapping images.
    """
    if kind not in ("none", "rigid", "affine"):
        raise InputError(f"align: unknown kind {kind!r}; give none, rigid, affine or auto")
    if kind == "none":
        return np.eye(4)
    # Something small, a mouse say, is looked at more closely, and moved in smaller steps.
    extents_mm = [length for image in (reference, target) for length in Grid.of(image).extent_mm]
    spacing_mm = min(spacing_mm, float(np.median(extents_mm)) / FEWEST_ACROSS)
    as_they_are = _coarse(reference, spacing_mm), _coarse(target, spacing_mm)
    fixed, moving = (_flattened(image, spacing_mm) for image in as_they_are)
    starts = [
        sitk.Euler3DTransform(_centre(fixed), 0.0, 0.0, 0.0, (0.0, 0.0, 0.0)),
        *_initial(*as_they_are, sitk.CenteredTransformInitializerFilter.GEOMETRY),
        *_initial(*as_they_are, sitk.CenteredTransformInitializerFilter.MOMENTS),
    ]
    # As they are, images find each other from farther away; normalised, they say best where they lie.
    starts += _best_rigid(*as_they_are, starts, spacing_mm, seen)
    if seen != (None, None):
        # The edge of what was seen, with black around, leads from farther away than what it holds.
        fixed_cut, moving_cut = (
            _coarse(image if mask is None else sitk.Mask(image, mask), spacing_mm)
            for image, mask in zip((reference, target), seen, strict=True)
        )
        starts += _initial(fixed_cut, moving_cut, sitk.CenteredTransformInitializerFilter.MOMENTS)
        starts += _best_rigid(fixed_cut, moving_cut, starts, spacing_mm, (None, None))
    found = _best_rigid(fixed, moving, starts, spacing_mm, seen)
    if not found:
        raise FitError(
            "pre-alignment: the images of the series have no overlap that could be aligned; check that they "
            "show the same region, or align them first and pass align='none'"
        )
    start: sitk.Transform = found[0]
    if kind == "affine":
        affine = sitk.AffineTransform(3)
        affine.SetCenter(start.GetCenter())
        affine.SetMatrix(start.GetMatrix())
        affine.SetTranslation(start.GetTranslation())
        start = affine
    refined = _register(fixed, moving, start, (1,), spacing_mm, seen)
    matrix = _matrix(start if refined is None else refined[0])
    scales = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    if scales.max() > LARGEST_SCALE or scales.min() < 1 / LARGEST_SCALE:
        logger.warning(
            "pre-alignment: the affine fit stretched the image by %.2f to %.2f, which no patient does; "
            "a rigid one is used instead",
            scales.min(),
            scales.max(),
        )
        return affine_between(reference, target, "rigid", spacing_mm, seen)
    return matrix


def _best_rigid(
    fixed: sitk.Image,
    moving: sitk.Image,
    starts: Sequence[sitk.Transform],
    spacing_mm: float,
    seen: Seen,
) -> list[sitk.Transform]:
    """The best of short rigid fits, if any finds an overlap."""
    results = [_register(fixed, moving, start, (4, 2), spacing_mm, seen) for start in starts]
    found = [result for result in results if result is not None]
    return [min(found, key=lambda result: result[1])[0]] if found else []


def _register(
    fixed: sitk.Image,
    moving: sitk.Image,
    start: sitk.Transform,
    shrink: tuple[int, ...],
    spacing_mm: float,
    seen: Seen = (None, None),
) -> tuple[sitk.Transform, float] | None:
    """The transform after a fit from `start`, or that if it is better, and its metric; None without overlap."""
    transform = type(start)(start)
    method = _correlation(transform, seen)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.25, seed=1)  # without a seed ITK takes the clock's
    # ITK's own gradients are of smoother images than the metric: on thick slices they lead away from the truth.
    method.MetricUseFixedImageGradientFilterOff()
    method.MetricUseMovingImageGradientFilterOff()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=spacing_mm / 2, minStep=spacing_mm / 400, numberOfIterations=100, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(list(shrink))
    method.SetSmoothingSigmasPerLevel([s * spacing_mm / 8 for s in shrink])
    try:
        with quiet_itk():  # a page for every step that leaves the image
            method.Execute(fixed, moving)
            # Of all voxels at full resolution: on a coarse level a fit may run away from where it was.
            found, before = (_correlation(one, seen).MetricEvaluate(fixed, moving) for one in (transform, start))
    except RuntimeError:  # ITK: all samples outside the moving image
        return None
    return (transform, found) if found < before else (type(start)(start), before)


def _correlation(transform: sitk.Transform, seen: Seen) -> sitk.ImageRegistrationMethod:
    """The metric, lower is better, and what is moved by it."""
    fixed_seen, moving_seen = seen
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums in a fixed order: the same result on every run
    method.SetMetricAsCorrelation()
    if fixed_seen is not None:
        method.SetMetricFixedMask(fixed_seen)
    if moving_seen is not None:
        method.SetMetricMovingMask(moving_seen)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=True)
    return method


def _initial(fixed: sitk.Image, moving: sitk.Image, how: int) -> list[sitk.Transform]:
    """A start from the images' centres; none where they have no centre of mass (an image of zeros)."""
    try:
        start = sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), how)
    except RuntimeError:
        return []
    return [sitk.Euler3DTransform(start)]


def _coarse(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """The image smoothed and resampled to an isotropic spacing, a finer one across a thin slab."""
    grid = Grid.of(image)
    finest_mm = [length / (FEWEST_VOXELS - 1) for length in grid.extent_mm]
    x, y, z = (min(max(s, spacing_mm), f) for s, f in zip(grid.spacing_mm, finest_mm, strict=True))
    coarse = grid.with_spacing((x, y, z))
    smooth = sitk.SmoothingRecursiveGaussian(sitk.Cast(image, sitk.sitkFloat32), spacing_mm / 2)
    return sitk.Resample(
        smooth,
        coarse.size,
        sitk.Transform(),
        sitk.sitkLinear,
        coarse.origin_mm,
        coarse.spacing_mm,
        coarse.direction,
    )


def _flattened(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """An image less its mean around each voxel, over its deviation there."""
    detail = image - sitk.SmoothingRecursiveGaussian(image, AROUND * spacing_mm)
    return detail / sitk.Sqrt(sitk.SmoothingRecursiveGaussian(detail**2, AROUND * spacing_mm) + FLAT**2)


def _centre(image: sitk.Image) -> list[float]:
    return [float(c) for c in Grid.of(image).centre_mm]


def _matrix(transform: sitk.Transform) -> np.ndarray:
    """Homogeneous (4, 4) of a centred linear transform."""
    linear = np.asarray(transform.GetMatrix()).reshape(3, 3)
    centre = np.asarray(transform.GetCenter())
    return homogeneous(linear, centre + np.asarray(transform.GetTranslation()) - linear @ centre)


def stretch_rate(matrix: np.ndarray) -> np.ndarray:
    """What an affine map (4, 4) does besides moving a rigid body: log S of its linear part R S, (3, 3), symmetric.

    S stretches along three orthogonal axes, before R rotates. Zero for a rigid map.
    """
    _, stretches, axes = np.linalg.svd(matrix[:3, :3])
    rate: np.ndarray = axes.T @ np.diag(np.log(stretches)) @ axes
    return rate


def affine_at(matrices: np.ndarray, times: Sequence[float], t: float, period: float | None = None) -> np.ndarray:
    """The alignment at time t, between those of the measured times (T, 4, 4): linear in the matrix logarithm.

    Before the first and after the last time it stays as it is there.
    """
    logs = _logarithms(np.ascontiguousarray(matrices, dtype=float).tobytes())
    if logs is None:
        return np.eye(4)
    log = [np.interp(t, times, column, period=period) for column in logs.T]
    return scipy.linalg.expm(np.reshape(log, (4, 4)))


@lru_cache(maxsize=8)  # a model asks for those of its own again and again, each a millisecond
def _logarithms(matrices: bytes) -> np.ndarray | None:
    """log of matrices (T, 4, 4), float64, as (T, 16); None where all are the identity."""
    each = np.frombuffer(matrices).reshape(-1, 4, 4)
    if np.allclose(each, np.eye(4)):
        return None
    return np.stack([scipy.linalg.logm(matrix).real for matrix in each]).reshape(-1, 16)

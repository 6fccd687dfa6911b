"""One patient's scans in order of time, with what is known at each: checked before any fit."""

from __future__ import annotations

import glob
import logging
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias, TypeGuard

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid, index_points
from stnerp.io.dicom import DicomSeries, dicom_series, read_dicom_series
from stnerp.io.image import ImageLike, as_image, as_images, to_labels
from stnerp.io.landmarks import read_landmarks
from stnerp.window import Window

logger = logging.getLogger(__name__)

# A landmark list: a file, or points (N, 3) in LPS mm.
LandmarksLike: TypeAlias = "str | os.PathLike[str] | np.ndarray | torch.Tensor"

_MIN_SIZE = 4
# More than any number of days, ms or phases, and no whole number of 5000 digits.
_LONGEST = 1e15
# How many times as long as the shortest the longest time between scans may be without a warning.
_UNEVEN = 20
# Of the reference's field of view: with less of it in an image, a fit has little to compare.
_LITTLE_OVERLAP = 0.1
# How far the darkest and the brightest thousandth must lie apart in the window, or an image shows nothing in it.
_CONTRAST, _CONTRAST_SAMPLES = 1e-3, 100_000


@dataclass(frozen=True, eq=False)
class Series:
    """Images of one patient in order of time, as `load_series` checked them.

    Attributes:
        images: 3D, each on its own grid, original intensities.
        times: in the user's unit, strictly increasing.
        reference: index of the image that the others are explained by, and that contours belong to.
        period: length of the breathing or heart cycle in the same unit; None: not periodic.
        window: intensities that matter, shared by all images.
        masks: label image at each time, on that image's grid, or None.
        landmarks: (N, 3) LPS mm at each time, or None; row i is the same point of the anatomy.
        names: file names, or "image 3", for messages.
        time_unit: "s", "ms" or "us" where a 4D file states it.
    """

    images: tuple[sitk.Image, ...]
    times: tuple[float, ...]
    reference: int
    period: float | None
    window: Window
    masks: tuple[sitk.Image | None, ...]
    landmarks: tuple[np.ndarray | None, ...]
    names: tuple[str, ...]
    time_unit: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        times = ", ".join(f"{t:g}" for t in self.times)
        return f"Series(times {times}; reference {self.reference}: {self.grid}; {self.window})"

    @property
    def grid(self) -> Grid:
        """The grid of the reference image."""
        return Grid.of(self.reference_image)

    @property
    def reference_image(self) -> sitk.Image:
        return self.images[self.reference]

    @property
    def reference_time(self) -> float:
        return self.times[self.reference]

    @property
    def targets(self) -> tuple[int, ...]:
        """Indices of the images other than the reference."""
        return tuple(i for i in range(len(self)) if i != self.reference)

    def subset(self, indices: Iterable[int]) -> Series:
        """The series with these images only, in order of time, and the same window.

        Raises:
            InputError: an index out of range or twice, the reference left out, or nothing else kept.
        """
        kept = sorted(operator.index(i) for i in indices)
        if len(set(kept)) < len(kept) or not all(0 <= i < len(self) for i in kept):
            raise InputError(f"indices: {kept} must be different numbers from 0 to {len(self) - 1}")
        if self.reference not in kept:
            raise InputError(f"indices: {kept} leave out the reference image, {self.reference}; add it")
        if len(kept) < 2:
            raise InputError(f"indices: {kept} keep the reference alone; add at least one more image")
        return replace(
            self,
            images=tuple(self.images[i] for i in kept),
            times=tuple(self.times[i] for i in kept),
            reference=kept.index(self.reference),
            masks=tuple(self.masks[i] for i in kept),
            landmarks=tuple(self.landmarks[i] for i in kept),
            names=tuple(self.names[i] for i in kept),
        )


def require_series(series: object) -> None:
    """Raises InputError for anything else."""
    if not isinstance(series, Series):
        raise InputError(f"series: expected what load_series gives back, got {type(series).__name__}")


def load_series(
    images: ImageLike | Sequence[ImageLike],
    times: Sequence[float] | np.ndarray | None = None,
    *,
    reference: int = 0,
    period: float | None = None,
    masks: ImageLike | Sequence[ImageLike | None] | Mapping[int, ImageLike] | None = None,
    landmarks: LandmarksLike | Sequence[LandmarksLike | None] | Mapping[int, LandmarksLike] | None = None,
    window: str | Sequence[float] | Window = "auto",
    spacing_mm: Sequence[float] | None = None,
) -> Series:
    """A patient's series from files or from memory.

    Args:
        images: a list of 3D images (files, folders with one DICOM series each, SimpleITK or nibabel
            images, arrays (z, y, x)), or one of: a 4D file, a 4D image, an array (t, z, y, x), a folder
            of several DICOM series, a pattern such as "phases/*.nii.gz" (in natural order: t2 before t10).
        times: one per image, strictly increasing, in any unit. None: those of the 4D file, else 0 to T - 1.
        reference: index of the reference image, from 0.
        period: length of the breathing or heart cycle, in the unit of the times; None: not periodic.
        masks: label images; a list like the images with None where there is none, a mapping
            {index: image}, or a single image, which belongs to the reference. A mask on another grid than
            its image is resampled onto it (nearest neighbour).
        landmarks: likewise, files (see `stnerp.io.landmarks`) or points (N, 3) in LPS mm.
        window: what `Window.of` accepts.
        spacing_mm: voxel size (x, y, z), needed for arrays.

    Raises:
        MissingFileError: a file, a folder or a pattern without a match.
        InputError: anything that would make a fit fail or mislead; the message says what.
    """
    loaded, names, own_times, time_unit = _load_images(images, spacing_mm)
    if len(loaded) < 2:
        raise InputError(f"images: got {len(loaded)} ({', '.join(names)}); a series needs at least two")
    for image, name in zip(loaded, names, strict=True):
        check_voxels(image, name)
    if times is not None or own_times is None:
        own_times, time_unit = (list(range(len(loaded))) if times is None else times), None
    checked_times = _check_times(own_times, names, period)
    reference = _check_reference(reference, len(loaded))
    _check_overlap(loaded, names, reference)
    grids = [Grid.of(image) for image in loaded]
    if not all(grid.is_close(grids[reference]) for grid in grids):
        logger.info("the images' grids differ: without another one, answers are drawn on %s's", names[reference])
    shared = Window.of(window, loaded)
    for image, name in zip(loaded, names, strict=True):
        check_contrast(image, name, shared)
    return Series(
        images=tuple(loaded),
        times=checked_times,
        reference=reference,
        period=None if period is None else float(period),
        window=shared,
        masks=_load_masks(masks, loaded, names, reference, spacing_mm),
        landmarks=_load_landmarks(landmarks, grids, names, reference),
        names=tuple(names),
        time_unit=time_unit,
    )


# -- images


def _load_images(
    images: ImageLike | Sequence[ImageLike], spacing_mm: Sequence[float] | None
) -> tuple[list[sitk.Image], list[str], Sequence[float] | np.ndarray | None, str | None]:
    """Images, names, and the times and their unit where a 4D file has them."""
    images = matches_of(images)
    if _is_list(images):
        if len(images) == 1:
            return _load_images(images[0], spacing_mm)
        names = _names(images)
        scans = [_one_series(image) for image in images]
        read = [
            image if scan is None else read_dicom_series(scan) for image, scan in zip(images, scans, strict=True)
        ]
        loaded = [_named(as_image, image, name, spacing_mm) for image, name in zip(read, names, strict=True)]
        _warn_of_others([scan for scan in scans if scan is not None])
        return loaded, names, None, None
    if isinstance(images, str | os.PathLike):
        if os.path.isdir(images):
            found = dicom_series(images)
            logger.info("%s: %d series, in this order: %s", images, len(found), _described(found))
            _warn_of_others(found)
            loaded = [_named(as_image, read_dicom_series(one), one.description, None) for one in found]
            return loaded, [one.description for one in found], None, None
        volumes, times, unit = as_images(images)
        name = Path(images).name
        return volumes, [f"{name}[{i}]" for i in range(len(volumes))], times, unit
    volumes, times, unit = as_images(images, spacing_mm)
    return volumes, [f"image {i}" for i in range(len(volumes))], times, unit


def matches_of(images: Any) -> Any:
    """The files of a pattern, in natural order: t2 before t10; whatever else `images` is, as it is.

    Raises:
        MissingFileError: a pattern without a match.
    """
    if not (isinstance(images, str) and not os.path.exists(images) and glob.has_magic(images)):
        return images
    matches = sorted(glob.glob(images, recursive=True), key=_natural_order)
    if not matches:
        raise MissingFileError(f"images: no file matches the pattern {images}; check it")
    return matches


def _one_series(image: Any) -> DicomSeries | None:
    """The series of a folder that holds one."""
    found = dicom_series(image) if isinstance(image, str | os.PathLike) and os.path.isdir(image) else []
    return found[0] if len(found) == 1 else None


def _warn_of_others(scans: Sequence[DicomSeries]) -> None:
    """Say what several DICOM series have in them that is hardly of one series of one patient."""
    ids = {scan.patient_id for scan in scans}
    if len(ids) > 1:
        logger.warning("images: have %d different patient IDs; are they of one person?", len(ids))
    modalities = sorted({scan.slices[0].modality for scan in scans})
    if len(modalities) > 1:
        logger.warning("images: are of several modalities, %s; name those of one", ", ".join(modalities))
    devices = {scan.device for scan in scans}
    if len(devices) > 1:
        logger.warning("images: are of %d devices; is a cone beam CT among them?", len(devices))
    without = [scan for scan in scans if scan.phase is None]
    if 0 < len(without) < len(scans):
        logger.warning("images: %s have no phase as the others have; are they averages?", _described(without))


def _described(scans: Sequence[DicomSeries]) -> str:
    return ", ".join(f"'{scan.description}'" for scan in scans)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _names(images: Sequence[Any]) -> list[str]:
    """File names, with their folder where they'd be the same otherwise."""
    paths = [Path(image) if isinstance(image, str | os.PathLike) else None for image in images]
    same = Counter(path.name for path in paths if path is not None)
    return [
        f"image {i}" if path is None else path.name if same[path.name] == 1 else str(path)
        for i, path in enumerate(paths)
    ]


def _named(convert: Any, value: Any, name: str, *arguments: Any) -> Any:
    """A conversion whose error names the argument; files are named by the error already."""
    try:
        return convert(value, *arguments)
    except InputError as error:
        if isinstance(value, str | os.PathLike):
            raise
        raise InputError(f"{name}: {str(error).removeprefix('image: ')}") from None


def _natural_order(path: str) -> list[tuple[int, str]]:
    """Numbers in names by their value: t2 before t10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path) if part]


def check_voxels(image: sitk.Image, name: str) -> None:
    """Raises InputError for an image that tells no motion: tiny, not finite, or of one intensity."""
    size = image.GetSize()
    if min(size) < _MIN_SIZE:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} x {size[2]} voxels; every axis needs {_MIN_SIZE} or more "
            "(a DICOM series is named by its folder)"
        )
    voxels = sitk.GetArrayViewFromImage(image)
    broken = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
    if broken:
        raise InputError(
            f"{name}: {broken} voxels are NaN or infinite; fill them, with the background's value say"
        )
    if voxels.min() == voxels.max():
        raise InputError(f"{name}: every voxel is {voxels.min():g}; leave this image out or export it again")


def _check_overlap(images: Sequence[sitk.Image], names: Sequence[str], reference: int) -> None:
    fixed = Grid.of(images[reference])
    for image, name in zip(images, names, strict=True):
        grid = Grid.of(image)
        if not _overlap(grid, fixed):
            apart = float(np.linalg.norm(grid.centre_mm - fixed.centre_mm))
            raise InputError(
                f"{name}: its field of view and that of the reference, {names[reference]}, do not meet "
                f"(centres {apart:.0f} mm apart); if it is the same anatomy, reset the images' origins"
            )
        share = float(grid.contains(fixed.cube_to_world(_CUBE)).mean())
        if share < _LITTLE_OVERLAP:
            logger.warning(
                "%s: holds only %.0f %% of the field of view of the reference, %s; is it the same region?",
                *(name, 100 * share, names[reference]),
            )


def check_contrast(image: sitk.Image, name: str, window: Window) -> None:
    """Raises InputError for an image all black or white in the window: in another unit than others, say."""
    voxels = sitk.GetArrayViewFromImage(image).reshape(-1)
    seen = window.normalise(voxels[:: voxels.size // _CONTRAST_SAMPLES | 1])
    low, high = np.percentile(seen, (0.1, 99.9))
    if high - low < _CONTRAST:
        raise InputError(
            f"{name}: shows nothing in the window {window.low:g} to {window.high:g}, its intensities are "
            f"{voxels.min():g} to {voxels.max():g}; give it the other images' unit, or another window"
        )


def _overlap(a: Grid, b: Grid) -> bool:
    """Whether the boxes of two grids, of any orientation, have a point in common.

    Separating axes: two boxes are apart exactly if they are so along the cross product of two of
    their six edges, which includes the normals of their faces.
    """
    edges = np.concatenate([np.reshape(grid.direction, (3, 3)).T for grid in (a, b)])
    axes = np.array([np.cross(e, f) for e, f in combinations(edges, 2)])
    corners_a, corners_b = (axes @ grid.corners_world().T for grid in (a, b))
    apart = (corners_a.min(1) > corners_b.max(1)) | (corners_b.min(1) > corners_a.max(1))
    return not bool(apart.any())


#: Points of a cube, evenly, (8000, 3).
_CUBE = (index_points((20, 20, 20)).reshape(-1, 3) + 0.5) / 10 - 1


# -- times


def _check_times(
    times: Sequence[float] | np.ndarray, names: Sequence[str], period: float | None
) -> tuple[float, ...]:
    if isinstance(times, np.ndarray) and times.dtype.kind in "mM":
        raise InputError("times: are dates; give days, (times - times[0]) / np.timedelta64(1, 'D')")
    try:
        values = tuple(float(time) for time in times)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"times: {times!r} must be numbers, one per image") from None
    if len(values) != len(names):
        raise InputError(f"times: {len(values)} for {len(names)} images; give one per image")
    if not all(map(math.isfinite, values)):
        raise InputError(f"times: {list(values)} must be finite numbers")
    for i, (before, after) in enumerate(pairwise(values)):
        if before == after:
            raise InputError(f"times: {names[i]} and {names[i + 1]} both are at {after:g}; leave one out")
        if before > after:
            raise InputError(
                f"times: {after:g} ({names[i + 1]}) comes after {before:g} ({names[i]}); "
                "sort the images and their times together"
            )
    if all(map(_is_date, values)):
        raise InputError(
            f"times: {values[0]:.0f} and the others are dates, which don't count days evenly; give the days since "
            "the first: datetime.strptime(date, '%Y%m%d').toordinal() counts them"
        )
    if period is not None:
        _check_period(values, names, period)
        _warn_of_a_gap(values, float(period))
    elif len(values) > 2:
        _warn_of_uneven(values)
    return values


def _is_date(time: float) -> bool:
    """Whether it is a day written as DICOM does, 20240131."""
    year, month, day = int(time) // 10_000, int(time) // 100 % 100, int(time) % 100
    return time == int(time) and 1900 <= year < 2200 and 1 <= month <= 12 and 1 <= day <= 31


def _warn_of_uneven(times: tuple[float, ...]) -> None:
    """A spline leaves two near times with the slope between them, and what is noise there is far off later."""
    gaps = [after - before for before, after in pairwise(times)]
    if max(gaps) > _UNEVEN * min(gaps):
        i = gaps.index(min(gaps))
        logger.warning(
            "times: %g and %g are very near, others %g apart, and what is predicted between those may be far off; "
            "leave one of the two out",
            *(times[i], times[i + 1], max(gaps)),
        )


def _warn_of_a_gap(times: tuple[float, ...], period: float) -> None:
    """Harmonics are free where no image of the cycle holds them."""
    gaps = [after - before for before, after in pairwise([*times, times[0] + period])]
    widest = max(gaps)
    if widest > period / 2:
        i = gaps.index(widest)
        logger.warning(
            "times: no image between %g and %g, more than half of the cycle of %g; what is predicted there is a "
            "guess",
            *(times[i], times[i] + widest, period),
        )


def _check_period(times: tuple[float, ...], names: Sequence[str], period: float) -> None:
    if isinstance(period, bool | str) or not isinstance(period, SupportsFloat):
        raise InputError(f"period: {period!r} must be a number, in the unit of the times")
    if not 0 < period < _LONGEST:  # NaN isn't
        raise InputError(f"period: {period} must be a positive number, in the unit of the times")
    span = times[-1] - times[0]
    # Rounding of decimal times (0.1 steps, say) must not let the same phase through twice.
    if span > period or math.isclose(span, period):
        raise InputError(
            f"period: {period:g} is not longer than the {span:g} from first to last image, so that "
            f"{names[-1]} repeats an earlier phase; give the whole cycle's length, or leave that image out"
        )


def _check_reference(reference: int, count: int) -> int:
    try:
        index = operator.index(reference)
    except TypeError:
        index = -1
    if not 0 <= index < count:
        raise InputError(f"reference: {reference!r} must be the index of an image, from 0 to {count - 1}")
    return index


# -- masks and landmarks


def _load_masks(
    masks: Any, images: Sequence[sitk.Image], names: Sequence[str], reference: int, spacing_mm: Any
) -> tuple[sitk.Image | None, ...]:
    loaded: list[sitk.Image | None] = []
    for i, mask in enumerate(_one_per_image(masks, "masks", len(images), reference, ndim=3)):
        if mask is None:
            loaded.append(None)
            continue
        name = f"mask {mask}" if isinstance(mask, str | os.PathLike) else f"mask {i}"
        if isinstance(mask, np.ndarray | torch.Tensor) and tuple(mask.shape) == Grid.of(images[i]).shape:
            # Voxels of the image itself.
            grid = Grid.of(images[i])
            image = as_image(mask, grid.spacing_mm, grid.origin_mm, grid.direction)
        else:
            image = _named(as_image, mask, name, spacing_mm)
        loaded.append(_mask_on_grid(to_labels(image, name), name, images[i], names[i]))
    return tuple(loaded)


def _mask_on_grid(mask: sitk.Image, name: str, image: sitk.Image, image_name: str) -> sitk.Image:
    if not sitk.GetArrayViewFromImage(mask).any():
        raise InputError(f"{name}: is empty; leave it out")
    if sitk.GetArrayViewFromImage(mask).min() < 0:
        raise InputError(f"{name}: has negative labels; is it an image? give labels 1, 2, ... and 0 outside")
    if Grid.of(mask).is_close(Grid.of(image)):
        # Exactly there: ITK puts no two images together that lie apart by NIfTI's rounding.
        return Grid.of(image).image(sitk.GetArrayFromImage(mask))
    logger.warning("%s is on another grid than %s: resampled onto it (nearest neighbour)", name, image_name)
    resampled = sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    if not sitk.GetArrayViewFromImage(resampled).any():
        raise InputError(
            f"{name}: nothing of it lies inside {image_name}; is it the mask of another patient or scan?"
        )
    return resampled


def _load_landmarks(
    landmarks: Any, grids: Sequence[Grid], names: Sequence[str], reference: int
) -> tuple[np.ndarray | None, ...]:
    loaded: list[np.ndarray | None] = []
    for i, points in enumerate(_one_per_image(landmarks, "landmarks", len(grids), reference, ndim=2)):
        loaded.append(None if points is None else _points(points, i, grids[i], names[i]))
    counts = {i: len(points) for i, points in enumerate(loaded) if points is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{names[i]} {count}" for i, count in counts.items())
        raise InputError(f"landmarks: their numbers differ ({listed}); row i must be the same point in all")
    return tuple(loaded)


def _points(points: Any, i: int, grid: Grid, image_name: str) -> np.ndarray:
    """Landmarks (N, 3) LPS mm of one image."""
    name = f"landmarks {i}"
    if isinstance(points, str | os.PathLike):
        name = f"landmarks {points}"
        points = read_landmarks(points, grid)
    elif isinstance(points, torch.Tensor):
        points = points.detach().cpu().numpy()
    try:
        points_mm = np.array(points, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: must be a file or an array (N, 3) of x, y, z in LPS mm") from None
    if points_mm.ndim != 2 or points_mm.shape[1] != 3 or len(points_mm) == 0:
        raise InputError(f"{name}: shape {points_mm.shape} must be (N, 3), x, y, z in LPS mm")
    if not np.isfinite(points_mm).all():
        raise InputError(f"{name}: holds coordinates that are NaN or infinite; remove those points everywhere")
    inside = int(grid.contains(points_mm).sum())
    if inside == 0:
        raise InputError(f"{name}: no point lies inside {image_name}; are they in LPS mm, and of this scan?")
    if inside < len(points_mm):
        logger.info("%s: %d of %d points lie inside %s", name, inside, len(points_mm), image_name)
    return points_mm


def _one_per_image(given: Any, argument: str, count: int, reference: int, ndim: int) -> list[Any]:
    """What was given for each image, None where nothing was: a list, {index: value} or the reference's.

    Arrays of `ndim` axes are one value; of one axis more, one value per image.
    """
    if given is None:
        return [None] * count
    if isinstance(given, Mapping):
        values = [None] * count
        for key, value in given.items():
            if not re.fullmatch(r"[0-9]{1,9}", str(key)) or int(key) >= count:
                raise InputError(f"{argument}: {key!r} is not the index of an image, from 0 to {count - 1}")
            values[int(key)] = value
        return values
    if _is_list(given) or (isinstance(given, np.ndarray | torch.Tensor) and given.ndim == ndim + 1):
        if len(given) != count:
            raise InputError(f"{argument}: {len(given)} for {count} images; give one per image, None for none")
        return list(given)
    return [given if i == reference else None for i in range(count)]

"""Images from files and from memory, always as 3D SimpleITK images, and back to files."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import read_dicom_folder, read_dicom_series, reason

# A nibabel image is `Any`: the library has no types.
ImageLike: TypeAlias = "str | os.PathLike[str] | sitk.Image | np.ndarray | torch.Tensor | Any"

_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img")
_TIME_UNITS = {"sec": "s", "msec": "ms", "usec": "us"}


def read_image(path: str | os.PathLike[str]) -> sitk.Image:
    """A 3D image from any file that SimpleITK reads, or from a folder with one DICOM series.

    Raises:
        MissingFileError: no such file or folder.
        InputError: not a readable 3D image with one value per voxel.
    """
    if Path(path).is_dir():
        return read_dicom_series(path)
    images = _read_volumes(path)
    if len(images) > 1:
        raise InputError(f"{path}: holds {len(images)} images (4D), where a single 3D image is expected")
    return images[0]


def read_images(path: str | os.PathLike[str]) -> tuple[list[sitk.Image], list[float] | None, str | None]:
    """All 3D images of a 4D file (or of a DICOM folder), their times and the times' unit.

    Times are in the file's own unit, so 35 ms apart reads 0, 35, 70 with unit "ms". A 3D file has one
    image and no times; nor has a folder of DICOM series, which are in the order of
    `stnerp.io.dicom.dicom_series`. The unit (s, ms, us) is known for NIfTI files that state it.

    Raises:
        MissingFileError: no such file or folder.
        InputError: not readable, or more than one value per voxel.
    """
    if Path(path).is_dir():
        return read_dicom_folder(path), None, None
    images = _read_volumes(path)
    if len(images) == 1:
        return images, None, None
    if str(path).lower().endswith(_NIFTI_SUFFIXES):
        return images, *_nifti_times(nibabel.load(path).header, len(images))
    header = _read_header(path)
    return images, _ramp(header.GetOrigin()[3], header.GetSpacing()[3], len(images)), None


def read_labels(path: str | os.PathLike[str]) -> sitk.Image:
    """A 3D label image of an integer type; floating-point files with whole values are converted.

    Raises:
        MissingFileError: no such file or folder.
        InputError: not a readable 3D image, or with values that aren't whole numbers.
    """
    return to_labels(read_image(path), str(path))


def to_labels(image: sitk.Image, name: str) -> sitk.Image:
    """The image with an integer type; `name` is for the message.

    Raises:
        InputError: values that aren't whole numbers.
    """
    if image.GetPixelID() not in (sitk.sitkFloat32, sitk.sitkFloat64):
        return image
    values = sitk.GetArrayViewFromImage(image)
    if not np.all(np.isfinite(values)) or np.any(values != np.rint(values)):
        raise InputError(f"{name}: labels must be whole numbers; threshold or round the image first")
    return sitk.Cast(image, sitk.sitkInt32)


def as_image(
    image: ImageLike,
    spacing_mm: Sequence[float] | None = None,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
) -> sitk.Image:
    """A 3D SimpleITK image of a file, a SimpleITK or nibabel image, or an array (z, y, x).

    Args:
        image: what to convert. Nibabel's RAS positions become LPS; the voxels keep their order.
        spacing_mm: (x, y, z), needed for arrays and tensors and only used there.
        origin: world position (LPS mm) of the first voxel's centre, for arrays.
        direction: nine direction cosines, row-major, for arrays.

    Raises:
        MissingFileError: no such file.
        InputError: not 3D, several values per voxel, or an array without `spacing_mm`.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    volumes = as_images(image, spacing_mm, origin, direction)[0]
    if len(volumes) > 1:
        raise InputError(f"image: holds {len(volumes)} images (4D), where a single 3D image is expected")
    return volumes[0]


def as_images(
    image: ImageLike,
    spacing_mm: Sequence[float] | None = None,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
) -> tuple[list[sitk.Image], list[float] | None, str | None]:
    """All 3D images of what may be 4D, with times and unit as in `read_images`.

    Arguments and errors are those of `as_image`; 4D arrays are (t, z, y, x) and have no times.
    """
    if isinstance(image, str | os.PathLike):
        return read_images(image)
    if isinstance(image, sitk.Image):
        volumes = _volumes(image, "image")
        if len(volumes) == 1:
            return volumes, None, None
        return volumes, _ramp(image.GetOrigin()[3], image.GetSpacing()[3], len(volumes)), None
    if isinstance(image, SpatialImage):
        return _nibabel_images(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"image: {type(image).__name__} is not an image; give a file, a SimpleITK or nibabel image, "
            "or an array (z, y, x)"
        )
    if image.ndim not in (3, 4):
        raise InputError(f"image: shape {image.shape} is not (z, y, x), nor (t, z, y, x) for a series")
    if spacing_mm is None:
        raise InputError("image: an array has no voxel size; give spacing_mm=(x, y, z)")
    volumes = list(image) if image.ndim == 4 else [image]
    z, y, x = volumes[0].shape
    grid = Grid((x, y, z), _triple(spacing_mm, "spacing_mm"), _triple(origin, "origin"), tuple(direction))
    return [grid.image(_voxels(volume)) for volume in volumes], None, None


def write_image(image: sitk.Image, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a .nii, .nii.gz, .mha or .nrrd file; an interrupted write leaves no broken file behind.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false, or another format is asked for.
    """
    path = Path(path)
    suffix = next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise InputError(f"{path}: the file name must end in one of {', '.join(_SUFFIXES)}")
    check_writable(path, overwrite)
    partial = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        sitk.WriteImage(image, str(partial), useCompression=True)
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: can't be written: {reason(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path, overwrite: bool) -> None:
    """Refuse a folder that isn't there, and a file that is unless `overwrite`.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false, or is a folder.
    """
    if not path.parent.is_dir():
        raise MissingFileError(f"{path}: the folder does not exist; create it first")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already exists; choose another name or pass overwrite=true")


def _read_header(path: str | os.PathLike[str]) -> sitk.ImageFileReader:
    if not Path(path).exists():
        raise MissingFileError(f"{path}: no such file or folder; check the path")
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    return reader


def _read_volumes(path: str | os.PathLike[str]) -> list[sitk.Image]:
    reader = _read_header(path)
    # Before the voxels are read: a photograph is refused, however large.
    _check_kind(reader.GetSize(), reader.GetNumberOfComponents(), str(path))
    if str(path).lower().endswith((".nii", ".nii.gz")):
        _check_complete(path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    return _volumes(image, str(path))


def _check_complete(path: str | os.PathLike[str]) -> None:
    """ITK fills what is missing from a NIfTI cut short with zeros, without a word."""
    try:
        voxels = nibabel.load(path).dataobj
        expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
        with open(path, "rb") as file:
            # Gzip ends with the size modulo 2^32, which spares the decompression; files of several
            # members have that of the last one, and must be decompressed to know.
            file.seek(-4, os.SEEK_END)
            tail = int.from_bytes(file.read(), "little")
        if str(path).lower().endswith(".gz"):
            complete = tail == expected % 2**32 or _decompressed_size(path) >= expected
        else:
            complete = Path(path).stat().st_size >= expected
    except (OSError, EOFError, zlib.error, HeaderDataError, ImageFileError) as error:
        raise _unreadable(path, error) from None
    if not complete:
        raise InputError(f"{path}: is cut short, its last voxels are missing; copy or export it again")


def _decompressed_size(path: str | os.PathLike[str]) -> int:
    size = 0
    with gzip.open(path) as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
    return size


def _unreadable(path: str | os.PathLike[str], error: Exception) -> InputError:
    return InputError(f"{path}: can't be read as an image, export it again, as NIfTI say: {reason(error)}")


def _check_kind(size: Sequence[int], components: int, name: str) -> None:
    if components != 1:
        raise InputError(f"{name}: has {components} values per voxel (colour or vectors); expected one")
    if len(size) not in (3, 4):
        raise InputError(f"{name}: is {len(size)}D; expected a 3D image, or a 4D series")


def _volumes(image: sitk.Image, name: str) -> list[sitk.Image]:
    """The 3D images along the fourth axis, if there is one."""
    size = image.GetSize()
    _check_kind(size, image.GetNumberOfComponentsPerPixel(), name)
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"{name}: has complex voxels; give their magnitude")
    if len(size) == 3:
        return [image]
    return [
        sitk.Extract(image, [*size[:3], 0], [0, 0, 0, i], sitk.ExtractImageFilter.DIRECTIONCOLLAPSETOSUBMATRIX)
        for i in range(size[3])
    ]


def _nibabel_images(image: Any) -> tuple[list[sitk.Image], list[float] | None, str | None]:
    voxels = np.asanyarray(image.dataobj)
    if voxels.ndim not in (3, 4):
        raise InputError(f"image: nibabel image of shape {voxels.shape}; expected a 3D image or a 4D series")
    volumes = np.moveaxis(voxels, 3, 0) if voxels.ndim == 4 else voxels[None]
    x, y, z = volumes.shape[1:]
    grid = _grid_of_ras_affine(image.affine, (x, y, z))
    # Nibabel's arrays are (x, y, z).
    images = [grid.image(_voxels(volume.T)) for volume in volumes]
    if len(images) == 1 or not hasattr(image.header, "get_xyzt_units"):
        return images, None, None
    return images, *_nifti_times(image.header, len(images))


def _grid_of_ras_affine(affine: np.ndarray | None, size: tuple[int, int, int]) -> Grid:
    """The grid whose voxel centres lie where the affine (index to RAS mm) puts them."""
    if affine is None:
        raise InputError("image: the nibabel image has no affine; set one (index to RAS mm)")
    to_lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(to_lps[:, :3], axis=0)
    if not np.all(spacing > 0):
        raise InputError("image: the nibabel image's affine has an axis of no length; correct it")
    axes = to_lps[:, :3] / spacing
    # Half a degree of shear, where files of ITK stop being readable too.
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-2:
        raise InputError("image: the nibabel image's affine is sheared; resample it onto a right-angled grid")
    return Grid(
        size,
        _triple(spacing, "spacing"),
        _triple(to_lps[:, 3], "origin"),
        tuple(float(cosine) for cosine in axes.ravel()),
    )


def _nifti_times(header: Any, count: int) -> tuple[list[float] | None, str | None]:
    """Times and unit of a 4D NIfTI, in its own unit."""
    unit = _TIME_UNITS.get(header.get_xyzt_units()[1])
    # The shortest decimal that is this float32: 0.1, rather than 0.10000000149.
    step, start = (float(str(np.float32(value))) for value in (header.get_zooms()[3], header["toffset"]))
    return _ramp(start, step, count), unit


def _ramp(start: float, step: float, count: int) -> list[float] | None:
    """Evenly spaced times without the noise of their sums; None where the file states no step."""
    return [round(start + i * step, 9) for i in range(count)] if step > 0 else None


def _voxels(array: np.ndarray) -> np.ndarray:
    """The array in a type that SimpleITK has."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        return array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    if array.dtype.kind not in "iuf":
        raise InputError(f"image: an array of {array.dtype} has no intensities; give real numbers")
    # SimpleITK wants the machine's byte order, which big-endian files don't have.
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _triple(values: Sequence[float] | np.ndarray, name: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(value) for value in values)
    except (TypeError, ValueError):
        raise InputError(f"{name}: {values!r} must be three numbers (x, y, z)") from None
    return x, y, z

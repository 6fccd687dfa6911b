"""Images from files and from memory, always as 3D SimpleITK images, and back to files."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import tempfile
import warnings
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

from stnerp.atomic import replacing
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid, apply_affine
from stnerp.io.dicom import (
    memory_bytes,
    read_dicom_folder,
    read_dicom_series,
    read_multi_frame,
    reason,
)
from stnerp.quiet import quiet_itk

logger = logging.getLogger(__name__)

# A nibabel image is `Any`: the library has no types.
ImageLike: TypeAlias = "str | os.PathLike[str] | sitk.Image | np.ndarray | torch.Tensor | Any"

_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
_NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img")
_META_SUFFIXES = (".mha", ".mhd")
# What of a NIfTI header says where the voxels lie.
_NIFTI_PLACE = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
# By this part voxel sizes may differ within a header.
_SIZE_TOLERANCE = 1e-3
_TIME_UNITS = {"sec": "s", "msec": "ms", "usec": "us"}
# Deflate makes 1032 bytes of one at most, zeros all of them.
_MOST_EXPANSION = 1032
_HEADER_BYTES = 1 << 16
# Fields of views that are in millimetres lie between these, from a mouse's to a whole body's, generously.
_EXTENT_MM = (1e-1, 1e4)
# Half a degree of shear, where files of ITK stop being readable too.
_SHEAR = 1e-2
# Of the headers of MetaImage and NRRD: where the voxels are, and whether they are as they are.
_DATA_FILE = re.compile(
    rb"^(?:ElementDataFile[ \t]*=|data ?file[ \t]*:)[ \t]*([^\r\n]*)", re.MULTILINE | re.IGNORECASE
)
_RAW = re.compile(rb"^(CompressedData[ \t]*=[ \t]*False|encoding[ \t]*:[ \t]*raw)", re.MULTILINE | re.IGNORECASE)
_FIELD = re.compile(rb"^(\w+)[ \t]*=[ \t]*([^\r\n]*)", re.MULTILINE)
_LARGEST_NUMBER = 1e12
_NO_AFFINE = "image: the nibabel image has no affine; set one (index to RAS mm)"
# A longer line of a field crashes the library by which ITK reads NRRD; written ones have a tenth.
_NRRD_FIELD = 512


def read_image(path: str | os.PathLike[str]) -> sitk.Image:
    """A 3D image from any file that SimpleITK reads, or from a folder with one DICOM series.

    Raises:
        MissingFileError: no such file or folder.
        InputError: not a readable 3D image with one value per voxel.
    """
    if os.path.isdir(path):
        return _volumes(read_dicom_series(path), str(path))[0]
    images = _read_volumes(path)
    if len(images) > 1:
        raise InputError(f"{path}: holds {len(images)} images (4D), where a single 3D image is expected")
    return images[0]


def read_images(path: str | os.PathLike[str]) -> tuple[list[sitk.Image], list[float] | None, str | None]:
    """All 3D images of a 4D file (or of a DICOM folder), their times and the times' unit.

    Times are in the file's own unit, so 35 ms apart reads 0, 35, 70 with unit "ms". A 3D file has one
    image and no times; nor has a folder of DICOM series, which are in the order of
    `stnerp.io.dicom.dicom_series`. The unit (s, ms, us) is known for NIfTI files that state it. Times that
    `stnerp.io.nifti_4d.write_nifti_4d` put beside a file, as .json, are the file's.

    Raises:
        MissingFileError: no such file or folder.
        InputError: not readable, or more than one value per voxel.
    """
    if os.path.isdir(path):
        return [_volumes(image, str(path))[0] for image in read_dicom_folder(path)], None, None
    images = _read_volumes(path)
    if len(images) == 1:
        return images, None, None
    if str(path).lower().endswith(_NIFTI_SUFFIXES):
        return images, *_times_of_file(path, len(images))
    header = _read_header(path)
    return images, _ramp(header.GetOrigin()[3], header.GetSpacing()[3], len(images)), None


def sidecar(path: Path) -> Path:
    """The .json beside a NIfTI file: series.json of series.nii.gz."""
    return path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) + ".json")


def times_beside(path: Path) -> tuple[list[float], str | None] | None:
    """Times and unit that `write_nifti_4d` put beside a 4D NIfTI file; None where no .json or a foreign one is.

    Raises:
        InputError: a .json of stnerp's that holds no times.
    """
    try:
        found = json.loads(sidecar(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != {"times", "time_unit"}:
        return None
    try:
        times = [float(t) for t in found["times"]]
    except (ValueError, TypeError, OverflowError):
        raise InputError(
            f"{sidecar(path)}: holds no list of times; move it elsewhere, or write the series again"
        ) from None
    unit = found["time_unit"]
    return times, unit if unit in _TIME_UNITS.values() else None


def read_labels(path: str | os.PathLike[str]) -> sitk.Image:
    """A 3D label image of an integer type; floating-point files with whole values are converted.

    Raises:
        MissingFileError: no such file or folder.
        InputError: not a readable 3D image, or with values that `to_labels` refuses.
    """
    return to_labels(read_image(path), str(path))


def to_labels(image: sitk.Image, name: str) -> sitk.Image:
    """The image with an integer type; `name` is for the message.

    Raises:
        InputError: no SimpleITK image, values that aren't whole numbers, or floating-point ones that don't fit
            into 32 bits.
    """
    if not isinstance(image, sitk.Image):
        raise InputError(
            f"{name}: expected a SimpleITK image (stnerp.io.image.read_labels(path)), got {type(image).__name__}"
        )
    if image.GetPixelID() not in (sitk.sitkFloat32, sitk.sitkFloat64):
        return image
    values = sitk.GetArrayViewFromImage(image)
    if not np.all(np.isfinite(values)) or np.any(values != np.rint(values)):
        raise InputError(f"{name}: labels must be whole numbers; threshold or round the image first")
    limits = np.iinfo(np.int32)
    if float(values.min()) < limits.min or float(values.max()) > limits.max:
        raise InputError(f"{name}: labels must lie between {limits.min} and {limits.max}; number them anew")
    return sitk.Cast(image, sitk.sitkInt32)


def as_image(
    image: ImageLike,
    spacing_mm: Sequence[float] | None = None,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    direction: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
) -> sitk.Image:
    """A 3D SimpleITK image of a file, a SimpleITK or nibabel image, or an array (z, y, x).

    Args:
        image: what to convert. Nibabel's RAS positions become LPS; the voxels keep their order. A NIfTI image
            of nibabel's lies where its file would: SimpleITK chooses between qform and sform, and the header's
            unit counts.
        spacing_mm: (x, y, z), needed for arrays and tensors and only used there.
        origin: world position (LPS mm) of the first voxel's centre, for arrays.
        direction: nine direction cosines, row-major, for arrays.

    Raises:
        MissingFileError: no such file.
        InputError: not 3D, several values per voxel, an array without `spacing_mm`, or a place that isn't in
            space: sheared axes, voxels of no size in mm.
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
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise InputError(f"image: shape {image.shape} is not (z, y, x), nor (t, z, y, x) for a series")
    if spacing_mm is None:
        raise InputError("image: an array has no voxel size; give spacing_mm=(x, y, z)")
    volumes = list(image) if image.ndim == 4 else [image]
    z, y, x = volumes[0].shape
    grid = Grid((x, y, z), _triple(spacing_mm, "spacing_mm"), _triple(origin, "origin"), tuple(direction))
    images = [grid.image(_voxels(volume)) for volume in volumes]
    _check_geometry(images[0], "image", "give spacing_mm, origin and direction in mm")
    return images, None, None


def write_image(image: sitk.Image, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a .nii, .nii.gz, .mha or .nrrd file; an interrupted write leaves no broken file behind.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false, or another format is asked for.
    """
    path = Path(path)
    if not path.name.lower().endswith(_SUFFIXES):
        raise InputError(f"{path}: the file name must end in one of {', '.join(_SUFFIXES)}")
    check_writable(path, overwrite)
    with replacing(path, lower_suffix(path, _SUFFIXES)) as partial:
        try:
            sitk.WriteImage(image, str(partial), useCompression=True)
        except RuntimeError as error:
            raise InputError(f"{path}: can't be written: {reason(error)}") from None


def lower_suffix(path: Path, suffixes: Sequence[str]) -> str:
    """Which of these suffixes, in lower case, a file's name ends in, in any."""
    return next(suffix for suffix in suffixes if path.name.lower().endswith(suffix))


def file_reader(path: str | os.PathLike[str]) -> sitk.ImageFileReader:
    """ITK's reader for a file; a MetaImage it knows by a suffix in lower case alone, unless it is told."""
    name, reader = os.fspath(path), sitk.ImageFileReader()
    reader.SetFileName(name)
    if name.lower().endswith(_META_SUFFIXES) and not name.endswith(_META_SUFFIXES):
        reader.SetImageIO("MetaImageIO")
    return reader


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
    if not os.path.isfile(path):  # nor a device, which never ends
        raise MissingFileError(f"{path}: no such file or folder; check the path")
    _check_nrrd(path)
    if str(path).lower().endswith(_META_SUFFIXES):
        _check_metaimage(path)
    reader = file_reader(path)
    try:
        with quiet_itk():  # what matters of a header is checked here, and said in a line
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    return reader


def _read_volumes(path: str | os.PathLike[str]) -> list[sitk.Image]:
    reader = _read_header(path)
    # Before the voxels are read: a photograph is refused, however large, and a header that lies about its size.
    _check_kind(reader.GetSize(), reader.GetNumberOfComponents(), str(path))
    _check_size(reader, path)
    frames = read_multi_frame(path)
    if frames is not None:
        return _volumes(frames, str(path))
    _check_geometry(reader, str(path))
    if str(path).lower().endswith(_META_SUFFIXES):
        _check_deflated(path)
    if str(path).lower().endswith(_NIFTI_SUFFIXES):
        _check_complete(path)
        _check_place(_nibabel_image(path).header, reader, str(path))
    try:
        with quiet_itk():
            image = _nifti_voxels(reader, path) if _is_misread(reader, path) else reader.Execute()
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    return _volumes(image, str(path))


def _is_misread(reader: sitk.ImageFileReader, path: str | os.PathLike[str]) -> bool:
    """Whether it is a NIfTI of which ITK would give other voxels than its own, without a word.

    It makes zeros of what is NaN or infinite (water, in HU), and takes the voxels of a.nii for those of a.nii.gz
    beside it.
    """
    name = str(path)
    floats = reader.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64)
    beside = name.endswith(".gz") and os.path.isfile(name[:-3])
    return name.lower().endswith(_NIFTI_SUFFIXES) and (floats or beside)


def _nifti_voxels(reader: sitk.ImageFileReader, path: str | os.PathLike[str]) -> sitk.Image:
    """The image where ITK's header has it, with the voxels as nibabel reads them."""
    data = _nibabel_image(path).dataobj
    if math.prod(data.shape) != math.prod(reader.GetSize()):
        raise InputError(f"{path}: its header can be read in two ways; export it again")
    voxels = np.asanyarray(data)
    array = _voxels(voxels.reshape(reader.GetSize(), order="F").T)
    image = sitk.GetImageFromArray(array, isVector=False)
    image.SetSpacing(reader.GetSpacing())
    image.SetOrigin(reader.GetOrigin())
    image.SetDirection(reader.GetDirection())
    return image


def _check_size(reader: sitk.ImageFileReader, path: str | os.PathLike[str]) -> None:
    """Refuse more voxels than the file can hold, or than the machine can."""
    voxels, size = math.prod(reader.GetSize()), " x ".join(map(str, reader.GetSize()))
    most = _most_bytes(path)
    if voxels > most:  # of a byte at least
        raise InputError(
            f"{path}: its header speaks of {size} voxels, more than its data can hold; copy or export it again"
        )
    needed = voxels * sitk.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    if needed > memory_bytes():
        raise InputError(
            f"{path}: {size} voxels need {needed / 2**30:.0f} GiB, more memory than there is; crop or resample it"
        )


def _most_bytes(path: str | os.PathLike[str]) -> float:
    """How many bytes of voxels a file can stand for; infinite if they lie in other files in a way of their own."""
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
    named = _DATA_FILE.search(head)
    data = _data_path(path, named)
    if data == Path(path) and str(path).lower().endswith((".hdr", ".img")):
        data = data.with_suffix(".img")
    if b"\0" in bytes(data) or not os.path.isfile(data):
        if named and not named[1].strip().upper().startswith(b"LIST") and b"%" not in named[1]:
            raise MissingFileError(f"{path}: the file of its voxels, which it names, isn't there; copy it too")
        return math.inf
    raw = _RAW.search(head) or data.suffix.lower() in (".nii", ".img")
    return os.path.getsize(data) * (1 if raw else _MOST_EXPANSION)


def _data_path(path: str | os.PathLike[str], named: re.Match[bytes] | None) -> Path:
    """The file that has the voxels: the one that the header names, or the header's own."""
    if named is None or named[1].strip().upper() == b"LOCAL":
        return Path(path)
    return Path(path).parent / os.fsdecode(named[1].strip())


def _check_nrrd(path: str | os.PathLike[str]) -> None:
    with open(path, "rb") as file:
        if file.read(4) != b"NRRD":
            return
        head = file.read(_HEADER_BYTES).split(b"\n\n")[0]
    if any(len(line) > _NRRD_FIELD and b":=" not in line for line in head.splitlines()):
        raise InputError(f"{path}: a line of its NRRD header is too long; export it again")


def _check_metaimage(path: str | os.PathLike[str]) -> None:
    """Refuse a header whose numbers don't belong together: the library by which ITK reads it crashes on some."""
    with open(path, "rb") as file:
        content = file.read(_HEADER_BYTES)
    named = _DATA_FILE.search(content)
    if named and b"%" in re.sub(rb"%\d*d", b"", named[1], count=1):  # a pattern of file names, given to printf
        raise InputError(f"{path}: its ElementDataFile is no name of a file; export it again")
    head = re.split(rb"^ElementDataFile", content, maxsplit=1, flags=re.MULTILINE)[0]
    fields = {key.decode(): value.split() for key, value in _FIELD.findall(head)}
    dimension = fields.get("NDims", [])
    n = int(dimension[0]) if dimension in ([b"2"], [b"3"], [b"4"]) else 0
    counts = dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize", "Offset", "Origin", "Position"), n)
    counts |= dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), n * n)
    counts |= {"CenterOfRotation": n, "CompressedDataSize": 1, "HeaderSize": 1, "ElementNumberOfChannels": 1}
    wrong = [key for key, count in counts.items() if key in fields and not _are_numbers(fields[key], count)]
    flags = ("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData")
    wrong += [key for key in flags if fields.get(key, [b"True"]) not in ([b"True"], [b"False"])]
    if wrong or n == 0:
        raise InputError(f"{path}: its header has an unusable {wrong[0] if wrong else 'NDims'}; export it again")


def _check_deflated(path: str | os.PathLike[str]) -> None:
    """Refuse a MetaImage whose compressed voxels are damaged: ITK would read on without end."""
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
    named = _DATA_FILE.search(head)
    if named is None or not re.search(rb"^CompressedData[ \t]*=[ \t]*True", head, re.MULTILINE):
        return
    local = named[1].strip().upper() == b"LOCAL"
    data = _data_path(path, named)
    told = re.search(rb"^CompressedDataSize[ \t]*=[ \t]*(\d+)", head, re.MULTILINE)
    if told and os.path.isfile(data) and float(told[1]) > os.path.getsize(data):  # ITK would ask for that memory
        raise InputError(f"{path}: its CompressedDataSize is more than there is; copy or export it again")
    try:
        with open(data, "rb") as file:
            file.seek(head.index(b"\n", named.start()) + 1 if local else 0)
            stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip
            while not stream.eof and (chunk := file.read(1 << 20)):
                while chunk and not stream.eof:
                    stream.decompress(chunk, 1 << 24)
                    chunk = stream.unconsumed_tail
    except (OSError, ValueError, zlib.error) as error:
        raise _unreadable(path, error) from None
    if not stream.eof:
        raise InputError(f"{path}: is cut short, its last voxels are missing; copy or export it again")


def _are_numbers(words: Sequence[bytes], count: int) -> bool:
    try:
        return len(words) == count and all(abs(float(word)) < _LARGEST_NUMBER for word in words)  # NaN isn't
    except ValueError:
        return False


def _check_geometry(
    image: sitk.Image | sitk.ImageFileReader, name: str, remedy: str = "correct the header"
) -> None:
    """Refuse places that aren't in space: ITK passes on what a header says, NaN and shear included."""
    dimension = len(image.GetSize())
    spacing, origin = image.GetSpacing()[:3], image.GetOrigin()[:3]
    axes = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    if not (np.isfinite([*spacing, *origin]).all() and np.isfinite(axes).all()):
        raise InputError(f"{name}: its spacing, origin or direction isn't a number; {remedy}")
    extents = [n * s for n, s in zip(image.GetSize(), spacing, strict=False)]
    if not (_EXTENT_MM[0] <= min(extents) and max(extents) <= _EXTENT_MM[1]):
        listed = " x ".join(f"{extent:.3g}" for extent in extents)
        raise InputError(f"{name}: is {listed} mm large; is its spacing in mm? {remedy}")
    if np.abs(axes).max() > 2 or np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR:
        raise InputError(
            f"{name}: its axes are sheared or not of length 1; resample it onto a right-angled grid, or correct "
            "its direction"
        )


def _check_place(header: Any, reader: sitk.ImageFileReader, name: str) -> None:
    """Refuse voxels of two sizes: ITK takes the axes of the sform, and the size from elsewhere (pixdim).

    And warn of two places.
    """
    if "sform_code" not in header or not header["sform_code"]:
        return
    dimension = len(reader.GetSize())
    axes = np.reshape(reader.GetDirection(), (dimension, dimension))[:3, :3]
    with np.errstate(all="ignore"):  # numbers that aren't any make axes of their own
        to_lps = np.diag([-1.0, -1.0, 1.0]) @ header.get_sform()[:3, :3]
        sizes, stated = np.linalg.norm(to_lps, axis=0), np.abs(header["pixdim"][1:4])
        same_axes = np.allclose(to_lps, axes * sizes, atol=_SHEAR * float(sizes.max()))
        same_sizes = np.allclose(sizes, stated, rtol=_SIZE_TOLERANCE, atol=0)
    if same_axes and not same_sizes:
        raise InputError(f"{name}: its sform and its pixdim speak of voxels of two sizes; correct the header")
    if header["qform_code"]:
        _warn_of_two_places(header, reader, name)


def _warn_of_two_places(header: Any, reader: sitk.ImageFileReader, name: str) -> None:
    """Where sform and qform put the image in two places, other tools may take the other one."""
    indices = Grid(reader.GetSize()[:3], (1.0, 1.0, 1.0)).corners_world()
    with np.errstate(all="ignore"):
        try:
            forms = {"sform": header.get_sform(), "qform": header.get_qform()}
        except (HeaderDataError, ValueError):  # a quaternion that is none
            return
        to_mm = reader.GetSpacing()[0] / abs(header["pixdim"][1])  # from the header's unit
        places = {form: to_mm * apply_affine(affine, indices) for form, affine in forms.items()}
        apart_mm = float(np.linalg.norm(places["sform"] - places["qform"], axis=1).max())
    if apart_mm > 0.5 * min(reader.GetSpacing()[:3]):
        first_ras = np.array([-1.0, -1.0, 1.0]) * reader.GetOrigin()[:3]
        taken, other = sorted(places, key=lambda form: float(np.abs(places[form][0] - first_ras).sum()))
        logger.warning(
            "%s: its sform and its qform lie up to %.3g mm apart; the %s is taken, tools that take the %s see it "
            "elsewhere",
            name,
            apart_mm,
            taken,
            other,
        )


def _check_complete(path: str | os.PathLike[str]) -> None:
    """ITK fills what is missing from a NIfTI cut short with zeros, without a word."""
    try:
        image = _nibabel_image(path)
        voxels, data = image.dataobj, image.file_map["image"].filename
        expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
        with open(data, "rb") as file:
            # Gzip ends with the size modulo 2^32, which spares the decompression; files of several
            # members have that of the last one, and must be decompressed to know.
            file.seek(-4, os.SEEK_END)
            tail = int.from_bytes(file.read(), "little")
        if str(data).lower().endswith(".gz"):
            complete = tail == expected % 2**32 or _decompressed_size(data, expected) >= expected
        else:
            complete = os.path.getsize(data) >= expected
    except (OSError, EOFError, zlib.error, HeaderDataError, ImageFileError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from None
    if min(voxels.shape, default=0) < 1 or voxels.offset < 0:
        raise InputError(f"{path}: its header is damaged; copy or export it again")
    if not complete:
        raise InputError(f"{path}: is cut short, its last voxels are missing; copy or export it again")


def _nibabel_image(path: str | os.PathLike[str]) -> Any:
    """Its header, as nibabel reads it. What it warns of (its idea of where the image lies) isn't used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return nibabel.load(path)
        except MemoryError:  # for an extension of the header that speaks of gigabytes
            raise InputError(f"{path}: its header is damaged; copy or export it again") from None


def _decompressed_size(path: str | os.PathLike[str], enough: int) -> int:
    size = 0
    with gzip.open(path) as file:
        while size < enough and (chunk := file.read(1 << 20)):
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
    _check_geometry(image, name)
    if len(size) == 3:
        return [image]
    return [
        sitk.Extract(image, [*size[:3], 0], [0, 0, 0, i], sitk.ExtractImageFilter.DIRECTIONCOLLAPSETOSUBMATRIX)
        for i in range(size[3])
    ]


def _nibabel_images(image: Any) -> tuple[list[sitk.Image], list[float] | None, str | None]:
    voxels = np.asanyarray(image.dataobj)
    if voxels.ndim not in (3, 4) or 0 in voxels.shape:
        raise InputError(f"image: nibabel image of shape {voxels.shape}; expected a 3D image or a 4D series")
    volumes = np.moveaxis(voxels, 3, 0) if voxels.ndim == 4 else voxels[None]
    x, y, z = volumes.shape[1:]
    is_nifti = isinstance(image, nibabel.Nifti1Pair)
    grid = _grid_of_nifti(image, (x, y, z)) if is_nifti else _grid_of_ras_affine(image.affine, (x, y, z))
    # Nibabel's arrays are (x, y, z).
    images = [grid.image(_voxels(volume.T)) for volume in volumes]
    _check_geometry(images[0], "image")
    if len(images) == 1 or not hasattr(image.header, "get_xyzt_units"):
        return images, None, None
    return images, *_nifti_times(image.header, len(images))


def _grid_of_nifti(image: Any, size: tuple[int, int, int]) -> Grid:
    """The grid on which ITK would read the file of a nibabel NIfTI image.

    ITK is asked, by a file of the header alone: its choice between qform and sform is no affine of nibabel's.
    """
    if image.affine is None:
        raise InputError(_NO_AFFINE)
    header = nibabel.Nifti1Header()
    header.set_data_shape((2, 2, 2))
    for field in _NIFTI_PLACE:
        header[field] = image.header[field]
    if not np.allclose(image.affine, image.header.get_best_affine()):  # as nibabel would write it
        header.set_sform(image.affine, code="aligned")
        header.set_qform(image.affine, code="unknown")
    header["vox_offset"] = header.single_vox_offset
    reader = sitk.ImageFileReader()
    with tempfile.TemporaryDirectory() as folder, quiet_itk():
        path = Path(folder) / "a.nii"
        path.write_bytes(header.binaryblock + bytes(4))  # of no extensions
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:
            raise InputError(
                "image: the nibabel image's affine is sheared, or has an axis of no length; resample it onto a "
                "right-angled grid"
            ) from None
    _check_place(header, reader, "image")
    return Grid(size, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def _grid_of_ras_affine(affine: np.ndarray | None, size: tuple[int, int, int]) -> Grid:
    """The grid whose voxel centres lie where the affine (index to RAS mm) puts them."""
    if affine is None:
        raise InputError(_NO_AFFINE)
    to_lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(to_lps[:, :3], axis=0)
    if not np.all(spacing > 0):
        raise InputError("image: the nibabel image's affine has an axis of no length; correct it")
    axes = to_lps[:, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR:
        raise InputError("image: the nibabel image's affine is sheared; resample it onto a right-angled grid")
    return Grid(
        size,
        _triple(spacing, "spacing"),
        _triple(to_lps[:, 3], "origin"),
        tuple(float(cosine) for cosine in axes.ravel()),
    )


def _times_of_file(path: str | os.PathLike[str], count: int) -> tuple[list[float] | None, str | None]:
    """Times and unit of a 4D NIfTI file: those beside it where they are of so many images, else its header's."""
    beside = times_beside(Path(path))
    if beside is not None and len(beside[0]) == count:
        return beside
    if beside is not None:
        logger.warning("%s: the %d times beside it aren't used, it has %d images", path, len(beside[0]), count)
    return _nifti_times(_nibabel_image(path).header, count)


def _nifti_times(header: Any, count: int) -> tuple[list[float] | None, str | None]:
    """Times and unit of a 4D NIfTI, in its own unit."""
    try:
        unit = _TIME_UNITS.get(header.get_xyzt_units()[1])
    except KeyError:  # a code that NIfTI has no unit for
        unit = None
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

"""Series as one 4D NIfTI file, written time by time: a volume is all that is ever in memory.

The header says where the voxels lie (sform and qform) and when they were there: `toffset` and `pixdim[4]`, in
seconds, milliseconds, microseconds or a unit that NIfTI has no name for (phases, days). Times that aren't evenly
spaced have no place in it: they stand in a file beside it, series.json for series.nii.gz, and the header's step
is 0. `stnerp.load_series` reads them from there. A .json of others (a BIDS sidecar) is left alone.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Literal

import nibabel
import numpy as np
import SimpleITK as sitk

from stnerp.atomic import replacing
from stnerp.errors import InputError
from stnerp.geometry import Grid, homogeneous
from stnerp.io.image import check_writable, sidecar, times_beside

VoxelType = Literal["uint8", "int16", "uint16", "int32", "float32"]

_SUFFIXES = (".nii.gz", ".nii")
_UNITS = {None: "unknown", "s": "sec", "ms": "msec", "us": "usec"}
_LARGEST = 2**15 - 1  # voxels along an axis
_GZIP_LEVEL = 4  # a third of the default's time, a few percent larger
_LPS_RAS = np.diag([-1.0, -1.0, 1.0])
# Times may be off by this part of the whole: the header's numbers are float32.
_EVEN = 1e-6


def write_nifti_4d(
    volumes: Iterable[sitk.Image],
    times: Sequence[float],
    path: str | os.PathLike[str],
    *,
    dtype: VoxelType = "float32",
    time_unit: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the images of a series, as they come, into one 4D NIfTI file.

    Args:
        volumes: one for each time, on one grid; only one of them is kept at a time.
        times: strictly increasing.
        path: .nii.gz or .nii; unevenly spaced times are written beside it, as .json.
        dtype: of the voxels, with slope 1; values are rounded to whole numbers where it has no others.
        time_unit: "s", "ms", "us", or None: none that NIfTI knows.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file (or its .json) exists and `overwrite` is false, or the .json is none of times;
            times that don't increase or don't fit the volumes; volumes on different grids, or with values that
            the type doesn't hold.
    """
    path = Path(path)
    suffix = _suffix(path)
    values = [float(t) for t in times]
    if not values or not np.isfinite(values).all() or any(a >= b for a, b in pairwise(values)):
        raise InputError(f"times: {values} must be numbers that increase strictly")
    if time_unit not in _UNITS:
        raise InputError(f"time_unit: {time_unit!r} is none of NIfTI's; give s, ms, us, or None")
    beside = sidecar(path)
    _check_own(path, beside)
    check_writable(path, overwrite)
    check_writable(beside, overwrite)
    with replacing(path) as partial:
        with _opened(partial, suffix) as file:
            even = _write(file, volumes, values, np.dtype(dtype), time_unit)
        beside.unlink(missing_ok=True)  # of the file that is replaced
        if not even:
            beside.write_text(json.dumps({"times": values, "time_unit": time_unit}), encoding="utf-8")


def _suffix(path: Path) -> str:
    suffix = next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise InputError(f"{path}: the file name must end in .nii.gz or .nii")
    return suffix


def _check_own(path: Path, beside: Path) -> None:
    """Refuse to write where a .json would be lost that isn't of this module's."""
    try:
        own = not beside.is_file() or times_beside(path) is not None
    except InputError:  # its own, and damaged
        own = True
    if not own:
        raise InputError(
            f"{beside}: holds something else than times, and would be lost; choose another name than {path.name}"
        )


def _opened(path: Path, suffix: str) -> IO[bytes]:
    if suffix == ".nii":
        return open(path, "wb")
    return gzip.GzipFile(path, "wb", compresslevel=_GZIP_LEVEL, mtime=0)  # type: ignore[return-value]


def _write(
    file: IO[bytes], volumes: Iterable[sitk.Image], times: list[float], dtype: np.dtype, time_unit: str | None
) -> bool:
    """Header and voxels, x fastest, then y, z and t; whether the header knows the times."""
    grid, even, count = None, True, 0
    for volume in volumes:
        if grid is None:
            grid = Grid.of(volume)
            header, even = _header(grid, times, dtype, time_unit)
            header.write_to(file)
        if not Grid.of(volume).is_close(grid):
            raise InputError(f"volumes: number {count} is on another grid than the first; resample it")
        voxels = sitk.GetArrayViewFromImage(volume)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            voxels = np.rint(voxels) if voxels.dtype.kind == "f" else voxels
            # As Python's numbers, which are compared exactly: among float32 2³¹ - 1 is 2³¹. NaN is refused, too.
            if not (voxels.min().item() >= limits.min and voxels.max().item() <= limits.max):
                raise InputError(f"volumes: number {count} has values that {dtype} can't hold; write float32")
        file.write(voxels.astype(dtype.newbyteorder("<")).tobytes())
        count += 1
    if count != len(times):
        raise InputError(f"volumes: {count} for {len(times)} times; give one per time")
    return even


def _header(
    grid: Grid, times: list[float], dtype: np.dtype, time_unit: str | None
) -> tuple[nibabel.Nifti1Header, bool]:
    if max(*grid.size, len(times)) > _LARGEST:
        raise InputError(f"volumes: NIfTI has room for {_LARGEST} voxels along an axis, not for {grid.size}")
    start = np.float32(times[0])
    step = np.float32((times[-1] - times[0]) / max(len(times) - 1, 1))
    ramp = float(start) + float(step) * np.arange(len(times))
    even = bool(np.abs(ramp - times).max() <= _EVEN * (times[-1] - times[0]))
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape((*grid.size, len(times)))
    affine = homogeneous(_LPS_RAS, np.zeros(3)) @ grid.index_to_world_matrix
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm", _UNITS[time_unit])
    header["pixdim"][4] = step if even else 0
    header["toffset"] = start if even else 0
    header["scl_slope"], header["scl_inter"] = 1, 0
    return header, even

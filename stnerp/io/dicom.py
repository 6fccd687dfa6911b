"""DICOM series (CT, MR, PET): a folder of slices to 3D images, in order of time.

SimpleITK (GDCM) reads the slices and applies their rescale slope and intercept, so that CT is in
Hounsfield units. Which slices belong together, whether any is missing and where they lie is decided
here, from the tags: GDCM only warns of missing slices.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError, MissingFileError

logger = logging.getLogger(__name__)

# Images that are no scans: doses, portal images, segmentations, screenshots.
_OTHER_MODALITIES = {"RTDOSE", "RTIMAGE", "SEG", "SR", "OT"}
# What tells phases apart that share one series: temporal position, trigger time, acquisition number.
_PHASE_TAGS = ("0020|0100", "0018|1060", "0020|0012")
# How far a slice may lie from its place, in slice distances: coordinates are rounded, slices not absent.
_POSITION_TOLERANCE = 0.1


@dataclass(frozen=True)
class _Slice:
    path: str
    tags: dict[str, str]
    size: tuple[int, ...]

    @property
    def position(self) -> tuple[float, ...]:
        return _numbers(self.tags.get("0020|0032", ""))

    @property
    def orientation(self) -> tuple[float, ...]:
        return tuple(round(cosine, 4) for cosine in _numbers(self.tags.get("0020|0037", "")))


@dataclass(frozen=True)
class DicomSeries:
    """One 3D image among the files of a folder.

    Attributes:
        folder: where the series was found.
        description: the series description, or the series number where there is none.
        date, time: of the acquisition, as in DICOM (YYYYMMDD, HHMMSS.FFFFFF), or empty.
        phase: the percentage in the description ("Gated, 30.0%"), or None.
        number: the series number.
        slices: in order of position along the slices' normal; not for use outside.
    """

    folder: str
    description: str
    date: str
    time: str
    phase: float | None
    number: int
    slices: tuple[_Slice, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(piece.path for piece in self.slices)


def dicom_series(folder: str | os.PathLike[str]) -> list[DicomSeries]:
    """The series in a folder and its subfolders, ordered by acquisition date, phase, time and number.

    The phase of a 4D CT comes before the time of day, which says when a phase was reconstructed as
    often as when it was acquired. Phases that share one series are told apart by temporal position,
    trigger time or acquisition number. Files that aren't DICOM, localisers and doses are left out.

    Raises:
        MissingFileError: no such folder, or no DICOM image in it.
        InputError: slices at the same position that can't be told apart.
    """
    if not Path(folder).is_dir():
        raise MissingFileError(f"{folder}: no such folder; check the path")
    groups = defaultdict(list)
    for piece in _unique_slices(folder):
        groups[piece.tags.get("0020|000e", ""), piece.orientation, piece.size].append(piece)
    found = []
    for slices in groups.values():
        if len(slices) == 1 and slices[0].size[2] == 1:
            logger.info("%s: left out, a single slice (a localiser?)", slices[0].path)
            continue
        for order, phase in enumerate(_phases(slices, folder)):
            found.append((order, _describe(phase, folder)))
    if not found:
        raise MissingFileError(f"{folder}: no DICOM series in this folder; name image files, or a pattern")
    found.sort(key=lambda item: (*_time_order(item[1]), item[0]))
    return [series for _, series in found]


def read_dicom_series(source: str | os.PathLike[str] | DicomSeries) -> sitk.Image:
    """The image of a series, or of a folder that holds exactly one.

    Raises:
        MissingFileError: no such folder, or no DICOM image in it.
        InputError: several series; slices missing, unevenly spaced or sheared (tilted gantry);
            or an unreadable file.
    """
    if isinstance(source, DicomSeries):
        return _read(source)
    series = dicom_series(source)
    if len(series) > 1:
        described = ", ".join(item.description for item in series[:3]) + (", ..." if len(series) > 3 else "")
        raise InputError(f"{source}: holds {len(series)} DICOM series ({described}); give a folder with one")
    return _read(series[0])


def read_dicom_folder(folder: str | os.PathLike[str]) -> list[sitk.Image]:
    """The images of all series in a folder, in the order of `dicom_series`; errors as there and in
    `read_dicom_series`."""
    return [_read(series) for series in dicom_series(folder)]


def reason(error: Exception) -> str:
    """What an exception of SimpleITK says, without its source file, addresses and further lines."""
    text = str(error).rsplit("ERROR:", 1)[-1].strip()
    return re.sub(r"\w+\(0x[0-9a-f]+\): ", "", text).split("\n")[0].rstrip(": ")


def _read(series: DicomSeries) -> sitk.Image:
    if len(series.slices) == 1:  # a multi-frame file, with its geometry inside
        return _execute(sitk.ImageFileReader(), series)
    positions = np.array([piece.position for piece in series.slices])
    step = _slice_step(positions, series)
    reader = sitk.ImageSeriesReader()
    rescale = {
        tuple(
            _numbers(piece.tags.get(tag, default))[0] for tag, default in (("0028|1053", "1"), ("0028|1052", "0"))
        )
        for piece in series.slices
    }
    # The first slice decides the type of all, which is wrong where each has a slope of its own (PET).
    if len(rescale) > 1 or any(value != round(value) for pair in rescale for value in pair):
        reader.SetOutputPixelType(sitk.sitkFloat32)
    image = _execute(reader, series)
    row, column = np.array(_numbers(series.slices[0].tags["0020|0037"])).reshape(2, 3)
    distance = float(np.linalg.norm(step))
    image.SetOrigin(positions[0].tolist())
    image.SetSpacing([*image.GetSpacing()[:2], distance])
    image.SetDirection(np.stack([row, column, np.cross(row, column)], axis=1).ravel().tolist())
    return image


def _slice_step(positions: np.ndarray, series: DicomSeries) -> np.ndarray:
    """From one slice to the next, (3,) LPS mm, once the slices are known to be a regular stack."""
    first, last, count = positions[0], positions[-1], len(positions)
    step = (last - first) / (count - 1)
    distance = np.linalg.norm(step)
    astray = np.linalg.norm(positions - (first + np.arange(count)[:, None] * step), axis=1)
    if astray.max() > _POSITION_TOLERANCE * distance:
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        raise InputError(
            f"{series.folder}: series '{series.description}' has missing or unevenly spaced slices "
            f"({gaps.min():.3g} to {gaps.max():.3g} mm apart); export it again, complete"
        )
    row, column = np.array(_numbers(series.slices[0].tags["0020|0037"])).reshape(2, 3)
    drift = np.abs([row @ (last - first), column @ (last - first)]).max()
    pixel = min(_numbers(series.slices[0].tags.get("0028|0030", "1\\1")))
    if drift > pixel / 2:
        raise InputError(
            f"{series.folder}: series '{series.description}' has slices shifted sideways by {drift:.3g} mm "
            "(tilted gantry); resample it onto a right-angled grid first"
        )
    return step


def _execute(reader: sitk.ImageSeriesReader | sitk.ImageFileReader, series: DicomSeries) -> sitk.Image:
    if len(series.files) == 1:
        reader.SetFileName(series.files[0])
    else:
        reader.SetFileNames(series.files)
    try:
        with _quiet():
            return reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{series.folder}: series '{series.description}' can't be read; export it again: {reason(error)}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """ITK warns on stderr of uneven slices and odd tags; the first was checked, the rest is unused."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _unique_slices(folder: str | os.PathLike[str]) -> list[_Slice]:
    """Every image slice below a folder; copies of the same slice count once."""
    slices: dict[str, _Slice] = {}
    for path in sorted(Path(folder).rglob("*")):
        piece = _read_tags(str(path)) if path.is_file() else None
        if piece is not None:
            slices.setdefault(piece.tags.get("0008|0018", piece.path), piece)
    return list(slices.values())


def _read_tags(path: str) -> _Slice | None:
    """A file's tags, or None for what isn't a slice (or a volume) of a scan."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        with _quiet():
            reader.ReadImageInformation()
    except RuntimeError:
        return None
    tags = {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}
    piece = _Slice(path, tags, reader.GetSize())
    placed = len(piece.position) == 3 and len(piece.orientation) == 6
    if tags.get("0008|0060", "") in _OTHER_MODALITIES or len(piece.size) != 3:
        return None
    return piece if placed or piece.size[2] > 1 else None


def _phases(slices: Sequence[_Slice], folder: str | os.PathLike[str]) -> list[list[_Slice]]:
    """The slices, sorted along their normal, of each phase in a group that may hold several."""
    if len(slices) == 1:
        return [list(slices)]
    row, column = np.array(slices[0].orientation).reshape(2, 3)
    normal = np.cross(row, column)
    slices = sorted(slices, key=lambda piece: float(normal @ np.array(piece.position)))
    if _distinct(slices):
        return [slices]
    for tag in _PHASE_TAGS:
        groups = defaultdict(list)
        for piece in slices:
            groups[(_numbers(piece.tags.get(tag, "")) or (0.0,))[0]].append(piece)
        stacks = [groups[value] for value in sorted(groups)]
        if len({len(stack) for stack in stacks}) == 1 and len(stacks[0]) > 1 and all(map(_distinct, stacks)):
            return stacks
    raise InputError(
        f"{folder}: series '{_description(slices[0])}' has several slices at the same position and no "
        "temporal position to tell them apart; split it into one folder per phase"
    )


def _distinct(slices: Sequence[_Slice]) -> bool:
    return len({piece.position for piece in slices}) == len(slices)


def _describe(slices: Sequence[_Slice], folder: str | os.PathLike[str]) -> DicomSeries:
    description = _description(slices[0])
    percentage = re.search(r"(\d+(?:\.\d+)?)\s*%", description)
    number = _numbers(slices[0].tags.get("0020|0011", ""))
    return DicomSeries(
        folder=str(folder),
        description=description,
        date=_earliest(slices, ("0008|0022", "0008|0021", "0008|0020")),
        time=_earliest(slices, ("0008|0032", "0008|0031", "0008|0030")),
        phase=float(percentage.group(1)) if percentage else None,
        number=int(number[0]) if number else 0,
        slices=tuple(slices),
    )


def _time_order(series: DicomSeries) -> tuple[str, float, str, int]:
    # Averages and other images without a phase come after a day's phases.
    phase = float("inf") if series.phase is None else series.phase
    return series.date, phase, series.time, series.number


def _description(piece: _Slice) -> str:
    return piece.tags.get("0008|103e", "") or f"number {piece.tags.get('0020|0011', 'unknown')}"


def _earliest(slices: Iterable[_Slice], tags: Sequence[str]) -> str:
    """The smallest value of the first tag that any slice has (acquisition, else series, else study)."""
    for tag in tags:
        values = [piece.tags[tag] for piece in slices if piece.tags.get(tag)]
        if values:
            return min(values)
    return ""


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError:
        return ()

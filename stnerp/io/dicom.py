"""DICOM series (CT, MR, PET): a folder of slices to 3D images, in order of time; and back, for CT.

SimpleITK (GDCM) reads the slices and applies their rescale slope and intercept, so that CT is in
Hounsfield units. Which slices belong together, whether any is missing and where they lie is decided
here, from the headers, which pydicom reads without the pixels: GDCM only warns of missing slices.
"""

from __future__ import annotations

import filecmp
import logging
import math
import os
import re
import struct
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    generate_uid,
)

from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.quiet import quiet_itk

logger = logging.getLogger(__name__)

# Images that are no scans: doses, portal images, segmentations, screenshots.
_OTHER_MODALITIES = {"RTDOSE", "RTIMAGE", "SEG", "SR", "OT"}
# What tells phases apart that share one series: temporal position, trigger time, acquisition number.
_PHASE_TAGS = ("0020|0100", "0018|1060", "0020|0012")
# What scanners write where a percentage is of the breath: "Gated, 30.0%", "30%A", "T30%", "4D 30%", "30% Ex".
_BREATHING = re.compile(
    r"(?<![a-z])(gat(ed|ing)|phase|resp|breath|4d|t[\s=]*\d+(\.\d+)?\s*%|(ex|in)(p|sp|h\w*)?[\s.,_]*\d+(\.\d+)?\s*%)"
    r"|%[\s,_(]*(a|(ex|in)(p|sp|h[a-z]*)?)(?![a-z])",
    re.IGNORECASE,
)
# A percentage of the reconstruction: "ASIR 40%", "ASiR-V 30%", "SS50%".
_RECONSTRUCTION = re.compile(r"(?<![a-z])(asir(-?v)?|ar|ss)[\s_:=-]*\d+(\.\d+)?\s*%", re.IGNORECASE)
# Bare percentages are a breath's from so many on, in steps of that.
_FEWEST_PHASES, _PHASE_STEP = 4, 5
# How far a slice may lie from its place, in slice distances: coordinates are rounded, slices not absent.
_POSITION_TOLERANCE = 0.1
# What is kept of a header, as text: "0020|000e" is the tag (0020,000e), the series' UID.
_TAGS = (
    *("0008|0016", "0008|0018", "0008|0060", "0008|0070", "0008|1090", "0008|103e", "0010|0020"),
    *("0008|0020", "0008|0021", "0008|0022", "0008|0023", "0008|0030", "0008|0031", "0008|0032", "0008|0033"),
    *("0020|000d", "0020|000e", "0020|0011", "0020|0032", "0020|0037", "0020|0052", *_PHASE_TAGS),
    *("0028|0030", "0028|0103", "0028|1052", "0028|1053"),
)
_FRAME_TAGS = [Tag("SharedFunctionalGroupsSequence"), Tag("PerFrameFunctionalGroupsSequence"), Tag("PixelSpacing")]
_SIZE_KEYWORDS = ("Columns", "Rows", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")
_NUMBERS = {tag: int(tag.replace("|", ""), 16) for tag in _TAGS}
_READ = [*_NUMBERS.values(), *(int(Tag(keyword)) for keyword in _SIZE_KEYWORDS)]
_UNDEFINED = 2**32 - 1  # length of compressed pixels
# Unit axes at right angles, but for rounding.
_RIGHT_ANGLES = 1e-2
# No compression of pixels makes more of a byte, but for empty images.
_MOST_EXPANSION = 1032
# Stored values of a written CT are HU + 1024, unsigned.
_INTERCEPT_HU = -1024


@dataclass(frozen=True)
class DicomHeader:
    """What is kept of a DICOM file's header.

    Attributes:
        path: the file.
        tags: text of the tags that are needed here, "0020|000e" for (0020,000e).
        size: columns, rows and frames; empty for what is no image.
        pixels_complete: whether the file has as many bytes of pixels as the header speaks of.
    """

    path: str
    tags: dict[str, str] = field(repr=False)
    size: tuple[int, ...]
    pixels_complete: bool = True

    @property
    def modality(self) -> str:
        return self.tags.get("0008|0060", "")

    @property
    def series_uid(self) -> str:
        return self.tags.get("0020|000e", "")

    @property
    def position(self) -> tuple[float, ...]:
        return _numbers(self.tags.get("0020|0032", ""))

    @property
    def orientation(self) -> tuple[float, ...]:
        return tuple(round(cosine, 4) for cosine in _numbers(self.tags.get("0020|0037", "")))

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice (or a volume) of a scan."""
        if self.modality in _OTHER_MODALITIES or not self.size:
            return False
        return self.size[2] > 1 or (len(self.position) == 3 and len(self.orientation) == 6)


@dataclass(frozen=True)
class DicomSeries:
    """One 3D image among the files of a folder.

    Attributes:
        folder: where the series was found.
        description: the series description, or the series number where there is none.
        date, time: of the acquisition (else the series, the study, the content), as in DICOM
            (YYYYMMDD, HHMMSS.FFFFFF), or empty.
        phase: the percentage in the description, or None. Scanners write other percentages too ("ASIR 40%"):
            it must speak of breathing or gating ("Gated, 30.0%", "30%A", "T30%", "4D 30%", "30% Ex"), or be one
            of four or more different ones of the study's day, 0 among them, in steps of 5 ("CT 30%").
        number: the series number.
        slices: headers in order of position along the slices' normal.
    """

    folder: str
    description: str
    date: str
    time: str
    phase: float | None
    number: int
    slices: tuple[DicomHeader, ...] = field(repr=False)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(piece.path for piece in self.slices)

    @property
    def patient_id(self) -> str:
        return self.slices[0].tags.get("0010|0020", "")

    @property
    def study_uid(self) -> str:
        return self.slices[0].tags.get("0020|000d", "")

    @property
    def study_date(self) -> str:
        """YYYYMMDD, or empty."""
        return self.slices[0].tags.get("0008|0020", "")

    @property
    def series_uid(self) -> str:
        return self.slices[0].series_uid

    @property
    def frame_uid(self) -> str:
        """UID of the frame of reference, or empty."""
        return self.slices[0].tags.get("0020|0052", "")

    @property
    def image_uids(self) -> tuple[str, ...]:
        """SOP instance UIDs, in the order of the slices."""
        return tuple(piece.tags.get("0008|0018", "") for piece in self.slices)

    @property
    def device(self) -> str:
        """Manufacturer and model."""
        return " ".join(filter(None, (self.slices[0].tags.get(tag, "") for tag in ("0008|0070", "0008|1090"))))


def dicom_series(folder: str | os.PathLike[str]) -> list[DicomSeries]:
    """The series in a folder and its subfolders, ordered by acquisition date, phase, time and number.

    The phase of a 4D CT comes before the time of day, which says when a phase was reconstructed as
    often as when it was acquired. Phases that share one series are told apart by temporal position,
    trigger time or acquisition number. Files that aren't DICOM, localisers and doses are left out.

    Raises:
        MissingFileError: no such folder, or no DICOM image in it.
        InputError: slices at the same position that can't be told apart, or a damaged file.
    """
    headers, damaged = _headers(folder)
    if damaged:
        raise InputError(damaged[0])
    slices = [header for header in headers if header.is_slice]
    used = {piece.series_uid for piece in slices}
    for header in headers:
        if not header.is_slice and header.series_uid in used and header.modality not in _OTHER_MODALITIES:
            raise InputError(
                f"{header.path}: is of a series of slices, and has no pixels or doesn't say where it lies; "
                "copy it again, or remove it"
            )
    found = series_of(slices, str(folder))
    if not found:
        raise MissingFileError(f"{folder}: no DICOM series in this folder; name image files, or a pattern")
    return found


def read_headers(folder: str | os.PathLike[str]) -> list[DicomHeader]:
    """The header of every DICOM file in a folder and its subfolders; copies of a file count once.

    Damaged files are left out, with a warning.

    Raises:
        MissingFileError: no such folder.
    """
    headers, damaged = _headers(folder)
    for message in damaged:
        logger.warning("%s", message)
    return headers


def _headers(folder: str | os.PathLike[str]) -> tuple[list[DicomHeader], list[str]]:
    """Headers, and what is to be said of damaged files."""
    if not os.path.isdir(folder):
        raise MissingFileError(f"{folder}: no such folder; check the path")
    headers: list[DicomHeader] = []
    damaged: list[str] = []
    known: dict[str, DicomHeader] = {}
    for path in sorted(Path(folder).rglob("*")):
        try:
            header = _read_header(path) if path.is_file() else None
        except InputError as error:
            damaged.append(str(error))
            continue
        if header is not None:
            same = known.setdefault(header.tags.get("0008|0018", header.path), header)
            if same is header or not filecmp.cmp(same.path, header.path, shallow=False):
                headers.append(header)
    return headers, damaged


def series_of(slices: Iterable[DicomHeader], folder: str) -> list[DicomSeries]:
    """The series among slices, in the order of `dicom_series`; `folder` is for messages.

    Raises:
        InputError: slices at the same position that can't be told apart and don't show the same.
    """
    groups = defaultdict(list)
    for piece in slices:
        volume = piece.path if piece.size[2] > 1 else ""  # a multi-frame file is one by itself
        groups[piece.series_uid, piece.orientation, piece.size, volume].append(piece)
    found = []
    for group in groups.values():
        if len(group) == 1 and group[0].size[2] == 1:
            logger.info("%s: left out, a single slice (a localiser?)", group[0].path)
            continue
        for order, phase in enumerate(_phases(group, folder)):
            found.append((order, _describe(phase, folder)))
    orders, described = [order for order, _ in found], _with_bare_phases([series for _, series in found])
    ordered = sorted(zip(orders, described, strict=True), key=lambda item: (*_time_order(item[1]), item[0]))
    return [series for _, series in ordered]


def read_dicom_series(source: str | os.PathLike[str] | DicomSeries) -> sitk.Image:
    """The image of a series, or of a folder that holds exactly one.

    Raises:
        MissingFileError: no such folder, or no DICOM image in it.
        InputError: several series; slices missing, unevenly spaced or sheared (tilted gantry); a multi-frame
            file that holds several images; or an unreadable file.
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


def series_grid(series: DicomSeries) -> Grid:
    """Where the voxels of a series of single slices lie, from the headers alone.

    Raises:
        InputError: slices missing, unevenly spaced or sheared, or a multi-frame file.
    """
    if len(series.slices) == 1:
        raise InputError(
            f"{series.folder}: series '{series.description}' is one multi-frame file; convert it first"
        )
    first = series.slices[0]
    positions = np.array([piece.position for piece in series.slices])
    row, column = np.array(_numbers(first.tags["0020|0037"])).reshape(2, 3)
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > _RIGHT_ANGLES:
        raise InputError(f"{first.path}: its rows and columns are at no right angle; correct its orientation")
    between_rows, between_columns = _pixel_spacing(series)
    distance = float(np.linalg.norm(_slice_step(positions, series, min(between_rows, between_columns))))
    x, y, z = positions[0].tolist()
    return Grid(
        (first.size[0], first.size[1], len(series.slices)),
        (between_columns, between_rows, distance),
        (x, y, z),
        tuple(np.stack([row, column, np.cross(row, column)], axis=1).ravel().tolist()),
    )


def write_dicom_series(
    image: sitk.Image,
    folder: str | os.PathLike[str],
    *,
    patient_id: str,
    description: str = "",
    date: str = "",
    time: str = "",
    number: int = 1,
    study_uid: str | None = None,
    series_uid: str | None = None,
    frame_uid: str | None = None,
    model: str = "",
) -> DicomSeries:
    """Write a CT as a DICOM series, one file per slice (0001.dcm, ...), and return it as it reads back.

    Args:
        image: HU on any right-angled grid; rounded to whole numbers.
        folder: new or empty; made where it is missing, its parent is not.
        patient_id, description, number: of the series; `description` may say "Gated, 30.0%".
        date, time: of study, series and acquisition, as in DICOM (YYYYMMDD, HHMMSS), or empty.
        study_uid, series_uid, frame_uid: of the study, the series and the frame of reference; None: new
            ones. Images that belong together share the study's, images of one couch position the frame's.
        model: of the device.

    Raises:
        MissingFileError: the folder's parent does not exist.
        InputError: the folder holds files, values that aren't HU, or a date that DICOM doesn't know.
    """
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise MissingFileError(f"{folder}: its parent folder does not exist; create it first")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: already exists and is no empty folder; choose another")
    for name, text, pattern in (("date", date, r"(\d{8})?"), ("time", time, r"(\d{6}(\.\d{1,6})?)?")):
        if not re.fullmatch(pattern, text):
            raise InputError(f"{name}: {text!r} must be written as in DICOM: YYYYMMDD, HHMMSS")
    grid = Grid.of(image)
    if grid.size[2] < 2:
        raise InputError(f"{folder}: a series needs at least two slices, the image has {grid.size[2]}")
    stored = np.rint(sitk.GetArrayFromImage(image)) - _INTERCEPT_HU
    if not (stored.min() >= 0 and stored.max() < 2**16):  # NaN included
        raise InputError(f"{folder}: HU must lie between {_INTERCEPT_HU} and {_INTERCEPT_HU + 2**16 - 1}")
    rows = np.reshape(grid.direction, (3, 3)).T
    common = Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    common.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    common.SOPClassUID = CTImageStorage
    common.StudyDate = common.SeriesDate = common.AcquisitionDate = common.ContentDate = date
    common.StudyTime = common.SeriesTime = common.AcquisitionTime = common.ContentTime = time
    common.AccessionNumber = common.ReferringPhysicianName = common.StudyID = ""
    common.Modality = "CT"
    common.Manufacturer, common.ManufacturerModelName = "stnerp", model
    common.SeriesDescription = description
    common.PatientName = common.PatientID = patient_id
    common.PatientBirthDate = common.PatientSex = ""
    common.PatientPosition = "HFS"
    common.StudyInstanceUID = study_uid or generate_uid()
    common.SeriesInstanceUID = series_uid or generate_uid()
    common.FrameOfReferenceUID = frame_uid or generate_uid()
    common.PositionReferenceIndicator = ""
    common.SeriesNumber, common.AcquisitionNumber, common.KVP = number, None, None
    common.ImageOrientationPatient = [f"{cosine:.12f}" for cosine in rows[:2].ravel()]
    common.PixelSpacing = [f"{grid.spacing_mm[1]:.10g}", f"{grid.spacing_mm[0]:.10g}"]  # between rows, columns
    common.SliceThickness = f"{grid.spacing_mm[2]:.10g}"
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.Columns, common.Rows, _ = grid.size
    common.BitsAllocated = common.BitsStored = 16
    common.HighBit, common.PixelRepresentation = 15, 0
    common.RescaleIntercept, common.RescaleSlope, common.RescaleType = _INTERCEPT_HU, 1, "HU"
    folder.mkdir(exist_ok=True)
    for k, slice_ in enumerate(stored):
        piece = Dataset(common)
        piece.SOPInstanceUID = generate_uid(entropy_srcs=[common.SeriesInstanceUID, str(k)])
        piece.InstanceNumber = k + 1
        position = grid.index_to_world(np.array([0.0, 0.0, k]))
        piece.ImagePositionPatient = [f"{value:.10g}" for value in position]
        piece.PixelData = slice_.astype("<u2").tobytes()
        piece.file_meta = FileMetaDataset()
        piece.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        piece.save_as(folder / f"{k + 1:04d}.dcm", enforce_file_format=True)
    return dicom_series(folder)[0]


def reason(error: Exception) -> str:
    """What an exception of SimpleITK says, without its source file, addresses and further lines."""
    text = str(error).rsplit("ERROR:", 1)[-1].strip()
    return re.sub(r"\w+\(0x[0-9a-f]+\): ", "", text).split("\n")[0].rstrip(": ")


def _read(series: DicomSeries) -> sitk.Image:
    for piece in series.slices:
        _check_pixels(piece)
    if len(series.slices) == 1:
        return _read_frames(series)
    grid = series_grid(series)
    reader = sitk.ImageSeriesReader()
    rescale = {_rescale(piece) for piece in series.slices}
    signs = {piece.tags.get("0028|0103", "") for piece in series.slices}
    # The first slice decides the type of all, which is wrong where each has a slope of its own (PET).
    if len(rescale) > 1 or len(signs) > 1 or any(value != round(value) for pair in rescale for value in pair):
        reader.SetOutputPixelType(sitk.sitkFloat32)
    image = _execute(reader, series)
    image.SetOrigin(grid.origin_mm)
    image.SetSpacing([*image.GetSpacing()[:2], grid.spacing_mm[2]])
    image.SetDirection(grid.direction)
    return image


def read_multi_frame(path: str | os.PathLike[str]) -> sitk.Image | None:
    """The volume of a multi-frame DICOM file; None for any other file.

    Raises:
        InputError: frames that make no single even stack, or a damaged DICOM file, of one frame too.
    """
    header = _read_header(Path(path))
    if header is None:
        return None
    _check_pixels(header)
    return _read_frames(_describe([header], path)) if header.size and header.size[2] > 1 else None


def memory_bytes() -> float:
    """How much memory the machine has; infinite where it doesn't tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _check_pixels(piece: DicomHeader) -> None:
    if not piece.pixels_complete:
        raise InputError(f"{piece.path}: its pixels aren't all there, or its header lies; copy or export it again")


def _rescale(piece: DicomHeader) -> tuple[float, float]:
    """Slope and intercept."""
    values = []
    for tag, default in (("0028|1053", "1"), ("0028|1052", "0")):
        numbers = _numbers(piece.tags.get(tag) or default)
        if not numbers:
            raise InputError(f"{piece.path}: its rescale slope or intercept is no number; export it again")
        values.append(numbers[0])
    return values[0], values[1]


def _pixel_spacing(series: DicomSeries) -> tuple[float, float]:
    """Between rows and between columns, mm, the same in all slices."""
    spacings = {_numbers(piece.tags.get("0028|0030", "")) for piece in series.slices}
    for spacing in spacings:
        if len(spacing) != 2 or min(spacing) <= 0:
            raise InputError(_without_size(series))
    (rows, columns), *others = sorted(spacings)
    if others and not np.allclose(others, (rows, columns), rtol=1e-3):
        raise InputError(
            f"{series.folder}: series '{series.description}' has pixels of several sizes, {columns:g} and "
            f"{max(others)[1]:g} mm say; split it into one folder per image"
        )
    return rows, columns


def _without_size(series: DicomSeries) -> str:
    return f"{series.folder}: series '{series.description}' has pixels without a size; export it again"


def _read_frames(series: DicomSeries) -> sitk.Image:
    """The volume of a multi-frame file, where its frames say that they lie; else where GDCM puts it."""
    positions = _frame_positions(series)
    if positions is None:
        return _execute(sitk.ImageFileReader(), series)
    step = _frame_step(positions, series.slices[0].path)
    image = _execute(sitk.ImageFileReader(), series)
    between_columns, between_rows, _ = image.GetSpacing()
    row, column, _ = np.reshape(image.GetDirection(), (3, 3)).T
    _check_drift(positions[-1] - positions[0], row, column, series, min(between_columns, between_rows))
    normal = np.cross(row, column)
    axes = np.stack([row, column, math.copysign(1, normal @ step) * normal], axis=1)
    image.SetOrigin(positions[0].tolist())
    image.SetSpacing([between_columns, between_rows, float(np.linalg.norm(step))])
    image.SetDirection(axes.ravel().tolist())
    return image


def _frame_positions(series: DicomSeries) -> np.ndarray | None:
    """Where the frames of a multi-frame file lie, (N, 3) LPS mm in the file's order; None where it doesn't say.

    Raises:
        InputError: a damaged file, one that says it of some frames only, or doesn't say how large pixels are.
    """
    piece = series.slices[0]
    try:
        with open(piece.path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of odd values
            tags = _dataset(file, _FRAME_TAGS)
            shared = list(tags.get("SharedFunctionalGroupsSequence") or [])
            frames = list(tags.get("PerFrameFunctionalGroupsSequence") or [])
            found = [
                _of_groups([frame, *shared], "PlanePositionSequence", "ImagePositionPatient") for frame in frames
            ]
            sizes = _of_groups([*frames[:1], *shared], "PixelMeasuresSequence", "PixelSpacing")
            has_size = len(sizes or tags.get("PixelSpacing") or ()) == 2
    except Exception:  # of any kind, from a file of any kind
        raise InputError(f"{piece.path}: is a damaged DICOM file; copy it again, or remove it") from None
    known = [position for position in found if len(position) == 3 and all(map(math.isfinite, position))]
    if not known:
        return None
    if not len(known) == len(found) == piece.size[2]:
        raise InputError(
            f"{piece.path}: has {piece.size[2]} frames and says of {len(known)} where they lie; export it again"
        )
    if not has_size:
        raise InputError(_without_size(series))
    return np.array(known)


def _of_groups(groups: Iterable[Dataset], sequence: str, keyword: str) -> tuple[float, ...]:
    """Numbers of the first functional group that has them; none at all."""
    for group in groups:
        for item in group.get(sequence) or []:
            if item.get(keyword):
                return tuple(float(value) for value in item.get(keyword))
    return ()


def _frame_step(positions: np.ndarray, path: str) -> np.ndarray:
    """From one frame to the next, (3,) LPS mm, once the frames are known to be a regular stack."""
    step, even = _step(positions)
    count, distinct = len(positions), len(set(map(tuple, positions.round(3).tolist())))
    if distinct < count or not even:
        kind = "a series in one file" if distinct < count else "unevenly spaced or in no order"
        places = "one position" if distinct == 1 else f"{distinct} positions"
        raise InputError(f"{path}: has {count} frames at {places} ({kind}); convert it to NIfTI, by dcm2niix say")
    return step


def _slice_step(positions: np.ndarray, series: DicomSeries, pixel_mm: float) -> np.ndarray:
    """From one slice to the next, (3,) LPS mm, once the slices are known to be a regular stack."""
    step, even = _step(positions)
    if not even:
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        raise InputError(
            f"{series.folder}: series '{series.description}' has missing or unevenly spaced slices "
            f"({gaps.min():.3g} to {gaps.max():.3g} mm apart, most behind the one at "
            f"{_position_text(positions[gaps.argmax()])}); export it again, complete"
        )
    row, column = np.array(_numbers(series.slices[0].tags["0020|0037"])).reshape(2, 3)
    _check_drift(positions[-1] - positions[0], row, column, series, pixel_mm)
    return step


def _step(positions: np.ndarray) -> tuple[np.ndarray, bool]:
    """From one slice to the next, (3,), on average, and whether all (N, 3) keep to it."""
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    astray = np.linalg.norm(positions - (positions[0] + np.arange(len(positions))[:, None] * step), axis=1)
    return step, bool(astray.max() <= _POSITION_TOLERANCE * np.linalg.norm(step))


def _check_drift(
    travel: np.ndarray, row: np.ndarray, column: np.ndarray, series: DicomSeries, pixel_mm: float
) -> None:
    """Refuse a last slice that lies beside the first one: `travel`, (3,) LPS mm, is from there to it."""
    drift = np.abs([row @ travel, column @ travel]).max()
    if drift > pixel_mm / 2:
        raise InputError(
            f"{series.folder}: series '{series.description}' has slices shifted sideways by {drift:.3g} mm "
            "(tilted gantry); resample it onto a right-angled grid first"
        )


def _position_text(position: np.ndarray) -> str:
    return "({:g}, {:g}, {:g})".format(*position)


def _execute(reader: sitk.ImageSeriesReader | sitk.ImageFileReader, series: DicomSeries) -> sitk.Image:
    reader.SetImageIO("GDCMImageIO")  # of a broken file no other format's reader is to make sense
    if len(series.files) == 1:
        reader.SetFileName(series.files[0])
    else:
        reader.SetFileNames(series.files)
    try:
        with quiet_itk():  # of uneven slices, which were checked, and of odd tags, which are not used
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{series.folder}: series '{series.description}' can't be read; export it again: {reason(error)}"
        ) from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{series.folder}: series '{series.description}' is in colour; give the scan itself")
    return image


def read_tags(path: str | os.PathLike[str], tags: Sequence[int] | None = None) -> Dataset | None:
    """A file's tags but the pixels, all of them or some; None for what isn't DICOM or is broken."""
    try:
        with open(path, "rb") as file:
            return _dataset(file, tags) if _begins_like_dicom(file) else None
    except Exception:  # of any kind, from a file of any kind
        return None


def _begins_like_dicom(file: BinaryIO) -> bool:
    start = file.read(132)
    file.seek(0)
    # Some files lack the preamble and begin with the tags of group 2 or 8.
    return start[128:] == b"DICM" or start[:2] in (b"\x02\x00", b"\x08\x00")


def _dataset(file: BinaryIO, tags: Sequence[int] | None) -> Dataset:
    """Tags of a file, which is left where its pixels begin."""
    some = None if tags is None else list(tags)
    return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=some, force=True)


def _read_header(path: Path) -> DicomHeader | None:
    """A file's header, or None for what isn't DICOM.

    Raises:
        InputError: a file that says to be DICOM and isn't readable as such.
    """
    preamble = False
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of odd values in tags that aren't used here
            if not _begins_like_dicom(file):
                return None
            preamble = file.read(132)[128:] == b"DICM"
            file.seek(0)
            dataset = _dataset(file, _READ)
            tags = {tag: _text(dataset, number) for tag, number in _NUMBERS.items() if number in dataset}
            columns, rows, frames, samples, bits = (int(dataset.get(keyword) or 0) for keyword in _SIZE_KEYWORDS)
            expected = columns * rows * (frames or 1) * (samples or 1) * bits / 8
            complete = _pixels_complete(file, dataset, expected) if columns and rows else True
            directory = dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    except Exception:  # of any kind, from a file of any kind
        if not preamble:
            return None
        raise InputError(f"{path}: is a damaged DICOM file; copy it again, or remove it") from None
    if preamble and not directory and not tags.get("0020|000e"):
        raise InputError(f"{path}: is a DICOM file of no series, damaged it seems; copy it again, or remove it")
    if not tags:
        return None
    return DicomHeader(str(path), tags, (columns, rows, frames or 1) if columns and rows else (), complete)


def _pixels_complete(file: BinaryIO, dataset: Dataset, expected: float) -> bool:
    """Whether as many bytes of pixels are there as a header speaks of; the file stands where they begin."""
    begin, size = file.tell(), os.fstat(file.fileno()).st_size
    if dataset.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return expected <= _MOST_EXPANSION * size
    implicit, little = dataset.original_encoding
    order = "<" if little else ">"
    head = file.read(12)
    if len(head) < 12 or struct.unpack(f"{order}H", head[:2]) != (0x7FE0,):
        return False
    if implicit:
        (length,), begin = struct.unpack(f"{order}I", head[4:8]), begin + 8
    elif head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN"):
        (length,), begin = struct.unpack(f"{order}I", head[8:]), begin + 12
    else:
        return False
    if length != _UNDEFINED:
        return begin + length <= size and expected <= length and length % 2 == 0
    file.seek(begin)
    return expected <= _MOST_EXPANSION * (size - begin) and _fragments_complete(file, size)


def _fragments_complete(file: BinaryIO, size: int) -> bool:
    """Whether compressed pixels, a row of items, go on until the mark of their end."""
    while len(head := file.read(8)) == 8:
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            return True
        if (group, element) != (0xFFFE, 0xE000) or file.tell() + length > size:
            return False
        file.seek(length, os.SEEK_CUR)
    return False


def _text(dataset: Dataset, number: int) -> str:
    """A tag as it stands in the file: numbers that aren't any don't matter before they are used."""
    value = dataset.get_item(number).value
    if not isinstance(value, bytes):
        text = "" if value is None else str(value)
    else:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
    # Messages are of one line, whatever somebody typed.
    return "".join(character if character.isprintable() else " " for character in text.strip(" \0"))


def _phases(slices: Sequence[DicomHeader], folder: str | os.PathLike[str]) -> list[list[DicomHeader]]:
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
    if (once := _without_copies(slices)) is not None:
        logger.warning(
            "%s: series '%s' has %d slices twice, with the same pixels: one of each is taken",
            *(folder, _description(slices[0]), len(slices) - len(once)),
        )
        return [once]
    raise InputError(
        f"{folder}: series '{_description(slices[0])}' has several slices at the same position and no "
        "temporal position to tell them apart; split it into one folder per phase"
    )


def _without_copies(slices: Sequence[DicomHeader]) -> list[DicomHeader] | None:
    """One slice of each position; None where two of one position differ."""
    kept: dict[tuple[float, ...], DicomHeader] = {}
    for piece in slices:
        first = kept.setdefault(piece.position, piece)
        if first is not piece and not _same_pixels(first, piece):
            return None
    return list(kept.values())


def _same_pixels(a: DicomHeader, b: DicomHeader) -> bool:
    try:
        same_scale = _rescale(a) == _rescale(b) and a.tags.get("0028|0103") == b.tags.get("0028|0103")
        first, second = (pydicom.dcmread(piece.path) for piece in (a, b))
        same_syntax = first.file_meta.TransferSyntaxUID == second.file_meta.TransferSyntaxUID
        return bool(same_scale and same_syntax and first.PixelData == second.PixelData)
    except Exception:  # of any kind, from a file of any kind
        return False


def _distinct(slices: Sequence[DicomHeader]) -> bool:
    return len({piece.position for piece in slices}) == len(slices)


def _describe(slices: Sequence[DicomHeader], folder: str | os.PathLike[str]) -> DicomSeries:
    description = _description(slices[0])
    number = _numbers(slices[0].tags.get("0020|0011", ""))
    return DicomSeries(
        folder=str(folder),
        description=description,
        date=_earliest(slices, ("0008|0022", "0008|0021", "0008|0020", "0008|0023")),
        time=_earliest(slices, ("0008|0032", "0008|0031", "0008|0030", "0008|0033")),
        phase=_percentage(description) if _BREATHING.search(description) else None,
        number=int(number[0]) if number else 0,
        slices=tuple(slices),
    )


def _percentage(description: str) -> float | None:
    """The first percentage that isn't of the reconstruction."""
    found = re.search(r"(\d+(?:\.\d+)?)\s*%", _RECONSTRUCTION.sub("", description))
    return float(found.group(1)) if found else None


def _with_bare_phases(found: Sequence[DicomSeries]) -> list[DicomSeries]:
    """The series, with percentages alone ("CT 30%") as phases where those of a study's day look like a breath."""
    percentages: defaultdict[tuple[str, str], set[float]] = defaultdict(set)
    for series in found:
        if (percentage := _percentage(series.description)) is not None:
            percentages[series.study_uid, series.date].add(percentage)
    breaths = {day for day, values in percentages.items() if _is_breath(values)}
    return [
        replace(series, phase=_percentage(series.description))
        if (series.study_uid, series.date) in breaths
        else series
        for series in found
    ]


def _is_breath(percentages: set[float]) -> bool:
    even = all(value <= 100 and value % _PHASE_STEP == 0 for value in percentages)
    return even and 0 in percentages and len(percentages) >= _FEWEST_PHASES


def _time_order(series: DicomSeries) -> tuple[str, float, str, int]:
    # Averages and other images without a phase come after a day's phases.
    phase = float("inf") if series.phase is None else series.phase
    return series.date, phase, series.time, series.number


def _description(piece: DicomHeader) -> str:
    return piece.tags.get("0008|103e", "") or f"number {piece.tags.get('0020|0011', 'unknown')}"


def _earliest(slices: Iterable[DicomHeader], tags: Sequence[str]) -> str:
    """The smallest value of the first tag that any slice has (acquisition, series, study, content)."""
    for tag in tags:
        values = [piece.tags[tag] for piece in slices if piece.tags.get(tag)]
        if values:
            return min(values)
    return ""


def _numbers(text: str) -> tuple[float, ...]:
    """Finite numbers, or none at all."""
    try:
        numbers = tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()

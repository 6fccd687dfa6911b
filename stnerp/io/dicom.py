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
from stnerp.window import MODALITY

logger = logging.getLogger(__name__)

# Images that are no scans: doses, portal images, segmentations, screenshots.
_OTHER_MODALITIES = {"RTDOSE", "RTIMAGE", "SEG", "SR", "OT"}
# What tells phases apart that share one series.
_TRIGGER_TIME = "0018|1060"
_PHASE_TAGS = {
    "0020|0100": "temporal position",
    _TRIGGER_TIME: "trigger time",
    "0020|0012": "acquisition number",
    "0054|1300": "frame reference time",  # dynamic PET
    "0008|0032": "acquisition time",
}
_PERCENTAGE = r"(\d+(?:\.\d+)?)\s*%"
# "30% Ex", "In 30%": how deep, and on which way.
_DIRECTION = re.compile(
    rf"(?<![a-z])(ex|in)(?:p|sp|h[a-z]*)?[\s.,_]*{_PERCENTAGE}"
    rf"|{_PERCENTAGE}[\s,_(]*(ex|in)(?:p|sp|h[a-z]*)?(?![a-z])",
    re.IGNORECASE,
)
# What scanners write where a percentage is of the breath: "Gated, 30.0%", "30%A", "T30%", "4D 30%", "30% Ex".
_BREATHING = re.compile(
    rf"(?<![a-z])(gat(ed|ing)|phase|resp|breath|4d|t[\s=]*{_PERCENTAGE})|%[\s,_(]*a(?![a-z])|{_DIRECTION.pattern}",
    re.IGNORECASE,
)
# A percentage of the reconstruction: "ASIR 40%", "ASiR-V 30%", "SS50%".
_RECONSTRUCTION = re.compile(rf"(?<![a-z])(asir(-?v)?|ar|ss)[\s_:=-]*{_PERCENTAGE}", re.IGNORECASE)
# Of several phases: "AVG", "AveIP", "MIP", "MinIP", "max. int. proj.", "0-90%", "T0%-T90%".
_SEVERAL_PHASES = re.compile(
    r"(?<![a-z])(av(g|e|erage)(ip)?|mean|t?m(in|ax)?ip|(min|max)(imum)?[\s._-]*(ip|int|proj)\w*)(?![a-z])"
    rf"|\d\s*%?\s*-\s*t?{_PERCENTAGE}",
    re.IGNORECASE,
)
# Bare percentages are a breath's from so many on, in steps of that.
_FEWEST_PHASES, _PHASE_STEP = 4, 5
# How far a slice may lie from its place, in slice distances: coordinates are rounded, slices not absent.
_POSITION_TOLERANCE = 0.1
# What is kept of a header, as text: "0020|000e" is the tag (0020,000e), the series' UID.
_TAGS = (
    *("0008|0016", "0008|0018", "0008|0060", "0008|0070", "0008|1090", "0008|103e", "0010|0020"),
    *("0008|0020", "0008|0021", "0008|0022", "0008|0023", "0008|0030", "0008|0031", "0008|0032", "0008|0033"),
    *("0020|000d", "0020|000e", "0020|0011", "0020|0032", "0020|0037", "0020|0052", *_PHASE_TAGS),
    *("0028|0030", "0028|1052", "0028|1053"),
)
# What only files of several frames have, or of which only theirs is used.
_FRAME_KEYWORDS = (
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "FrameIncrementPointer"),
    *("GridFrameOffsetVector", "SpacingBetweenSlices", "SliceThickness"),
)
# Frames may follow one another in space, or else in time, angle or energy.
_SLICE_POINTERS = {Tag("SliceVector"), Tag("SliceLocationVector"), Tag("GridFrameOffsetVector")}
_SIZE_KEYWORDS = ("Columns", "Rows", "NumberOfFrames", "SamplesPerPixel")
_STORED_KEYWORDS = ("BitsAllocated", "BitsStored", "PixelRepresentation")
_NUMBERS = {tag: int(tag.replace("|", ""), 16) for tag in _TAGS}
_READ = [
    *_NUMBERS.values(),
    *(int(Tag(keyword)) for keyword in (*_SIZE_KEYWORDS, *_STORED_KEYWORDS, *_FRAME_KEYWORDS)),
]
_UNDEFINED = 2**32 - 1  # length of compressed pixels
# Unit axes at right angles, but for rounding.
_RIGHT_ANGLES = 1e-2
# No compression of pixels makes more of a byte, but for empty images.
_MOST_EXPANSION = 1032
# Stored values of a written CT are HU + 1024, unsigned.
_INTERCEPT_HU = -1024


@dataclass(frozen=True)
class Frames:
    """What a multi-frame file says of its frames.

    Attributes:
        positions: LPS mm, of those that say where they lie.
        distance_mm: from slice to slice where none does and the frames are slices; 0: it isn't said.
        rescale: slope and intercept of each; empty where the file has them once, if at all.
        pixel_mm: between rows and between columns, or empty.
    """

    positions: tuple[tuple[float, ...], ...]
    distance_mm: float
    rescale: tuple[tuple[float, float], ...]
    pixel_mm: tuple[float, ...]


@dataclass(frozen=True)
class DicomHeader:
    """What is kept of a DICOM file's header.

    Attributes:
        path: the file.
        tags: text of the tags that are needed here, "0020|000e" for (0020,000e).
        size: columns, rows and frames; empty for what is no image.
        pixels_complete: whether the file has as many bytes of pixels as the header speaks of.
        stored: bits allocated and bits used per value, and 1 if signed.
        frames: of a multi-frame file; None for any other.
    """

    path: str
    tags: dict[str, str] = field(repr=False)
    size: tuple[int, ...]
    pixels_complete: bool = True
    stored: tuple[int, ...] = ()
    frames: Frames | None = field(default=None, repr=False)

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
        if self.frames is not None:
            return bool(self.frames.positions or self.frames.distance_mm)
        return len(self.position) == 3 and len(self.orientation) == 6


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
            of four or more different ones of the study's day, 0 among them, in steps of 5 ("CT 30%"). Averages
            and projections ("AVG 0-90%", "MIP") have none. Where a study's day has both "20% In" and "20% Ex",
            which are depths, it is the percentage of the cycle from full inhalation: 100% In is 0, 20% Ex 40,
            0% Ex 50, 20% In 60.
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
    trigger time or acquisition number. Files that aren't DICOM, localisers, films and doses are left out.

    Raises:
        MissingFileError: no such folder, or no DICOM image in it.
        InputError: slices at the same position that can't be told apart, a phase that lacks some, rows and
            columns at no right angle, a damaged file, or nothing but films.
    """
    headers, damaged = _headers(folder)
    if damaged:
        raise InputError(damaged[0])
    slices = [header for header in headers if header.is_slice]
    used = {piece.series_uid for piece in slices}
    others = [header for header in headers if not header.is_slice and header.modality not in _OTHER_MODALITIES]
    for header in others:
        if header.series_uid in used:
            raise InputError(
                f"{header.path}: is of a series of slices, and has no pixels or doesn't say where it lies; "
                "copy it again, or remove it"
            )
        if header.size:
            logger.info("%s: left out, it doesn't say where it lies (a film, a screenshot?)", header.path)
    found = series_of(slices, str(folder))
    if not found and (films := [header for header in others if header.frames is not None]):
        raise InputError(_nowhere(films[0]))
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
            if same is header or not _is_copy(header, same):
                headers.append(header)
    return headers, damaged


def series_of(slices: Iterable[DicomHeader], folder: str) -> list[DicomSeries]:
    """The series among slices, in the order of `dicom_series`; `folder` is for messages.

    Raises:
        InputError: slices at the same position that can't be told apart and don't show the same, a phase
            that lacks some, or rows and columns at no right angle.
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
    orders, described = [order for order, _ in found], with_phases([series for _, series in found])
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
    row, column = _axes(first)
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
    image = _read_frames(series) if len(series.slices) == 1 else _read_slices(series)
    image.SetMetaData(MODALITY, series.slices[0].modality)  # for `window.is_ct`
    return image


def _read_slices(series: DicomSeries) -> sitk.Image:
    grid = series_grid(series)
    reader = sitk.ImageSeriesReader()
    rescale = {_rescale(piece) for piece in series.slices}
    stored = {piece.stored for piece in series.slices}
    # The first slice decides the type of all, which is wrong where each has a slope (PET) or bits of its own.
    if len(rescale) > 1 or len(stored) > 1 or any(value != round(value) for pair in rescale for value in pair):
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
    """The volume of a multi-frame file, where its frames say that they lie, or in steps of the file's distance."""
    piece = series.slices[0]
    frames, reader = piece.frames, sitk.ImageFileReader()
    if frames is None or not (frames.positions or frames.distance_mm):
        raise InputError(_nowhere(piece))
    if frames.positions and not len(frames.positions) == len(frames.rescale) == piece.size[2]:
        raise InputError(
            f"{piece.path}: has {piece.size[2]} frames and says of {len(frames.positions)} where they lie; "
            "export it again"
        )
    if len(frames.pixel_mm) != 2:
        raise InputError(_without_size(series))
    positions = np.array(frames.positions)
    step = _frame_step(positions, piece.path) if frames.positions else np.array([frames.distance_mm])
    own_rescale = len(set(frames.rescale)) > 1
    if own_rescale:
        reader.SetOutputPixelType(sitk.sitkFloat64)
    image = _execute(reader, series)
    if own_rescale:
        image = _each_rescaled(image, piece, frames.rescale)
    between_rows, between_columns = frames.pixel_mm
    image.SetSpacing([between_columns, between_rows, float(np.linalg.norm(step))])
    if frames.positions:
        row, column, _ = np.reshape(image.GetDirection(), (3, 3)).T
        _check_drift(positions[-1] - positions[0], row, column, series, min(frames.pixel_mm))
        normal = np.cross(row, column)
        axes = np.stack([row, column, math.copysign(1, normal @ step) * normal], axis=1)
        image.SetOrigin(positions[0].tolist())
        image.SetDirection(axes.ravel().tolist())
    return image


def _nowhere(piece: DicomHeader) -> str:
    return (
        f"{piece.path}: has {piece.size[2]} frames and doesn't say that they are evenly spaced slices (a film?); "
        "export it as a volume, or one file per slice"
    )


def _each_rescaled(image: sitk.Image, piece: DicomHeader, rescale: Sequence[tuple[float, float]]) -> sitk.Image:
    """The image in float32, each frame by its own slope and intercept: GDCM took those of the first for all."""
    slopes, intercepts = np.array(rescale).T[:, :, None, None]
    if not (slopes.all() and np.isfinite(rescale).all()):
        raise InputError(f"{piece.path}: a frame's rescale slope or intercept is 0 or no number; export it again")
    # Stored values are whole: rounding undoes the rescale exactly.
    stored = np.rint((sitk.GetArrayFromImage(image) - intercepts[0]) / slopes[0])
    rescaled = sitk.GetImageFromArray((stored * slopes + intercepts).astype(np.float32))
    rescaled.CopyInformation(image)
    return rescaled


def _frames(dataset: Dataset) -> Frames:
    """What a multi-frame file says of its frames."""
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
    frames = [[frame, *shared] for frame in dataset.get("PerFrameFunctionalGroupsSequence") or []]
    places = [_of_groups(groups, "PlanePositionSequence", "ImagePositionPatient") for groups in frames]
    slopes, intercepts = (  # the shared one first, as GDCM does
        [
            (*_of_groups([*shared, *frame], "PixelValueTransformationSequence", keyword), default)[0]
            for frame in frames
        ]
        for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    sizes = _of_groups(frames[0] if frames else shared, "PixelMeasuresSequence", "PixelSpacing")
    return Frames(
        tuple(place for place in places if len(place) == 3 and all(map(math.isfinite, place))),
        0.0 if frames else _frame_distance_mm(dataset),
        tuple(zip(slopes, intercepts, strict=True)),
        sizes or _values(dataset, "PixelSpacing"),
    )


def _frame_distance_mm(dataset: Dataset) -> float:
    """From one frame to the next where they are slices, as in a dose or a SPECT; 0 where nothing says it."""
    pointer = dataset.get("FrameIncrementPointer")
    if pointer is not None and not {Tag(tag) for tag in np.ravel(pointer)} <= _SLICE_POINTERS:
        return 0.0
    steps = np.diff(_values(dataset, "GridFrameOffsetVector"))
    if len(steps):
        return float(abs(steps.mean())) if np.ptp(steps) <= _POSITION_TOLERANCE * abs(steps.mean()) else 0.0
    distances = (*_values(dataset, "SpacingBetweenSlices"), *_values(dataset, "SliceThickness"))
    return next((abs(distance) for distance in distances if distance and math.isfinite(distance)), 0.0)


def _of_groups(groups: Iterable[Dataset], sequence: str, keyword: str) -> tuple[float, ...]:
    """Numbers of the first functional group that has them; none at all."""
    items = (item for group in groups for item in group.get(sequence) or [])
    return next((values for item in items if (values := _values(item, keyword))), ())


def _values(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    value = dataset.get(keyword)
    return () if value in (None, "") else tuple(float(number) for number in np.ravel(value))


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
    row, column = _axes(series.slices[0])
    _check_drift(positions[-1] - positions[0], row, column, series, pixel_mm)
    return step


def _axes(piece: DicomHeader) -> np.ndarray:
    """Unit vectors along a slice's rows and columns, (2, 3) LPS.

    Raises:
        InputError: they are none, or at no right angle.
    """
    axes = np.array(_numbers(piece.tags["0020|0037"])).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > _RIGHT_ANGLES:
        raise InputError(f"{piece.path}: its rows and columns are at no right angle; correct its orientation")
    return axes


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
            columns, rows, frames, samples = (int(dataset.get(keyword) or 0) for keyword in _SIZE_KEYWORDS)
            stored = tuple(int(dataset.get(keyword) or 0) for keyword in _STORED_KEYWORDS)
            expected = columns * rows * (frames or 1) * (samples or 1) * stored[0] / 8
            complete = _pixels_complete(file, dataset, expected) if columns and rows else True
            of_frames = _frames(dataset) if columns and rows and frames > 1 else None
            directory = dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
    except Exception:  # of any kind, from a file of any kind
        if not preamble:
            return None
        raise InputError(f"{path}: is a damaged DICOM file; copy it again, or remove it") from None
    if preamble and not directory and not tags.get("0020|000e"):
        raise InputError(f"{path}: is a DICOM file of no series, damaged it seems; copy it again, or remove it")
    if not tags:
        return None
    size = (columns, rows, frames or 1) if columns and rows else ()
    return DicomHeader(str(path), tags, size, complete, stored, of_frames)


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
    places = _places(slices)
    count = max(map(len, places))
    if count == 1:
        return [[piece for (piece,) in places]]
    name, problem = f"{folder}: series '{_description(slices[0])}'", ""
    for tag, meaning in _PHASE_TAGS.items():
        stacks = _stacks(places, tag)
        absent = [len(places) - len(stack) for stack in stacks]
        if stacks and len(places) > 1 and not any(absent):
            return stacks
        if stacks and any(absent) and not problem:
            phase = int(np.argmax(absent))
            problem = (
                f"{name} lacks {absent[phase]} of {len(places)} slices of phase {phase + 1} of {count} "
                f"({meaning} {_phase_value(stacks[phase][0], tag):g}); export it again, complete"
            )
    if (once := _without_copies(places)) is not None:
        logger.warning(
            "%s has %d slices twice, with the same pixels: one of each is taken", name, len(slices) - len(once)
        )
        return [once]
    raise InputError(problem or f"{name} has several slices at the same position{_and_why(places)}")


def _and_why(places: Sequence[Sequence[DicomHeader]]) -> str:
    """Why the slices of a place can't be told apart, and what to do: the end of a sentence."""
    known: dict[str, DicomHeader] = {}
    for piece in (piece for place in places for piece in place):
        first = known.setdefault(piece.tags.get("0008|0018", piece.path), piece)
        if first is not piece:
            return f": {first.path} and {piece.path} are one by their UID, and differ; keep one of each such pair"
    fewest, most = min(places, key=len), max(places, key=len)
    if len(fewest) < len(most):
        where = _position_text(np.array(fewest[0].position))
        return f", {len(most)} at most and {len(fewest)} at {where}; export it again, each phase complete"
    return " and no temporal position to tell them apart; split it into one folder per phase"


def _places(slices: Sequence[DicomHeader]) -> list[list[DicomHeader]]:
    """The slices of each place along their normal, in order: what is nearer than slices are is at one."""
    normal = np.cross(*_axes(slices[0]))
    slices = sorted(slices, key=lambda piece: float(normal @ piece.position))
    gaps = np.diff([normal @ piece.position for piece in slices])
    # Gaps within a place are a small part of the whole: the smallest beyond them is the slices' distance.
    ascending = np.sort(gaps)
    distance = ascending[np.searchsorted(np.cumsum(ascending), _POSITION_TOLERANCE * gaps.sum())]
    places = [[slices[0]]]
    for piece, gap in zip(slices[1:], gaps, strict=True):
        if gap > _POSITION_TOLERANCE * distance:
            places.append([])
        places[-1].append(piece)
    return places


def _stacks(places: Sequence[Sequence[DicomHeader]], tag: str) -> list[list[DicomHeader]]:
    """The slices of each phase by a tag, in its order, perhaps not at all places; none if it tells no phases."""
    ranked = [sorted(place, key=lambda piece: _phase_value(piece, tag)) for place in places]
    groups = defaultdict(list)
    for place in ranked:
        for piece in place:
            groups[_phase_value(piece, tag)].append(piece)
        if len({_phase_value(piece, tag) for piece in place}) < len(place):
            return []
    counts = set(map(len, places))
    if len(groups) == max(counts):
        return [groups[value] for value in sorted(groups)]
    # Slices that are acquired one after another have trigger times of their own: the n-th of each is a phase's.
    in_turn = tag == _TRIGGER_TIME and len(counts) == 1
    return [list(stack) for stack in zip(*ranked, strict=True)] if in_turn else []


def _phase_value(piece: DicomHeader, tag: str) -> float:
    return (*_numbers(piece.tags.get(tag, "")), 0.0)[0]


def _without_copies(places: Sequence[Sequence[DicomHeader]]) -> list[DicomHeader] | None:
    """One slice of each place; None where two of one place differ."""
    same = all(_same_pixels(first, other) for first, *others in places for other in others)
    return [place[0] for place in places] if same else None


def _is_copy(a: DicomHeader, b: DicomHeader) -> bool:
    """Whether two files are the same, byte by byte or but for the compression of their pixels."""
    if filecmp.cmp(a.path, b.path, shallow=False):
        return True
    return replace(a, path=b.path) == b and bool(a.size) and _same_pixels(a, b)


def _same_pixels(a: DicomHeader, b: DicomHeader) -> bool:
    if a.size != b.size or not (a.pixels_complete and b.pixels_complete):
        return False
    try:
        with quiet_itk():
            first, second = (
                sitk.GetArrayFromImage(sitk.ReadImage(piece.path, imageIO="GDCMImageIO")) for piece in (a, b)
            )
    except RuntimeError:
        return False
    return np.array_equal(first, second)


def _describe(slices: Sequence[DicomHeader], folder: str | os.PathLike[str]) -> DicomSeries:
    description = _description(slices[0])
    number = _numbers(slices[0].tags.get("0020|0011", ""))
    return DicomSeries(
        folder=str(folder),
        description=description,
        date=_earliest(slices, ("0008|0022", "0008|0021", "0008|0020", "0008|0023")),
        time=_earliest(slices, ("0008|0032", "0008|0031", "0008|0030", "0008|0033")),
        phase=None,
        number=int(number[0]) if number else 0,
        slices=tuple(slices),
    )


def of_several_phases(description: str) -> bool:
    """Whether a series' description is of an average or a projection over phases: "AVG", "MIP", "0-90%"."""
    return _SEVERAL_PHASES.search(description) is not None


def with_phases(found: Sequence[DicomSeries]) -> list[DicomSeries]:
    """The series with the phases of their descriptions, which those of the same study and day explain."""
    percentages: defaultdict[tuple[str, str], set[float]] = defaultdict(set)
    directions: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for series in found:
        day, percentage = (series.study_uid, series.date), _percentage(series.description)
        if percentage is not None:
            percentages[day].add(percentage)
            directions[day].add(_direction(series.description))

    def phase(series: DicomSeries) -> float | None:
        day, percentage = (series.study_uid, series.date), _percentage(series.description)
        if percentage is None or not (_BREATHING.search(series.description) or _is_breath(percentages[day])):
            return None
        direction = _direction(series.description) if {"ex", "in"} <= directions[day] else ""
        # Depths, not phases: from full inhalation down to 0, half a cycle, and up again.
        return {"ex": 50 - percentage / 2, "in": (50 + percentage / 2) % 100}.get(direction, percentage)

    return [replace(series, phase=phase(series)) for series in found]


def _percentage(description: str) -> float | None:
    """The first percentage that isn't of the reconstruction; None where it is of several phases."""
    found = re.search(_PERCENTAGE, _RECONSTRUCTION.sub("", description))
    return float(found.group(1)) if found and not of_several_phases(description) else None


def _direction(description: str) -> str:
    """Which way a depth is, "ex" or "in"; empty where it isn't said."""
    found = _DIRECTION.search(description)
    return (found.group(1) or found.group(4)).lower() if found else ""


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

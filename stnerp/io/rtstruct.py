"""DICOM RT Structure Sets: regions of interest (ROIs) to masks, and contours or label images back to files.

pydicom reads and writes the files; what a contour covers is decided in `stnerp.contours`. Names of ROIs are
text that somebody typed: they are compared and kept, never become part of a path, and get into messages only
where a ROI was asked for by name; elsewhere it is called by its number. See docs/rtstruct.md.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.config import RAISE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    ImplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RTStructureSetStorage,
    generate_uid,
)

from stnerp.atomic import replacing
from stnerp.contours import Solid, carried_contours, contour_mask, keyholes, mask_contours, plane_distance_mm
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import DicomSeries, read_tags, series_grid
from stnerp.io.image import check_writable, to_labels
from stnerp.io.landmarks import FARTHEST_MM

logger = logging.getLogger(__name__)

# Of the contours' geometric types those that bound an area; points are kept apart, open lines aren't read.
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
# What is read of a file to know what is in it: everything but the contours.
_CONTENTS = ("SOPClassUID", "Modality", "ReferencedFrameOfReferenceSequence", "StructureSetROISequence")
_ROI_FRAME = "ReferencedFrameOfReferenceUID"
_KINDS = (RTStructureSetStorage, "RTSTRUCT")
_DECIMALS = 4  # of written coordinates in mm
_IN_SLICE = 0.1  # of the slices' distance: how far from a slice a contour may lie that is written for it
# What a file says about patient and study comes from the scan that the contours belong to.
_PATIENT = ("PatientName", "PatientBirthDate", "PatientSex")
_PATIENT_IF_THERE = ("IssuerOfPatientID", "PatientBirthTime", "OtherPatientIDs", "PatientIdentityRemoved",
                     "DeidentificationMethod", "PatientAge", "PatientSize", "PatientWeight")  # fmt: skip
_STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription")
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # by which RTSTRUCT refers to a study
# Of slices that don't say it themselves, by modality; CT's otherwise.
_CLASSES = {"MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}
_COLORS = ((255, 64, 64), (64, 160, 255), (80, 220, 80), (255, 200, 0), (220, 80, 255), (0, 220, 220),
           (255, 140, 40), (160, 160, 160))  # fmt: skip


@dataclass(frozen=True, eq=False)
class Roi:
    """A region of interest.

    Attributes:
        number: unique within the file.
        name: as it was typed; other ROIs may have the same.
        color: red, green, blue from 0 to 255, or None.
        contours: closed polygons (N, 3), LPS mm; none where it was named but not drawn, or drawn as points.
        thickness_mm: distance of neighbouring contours, the median; of one on a single plane, that of the file's
            other ROIs; None: not known.
        points: drawn as single points (N, 3), LPS mm.
        interpreted_type: what it is for: "PTV", "ORGAN", "SUPPORT", ...; or empty.
        label, description: as they were typed, or empty.
        frame_uid: frame of reference that it is in, or empty.
    """

    number: int
    name: str
    color: tuple[int, int, int] | None = None
    contours: tuple[np.ndarray, ...] = field(default=(), repr=False)
    thickness_mm: float | None = None
    points: np.ndarray = field(default_factory=lambda: np.empty((0, 3)), repr=False)
    interpreted_type: str = ""
    label: str = ""
    description: str = ""
    frame_uid: str = ""


@dataclass(frozen=True, eq=False)
class StructureSet:
    """An RTSTRUCT file.

    Attributes:
        path: of the file, for messages.
        frame_uid: frame of reference that most of the ROIs are in, or empty.
        series_uids: of the images that they were drawn on.
        rois: in the order of the file.
        uid: of the file itself (SOP instance).
        patient_id: as it is in the file.
    """

    path: str
    frame_uid: str
    series_uids: tuple[str, ...]
    rois: tuple[Roi, ...]
    uid: str = ""
    patient_id: str = field(default="", repr=False)

    def roi(self, wanted: str | int) -> Roi:
        """The ROI of a name or a number.

        A name is looked for as it is, then without regard to spaces and to upper and lower case. Among
        several of the same name one that is drawn is taken before those that aren't.

        Raises:
            InputError: there is none, or several of that name are drawn.
        """
        if isinstance(wanted, int):
            found = [roi for roi in self.rois if roi.number == wanted]
        else:
            found = [roi for roi in self.rois if roi.name == wanted]
            found = found or [roi for roi in self.rois if plain_name(roi.name) == plain_name(wanted)]
        return one_roi(found, wanted, self)


@dataclass(frozen=True)
class StructureFile:
    """What an RTSTRUCT file holds, without its contours.

    Attributes:
        path: of the file.
        frame_uid, series_uids: as of `StructureSet`.
        image_uids: of the slices that contours were drawn on, where the file names them.
        names: of its ROIs.
    """

    path: str
    frame_uid: str
    series_uids: tuple[str, ...]
    image_uids: frozenset[str] = field(repr=False)
    names: tuple[str, ...]


def plain_name(name: str) -> str:
    """A name for comparison: without spaces, in lower case."""
    return "".join(name.split()).casefold()


def shown(name: str) -> str:
    """A name for messages, on one line whatever was typed."""
    return "".join(character if character.isprintable() else " " for character in name)


def one_roi(found: Sequence[Roi], wanted: str | int, structures: StructureSet) -> Roi:
    """The only ROI among those found, or the only one that is drawn.

    Raises:
        InputError: none, or several that are drawn.
    """
    drawn = [roi for roi in found if roi.contours]
    if len(drawn) > 1:
        listed = ", ".join(f"{roi.number} '{shown(roi.name)}'" for roi in drawn)
        raise InputError(f"{structures.path}: {wanted!r} fits several ROIs ({listed}); ask by number")
    if not found:
        listed = ", ".join(shown(roi.name) for roi in structures.rois) or "none"
        raise InputError(f"{structures.path}: no ROI {wanted!r}; there are: {listed}")
    return (drawn or list(found))[0]


# -- reading


def read_rtstruct(path: str | os.PathLike[str]) -> StructureSet:
    """The ROIs of an RTSTRUCT file, with their closed contours and points.

    Open lines are left out, and so is a contour that is there twice, each with a notice.

    Raises:
        MissingFileError: no such file.
        InputError: not an RTSTRUCT, or contours that are no points x, y, z.
    """
    with _one_error(path):
        dataset = _read(path)
        frame_uid, series_uids, _ = _references(dataset)
        rois = _rois(dataset, frame_uid, str(path))
        uid, patient_id = _text(dataset, "SOPInstanceUID"), _text(dataset, "PatientID")
    thicknesses_mm = [roi.thickness_mm for roi in rois if roi.thickness_mm is not None]
    usual_mm = median_low(thicknesses_mm) if thicknesses_mm else None
    known = (roi if roi.thickness_mm is not None else replace(roi, thickness_mm=usual_mm) for roi in rois)
    return StructureSet(str(path), frame_uid, series_uids, tuple(known), uid, patient_id)


def rtstruct_contents(path: str | os.PathLike[str]) -> StructureFile:
    """What an RTSTRUCT file refers to and its ROIs' names, without reading contours.

    Raises:
        MissingFileError: no such file.
        InputError: not an RTSTRUCT.
    """
    with _one_error(path):
        dataset = _read(path, _CONTENTS)
        names = tuple(_text(item, "ROIName") for item in _items(dataset, "StructureSetROISequence"))
        frame_uid, series_uids, image_uids = _references(dataset)
    return StructureFile(str(path), frame_uid, series_uids, image_uids, names)


def roi_mask(roi: Roi, grid: Grid) -> sitk.Image:
    """1 where a voxel's centre lies inside an ROI, else 0, on any grid (see `stnerp.contours`).

    Raises:
        InputError: the ROI isn't drawn, isn't planar, or covers no voxel of the grid.
    """
    if not roi.contours:
        raise InputError(f"ROI '{shown(roi.name)}': has no closed contours; leave it out")
    try:
        inside = contour_mask(roi.contours, grid, roi.thickness_mm)
    except InputError as error:
        raise InputError(f"ROI '{shown(roi.name)}': {error}") from None
    if not inside.any():
        raise InputError(
            f"ROI '{shown(roi.name)}': covers no voxel of the image; is it of another patient or scan?"
        )
    return grid.image(inside.astype(np.uint8))


def roi_labels(rois: Iterable[Roi], grid: Grid) -> sitk.Image:
    """Labels 1, 2, ... of ROIs in the given order, 0 elsewhere; uint8, or uint16 for more than 255.

    Where ROIs overlap the one named first counts: name a tumour before the lung around it.

    Raises:
        InputError: as `roi_mask`.
    """
    rois = list(rois)
    labels = np.zeros(grid.shape, np.uint8 if len(rois) < 256 else np.uint16)
    for label, roi in enumerate(rois, 1):
        labels[(sitk.GetArrayFromImage(roi_mask(roi, grid)) > 0) & (labels == 0)] = label
    return grid.image(labels)


def carried_rois(
    rois: Iterable[Roi],
    grid: Grid,
    target_to_reference: Callable[[np.ndarray], np.ndarray],
    reference_to_target: Callable[[np.ndarray], np.ndarray],
) -> list[Roi]:
    """ROIs of the reference where a deformation carries them, their contours drawn in a target's slices.

    Args:
        rois: drawn on the reference.
        grid: of the target, `stnerp.io.dicom.series_grid` of its series.
        target_to_reference, reference_to_target: points (N, 3) to points (N, 3), LPS mm, inverse to each other.

    Returns:
        The same ROIs with other contours (see `stnerp.contours.carried_contours`) and points, in the target's
        frame of reference, whatever its UID; one that lies outside the target has none.

    Raises:
        InputError: an ROI isn't planar.
    """
    carried = []
    for roi in rois:
        contours: list[np.ndarray] = []
        if roi.contours:
            try:
                solid = Solid.of(roi.contours, roi.thickness_mm or grid.spacing_mm[2], max(grid.spacing_mm[:2]))
            except InputError as error:
                raise InputError(f"ROI {roi.number}: {error}") from None
            contours = carried_contours(solid, grid, target_to_reference, reference_to_target)
        points = reference_to_target(roi.points) if len(roi.points) else roi.points
        carried.append(
            replace(
                roi,
                contours=tuple(contours),
                points=points[grid.contains(points)],
                thickness_mm=grid.spacing_mm[2],
                frame_uid="",
            )
        )
    return carried


@contextmanager
def _one_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """pydicom reads sequences when they are asked for, and then finds what is wrong with them."""
    try:
        with _quietly():
            yield
    except InputError:
        raise
    except Exception:  # of any kind, from a file of any kind
        raise InputError(f"{path}: is a damaged RT Structure Set; copy or export it again") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without pydicom's remarks on values that DICOM doesn't take: they quote them, so say who the patient is."""
    remarks = logging.getLogger("pydicom")
    before, remarks.disabled = remarks.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.disabled = before


def _read(path: str | os.PathLike[str], keywords: Sequence[str] | None = None) -> Dataset:
    if not os.path.isfile(path):
        raise MissingFileError(f"{path}: no such file; check the path")
    dataset = read_tags(path, None if keywords is None else [int(Tag(keyword)) for keyword in keywords])
    if dataset is None or (dataset.get("SOPClassUID") or dataset.get("Modality")) not in _KINDS:
        raise InputError(f"{path}: can't be read as an RT Structure Set; give an RTSTRUCT file, whole")
    return dataset


def _references(dataset: Dataset) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """Frame of reference, series and images that a structure set was drawn on.

    The frame is the one that most ROIs name: a file may list others besides.
    """
    frames = _items(dataset, "ReferencedFrameOfReferenceSequence")
    series = [
        item
        for frame in frames
        for study in _items(frame, "RTReferencedStudySequence")
        for item in _items(study, "RTReferencedSeriesSequence")
    ]
    images = (_text(image, "ReferencedSOPInstanceUID")
              for item in series for image in _items(item, "ContourImageSequence"))  # fmt: skip
    stated = Counter(_text(item, _ROI_FRAME) for item in _items(dataset, "StructureSetROISequence"))
    del stated[""]
    listed = next((_text(frame, "FrameOfReferenceUID") for frame in frames), "")
    frame_uid = max(stated, key=lambda uid: stated[uid], default=listed)
    return frame_uid, tuple(dict.fromkeys(_text(item, "SeriesInstanceUID") for item in series)), frozenset(images)


def _rois(dataset: Dataset, frame_uid: str, path: str) -> list[Roi]:
    """`frame_uid`: of ROIs that don't state theirs."""
    drawn: dict[int, list[Dataset]] = defaultdict(list)
    for item in _items(dataset, "ROIContourSequence"):
        drawn[_whole(item, "ReferencedROINumber", path)].append(item)
    observed: dict[int, Dataset] = {}
    for item in _items(dataset, "RTROIObservationsSequence"):
        with suppress(InputError):  # what is said of no ROI is left out
            observed.setdefault(_whole(item, "ReferencedROINumber", path), item)
    rois = []
    for item in _items(dataset, "StructureSetROISequence"):
        number = _whole(item, "ROINumber", path)
        contours, points = _geometry(drawn[number], number, path)
        color = next((part.ROIDisplayColor for part in drawn[number] if part.get("ROIDisplayColor")), None)
        observation = observed.get(number, Dataset())
        rois.append(
            Roi(
                number,
                _text(item, "ROIName"),
                None if color is None or len(color) != 3 else (int(color[0]), int(color[1]), int(color[2])),
                contours,
                _thickness_mm(contours),
                points,
                _text(observation, "RTROIInterpretedType"),
                _text(observation, "ROIObservationLabel"),
                _text(item, "ROIDescription"),
                _text(item, _ROI_FRAME) or frame_uid,
            )
        )
    return rois


def _thickness_mm(contours: tuple[np.ndarray, ...]) -> float | None:
    try:
        return plane_distance_mm(contours) if contours else None
    except InputError:  # which `roi_mask` raises, for those who want this ROI
        return None


def _geometry(items: Iterable[Dataset], number: int, path: str) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Closed contours and single points (N, 3)."""
    contours: dict[bytes, np.ndarray] = {}
    points, others, repeated = [np.empty((0, 3))], 0, 0
    for contour in (contour for item in items for contour in _items(item, "ContourSequence")):
        data, kind = _points(contour, number, path), _text(contour, "ContourGeometricType")
        if kind in _CLOSED and len(data) >= 3:
            repeated += contours.setdefault(_borders(data), data) is not data
        elif kind == "POINT":
            points.append(data)
        else:
            others += 1
    if others:
        logger.info("%s: ROI %d: %d open lines left out", path, number, others)
    if repeated:
        logger.info("%s: ROI %d: %d contours that are there twice taken once", path, number, repeated)
    return tuple(contours.values()), np.concatenate(points)


def _borders(points: np.ndarray) -> bytes:
    """The same for the same closed contour, wherever it starts and whatever way it runs: twice the same borders
    would be none by the even-odd rule."""
    points = np.round(points, _DECIMALS) + 0.0  # no -0.0
    edges = np.concatenate([points, np.roll(points, -1, axis=0)], axis=1)
    edges = edges[np.any(edges[:, :3] != edges[:, 3:], axis=1)]
    turned = np.roll(edges, 3, axis=1)
    first = np.argmax(edges != turned, axis=1)[:, None]
    edges = np.where(np.take_along_axis(edges > turned, first, axis=1), turned, edges)
    return edges[np.lexsort(edges.T)].tobytes()


def _points(contour: Dataset, number: int, path: str) -> np.ndarray:
    """(N, 3), from the text: far quicker than number by number."""
    try:
        data = contour.get_item("ContourData")
        values = () if data is None else data.value
        numbers = values.split(b"\\") if isinstance(values, bytes) else list(values or ())
        points = np.array([number for number in numbers if number != b""], dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError):
        points = np.full((1, 3), np.nan)
    if not (np.abs(points) < FARTHEST_MM).all():  # NaN included
        raise InputError(f"{path}: ROI {number}: a contour is no list of points x, y, z; export it again")
    return points


def _items(dataset: Dataset, keyword: str) -> Sequence[Dataset]:
    return dataset.get(keyword) or ()


def _text(dataset: Dataset, keyword: str) -> str:
    value: Any = dataset.get(keyword)
    if value is None:
        return ""
    # A backslash in a name parts it in two for DICOM.
    return "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)


def _whole(dataset: Dataset, keyword: str, path: str) -> int:
    try:
        return int(dataset[keyword].value)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: an ROI has no number ({keyword}); export it again") from None


# -- writing


def write_rtstruct(
    labels: sitk.Image,
    names: Mapping[int, str],
    series: DicomSeries,
    path: str | os.PathLike[str],
    *,
    colors: Mapping[int, tuple[int, int, int]] | None = None,
    title: str = "stnerp",
    overwrite: bool = False,
) -> None:
    """Write the contours of a label image as the structure set of a CT series.

    They lie in the series' slices, at sub-voxel accuracy where the labels are on another grid. The ROIs'
    numbers are the labels. A label without voxels becomes an ROI without contours.

    Args:
        labels: on any grid of the series' world space.
        names: of the labels that are written.
        series, path, title: as of `write_structures`.
        colors: red, green, blue from 0 to 255 of labels; the others get one.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: as `write_structures`, or labels without a name.
    """
    check_writable(Path(path), overwrite)
    labels = to_labels(labels, "labels")
    found = {int(label) for label in np.unique(sitk.GetArrayViewFromImage(labels)) if label != 0}
    if found - set(names):
        raise InputError(f"names: labels {sorted(found - set(names))} have none; name every label of the image")
    for label, name in names.items():
        _check_name(label, name)
    _check_series(series, title)
    grid = series_grid(series)

    def contours(label: int) -> tuple[np.ndarray, ...]:
        slices = mask_contours(_mask_on(labels, label, grid), grid)
        return tuple(outline for outlines in slices for outline in outlines)

    rois = [Roi(label, name, (colors or {}).get(label), contours(label)) for label, name in sorted(names.items())]
    description = series.description.replace("\\", "/")[:64]  # as long as DICOM lets it be
    write_structures(rois, series, path, title=title, description=description, overwrite=overwrite)


def write_structures(
    rois: Sequence[Roi],
    series: DicomSeries,
    path: str | os.PathLike[str],
    *,
    title: str = "stnerp",
    description: str = "computed contours",
    source_uid: str = "",
    overwrite: bool = False,
) -> None:
    """Write ROIs as the structure set of a CT series: computed, unapproved, with UIDs of its own.

    Patient, study and frame of reference are the series', but for values that DICOM doesn't take, which are left
    out with a warning; each contour refers to the slice that it lies in.
    Holes are joined to the outlines around them (keyholes), since many programs read nothing else.

    Args:
        rois: their contours lie in slices of the series, and combine by the even-odd rule in each. Names,
            numbers, colours, types, labels and descriptions are kept; an ROI without a colour gets one.
        series: that the contours belong to, from `stnerp.io.dicom`.
        path: of the file.
        title: of the structure set, at most 16 characters.
        description: of the DICOM series that the file makes up, at most 64 characters.
        source_uid: of the structure set that these were computed from, if any.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false; no ROIs, two of one number, names that DICOM can't
            keep, contours beside the series' slices; a series without a frame of reference, with missing
            slices, or without the UID of its study or of a file.
    """
    path = Path(path)
    check_writable(path, overwrite)
    if not rois or len({roi.number for roi in rois}) < len(rois):
        raise InputError("rois: there must be one or more, each with a number of its own")
    for roi in rois:
        _check_name(roi.number, roi.name)
    if len(description) > 64 or "\\" in description:
        raise InputError(f"description: {description!r} must have at most 64 characters, no backslash")
    _check_series(series, title)
    grid = series_grid(series)
    with _quietly(), replacing(path) as partial:
        dataset = _structure_set(series, title, description, source_uid)
        for i, roi in enumerate(rois):
            _add_roi(dataset, series, grid, roi if roi.color else replace(roi, color=_COLORS[i % len(_COLORS)]))
        dataset.save_as(partial, enforce_file_format=True)


def _check_name(number: int, name: str) -> None:
    if not 0 < number < 2**31:
        raise InputError(f"names: label {number} must be a positive whole number")
    if not re.fullmatch(r"[^\\\x00-\x1f]{1,64}", name):
        raise InputError(f"names: {name!r} must have 1 to 64 characters, no backslash or line break")


def _check_series(series: DicomSeries, title: str) -> None:
    if not re.fullmatch(r"[^\\\x00-\x1f]{1,16}", title):
        raise InputError(f"title: {title!r} must have 1 to 16 characters, no backslash")
    if not series.frame_uid:
        raise InputError(f"{series.folder}: series '{series.description}' has no frame of reference for contours")
    if not series.study_uid:  # a made-up one would be another than the planning system makes up for the scan
        raise InputError(
            f"{series.folder}: series '{series.description}' has no StudyInstanceUID for contours to be found by; "
            "export it again"
        )
    for piece, uid in zip(series.slices, series.image_uids, strict=True):
        if not uid:
            raise InputError(f"{piece.path}: has no SOPInstanceUID for contours to refer to; export it again")


def _mask_on(labels: sitk.Image, label: int, grid: Grid) -> np.ndarray:
    """One label on a grid: as it is on its own grid, else 0 to 1, which keeps borders finer than a voxel."""
    mask = labels == label
    if Grid.of(labels).is_close(grid):
        return sitk.GetArrayFromImage(mask).astype(bool)
    onto = (grid.origin_mm, grid.spacing_mm, grid.direction)
    shares = sitk.Resample(mask, grid.size, sitk.Transform(), sitk.sitkLinear, *onto, 0.0, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(shares)


def _structure_set(series: DicomSeries, title: str, description: str, source_uid: str) -> Dataset:
    """A structure set without ROIs, of the series' patient and study."""
    scan = read_tags(series.files[0]) or Dataset()
    now = datetime.now()
    day, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = day, time
    for keyword in (*_PATIENT, *_STUDY, *_PATIENT_IF_THERE):
        value = _valid(scan, keyword)
        if value or keyword not in _PATIENT_IF_THERE:
            setattr(dataset, keyword, value or "")
    dataset.PatientID = scan.get("PatientID", "")  # as it is: by it the file finds its patient
    dataset.StudyInstanceUID = series.study_uid
    dataset.SeriesInstanceUID = generate_uid()
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = (
        series.frame_uid,
        scan.get("PositionReferenceIndicator", ""),
    )
    dataset.Modality = "RTSTRUCT"
    dataset.Manufacturer = dataset.ManufacturerModelName = "stnerp"
    dataset.SoftwareVersions = _own_version()
    dataset.SeriesDescription = description
    dataset.SeriesDate, dataset.SeriesTime = day, time
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.OperatorsName = None, 1, ""
    dataset.StructureSetLabel = title
    dataset.StructureSetDescription = "Computed by stnerp, not reviewed"
    dataset.StructureSetDate, dataset.StructureSetTime = day, time
    dataset.ApprovalStatus = "UNAPPROVED"
    if source_uid:
        source = Dataset()
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = RTStructureSetStorage, source_uid
        dataset.PredecessorStructureSetSequence = [source]
    images = Dataset()
    images.SeriesInstanceUID = series.series_uid
    images.ContourImageSequence = [_image_reference(series, k) for k in range(len(series.slices))]
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, series.study_uid
    study.RTReferencedSeriesSequence = [images]
    frame = Dataset()
    frame.FrameOfReferenceUID = series.frame_uid
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.StructureSetROISequence = []
    dataset.ROIContourSequence = []
    dataset.RTROIObservationsSequence = []
    dataset.file_meta = FileMetaDataset()
    # Implicit, because an explicit type has no room for the length of a contour of 2000 points.
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def _valid(dataset: Dataset, keyword: str) -> Any:
    """A tag's value; None where there is none or DICOM doesn't take it, as a weight of "70,5", with a notice."""
    try:
        value = dataset.get(keyword)
        return value and DataElement(keyword, dictionary_VR(keyword), value, validation_mode=RAISE).value
    except (ValueError, TypeError, OverflowError):
        logger.warning("the scan's %s is not as DICOM has it: left out of the structure set", keyword)
        return None


def _own_version() -> str:
    try:
        return version("stnerp")
    except PackageNotFoundError:  # run from its folder, without being installed
        return "unknown"


def _image_reference(series: DicomSeries, k: int) -> Dataset:
    reference = Dataset()
    piece = series.slices[k]
    reference.ReferencedSOPClassUID = piece.tags.get("0008|0016") or _CLASSES.get(piece.modality, CTImageStorage)
    reference.ReferencedSOPInstanceUID = series.image_uids[k]
    return reference


def _add_roi(dataset: Dataset, series: DicomSeries, grid: Grid, roi: Roi) -> None:
    named = Dataset()
    named.ROINumber, named.ROIName = roi.number, roi.name
    named.ReferencedFrameOfReferenceUID = series.frame_uid
    named.ROIGenerationAlgorithm = "AUTOMATIC"
    if roi.description:
        named.ROIDescription = roi.description
    dataset.StructureSetROISequence.append(named)
    drawn = Dataset()
    drawn.ReferencedROINumber, drawn.ROIDisplayColor = roi.number, list(roi.color or _COLORS[0])
    contours = [
        _contour(points, "CLOSED_PLANAR", _image_reference(series, k))
        for k, outlines in sorted(_by_slice(roi, series, grid).items())
        for points in map(_rounded, keyholes(outlines, grid))
        if len(points) >= 3
    ]
    for point in roi.points:
        k = int(np.clip(np.rint(grid.world_to_index(point)[2]), 0, grid.size[2] - 1))
        contours.append(_contour(np.round(point[None], _DECIMALS), "POINT", _image_reference(series, k)))
    for number, contour in enumerate(contours, 1):
        contour.ContourNumber = number
    if contours:
        drawn.ContourSequence = contours
    else:
        logger.warning("ROI %d: reaches no slice of the series, it is written without contours", roi.number)
    dataset.ROIContourSequence.append(drawn)
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = roi.number
    observation.RTROIInterpretedType, observation.ROIInterpreter = roi.interpreted_type, ""
    if roi.label:
        observation.ROIObservationLabel = roi.label
    dataset.RTROIObservationsSequence.append(observation)


def _by_slice(roi: Roi, series: DicomSeries, grid: Grid) -> dict[int, list[np.ndarray]]:
    """The contours of each slice, moved onto it: the header's positions, by which other programs tell which
    slice a contour is in, are rounded, while the grid's are even."""
    normal = np.reshape(grid.direction, (3, 3))[:, 2]
    slices: dict[int, list[np.ndarray]] = defaultdict(list)
    for points in roi.contours:
        heights = grid.world_to_index(points)[:, 2]
        k = int(np.rint(heights.mean()))
        if not 0 <= k < grid.size[2] or np.abs(heights - k).max() > _IN_SLICE:
            raise InputError(
                f"ROI {roi.number}: a contour lies in no slice of '{series.description}'; draw it there"
            )
        off_mm = (np.array(series.slices[k].position) - points) @ normal
        slices[k].append(points + off_mm[:, None] * normal)
    return slices


def _contour(points: np.ndarray, kind: str, image: Dataset) -> Dataset:
    contour = Dataset()
    contour.ContourImageSequence = [image]
    contour.ContourGeometricType = kind
    contour.NumberOfContourPoints = len(points)
    # As text that is written as it is: made into pydicom's numbers, a million of them would take half a minute.
    text = "\\".join([f"{value:.{_DECIMALS}f}" for value in points.ravel().tolist()]).encode("ascii")
    tag, text = Tag("ContourData"), text + b" " * (len(text) % 2)
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, is_implicit_VR=True, is_little_endian=True)
    return contour


def _rounded(points: np.ndarray) -> np.ndarray:
    """As they are written, without points that became the same as the one before."""
    points = np.round(points, _DECIMALS)
    return points[np.any(points != np.roll(points, 1, axis=0), axis=1)]

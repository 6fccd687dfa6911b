"""The 4D-Lung collection of The Cancer Imaging Archive: patient, 4D CT of a day, breathing phase, contours.

Hugo et al., Medical Physics 44 (2017) 762, doi:10.7937/K9/TCIA.2016.ELN8YGLE: 20 patients with lung cancer,
each with several 4D CT over the weeks of a therapy, 10 phases, and an RTSTRUCT for nearly every phase. A folder
is indexed by what its files say, wherever they lie; other 4D CT that are described alike are read as well.

What the files look like, and what is made of it:

- Each phase is a CT series: "P4^P100^S300^I00003, Gated, 0.0%A". The percentage is the phase, 0 % the end of
  inhalation. All phases have series number 1 and share a study.
- 4D CT of one day, if there are several, differ in study, or in the letter after the percentage or the session
  (S300).
- Cone beam CT is CT by modality too: "P4^P100^S100^I0, Gated, 0.0%" of a "Trilogy Cone Beam CT". It has no
  contours, and is left out; so are averages and other series without a phase.
- An RTSTRUCT names the series that it was drawn on, which is what links them.
- ROIs carry their phase: "Tumor_c40", sometimes "Tumor_ c00" or "LN2_C10". Here they are called "Tumor", "LN2".
- Dates are shifted for privacy: only how far a patient's 4D CT are apart means something.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from stnerp.errors import InputError, MissingContoursError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import (
    DicomHeader,
    DicomSeries,
    of_several_phases,
    read_dicom_series,
    read_headers,
    series_of,
    with_phases,
)
from stnerp.io.rtstruct import (
    Roi,
    StructureFile,
    StructureSet,
    one_roi,
    plain_name,
    read_rtstruct,
    roi_labels,
    rtstruct_contents,
)

logger = logging.getLogger(__name__)

#: Length of the breathing cycle in the unit of the phases, percent.
PERIOD = 100.0
_DAY_SECONDS = 86400
_PHASE_OF_ROI = re.compile(r"_c(\d{2,3})$", re.IGNORECASE)


@dataclass(frozen=True)
class Phase:
    """One breathing phase of a 4D CT.

    Attributes:
        percent: of the breathing cycle, from the series' description.
        series: the CT.
        structures: the RTSTRUCT files that were drawn on it.
    """

    percent: float
    series: DicomSeries
    structures: tuple[StructureFile, ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The ROIs, without their phase."""
        return tuple(dict.fromkeys(roi_name(name) for file in self.structures for name in file.names))


@dataclass(frozen=True)
class Scan:
    """One 4D CT.

    Attributes:
        patient: ID.
        date: of the study, "2003-07-02"; empty if no tag tells.
        time: of the day in seconds, or None.
        name: the date, with ".1", ".2", ... in order of time where a patient has several 4D CT on one day.
        phases: in order.
    """

    patient: str
    date: str
    time: float | None
    name: str
    phases: tuple[Phase, ...]

    def phase(self, percent: float) -> Phase | None:
        """The phase of a percentage; None where it is missing.

        Raises:
            InputError: two series claim to be it.
        """
        found = [phase for phase in self.phases if abs(phase.percent - percent) < 0.05]
        if len(found) > 1:
            listed = " and ".join(f"'{phase.series.description}' in {phase.series.folder}" for phase in found)
            raise InputError(
                f"{self.patient} {self.name}: phase {percent:g} % is there {len(found)} times, {listed}; keep one"
            )
        return found[0] if found else None

    def __str__(self) -> str:
        percents = " ".join(f"{phase.percent:g}" for phase in self.phases)
        names = ", ".join(dict.fromkeys(name for phase in self.phases for name in phase.names)) or "none"
        return f"{self.patient}  {self.name or 'undated'}  phases {percents} %  contours: {names}"


@dataclass(frozen=True)
class FourDLung:
    """What a folder holds.

    Attributes:
        folder: that was indexed.
        scans: by patient, date and time.
        left_out: what was found besides, and why it isn't used.
    """

    folder: str
    scans: tuple[Scan, ...]
    left_out: tuple[str, ...] = ()

    @property
    def patients(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(scan.patient for scan in self.scans))

    def of(self, patient: str) -> tuple[Scan, ...]:
        """The 4D CT of a patient, in order of time.

        Raises:
            InputError: no such patient.
        """
        found = tuple(scan for scan in self.scans if scan.patient == patient)
        if not found:
            raise InputError(f"{self.folder}: no patient {patient!r}; there are: {', '.join(self.patients)}")
        return found

    def scan(self, patient: str, date: str | int | Date | None = None) -> Scan:
        """One 4D CT of a patient.

        Args:
            patient: ID.
            date: its name ("2003-07-02", or "2003-07-02.2" for the second of a day), also written as 20030702
                or, as in the archive's folders, 07-02-2003; None: the first.

        Raises:
            InputError: no such patient or date, or several 4D CT on it.
        """
        scans = self.of(patient)
        if date is None:
            return scans[0]
        wanted = _iso(str(date).strip())
        found = [scan for scan in scans if wanted in (scan.name, scan.date)]
        found = [scan for scan in found if scan.name == wanted] or found
        if len(found) == 1:
            return found[0]
        listed = ", ".join(scan.name or "undated" for scan in found or scans)
        problem = f"{len(found)} 4D CT" if found else "no 4D CT"
        raise InputError(f"{self.folder}: {patient} has {problem} on {date}; choose one of {listed}")

    def __str__(self) -> str:
        head = f"{self.folder}: {len(self.patients)} patients, {len(self.scans)} 4D CT"
        return "\n".join([head, *map(str, self.scans), *(f"left out: {note}" for note in self.left_out)])


def index_4d_lung(folder: str | os.PathLike[str]) -> FourDLung:
    """What a download of the collection holds, in folders of any nesting.

    Every file's header is read, once, and no pixel; keep the result to ask several times. A series that can't be
    used is left out with a note, and never keeps the others from being used.

    Raises:
        MissingFileError: no such folder, or no 4D CT in it.
    """
    headers = read_headers(folder)
    left_out: Counter[str] = Counter()
    found = [one for group in _by_series(headers) for one in _readable(group, left_out)]
    series = _usable(with_phases(found), left_out)
    files = [contents for header in headers if (contents := _structure_file(header, left_out)) is not None]
    structures = _linked(files, series, left_out)
    days: dict[tuple[str, str], list[Phase]] = defaultdict(list)
    for one in series:
        phase = Phase(one.phase or 0.0, one, tuple(structures[one.series_uid]))
        days[one.patient_id, _date(one)].append(phase)
    scans = [scan for phases in days.values() for scan in _scans(phases)]
    if not scans:
        raise MissingFileError(
            f"{folder}: no CT series with a breathing phase ('Gated, 30.0%') in it; "
            "download 4D-Lung from The Cancer Imaging Archive, or name another folder"
        )
    notes = tuple(f"{count} x {reason}" for reason, count in sorted(left_out.items()))
    for note in notes:
        logger.info("%s: left out %s", folder, note)
    return FourDLung(str(folder), _named(scans), notes)


def breathing_series(
    collection: FourDLung, patient: str, date: str | int | Date | None = None, rois: Sequence[str] = ("Tumor",)
) -> dict[str, Any]:
    """One 4D CT: what `stnerp.load_series` takes.

    The times are the phases in percent, the period is 100. The masks' labels are 1, 2, ... in the order of
    `rois`, and where ROIs overlap the first of them counts; a phase on which none is drawn has no mask. A warning
    tells which phases are missing from an even row, since that shifts the others' numbers.

    Args:
        collection: from `index_4d_lung`.
        patient, date: which, see `FourDLung.scan`.
        rois: names without their phase; none: no masks.

    Returns:
        images, times, period and masks.

    Raises:
        InputError: no such patient or date, a phase that is there twice, slices that make no image, or
            (MissingContoursError) an ROI that no phase has.
    """
    scan = collection.scan(patient, date)
    if lacking := _missing([phase.percent for phase in scan.phases]):
        told = ", ".join(f"{percent:g}" for percent in lacking)
        logger.warning("%s %s: no phase %s %%; scans are numbered without it", patient, scan.name, told)
    phases = [phase for percent in dict.fromkeys(p.percent for p in scan.phases) if (phase := scan.phase(percent))]
    what = f"{patient} {scan.name}"
    _check_drawn(phases, rois, what)
    images = [read_dicom_series(phase.series) for phase in phases]
    return {
        "images": images,
        "times": [phase.percent for phase in phases],
        "period": PERIOD,
        "masks": _masks(phases, images, rois, what),
    }


def longitudinal_series(
    collection: FourDLung,
    patient: str,
    phase: float = 0.0,
    rois: Sequence[str] = ("Tumor",),
    *,
    dates: Sequence[str | int | Date] | None = None,
    allow_missing: bool = True,
) -> dict[str, Any]:
    """One breathing phase of each of a patient's 4D CT: what `stnerp.load_series` takes.

    The times are days since the first: whole days, or, if two scans share a day, with the time of day as a
    fraction. Labels are as in `breathing_series`.

    Args:
        collection: from `index_4d_lung`.
        patient: ID.
        phase: in percent.
        rois: names without their phase; none: no masks.
        dates: of the scans to use, see `FourDLung.scan`; None: all.
        allow_missing: whether a scan without the phase is left out, with a warning, or an error.

    Returns:
        images, times, period (None) and masks.

    Raises:
        InputError: no such patient or date, a phase that is missing or there twice, scans without dates or of
            one day without times, slices that make no image, or (MissingContoursError) an ROI that no scan has.
    """
    wanted = None if dates is None else {collection.scan(patient, date).name for date in dates}
    scans = [scan for scan in collection.of(patient) if wanted is None or scan.name in wanted]
    found = {scan.name: scan.phase(phase) for scan in scans}
    missing = [name for name, there in found.items() if there is None]
    if missing:
        problem = f"{patient}: no phase {phase:g} % on {', '.join(missing)}"
        if not allow_missing or len(missing) == len(scans):
            raise InputError(f"{problem}; choose other dates or another phase")
        logger.warning("%s: left out", problem)
    kept = [scan for scan in scans if found[scan.name] is not None]
    phases = [there for there in found.values() if there is not None]
    times, what = _days(kept), f"{patient}, phase {phase:g} %"
    _check_drawn(phases, rois, what)
    images = [read_dicom_series(one.series) for one in phases]
    masks = _masks(phases, images, rois, what)
    return {"images": images, "times": times, "period": None, "masks": masks}


def roi_name(name: str) -> str:
    """An ROI's name without spaces and without the phase at its end: "Tumor" for "Tumor_ c00"."""
    return _PHASE_OF_ROI.sub("", "".join(name.split()))


# -- the index


def _by_series(headers: Iterable[DicomHeader]) -> list[list[DicomHeader]]:
    groups = defaultdict(list)
    for header in headers:
        if header.is_slice:
            groups[header.series_uid].append(header)
    return list(groups.values())


def _readable(slices: list[DicomHeader], left_out: Counter[str]) -> list[DicomSeries]:
    """The images that a series is, or a note why it is none."""
    try:
        return series_of(slices, str(Path(slices[0].path).parent))
    except InputError as error:
        left_out[str(error)] += 1
        return []


def _usable(found: Iterable[DicomSeries], left_out: Counter[str]) -> list[DicomSeries]:
    """The phases among them, and notes why the others are none."""
    kept = []
    for series in found:
        reason = _reason_to_skip(series)
        if reason is None:
            kept.append(series)
        else:
            left_out[reason] += 1
    return kept


def _reason_to_skip(series: DicomSeries) -> str | None:
    text = series.description
    if series.slices[0].modality != "CT":
        return f"{series.slices[0].modality} series"
    # "^S100^I0" is how the collection names cone beam CT, for copies that lost the device.
    if re.search(r"cbct|cone.?beam|\^S1\d\d\^I0\b", f"{series.device} {text}", re.IGNORECASE):
        return "cone beam CT series"
    if of_several_phases(text):
        return "averages over the phases"
    if series.phase is None:
        return "CT series without a breathing phase"
    return None


def _structure_file(header: DicomHeader, left_out: Counter[str]) -> StructureFile | None:
    if header.modality != "RTSTRUCT":
        return None
    try:
        return rtstruct_contents(header.path)
    except InputError as error:
        left_out[str(error)] += 1
        return None


def _linked(
    files: Iterable[StructureFile], series: Iterable[DicomSeries], left_out: Counter[str]
) -> defaultdict[str, list[StructureFile]]:
    """The structure sets of each series' UID: by the series that they name, else by the slices."""
    series_of_image = {image: one.series_uid for one in series for image in one.image_uids}
    known = set(series_of_image.values())
    linked: defaultdict[str, list[StructureFile]] = defaultdict(list)
    for file in files:
        named = known.intersection(file.series_uids)
        named = named or {series_of_image[image] for image in file.image_uids if image in series_of_image}
        for uid in named:
            linked[uid].append(file)
        if not named:
            left_out["RTSTRUCT of a series that isn't used or isn't here"] += 1
    return linked


def _scans(phases: Sequence[Phase], parts: Sequence[Callable[[DicomSeries], str]] | None = None) -> list[Scan]:
    """The 4D CT of a day: one, unless phases are there several times, which studies, letters or sessions tell
    apart."""
    parts = (lambda series: series.study_uid, _stem) if parts is None else parts
    if not parts or len({phase.percent for phase in phases}) == len(phases):
        return [_scan(phases)]
    groups: dict[str, list[Phase]] = defaultdict(list)
    for phase in phases:
        groups[parts[0](phase.series)].append(phase)
    return [scan for group in groups.values() for scan in _scans(group, parts[1:])]


def _stem(series: DicomSeries) -> str:
    """A description without what differs from phase to phase: the percentage and the image's number."""
    return re.sub(r"\d+(\.\d+)?\s*%|\^I\d+", "", series.description)


def _scan(phases: Iterable[Phase]) -> Scan:
    phases = sorted(phases, key=lambda phase: phase.percent)
    first, date = phases[0].series, _date(phases[0].series)
    times = [seconds for phase in phases if (seconds := _seconds(phase.series.time)) is not None]
    return Scan(first.patient_id, date, min(times, default=None), date, tuple(phases))


def _date(series: DicomSeries) -> str:
    """Of the study, which the archive's folders show, else of the series."""
    return _iso(series.study_date or series.date)


def _named(scans: Sequence[Scan]) -> tuple[Scan, ...]:
    """The scans in order, numbered where a patient has several on a day."""

    def order(scan: Scan) -> tuple[str, str, float, str]:
        return scan.patient, scan.date, scan.time or 0.0, scan.phases[0].series.description

    per_day = Counter((scan.patient, scan.date) for scan in scans)
    seen: Counter[tuple[str, str]] = Counter()
    named = []
    for scan in sorted(scans, key=order):
        day = scan.patient, scan.date
        seen[day] += 1
        name = f"{scan.date}.{seen[day]}" if per_day[day] > 1 else scan.date
        named.append(Scan(scan.patient, scan.date, scan.time, name, scan.phases))
    return tuple(named)


# -- dates and times


def _iso(text: str) -> str:
    """2003-07-02 for 20030702 and 07-02-2003; with what follows, a scan's number; anything else as it is."""
    for pattern, order in (
        (r"(\d{4})(\d\d)(\d\d)(\.\d+)?", (1, 2, 3)),
        (r"(\d\d)-(\d\d)-(\d{4})(\.\d+)?", (3, 1, 2)),
    ):
        match = re.fullmatch(pattern, text.strip())
        if match:
            return "-".join(match.group(i) for i in order) + (match.group(4) or "")
    return text.strip()


def _seconds(time: str) -> float | None:
    """Of the day, from DICOM's HHMMSS.FFFFFF."""
    match = re.fullmatch(r"(\d\d)(\d\d)(\d\d(?:\.\d*)?)", time)
    return None if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


def _days(scans: Sequence[Scan]) -> list[float]:
    """Since the first scan."""
    patient, names = scans[0].patient, ", ".join(scan.name or "undated" for scan in scans)
    try:
        days = [Date.fromisoformat(scan.date).toordinal() for scan in scans]
    except ValueError:
        raise InputError(f"{patient}: scans without a date ({names}); choose dates") from None
    if len(set(days)) == len(days):
        return [float(day - days[0]) for day in days]
    times = [scan.time / _DAY_SECONDS for scan in scans if scan.time is not None]
    moments = [day + time for day, time in zip(days, times, strict=False)]
    if len(set(moments)) < len(scans):
        raise InputError(
            f"{patient}: scans on one day without a time of day to order them ({names}); choose dates"
        )
    return [round(moment - moments[0], 6) for moment in moments]


# -- phases


def _missing(percents: Sequence[float]) -> list[float]:
    """What an even row over the cycle lacks, where more than half of it is there; all in percent."""
    tenths = {round(10 * percent) for percent in percents}
    first = min(tenths)
    step = math.gcd(round(10 * PERIOD), *(each - first for each in tenths))
    lacking = sorted(set(range(first % step, round(10 * PERIOD), step)) - tenths)
    return [each / 10 for each in lacking] if len(lacking) < len(tenths) else []


# -- contours


def _check_drawn(phases: Sequence[Phase], rois: Sequence[str], what: str) -> None:
    """Raises MissingContoursError for ROIs that no phase has; before any image is read."""
    there = tuple(dict.fromkeys(name for phase in phases for name in phase.names))
    known = {plain_name(name) for name in there}
    absent = [name for name in rois if plain_name(roi_name(name)) not in known]
    if absent:
        others = f"{', '.join(there)}; choose rois among them, or none" if there else "none; choose no rois"
        message = f"{what}: no contours of {', '.join(absent)}; there are: {others}"
        raise MissingContoursError(message, absent, there)


def _masks(
    phases: Sequence[Phase], images: Sequence[sitk.Image], rois: Sequence[str], what: str
) -> list[sitk.Image | None] | None:
    if not rois:
        return None
    return [_mask(phase, Grid.of(image), rois, what) for phase, image in zip(phases, images, strict=True)]


def _mask(phase: Phase, grid: Grid, rois: Sequence[str], what: str) -> sitk.Image | None:
    """The label image of a phase; None where none of the ROIs is drawn."""
    sets = [read_rtstruct(file.path) for file in phase.structures]
    for structures in sets:
        if structures.frame_uid and phase.series.frame_uid and structures.frame_uid != phase.series.frame_uid:
            logger.warning("%s: states another frame of reference than the series that it names", structures.path)
    drawn = {label: roi for label, name in enumerate(rois, 1) if (roi := _roi(sets, name, phase)) is not None}
    for label, name in enumerate(rois, 1):
        if label not in drawn:
            logger.warning("%s: %s is not drawn on '%s'", what, name, phase.series.description)
    if not drawn:
        return None
    labels = roi_labels(drawn.values(), grid)
    return sitk.ChangeLabel(labels, {i: float(label) for i, label in enumerate(drawn, 1) if i != label})


def _roi(sets: Sequence[StructureSet], name: str, phase: Phase) -> Roi | None:
    """The ROI of a name among the structure sets of a phase; None where it isn't drawn."""
    wanted = plain_name(roi_name(name))
    found = [
        one_roi(same, name, structures)
        for structures in sets
        if (same := [roi for roi in structures.rois if plain_name(roi_name(roi.name)) == wanted])
    ]
    found = [roi for roi in found if roi.contours]
    if len(found) > 1:
        listed = ", ".join(structures.path for structures in sets)
        raise InputError(f"{name} is drawn in several files for '{phase.series.description}': {listed}; keep one")
    if not found:
        return None
    own = _PHASE_OF_ROI.search("".join(found[0].name.split()))
    if own and float(own[1]) != phase.percent:
        logger.warning("ROI '%s' is drawn on phase %g %%: check its name", found[0].name, phase.percent)
    return found[0]

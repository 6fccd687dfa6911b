"""A stand-in for TCIA's 4D-Lung: the procedural thorax as DICOM files in that collection's layout.

The patient breathes, and over the weeks the tumour shrinks and the tissue around it shifts. Every phase of
every day is a CT series, with the organs' contours in an RTSTRUCT, in the folders of a download; series of
other kinds lie beside them, as they do there. `stnerp.io.four_d_lung` reads it like the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom.uid import generate_uid

from stnerp import InputError
from stnerp.io.dicom import write_dicom_series
from stnerp.io.rtstruct import write_rtstruct
from stnerp.motion import Breathing, Longitudinal
from stnerp.phantom import BOX_MM, LABELS, TUMOUR_CENTRE_MM, Phantom

PATIENT = "900_PHANTOM"
FIRST_DAY = date(2000, 1, 3)
ROOT = Path("runs/tcia_4d_lung_phantom")
#: Names of the phantom's labels as 4D-Lung spells them.
ROIS = {"tumour": "Tumor", "lung": "Lungs", "heart": "Heart", "liver": "Liver", "spine": "Spine"}
#: What is written where a config doesn't say.
DAYS = {"breathing": [0], "longitudinal": [0, 7, 14, 21, 28]}
PHASES = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
# What the files depend on.
_MADE_OF = ["size", "spacing_mm", "noise_hu", "seed"]
_MADE_OF += ["days", "phases", "amplitude_si_mm", "tumour_scale", "shift_mm"]


@dataclass(frozen=True)
class Therapy:
    """Breathing on every day of a change over weeks, at rest on day 0 in phase 0.

    The time is `moment(day, percent)`: one number for both, so that every image has noise of its own.
    """

    breathing: Breathing
    change: Longitudinal

    period = None
    reference_time = 0.0

    @staticmethod
    def moment(day: float, percent: float) -> float:
        return day + percent / 1000

    def times(self, count: int = 10) -> list[float]:
        """`count` evenly spaced phases of the first day."""
        return [self.moment(0, 100 * i / count) for i in range(count)]

    def target_to_reference(self, points_mm: np.ndarray, t: float) -> np.ndarray:
        day, phase = _day_and_phase(t)
        return self.change.target_to_reference(self.breathing.target_to_reference(points_mm, phase), day)

    def reference_to_target(self, points_mm: np.ndarray, t: float) -> np.ndarray:
        day, phase = _day_and_phase(t)
        return self.breathing.reference_to_target(self.change.reference_to_target(points_mm, day), phase)


def _day_and_phase(t: float) -> tuple[float, float]:
    """Day, and phase from 0 to 1, of a `Therapy.moment`."""
    day = float(np.floor(t + 1e-9))
    return day, (t - day) * 10


def phantom_of(values: Mapping[str, Any]) -> Phantom:
    """The phantom of a `data` section of kind tcia_4d_lung_phantom.

    Raises:
        InputError: days or phases that aren't usable, a motion that would fold.
    """
    days, phases = values["days"], values["phases"]
    if not (_increasing(days) and all(isinstance(day, int) for day in days) and days[0] == 0):
        raise InputError(f"data.days: {days!r} must be increasing whole numbers from 0")
    if not (_increasing(phases) and phases[0] >= 0 and phases[-1] < 100):
        raise InputError(f"data.phases: {phases!r} must be increasing percentages, below 100")
    amplitude = values["amplitude_si_mm"]
    breathing = Breathing(*BOX_MM, amplitude_si_mm=amplitude, amplitude_ap_mm=amplitude / 3)
    change = Longitudinal(
        *BOX_MM,
        TUMOUR_CENTRE_MM,
        tumour_scale=values["tumour_scale"],
        shift_mm=values["shift_mm"],
        duration=float(max(days[-1], 1)),
    )
    x, y, z = values["size"]
    motion = Therapy(breathing, change)
    return Phantom((x, y, z), values["spacing_mm"], motion, values["noise_hu"], values["seed"])


def stand_in_motion(
    values: Mapping[str, Any],
) -> tuple[Callable[[float], np.ndarray], Callable[[np.ndarray, float, float], np.ndarray]]:
    """What the collection itself doesn't have, at the times of a series of it: landmarks and the motion.

    Times are percent of the breath on the day of the section, or days since the first scan used at its phase.

    Args:
        values: the `data` section, and the `collection` that was written for it.

    Returns:
        Landmarks (N, 3) in LPS mm at a time; points (..., 3) in LPS mm of a first time, at a second one.
    """
    phantom = phantom_of(_complete(values))
    longitudinal, collection = values["series"] == "longitudinal", values["collection"]
    dates = values["dates"] if longitudinal else [values["date"]]
    used = collection.of(PATIENT) if dates is None else [collection.scan(PATIENT, one) for one in dates]
    day = min((date.fromisoformat(scan.date) - FIRST_DAY).days for scan in used)

    def moment(t: float) -> float:
        return Therapy.moment(day + t, values["phase"]) if longitudinal else Therapy.moment(day, t)

    def moved(points_mm: np.ndarray, start: float, end: float) -> np.ndarray:
        return phantom.map_points(phantom.map_points(points_mm, moment(start)), moment(end), inverse=True)

    return lambda t: phantom.landmarks(moment(t)), moved


def _complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `data` section with the days and phases that it leaves open."""
    longitudinal = values["series"] == "longitudinal"
    days = values["days"] or DAYS["longitudinal" if longitudinal else "breathing"]
    return {**values, "days": days, "phases": values["phases"] or ([values["phase"]] if longitudinal else PHASES)}


def _increasing(numbers: object) -> bool:
    return isinstance(numbers, list) and bool(numbers) and sorted(set(numbers)) == numbers


def write_stand_in(values: Mapping[str, Any]) -> Path:
    """Write the collection of a `data` section, unless it is there from the same settings; its folder.

    Raises:
        InputError: as `phantom_of`, or a folder that holds something else.
    """
    values = _complete(values)
    phantom = phantom_of(values)
    folder = folder_of(values) if values["root"] is None else Path(values["root"])
    made: dict[str, Any] = {name: values[name] for name in _MADE_OF}
    about = folder / "phantom.json"
    if _made_of(about) == made:
        return folder
    if folder.exists() and not about.is_file() and any(folder.iterdir()):
        raise InputError(f"data.root: {folder} holds other files; name a folder of its own for the phantom")
    # Complete or not at all: it is moved to its place in the end.
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_collection(partial, phantom, values["days"], values["phases"])
        (partial / about.name).write_text(json.dumps(made) + "\n", encoding="utf-8")
        if _made_of(about) == made:  # by another program, meanwhile, which reads it now
            return folder
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _made_of(about: Path) -> object:
    """What a stand-in that is there was made of; None: there is none."""
    return json.loads(about.read_text(encoding="utf-8")) if about.is_file() else None


def folder_of(values: Mapping[str, Any]) -> Path:
    """A place of its own for everything that a `data` section with days and phases may ask for."""
    made = json.dumps([values[name] for name in _MADE_OF])
    days, phases = ("-".join(f"{number:g}" for number in values[name]) for name in ("days", "phases"))
    told = f"days{days}_phases{phases}"[:100]
    return ROOT / f"{told}_seed{values['seed']}_{zlib.crc32(made.encode()):08x}"


def write_collection(folder: Path, phantom: Phantom, days: Sequence[int], phases: Sequence[float]) -> None:
    """A folder for the patient, one in it for each day, and in that one for every series."""
    frame_uid = generate_uid()
    for session, day in enumerate(days):
        when = FIRST_DAY + timedelta(days=day)
        study = folder / PATIENT / f"{when:%m-%d-%Y}-NA-p4-{session:05d}"
        study.mkdir(parents=True)
        study_uid = generate_uid()
        for i, percent in enumerate(phases):
            t = Therapy.moment(day, percent)
            image = phantom.image(t)
            series = write_dicom_series(
                image,
                study / f"1.000000-P4P900S{300 + session}I{i + 3:05d} Gated {percent:.1f}A-{i:05d}",
                patient_id=PATIENT,
                description=f"P4^P900^S{300 + session}^I{i + 3:05d}, Gated, {percent:.1f}%A",
                date=f"{when:%Y%m%d}",
                time="101500",
                study_uid=study_uid,
                frame_uid=frame_uid,
                model="procedural thorax",
            )
            contours = study / f"1.000000-RTS {percent:.1f}A-{i:05d}"
            contours.mkdir()
            labels = phantom.labels(t)
            found = set(np.unique(sitk.GetArrayViewFromImage(labels)).tolist()) - {0}
            names = {
                LABELS[organ]: f"{roi}_c{percent:02.0f}" for organ, roi in ROIS.items() if LABELS[organ] in found
            }
            write_rtstruct(labels, names, series, contours / "1-1.dcm")
        _write_others(study, phantom.image(Therapy.moment(day, phases[0])), f"{when:%Y%m%d}", study_uid)


def _write_others(study: Path, image: sitk.Image, day: str, study_uid: str) -> None:
    """A cone beam CT and an average, as lie beside the 4D CT."""
    common: dict[str, Any] = {"patient_id": PATIENT, "date": day, "study_uid": study_uid}
    cone_beam = {"description": "P4^P900^S100^I0, Gated, 0.0%", "model": "Trilogy Cone Beam CT"}
    write_dicom_series(image, study / "500.000000-P4P900S100I0 Gated 0.0-90000", **common, **cone_beam, number=500)
    write_dicom_series(image, study / "2.000000-Average-90001", **common, description="Average", number=2)

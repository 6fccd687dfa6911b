"""What scripts ask of a finished run, and of the command line about it: its model's times, its scans, a ROI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, OmegaConf
from data import PatientData, load_data, named_files

from stnerp import InputError, Series, STNeRP
from stnerp.io.dicom import DicomSeries, dicom_series, series_grid
from stnerp.io.image import read_labels
from stnerp.io.rtstruct import rtstruct_contents
from stnerp.series import matches_of

NEEDS = {"model.pt": "run train_def.py with the same out= first"}


def roi_name(path: Path) -> str:
    """The file's name without its ending."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def times_of(config: DictConfig) -> list[float]:
    """`times` as numbers; one number is a list of one."""
    given = OmegaConf.to_container(config.times) if OmegaConf.is_list(config.times) else [config.times]
    assert isinstance(given, list)
    if not given or not all(isinstance(t, int | float) and np.isfinite(t) for t in given):
        raise InputError(f"times: {given} must be numbers, times='[5,21]' say")
    return list(dict.fromkeys(float(t) for t in given))


def evenly(model: STNeRP, count: int) -> list[float]:
    """Evenly spaced times over the measured range.

    Raises:
        InputError: a negative count.
    """
    if count < 0:
        raise InputError(f"curve_points: {count} must not be negative")
    return np.linspace(*measured_range(model), count).tolist()


def measured_range(model: STNeRP) -> tuple[float, float]:
    """First and last measured time; of a periodic series, one whole cycle."""
    first = model.times[0]
    return first, model.times[-1] if model.period is None else first + model.period


def time_label(model: STNeRP) -> str:
    return f"time ({model.time_unit})" if model.time_unit else "time"


def fitted_series(out: Path, model: STNeRP) -> Series:
    """The scans that the model in a run directory was fitted to.

    Raises:
        InputError: as `fitted_patient`.
    """
    series = fitted_patient(out, model).series
    return series.subset(series.times.index(t) for t in model.times)


def fitted_patient(out: Path, model: STNeRP) -> PatientData:
    """What the saved config of a run directory names: the model's scans, and those that were held out of its fit.

    Raises:
        InputError: no config, scans that can't be read any more, or others than the model's.
    """
    patient = load_data(data_section(out))
    if set(model.times) <= set(patient.series.times) and patient.series.grid.is_close(model.grid):
        return patient
    raise InputError(f"{saved_config(out)}: names other scans than those of model.pt; run train_def.py again")


def found_config(out: Path) -> Path | None:
    """The config of the fit in a run directory, as its script left it."""
    return next((path for path in (out / "train_def.yaml", out / "config.yaml") if path.is_file()), None)


def saved_config(out: Path) -> Path:
    """`found_config`; InputError where it is gone."""
    saved = found_config(out)
    if saved is None:
        raise InputError(f"{out}: holds neither train_def.yaml nor config.yaml, which name the model's scans")
    return saved


def data_section(out: Path) -> DictConfig:
    """What the saved config of a run directory says of the scans.

    Raises:
        InputError: no config, or nothing in it.
    """
    saved = saved_config(out)
    section: object = OmegaConf.select(OmegaConf.load(saved), "data")
    if isinstance(section, DictConfig):
        return section
    raise InputError(f"{saved}: has no section data, which names the model's scans")


def fitted_align(out: Path) -> str:
    """The pre-alignment of the fit in a run directory, as its saved config has it; "auto" where it says none."""
    return str(OmegaConf.select(OmegaConf.load(saved_config(out)), "align", default="auto"))


@dataclass(frozen=True)
class FittedScan:
    """A DICOM series that a model was fitted to, and when it was taken, in the model's unit."""

    time: float
    series: DicomSeries


def fitted_scans(out: Path, model: STNeRP) -> list[FittedScan]:
    """The DICOM series that the model in a run directory was fitted to, in order of time, by headers alone.

    Raises:
        InputError: no config; scans that are no DICOM series or can't be read any more; others than the model's.
    """
    saved, arguments = saved_config(out), named_files(data_section(out))
    found = _dicom_of(arguments.get("images"), saved)
    times = _times_of(arguments.get("times"), len(found))
    reference = arguments.get("reference") or 0
    if len(times) != len(found) or not set(model.times) <= set(times) or reference >= len(found):
        raise InputError(f"{saved}: names other scans than those of model.pt")
    scans = [FittedScan(t, one) for t, one in zip(times, found, strict=True) if t in model.times]
    if times[reference] != model.reference_time or not series_grid(found[reference]).is_close(model.grid):
        raise InputError(f"{saved}: names another reference than that of model.pt")
    return scans


def _times_of(given: Any, count: int) -> list[float]:
    try:
        return [float(t) for t in (range(count) if given is None else given)]
    except (TypeError, ValueError):
        return []


def _dicom_of(images: Any, saved: Path) -> list[DicomSeries]:
    """The series that `images` of `load_series` names, if all are DICOM."""
    images = matches_of(images)
    if isinstance(images, Sequence) and not isinstance(images, str) and len(images) == 1:
        images = images[0]
    one_folder = isinstance(images, str | os.PathLike)
    folders = [images] if one_folder else list(images or [])
    if not folders or not all(isinstance(one, str | os.PathLike) and os.path.isdir(one) for one in folders):
        raise InputError(f"{saved}: the model's scans are no DICOM folders, or not where they were")
    found = [dicom_series(folder) for folder in folders]
    if not one_folder and any(len(series) > 1 for series in found):
        raise InputError(f"{saved}: a folder of the model's scans holds several DICOM series by now")
    return [one for series in found for one in series]


def is_structure_set(path: Path) -> bool:
    """Whether a file is a DICOM RT structure set, whatever its name."""
    try:
        rtstruct_contents(path)
    except InputError:
        return False
    return True


def read_label_roi(path: Path) -> sitk.Image:
    """A region of interest as a label image.

    Raises:
        InputError: as `read_labels`, or a structure set.
    """
    if is_structure_set(path):
        raise InputError(
            f"{path}: is a DICOM RT structure set, where a label image is wanted; propagate_rtstruct.py carries it"
        )
    return read_labels(path)

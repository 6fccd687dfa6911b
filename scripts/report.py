"""python scripts/report.py out=runs/p1

One HTML page of a fitted patient, to look at and to pass on: slices at any time beside the scans, contours,
deformation, curves, scores and settings. Writes report.html and report.log into the run directory. The page is
one file that opens in any browser without a network. Names of files, and what else in the data's section could
name the patient, don't go into it, unless names=true or title= puts them there.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, OmegaConf, hydra
from data import PatientData
from fitted_run import fitted_patient, found_config, roi_name
from rois import read_rois
from run_directory import CONFIGS, MADE, launch, plain, run_directory, value_of, wrote

from stnerp import InputError, STNeRP
from stnerp.geometry import Grid
from stnerp.html_report import Structure, write_html_report

WRITES = (MADE["report"],)
NEEDS = {"model.pt": "run train_def.py or eval_interpolation.py with the same out= first"}
TABLES = {
    "Means of each method": "summary.csv",
    "Each image": "metrics.csv",
    "Ref-Net": "ref_net.csv",
}
NAMES_OF_FILES = ("image", "reference")  # columns of these tables
# Of the configuration, what can't name a person or a place: sections, settings of data, and single ones.
SHOWN_SECTIONS = ("preset",)
SHOWN_OF_DATA = (
    "kind", "times", "reference", "period", "window", "size", "spacing_mm", "phases", "motion", "motion_settings",
    "noise_hu", "seed", "series", "phase", "scale",
)  # fmt: skip
SHOWN = ("prior", "align", "appearance", "guided_times", "held_out", "known_every", "device", "seed")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="report")
def main(config: DictConfig) -> None:
    with run_directory(config, "report", WRITES, NEEDS) as out:
        for setting in ("scans", "names"):
            value_of(config, setting, bool)
        if not isinstance(config.spacing_mm, int | float | None) or isinstance(config.spacing_mm, bool):
            raise InputError(f"spacing_mm: {config.spacing_mm!r} must be a number, in mm")
        model = STNeRP.load(out / "model.pt", config.device)
        patient = patient_of(out, model) if config.scans else None
        page = write_html_report(
            out / MADE["report"],
            model,
            series=None if patient is None else patient.series,
            structures=[*contours_of(patient, plain(config.contours)), *rois_of(config, model.grid)],
            tables={f"{title} ({name})": rows_of(out / name) for title, name in TABLES.items()},
            settings=shown_settings(out),
            title=str(config.title),
            spacing_mm=config.spacing_mm,
            named=config.names,
        )
        wrote(page, out / "report.log")


def patient_of(out: Path, model: STNeRP) -> PatientData:
    """`fitted_patient`, whose errors say how to do without the scans."""
    try:
        return fitted_patient(out, model)
    except InputError as error:
        remedy = "pass scans=false for a report of the model alone"
        raise InputError(f"{str(error).rstrip('.')}; or {remedy}") from error


def contours_of(patient: PatientData | None, wanted: Any) -> list[Structure]:
    """The labels of the reference's mask, with what was drawn at other times.

    Raises:
        InputError: a name that is none of the labels'.
    """
    if patient is None:
        return []
    series, known = patient.series, patient.label_names
    names = None if wanted is None else [str(name) for name in (wanted if isinstance(wanted, list) else [wanted])]
    unknown = sorted(set(names or ()) - set(known.values()))
    if unknown:
        raise InputError(f"contours: no label {', '.join(unknown)}; known: {', '.join(known.values())}")
    mask = series.masks[series.reference]
    if mask is None:
        return []
    drawn = {t: m for t, m in zip(series.times, series.masks, strict=True) if m is not None}
    labels = patient.contours if names is None else [label for label, name in known.items() if name in names]
    return [Structure(known[label], mask, label, drawn) for label in labels]


def rois_of(config: DictConfig, reference: Grid) -> Iterator[Structure]:
    """Every label of these files, and every ROI of a structure set.

    With `names` they are called by their files and names; else "ROI 2" is of the second file, "ROI 2.5" the one of
    number 5 in it, a structure set.
    """
    files = plain(config.roi)
    files = files if isinstance(files, list) else [] if files is None else [files]
    for k, path in enumerate((Path(str(file)) for file in files), start=1):
        for name, mask in read_rois(path, plain(config.rois), reference, config.names).items():
            if not config.names:
                name = f"ROI {k}" + name.removeprefix(roi_name(path)).replace(" ROI ", ".")
            found = [int(label) for label in np.unique(sitk.GetArrayViewFromImage(mask)) if label != 0]
            if not found:
                raise InputError(f"{path}: is empty; draw the ROI, or export it again")
            for label in found:
                yield Structure(name + (f" label {label}" if len(found) > 1 else ""), mask, label)


def rows_of(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a CSV file without columns that name files; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in NAMES_OF_FILES} for row in csv.DictReader(file)]


def shown_settings(out: Path) -> dict[str, Any]:
    """Name -> value of the fit's settings that say nothing about who or where, 'preset.def_net.width' -> 128."""
    path = found_config(out)
    saved: Any = OmegaConf.create({}) if path is None else OmegaConf.load(path)
    chosen = {name: plain(saved[name]) for name in (*SHOWN, *SHOWN_SECTIONS) if name in saved}
    data = {name: plain(value) for name, value in saved.get("data", {}).items() if name in SHOWN_OF_DATA}
    return dict(flat({"data": data, **chosen}))


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", "none" if value is None else value


if __name__ == "__main__":
    launch(main)

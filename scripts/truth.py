"""What a patient's scans have that a table can score, contours and landmarks; what they lack is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, OmegaConf
from data import PatientData, load_data
from labels import LABELS
from results import Record
from run_directory import logger

from stnerp.errors import InputError, MissingContoursError

Row = Mapping[str, Any]


def load_what_is_there(section: DictConfig) -> PatientData:
    """`load_data`, without contours that no scan has, or not the reference: a table shows all else nevertheless.

    Raises:
        InputError: as `load_data`, but for such contours; contours to score that aren't among those to read.
    """
    _check_contours(section)
    nowhere: list[str] = []
    while True:
        try:
            return replace(load_data(section), nowhere=tuple(nowhere))
        except MissingContoursError as error:
            fewer = _without(section, error.absent)
            if fewer == section:
                raise
            logger.warning("no Dice and HD95 of %s: %s", ", ".join(error.absent), error)
            nowhere += [name for name in error.absent if name not in error.there]
            section = fewer


def truth_of(patient: PatientData, numbers: Sequence[int] | None = None) -> dict[str, Any]:
    """The numbers of a patient's scans, and of those among them with each contour and with landmarks.

    Args:
        numbers: of the series' scans; None: from 1.
    """
    series = patient.series
    numbers = range(1, len(series) + 1) if numbers is None else numbers
    masks = [None if mask is None else sitk.GetArrayViewFromImage(mask) for mask in series.masks]
    return {
        "scans": list(numbers),
        "reference": numbers[series.reference],
        "contours": {
            patient.label_names[label]: [
                n for n, mask in zip(numbers, masks, strict=True) if mask is not None and np.any(mask == label)
            ]
            for label in patient.contours
        },
        "nowhere": list(patient.nowhere),
        "landmarks": [n for n, points in zip(numbers, series.landmarks, strict=True) if points is not None],
    }


def lacking_lines(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    """A line for each case whose scans lack contours or landmarks that a table is of, and what that leaves.

    Args:
        rows: of the records' images.
    """
    lines = []
    for case in sorted({record["arguments"]["case"] for record in records}):
        own = [record for record in records if record["arguments"]["case"] == case and record["result"]]
        found = [record["result"]["truth"] for record in own if "truth" in record["result"]]
        section = own[0]["arguments"].get("data", {}) if own else {}
        reasons = {"dice": _undrawn(section, found), "tre_mean_mm": _without_landmarks(found, rows)}
        for measure, reason in reasons.items():
            known = bool(reason) or any(measure in row for row in rows)
            left = _left(rows, case, measure, TITLES[measure]) if known else ""
            if told := ": ".join(filter(None, [reason, left])):
                lines.append(f"- case {case}: {told}")
    return lines


# -- parts of the above

TITLES = {"dice": "Dice", "tre_mean_mm": "TRE"}  # of what contours and landmarks are for


def _check_contours(section: DictConfig) -> None:
    """Raises InputError for a contour to score that isn't among those to read: none would be scored, silently."""
    rois, contours = (section.get(name) for name in ("rois", "contours"))
    if not (rois and OmegaConf.is_list(rois) and OmegaConf.is_list(contours)):
        return
    slips = [str(name) for name in contours if name not in rois]
    if slips:
        known = ", ".join(map(str, rois))
        raise InputError(f"data.contours: {', '.join(slips)} must be among data.rois, which are {known}")


def _without(section: DictConfig, absent: Collection[str]) -> DictConfig:
    """A `data` section without some contours."""
    kept = {
        name: [one for one in section[name] if one not in absent]
        for name in ("rois", "contours")
        if section.get(name) is not None
    }
    return OmegaConf.merge(section, OmegaConf.create(kept))  # type: ignore[return-value]


def _undrawn(section: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """Which contours aren't drawn, and on which scans; empty where all are, or none was named."""
    if not found:
        return ""
    drawn: dict[str, set[int]] = {}
    for truth in found:
        for name, scans in truth["contours"].items():
            drawn.setdefault(name, set()).update(scans)
    asked = section.get("contours") or section.get("rois") or list(drawn)
    if not any(drawn.values()):
        return f"no contours of {', '.join(asked)}" if asked else ""
    missing = {name: _scans(found) - drawn.get(name, set()) for name in asked}
    nowhere = {name for truth in found for name in truth.get("nowhere", ())}  # of before: not known
    where = {
        name: _listed(scans, found) if name in {*drawn, *nowhere} else "the reference"
        for name, scans in missing.items()
    }
    return ", ".join(f"no contour of {name} on {where[name]}" for name, scans in missing.items() if scans)


def _without_landmarks(found: Sequence[Mapping[str, Any]], rows: Iterable[Row]) -> str:
    """Which scans have no landmarks; empty where all have, or where no landmarks are known of anything."""
    some = {scan for truth in found for scan in truth["landmarks"]}
    if not found or not (some or any("tre_mean_mm" in row for row in rows)):
        return ""
    without = _scans(found) - some
    return f"no landmarks on {_listed(without, found)}" if without else ""


def _scans(found: Sequence[Mapping[str, Any]]) -> set[int]:
    return {scan for truth in found for scan in truth["scans"]}


def _listed(scans: set[int], found: Sequence[Mapping[str, Any]]) -> str:
    """Scans by their numbers; one is the reference of all records, unless they are of pairs."""
    if scans == _scans(found):
        return "any scan"
    references = {truth["reference"] for truth in found}
    named = [f"{n} (the reference)" if references == {n} else str(n) for n in sorted(scans)]
    return ("scan " if len(named) == 1 else "scans ") + ", ".join(named)


def _left(rows: Sequence[Row], case: int, measure: str, title: str) -> str:
    """Of how many of a case's images each method has a measure, where it isn't all; methods that never have any,
    since they move nothing, are passed over."""
    counts: dict[tuple[int, int], list[str]] = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["case"] == case):
        if any(measure in row or "folded_voxels" in row for row in rows if row["method"] == method):
            own = [row for row in rows if (row["case"], row["method"]) == (case, method)]
            scored = sum(bool(np.isfinite(row.get(measure, np.nan))) for row in own)
            counts.setdefault((scored, len(own)), []).append(LABELS[method])
    if all(scored == of for scored, of in counts):
        return ""
    if not any(scored for scored, _ in counts):
        return f"no {title}"
    parts = [f"of {scored} of {of} images ({', '.join(labels)})" for (scored, of), labels in counts.items()]
    return f"{title} is {', '.join(parts)}"

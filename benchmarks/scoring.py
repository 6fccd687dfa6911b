"""Scores of a method on a case, as scripts/answers.py takes them; landmarks by region, over several images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from answers import Answers, Row, answer, landmark_errors, summary_of_errors
from answers import score as scores_of
from cases import Case
from data import PatientData

Errors = dict[str, np.ndarray]  # of each region, one per point, mm
SUMMED = ("folded_voxels",)


def score(case: Case, truth: PatientData, given: Answers, index: int) -> tuple[Row, Errors]:
    """Scores of one image, by name, and the errors of its landmarks; empty where there is no answer."""
    found = answer(truth, given, index)
    row = scores_of(truth, found, index)
    measured = landmark_errors(truth, found, index) if row else None
    if measured is None:
        return row, {}
    errors_mm, seen = measured
    regions = zip(case.regions_of(errors_mm), case.regions_of(seen), strict=True)
    return row, {name: own[inside] for (name, own), (_, inside) in regions}


def summary(rows: Sequence[tuple[Row, Errors]]) -> Row:
    """Over several images: of landmarks' errors all together, of other scores the mean; folded voxels add up."""
    rows = [(row, errors) for row, errors in rows if row]
    result: Row = {"images": len(rows)} if rows else {}
    for number, region in enumerate(dict.fromkeys(name for _, errors in rows for name in errors)):
        pooled = np.concatenate([errors[region] for _, errors in rows if region in errors])
        name = "tre" if number == 0 else f"tre_{region.replace(' ', '_')}"
        result |= {f"{name}_{key}": value for key, value in summary_of_errors(pooled).items()}
    for name in dict.fromkeys(name for row, _ in rows for name in row):
        values = [row[name] for row, _ in rows if name in row and not np.isnan(row[name])]
        if values:
            result[name] = float(np.sum(values) if name in SUMMED else np.mean(values))
    return result

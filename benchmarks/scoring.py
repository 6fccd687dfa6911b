"""One code scores every method: its answer for an image against the truth.

- Landmarks: points of the target, mapped to the reference and compared there, of those that lie in both
  fields of view. Where a method shows a copy of another image, that image's points stand for the target's.
- Images: in the case's window as [0, 1], on the target's grid; where the reference's grid is another, over
  the voxels that the method draws from within the reference.
- Contours: the reference's, carried by the method and compared on the target's grid.
- Folding and the spread of log |J|: over all voxels of the target's grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import SimpleITK as sitk
from cases import Case
from data import PatientData
from methods import Answers
from scores import contour_scores

from stnerp import Grid
from stnerp.baselines.pair import PairRegistration
from stnerp.metrics import folding, jacobian_determinant, psnr_db, ssim, tre_mm
from stnerp.preprocess import normalised

Row = dict[str, float]
Errors = dict[str, np.ndarray]  # of each region, one per point, mm
SUMMED = ("folded_voxels",)


def score(case: Case, truth: PatientData, answers: Answers, index: int) -> tuple[Row, Errors]:
    """Scores of one image, by name, and the errors of its landmarks; empty where there is no answer."""
    scan = truth.series.images[index]
    grid = Grid.of(scan)
    registration = answers.registration(index, grid)
    copy = None if answers.copy_of is None else answers.copy_of(index)
    row = _image_scores(truth, answers, registration, index)
    if copy is not None and row:
        row |= contour_scores(truth, index, truth.series.masks[copy])
    elif registration is not None:
        mask = truth.series.masks[case.reference]
        row |= contour_scores(truth, index, None if mask is None else registration.propagate(mask))
        field = sitk.GetArrayViewFromImage(registration.displacement)
        row |= folding(jacobian_determinant(field, grid))
    return row, _landmark_errors(case, truth, registration, copy if row else None, index)


def summary(rows: Sequence[tuple[Row, Errors]]) -> Row:
    """Over several images: of landmarks' errors all together, of other scores the mean; folded voxels add up."""
    rows = [(row, errors) for row, errors in rows if row]
    result: Row = {"images": len(rows)} if rows else {}
    for number, region in enumerate(dict.fromkeys(name for _, errors in rows for name in errors)):
        pooled = np.concatenate([errors[region] for _, errors in rows if region in errors])
        name = "tre" if number == 0 else f"tre_{region.replace(' ', '_')}"
        result |= {f"{name}_{key}": value for key, value in _of_errors(pooled).items()}
    for name in dict.fromkeys(name for row, _ in rows for name in row):
        values = [row[name] for row, _ in rows if name in row and not np.isnan(row[name])]
        if values:
            result[name] = float(np.sum(values) if name in SUMMED else np.mean(values))
    return result


def _of_errors(errors_mm: np.ndarray) -> Mapping[str, float]:
    if len(errors_mm) == 0:
        return {}
    return {
        "mean_mm": float(errors_mm.mean()),
        "median_mm": float(np.median(errors_mm)),
        "p95_mm": float(np.percentile(errors_mm, 95)),
        "max_mm": float(errors_mm.max()),
        "points": len(errors_mm),
    }


def _image_scores(truth: PatientData, answers: Answers, registration: PairRegistration | None, index: int) -> Row:
    series = truth.series
    scan, grid, reference = series.images[index], Grid.of(series.images[index]), series.reference_image
    shown = None
    if answers.image is not None:
        shown = answers.image(index, grid)
    elif registration is not None:
        shown = registration.warp(reference)
    if shown is None:
        return {}
    covered = None
    if registration is not None and not series.grid.is_close(grid):
        everywhere = series.grid.image(np.ones(series.grid.shape, np.float32))
        covered = sitk.GetArrayFromImage(registration.warp(everywhere, outside=0.0)) > 0.5
    image, target = (normalised(volume, series.window) for volume in (shown, scan))
    return {
        "psnr_db": psnr_db(image, target, mask=covered),
        "ssim": ssim(image, target, mask=covered),
        "covered_percent": 100.0 if covered is None else 100 * float(covered.mean()),
    }


def _landmark_errors(
    case: Case, truth: PatientData, registration: PairRegistration | None, copy: int | None, index: int
) -> Errors:
    """Errors in mm of each region's landmarks that lie in both fields of view."""
    series = truth.series
    shown = case.reference if copy is None else copy  # the image whose landmarks are found again
    shown_mm, target_mm = series.landmarks[shown], series.landmarks[index]
    if shown_mm is None or target_mm is None or (registration is None and copy is None):
        return {}
    seen = Grid.of(series.images[shown]).contains(shown_mm) & Grid.of(series.images[index]).contains(target_mm)
    found_mm = target_mm if registration is None else registration.map_points(target_mm)
    errors_mm = tre_mm(found_mm, shown_mm)
    return {
        name: own[inside]
        for (name, own), (_, inside) in zip(case.regions_of(errors_mm), case.regions_of(seen), strict=True)
    }

"""What is said about one image of a series: how well a model explains it, beside what it was before.

Images are scored in the window's [0, 1]; landmarks in the reference, contours in the image itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from data import PatientData

from stnerp import STNeRP
from stnerp.geometry import Grid
from stnerp.metrics import (
    dice,
    folding,
    jacobian_determinant,
    ncc,
    psnr_db,
    ssim,
    surface_distances_mm,
    tre_summary,
)
from stnerp.preprocess import normalised
from stnerp.report import overview

# Of a contour `_lung`, or `_lung_before`.
CONTOUR_KEYS = ("dice{}", "hd95{}_mm", "mean_surface_distance{}_mm")
TRE_KEYS = ("landmarks", "tre_mean_mm", "tre_median_mm", "tre_p95_mm", "tre_max_mm")


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one image of the series, on that image's own grid.

    Attributes:
        target, image: intensities in [0, 1], (z, y, x): the scan and what the model says.
        before: the reference as the headers place it.
        covered: where the reference has something to say, after deformation; only this is scored of `image`.
        displacement_mm: target -> reference, world LPS mm, (z, y, x, 3).
        labels, labels_before: the reference's labels carried to this time, or left where they are.
    """

    index: int
    grid: Grid
    target: np.ndarray
    image: np.ndarray
    before: np.ndarray
    covered: np.ndarray
    displacement_mm: np.ndarray
    labels: sitk.Image | None
    labels_before: sitk.Image | None


def predict(model: STNeRP, patient: PatientData, index: int) -> Prediction:
    """The model's answer for the image at `index`."""
    series = patient.series
    scan, t, window = series.images[index], series.times[index], series.window
    grid, reference = Grid.of(scan), series.reference_image
    mask = series.masks[series.reference]
    before = sitk.Resample(reference, scan, sitk.Transform(), sitk.sitkLinear, window.low, sitk.sitkFloat32)
    return Prediction(
        index=index,
        grid=grid,
        target=normalised(scan, window),
        image=normalised(model.image(t, grid), window),
        before=normalised(before, window),
        covered=sitk.GetArrayFromImage(model.propagate(everywhere(reference), t, grid)) != 0,
        displacement_mm=sitk.GetArrayFromImage(model.displacement(t, grid)),
        labels=None if mask is None else model.propagate(mask, t, grid),
        labels_before=None if mask is None else resampled_labels(mask, scan),
    )


def score(model: STNeRP, patient: PatientData, prediction: Prediction) -> dict[str, Any]:
    """One row of metrics.csv; names without `before` are those of the model.

    Images are scored where the reference has something to say: the model's where it does after deformation, that
    of `before` where headers place it. Beyond, `before` would be scored for what it lacks.
    """
    series, i, p = patient.series, prediction.index, prediction
    seen_before = resampled_labels(everywhere(series.reference_image), series.images[i])
    reached = sitk.GetArrayFromImage(seen_before) != 0
    mask, mask_before = (None if seen.all() else seen for seen in (p.covered, reached))
    row: dict[str, Any] = {"time": series.times[i], "image": series.names[i]}
    row["covered_percent"] = 100 * float(p.covered.mean())
    for name, measure in {"psnr_db": psnr_db, "ssim": ssim}.items():
        row[f"{name}_before"] = measure(p.before, p.target, mask=mask_before)
        row[name] = measure(p.image, p.target, mask=mask)
    row["ncc_before"], row["ncc"] = ncc(p.before, p.target, mask_before), ncc(p.image, p.target, mask)
    row |= folding(jacobian_determinant(p.displacement_mm, p.grid))
    row |= landmark_errors(model, patient, i)
    row |= contour_scores(patient, i, p.labels_before, seen_before, "_before")
    row |= contour_scores(patient, i, p.labels, p.grid.image(p.covered.astype(np.uint8)))
    return row


def landmark_errors(model: STNeRP, patient: PatientData, index: int) -> dict[str, Any]:
    """TRE of the landmarks inside both fields of view, in the reference, in mm; empty where there are none."""
    series = patient.series
    reference_mm, target_mm = series.landmarks[series.reference], series.landmarks[index]
    if reference_mm is None or target_mm is None:
        return {}
    seen = series.grid.contains(reference_mm) & Grid.of(series.images[index]).contains(target_mm)
    reference_mm, target_mm = reference_mm[seen], target_mm[seen]
    before = tre_summary(target_mm, reference_mm)
    after = tre_summary(model.map_points(target_mm, series.times[index]), reference_mm, series.grid)
    row = {f"{key.removesuffix('_mm')}_before_mm": before[key] for key in TRE_KEYS[1:]}
    row |= after
    row["landmarks_outside"] = int(np.count_nonzero(~seen))
    return row


def contour_scores(
    patient: PatientData,
    index: int,
    labels: sitk.Image | None,
    seen: sitk.Image | None = None,
    suffix: str = "",
    source: sitk.Image | None = None,
) -> dict[str, float]:
    """Dice, HD95 and mean surface distance of each label; empty where the truth or the labels are missing.

    A label that is nowhere in the truth is not drawn on that scan, and not scored; one that is there and not among
    `labels` is lost, a Dice of 0.

    Args:
        labels: carried from another image, on the grid of the one at `index`.
        seen: `everywhere` of that other image, carried in the same way: where it shows nothing, nothing is
            scored. An organ that its border cuts would else count as lost there, however well it was followed.
            None: all is scored.
        source: the mask that `labels` were carried from; what isn't drawn there isn't scored. None: all is.
    """
    whole = patient.series.masks[index]
    if whole is None or labels is None:
        return {}
    # Of the whole scan: where it is seen alone, a label that is drawn may be empty.
    masks = [sitk.GetArrayViewFromImage(mask) for mask in (whole, source) if mask is not None]
    drawn = [label for label in patient.label_names if all(np.any(mask == label) for mask in masks)]
    true, labels = within(seen, whole, labels)
    row: dict[str, float] = {}
    for label in drawn:
        distances = surface_distances_mm(labels, true, label)
        scores = dice(labels, true, label), distances["hd95_mm"], distances["mean_surface_distance_mm"]
        row |= zip(contour_columns(patient.label_names[label], suffix), scores, strict=True)
    return row


def contour_columns(name: str, suffix: str = "") -> list[str]:
    """The columns of a contour's scores in metrics.csv, in the order of `CONTOUR_KEYS`."""
    return [key.format(f"_{name.replace(' ', '_')}{suffix}") for key in CONTOUR_KEYS]


def within(seen: sitk.Image | None, *labels: sitk.Image) -> list[sitk.Image]:
    """Label images without what lies where `seen` is 0; None: as they are."""
    return [image if seen is None else sitk.Mask(image, seen) for image in labels]


def everywhere(image: sitk.Image) -> sitk.Image:
    """A label of 1 at every voxel of an image."""
    grid = Grid.of(image)
    return grid.image(np.ones(grid.shape, np.uint8))


def resampled_labels(labels: sitk.Image, grid: sitk.Image) -> sitk.Image:
    """Labels on another image's grid, nearest neighbour."""
    return sitk.Resample(labels, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0, labels.GetPixelID())


def all_reach(images: Sequence[sitk.Image], target: sitk.Image) -> np.ndarray | None:
    """Which of a target's voxels all images reach, where headers place them, (z, y, x); None: all."""
    grid = Grid.of(target)
    others = [image for image in images if not Grid.of(image).is_close(grid)]
    reached = [sitk.GetArrayFromImage(resampled_labels(everywhere(image), target)) != 0 for image in others]
    return np.logical_and.reduce(reached) if reached else None


def draw(path: Path, patient: PatientData, prediction: Prediction, title: str) -> Path:
    """Reference / target / prediction / difference / deformation, the contours overlaid."""
    p, true = prediction, patient.series.masks[prediction.index]
    contours = {}
    if p.labels is not None:
        carried = sitk.GetArrayFromImage(p.labels)
        truth = None if true is None else sitk.GetArrayFromImage(true)
        for label in patient.contours:
            name = patient.label_names[label]
            contours[name] = (None if truth is None else truth == label, carried == label)
    return overview(
        path,
        reference=p.before,
        target=p.target,
        prediction=p.image,
        displacement_mm=p.displacement_mm,
        grid=p.grid,
        contours=contours,
        title=title,
        mask=p.covered,
    )

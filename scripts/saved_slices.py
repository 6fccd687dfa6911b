"""Some slices of what a method says about an image, small enough to keep: figures need no fit.

A file (.npz) holds axial slices, upright (anterior on top, the patient's right on the left), float16 or bool:
`reference`, `rendered` (by Ref-Net), `target`, `prediction` in [0, 1], `displacement_mm` (..., 3), target ->
reference, LPS, `mask` and `carried` (all drawn contours together), each (slices, y, x); and `pixel_mm` (y, x).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from answers import Answer, Answers
from data import PatientData

from stnerp import Grid, Series
from stnerp.preprocess import normalised

SLICES = 4
Slices = dict[str, np.ndarray]


def save_slices(path: Path, patient: PatientData, answers: Answers, given: Answer, index: int) -> Path | None:
    """Write the slices of one answer; None, and no file, where there is no image."""
    if given.image is None:
        return None
    series = patient.series
    scan, mask = series.images[index], series.masks[index]
    grid = Grid.of(scan)
    volumes: dict[str, np.ndarray] = {
        "reference": _on(series, series.reference_image, scan),
        "target": normalised(scan, series.window),
        "prediction": normalised(given.image, series.window),
    }
    if answers.rendered is not None:
        volumes["rendered"] = _on(series, answers.rendered, scan)
    if given.registration is not None:
        volumes["displacement_mm"] = sitk.GetArrayFromImage(given.registration.displacement)
    for name, labels in {"mask": mask, "carried": given.labels}.items():
        if labels is not None:
            volumes[name] = np.isin(sitk.GetArrayFromImage(labels), patient.contours)
    kept = {name: upright(volume, grid) for name, volume in volumes.items()}
    heights = _heights(kept["target"].shape[0], kept.get("mask"))
    arrays = {
        name: volume[heights].astype(bool if name in ("mask", "carried") else np.float16)
        for name, volume in kept.items()
    }
    arrays["pixel_mm"] = np.asarray(_upright_spacing(grid)[1::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def load_slices(path: Path) -> Slices:
    with np.load(path) as arrays:
        return dict(arrays)


def upright(volume: np.ndarray, grid: Grid) -> np.ndarray:
    """A volume with its axes in the order S, P, L of the patient's; world vectors keep their components."""
    kept = volume.astype(np.uint8 if volume.dtype == bool else np.float32)
    return sitk.GetArrayFromImage(sitk.DICOMOrient(grid.image(kept), "LPS"))


def _upright_spacing(grid: Grid) -> tuple[float, float, float]:
    return Grid.of(sitk.DICOMOrient(grid.image(np.zeros(grid.shape, np.uint8)), "LPS")).spacing_mm


def _on(series: Series, image: sitk.Image, scan: sitk.Image) -> np.ndarray:
    low = series.window.low
    return normalised(
        sitk.Resample(image, scan, sitk.Transform(), sitk.sitkLinear, low, sitk.sitkFloat32), series.window
    )


def _heights(count: int, mask: np.ndarray | None) -> np.ndarray:
    """Evenly spaced slices: of the contours where there are any, else of the inner three fifths of the volume."""
    first, last = 0.2 * (count - 1), 0.8 * (count - 1)
    if mask is not None and mask.any():
        inside = np.flatnonzero(mask.any((1, 2)))
        first, last = float(inside[0]), float(inside[-1])
    steps = (np.arange(SLICES) + 0.5) / SLICES
    return np.unique(np.rint(first + steps * (last - first)).astype(int))

"""python benchmarks/broken_fits.py

What the verdicts of `stnerp.trust` say of fits that are broken on purpose, and of good ones; and how the
uncertainty from refits relates to the true error, on a phantom. Prints tables and writes trust.md into `out`. The
folder of real images is that of the environment variable STNERP_DATA; cases without their images are left out.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from run import settings_of, start

from stnerp import MissingFileError, Series, STNeRP, fit_deformation, load_series, trust
from stnerp.geometry import Grid
from stnerp.io.image import read_image
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, Phantom
from stnerp.report import markdown_table, text_table

logger = logging.getLogger("stnerp.benchmarks")

Change = Callable[[sitk.Image], sitk.Image]


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where the tables are written.
        cases: of `CASES`, by name; None: all.
        levels: of every fit.
        refits: for the uncertainty; 0: no calibration.
    """

    out: str = "runs/trust"
    cases: Any = None
    levels: Any = field(default_factory=lambda: [[8, 12, 60], [4, 6, 25]])
    refits: int = 4


def phantom(seed: int = 0) -> Phantom:
    """A thorax in 5 mm voxels with 20 HU of noise."""
    return Phantom((72, 56, 36), 5.0, Breathing(*BOX_MM, period=10.0), seed=seed)


def breath(change: Change | None = None, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> Series:
    """Six phases; the fourth may be changed."""
    scene = phantom()
    times = scene.times(6)
    images = [scene.image(times[i]) for i in order]
    if change is not None:
        images[3] = change(images[3])
    return load_series(images, times, period=10.0)


def lungs(change: Change = lambda image: image) -> Series:
    folder = data() / "lung_followup"
    baseline, followup = (read_image(folder / f"3DCT_lung_{name}.mha") for name in ("baseline", "followup"))
    return load_series([baseline, change(followup)], [0, 30])


def heart(change: Change | None = None, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)) -> Series:
    """Every 4th phase; the fourth of them may be changed."""
    cine = load_series(str(data() / "cine_mr" / "cine.nii.gz"), period=875, window="percentile")
    times = cine.times[::4]
    images = [cine.images[4 * i] for i in order]
    if change is not None:
        images[3] = change(images[3])
    return load_series(images, times, period=875, window="percentile")


def two_patients() -> Series:
    """A chest, and another patient's, put on its middle."""
    chest = coarse(read_image(data() / "chest_ct" / "ct.nii.gz"))
    other = coarse(read_image(data() / "thorax_4dct" / "t0.mha"))
    apart_mm = Grid.of(chest).centre_mm - Grid.of(other).centre_mm
    return load_series([chest, moved(other, apart_mm)], [0, 30])


def breathing_thorax() -> Series:
    folder = data() / "thorax_4dct"
    return load_series([coarse(read_image(folder / f"t{phase}.mha")) for phase in (0, 5)], [0, 5], period=10)


def data() -> Path:
    return Path(os.environ.get("STNERP_DATA", "../shared/data"))


def like(array: np.ndarray, image: sitk.Image) -> sitk.Image:
    return Grid.of(image).image(np.ascontiguousarray(array))


def mirrored(image: sitk.Image) -> sitk.Image:
    return like(sitk.GetArrayFromImage(image)[:, :, ::-1], image)


def half_black(image: sitk.Image) -> sitk.Image:
    array = sitk.GetArrayFromImage(image)
    array[: len(array) // 2] = array.min()
    return like(array, image)


def moved(image: sitk.Image, by_mm: np.ndarray) -> sitk.Image:
    image = sitk.Image(image)
    image.SetOrigin([float(o + d) for o, d in zip(image.GetOrigin(), by_mm, strict=True)])
    return image


def coarse(image: sitk.Image) -> sitk.Image:
    """About 3 mm voxels."""
    grid = Grid.of(image).with_spacing(3.0)
    like_grid = grid.image(np.zeros(grid.shape, np.uint8))
    return sitk.Resample(image, like_grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)


SHORT: dict[str, Any] = {"levels": [[8, 12, 5]]}
FAST: dict[str, Any] = {"learning_rate": 0.1}
CASES: dict[str, tuple[Callable[[], Series], dict[str, Any]]] = {
    "phantom": (breath, {}),
    "phantom, 5 iterations": (breath, SHORT),
    "phantom, learning rate x 100": (breath, FAST),
    "phantom, an image mirrored": (lambda: breath(mirrored), {}),
    "phantom, an image 40 mm off": (lambda: breath(lambda image: moved(image, np.array([0, 0, 40.0]))), {}),
    "phantom, an image half black": (lambda: breath(half_black), {}),
    "phantom, an image with other vessels": (lambda: breath(lambda image: phantom(seed=7).image(5.0)), {}),
    "phantom, order shuffled": (lambda: breath(order=(0, 3, 1, 5, 2, 4)), {}),
    "phantom, two images exchanged": (lambda: breath(order=(0, 1, 4, 3, 2, 5)), {}),
    "lung_followup": (lungs, {}),
    "lung_followup, align=none": (lungs, {"align": "none"}),
    "lung_followup, 5 iterations": (lungs, SHORT),
    "lung_followup, learning rate x 100": (lungs, FAST),
    "lung_followup, mirrored": (lambda: lungs(mirrored), {}),
    "lung_followup, half black": (lambda: lungs(half_black), {}),
    "cine_mr": (heart, {}),
    "cine_mr, an image mirrored": (lambda: heart(mirrored), {}),
    "cine_mr, an image half black": (lambda: heart(half_black), {}),
    "cine_mr, order shuffled": (lambda: heart(order=(0, 3, 5, 1, 6, 2, 4)), {}),
    "thorax_4dct": (breathing_thorax, {}),
    "chest_ct, then another patient": (two_patients, {}),
}


def main(arguments: list[str]) -> None:
    """A fit and a verdict of each case, and the calibration."""
    settings = settings_of(Settings(), arguments)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in settings.cases or CASES:
        make, changes = CASES[name]
        try:
            series = make()
        except MissingFileError as error:
            logger.warning("%s: left out: %s", name, error)
            continue
        model = fit_deformation(series, None, progress=False, **{"levels": settings.levels, **changes})
        rows += [{"case": name, **row(verdict)} for verdict in trust.verdicts(model, series)[1:]]
        logger.info("\n%s", text_table(rows[1 - len(series) :]))
    tables = [markdown_table(rows)]
    if settings.refits:
        series = breath()
        model = fit_deformation(series, None, progress=False, levels=settings.levels)
        fits = trust.refits(series, settings.refits, levels=settings.levels, progress=False)
        calibration = calibrated(model, fits, series)
        logger.info("\n%s", text_table(calibration))
        tables.append(markdown_table(calibration))
    (out / "trust.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def row(verdict: trust.Verdict) -> dict[str, Any]:
    names = ("unlike_percent", "misplaced_percent", "order_percent", "covered_percent", "beyond_jacobian_ml")
    said = verdict.row()
    return {name: said.get(name) for name in ("time", "verdict", *names, "reason")}


def calibrated(model: STNeRP, fits: list[STNeRP], series: Series) -> list[dict[str, Any]]:
    """The uncertainty against the true error within the body, at scans and between them."""
    scene = phantom()
    inside = sitk.GetArrayFromImage(series.reference_image) > -900
    points_mm = model.grid.points_world()[inside]
    gaps = [(a + b) / 2 for a, b in zip(series.times, [*series.times[1:], series.times[0] + 10], strict=True)]
    rows, errors, sigmas = [], [], []
    for t in sorted([*series.times[1:], *gaps]):
        error_mm = np.linalg.norm(model.map_points(points_mm, t) - scene.map_points(points_mm, t), axis=1)
        sigma_mm = trust.uncertainty_at(model, fits, points_mm, t)
        rows.append({"time": f"{t:.3g}", "scan": t in series.times, **related(error_mm, sigma_mm)})
        errors.append(error_mm)
        sigmas.append(sigma_mm)
    everything = related(np.concatenate(errors), np.concatenate(sigmas))
    return [*rows, {"time": "all", "scan": "", **everything}]


def related(error_mm: np.ndarray, sigma_mm: np.ndarray) -> dict[str, float]:
    return {
        "error_mean_mm": float(error_mm.mean()),
        "uncertainty_mean_mm": float(sigma_mm.mean()),
        "pearson": float(np.corrcoef(error_mm, sigma_mm)[0, 1]),
        "spearman": float(spearmanr(error_mm, sigma_mm)[0]),
        "below_2_sigma_percent": 100 * float((error_mm < 2 * sigma_mm).mean()),
        "rms_error_per_sigma": float(np.sqrt((error_mm**2).mean() / (sigma_mm**2).mean())),
    }


if __name__ == "__main__":
    start(main)

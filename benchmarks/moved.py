"""python benchmarks/moved.py image=ct.nii.gz methods=stnerp_fast,greedy,elastix_bspline

Does it hold on your images? Any 3D image, denoised, and the same image half a breath later by a known motion, each
with noise of its own, so that no noise moves along with the tissue; registered by each method in turn. Prints a
table of errors in mm, and adds its rows to moved.csv in `out`: a method's that is there already is not run again.
"""

from __future__ import annotations

import csv
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from answers import folding_of
from machine import machine
from pair_methods import METHODS, timed
from run import chosen, settings_of, start, whole_numbers

from stnerp import Grid, InputError
from stnerp.baselines.pair import PairRegistration
from stnerp.io.image import read_image
from stnerp.metrics import tre_mm
from stnerp.motion import Breathing
from stnerp.phantom import MovedImage, patient_in
from stnerp.report import text_table, write_csv
from stnerp.window import Window

logger = logging.getLogger("stnerp.benchmarks")

MEASURED = ("landmarks_mean", "landmarks_median", "landmarks_p95", "body_mean", "body_median")
REFERENCE, TARGET = 0.0, 0.5  # of a breath: at rest, and half a breath later


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        image: a 3D image, in any format that SimpleITK reads, or a folder with one DICOM series.
        out: where moved.csv is written.
        methods: of scripts/pair_methods.py.
        motion: settings of `Breathing`, `motion.amplitude_si_mm=10`.
        window: as for `load_series`.
        noise: standard deviation of the noise on both images, as a part of the window: 0.01 is 20 HU.
        seeds: of the methods; images and noise stay.
        device: of the methods that can choose.
    """

    image: str = ""
    out: str = "runs/moved"
    methods: Any = "stnerp_fast"
    motion: dict[str, Any] = field(default_factory=dict)
    window: Any = "auto"
    noise: float = 0.01
    seeds: Any = field(default_factory=lambda: [0])
    device: str = "auto"


def main(arguments: list[str]) -> None:
    """Move the image, register, score."""
    settings = settings_of(Settings(), arguments)
    methods, seeds = chosen(settings.methods, list(METHODS), "methods"), whole_numbers(settings.seeds, "seeds")
    if not settings.image:
        raise InputError("image: give a file, image=ct.nii.gz")
    still = read_image(settings.image)
    window = Window.of(settings.window, [still])
    try:
        motion = Breathing.of_grid(Grid.of(still), **settings.motion)
    except TypeError as error:
        raise InputError(f"motion: {str(error).split('()', 1)[-1].strip()}") from None
    scene = MovedImage(denoised(still, window), motion)
    images = [noisy(scene.image(t), settings.noise, window, seed) for seed, t in enumerate((REFERENCE, TARGET))]
    path = Path(settings.out) / "moved.csv"
    rows = rows_of(path)
    about = {"image": Path(settings.image).name, "motion": str(settings.motion), "noise": str(settings.noise)}
    for name in methods:
        for seed in seeds:
            key = {**about, "method": name, "seed": str(seed)}
            if any(key.items() <= row.items() for row in rows):
                continue
            found, seconds = timed(name, *images, window=window, align="none", seed=seed, device=settings.device)
            row = {**key, **errors_mm(scene, found), **folding_of(found.displacement), "seconds": seconds}
            rows.append({k: v if isinstance(v, str) else f"{v:.6g}" for k, v in {**row, **machine()}.items()})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_csv(path, rows)
            logger.info("%s, seed %d: %.3f mm, %.0f s", name, seed, row["landmarks_mean_mm"], seconds)
    shown = ["method", "seed", *(f"{name}_mm" for name in MEASURED), "folded_voxels", "seconds"]
    mine = [row for row in rows if about.items() <= row.items()]
    logger.info("\n%s", text_table([{name: row[name] for name in shown} for row in mine]))


def denoised(image: sitk.Image, window: Window) -> sitk.Image:
    """The image in its window, without most of its noise, edges kept: what moves must not carry noise along."""
    clipped = sitk.Clamp(image, sitk.sitkFloat32, window.low, window.high)
    return sitk.CurvatureAnisotropicDiffusion(
        clipped, timeStep=0.05, conductanceParameter=1.5, numberOfIterations=8
    )


def noisy(image: sitk.Image, noise: float, window: Window, seed: int) -> sitk.Image:
    grid, voxels = Grid.of(image), sitk.GetArrayFromImage(image).astype(np.float32)
    sigma = noise * (window.high - window.low)
    return grid.image(voxels + np.random.default_rng([7, seed]).normal(0, sigma, voxels.shape).astype(np.float32))


def errors_mm(scene: MovedImage, found: PairRegistration) -> dict[str, float]:
    """Distances in mm from the known motion: of points with structure, and of all voxels of the body."""
    landmarks = tre_mm(found.map_points(scene.landmarks(TARGET)), scene.landmarks(REFERENCE))
    field = sitk.GetArrayViewFromImage(found.displacement)
    body = np.linalg.norm(field - scene.displacement(TARGET), axis=-1)
    body = body[sitk.GetArrayFromImage(patient_in(scene.image(TARGET))) != 0]
    figures = landmarks.mean(), np.median(landmarks), np.percentile(landmarks, 95), body.mean(), np.median(body)
    return {f"{name}_mm": float(figure) for name, figure in zip(MEASURED, figures, strict=True)}


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    start(main)

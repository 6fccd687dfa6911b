"""python benchmarks/load.py series=200 seed=0 out=runs/load

Random series through the whole pipeline, one after the other in one process: written to files, loaded, fitted,
asked for everything that a model answers, exported, saved and loaded. Sizes, spacings, orientations, phases and
dates, modalities, formats and what else a user chooses are drawn; anatomy and motion are functions of points, and
so known everywhere. Some series have a defect that is to be refused. A failure stops nothing; it is told in one
line, and `first=17 series=1` has series 17 again. The first `again` series are run once more at the end.

Writes into `out`, after each series: load.csv, load.md. On Linux.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates
from scipy.optimize import nnls
from scipy.spatial.transform import Rotation
from scipy.stats import linregress

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from machine import machine, peak_memory_mib
from run import settings_of, start

from stnerp import InputError, Series, STNeRP, fit_deformation, fit_reference, load_series
from stnerp.geometry import Grid, apply_affine
from stnerp.io.dicom import write_dicom_series
from stnerp.io.image import write_image
from stnerp.io.landmarks import write_landmarks
from stnerp.io.nifti_4d import write_nifti_4d
from stnerp.io.transforms import write_transform, write_velocity
from stnerp.metrics import folding, tre_mm
from stnerp.presets import FAST
from stnerp.report import Row, markdown_table, write_csv

logger = logging.getLogger("stnerp.benchmarks")

FEWEST, MOST = 4, 96  # voxels along an axis
MOST_VOXELS = 2_500_000  # of all images of a series
MOST_MM = 400.0  # along an axis
FULL_VOXELS, FULL_MM3 = 200_000, 3e6  # up to so much, a fit makes all its steps
SHORT = tuple(replace(level, iterations=3) for level in FAST.def_net.levels)

MODALITIES = ("ct", "cbct", "mr", "pet", "uint8")
SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
#: What is wrong with some series, and what the refusal has to say.
DEFECTS = {
    "NaN voxels": r"\d+ voxels are NaN",
    "a constant image": r"every voxel is",
    "fewer than 4 slices": r"every axis needs 4 or more",
    "dates as they are": r"must be numbers, one per image",
    "unsorted times": r"sort the images and their times together",
}
# Points there and back: docs/transforms.md says 0.03. Files are of single precision, some 1e-5 of 100 mm.
BACK_MM, FILE_MM = 0.03, 1e-3
COMPARED = 400  # points
THIN_MM = 40.0  # five windows of the local correlation


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        series: how many.
        first: number of the first.
        again: how many of them are run once more at the end.
        seed: of all that is drawn; a series depends on it and on its number alone.
        out: where the tables are written.
        scratch: where images and models lie for a moment; best in memory.
    """

    series: int = 200
    first: int = 0
    again: int = 20
    seed: int = 0
    out: str = "runs/load"
    scratch: str = "/dev/shm"


# -- a patient as drawn


@dataclass(frozen=True, eq=False)
class Patient:
    """Anatomy and motion, known at every point, and what is done with them.

    Attributes:
        grids: of the images.
        times, period, reference: as `load_series` takes them.
        amounts: of the motion at each time, 0 at the reference.
        waves: directions, wave vectors and phases (W, 3), (W, 3), (W,) of the motion in the reference's cube.
        poses: (T, 4, 4), reference point -> point at each time, before the motion.
        texture: coefficients of a cubic spline over the reference's cube.
        suffix: of the files; "mixed", "4D" (one file) or "dicom".
        scale: of the intensities, where the modality has none of its own.
        masks, landmarks, guided, prior, blend, full, align: what the user gives and chooses.
        defect: of `DEFECTS`, or "".
    """

    number: int
    modality: str
    orientation: str
    grids: tuple[Grid, ...]
    times: tuple[float, ...]
    period: float | None
    reference: int
    amounts: tuple[float, ...]
    waves: tuple[np.ndarray, np.ndarray, np.ndarray]
    poses: np.ndarray
    texture: np.ndarray
    suffix: str
    scale: float
    masks: tuple[int, ...]
    landmarks: tuple[int, ...]
    guided: bool
    prior: bool
    blend: bool
    full: bool
    align: str
    defect: str

    @property
    def grid(self) -> Grid:
        return self.grids[self.reference]

    @property
    def voxels(self) -> int:
        """Of all images."""
        return sum(grid.voxels for grid in self.grids)

    def target_to_reference(self, points_mm: np.ndarray, i: int) -> np.ndarray:
        """Where points (..., 3) of image i are in the reference, LPS mm."""
        cube = self.grid.world_to_cube(apply_affine(np.linalg.inv(self.poses[i]), points_mm))
        return self.grid.cube_to_world(cube + self.amounts[i] * self._motion(cube))

    def reference_to_target(self, points_mm: np.ndarray, i: int) -> np.ndarray:
        """Its inverse: the motion's slope is below 1, so that it is found by repetition."""
        wanted = cube = self.grid.world_to_cube(points_mm)
        for _ in range(60):
            cube = wanted - self.amounts[i] * self._motion(cube)
        return apply_affine(self.poses[i], self.grid.cube_to_world(cube))

    def _motion(self, cube: np.ndarray) -> np.ndarray:
        directions, vectors, phases = self.waves
        return np.sin(cube @ vectors.T + phases) @ directions

    def image(self, i: int) -> sitk.Image:
        grid = self.grids[i]
        cube = self.grid.world_to_cube(self.target_to_reference(grid.points_world(), i))
        draw = np.random.default_rng([7, self.number, i])
        voxels = _intensities(self, cube, draw)
        if self.modality == "ct" and self.suffix != "dicom":
            x, y = (np.linspace(-1, 1, n) for n in grid.size[:2])
            voxels[:, np.hypot(x, y[:, None]) > 1.05] = -2000  # beside the round field of view
        return grid.image(voxels)

    def labels(self, i: int) -> sitk.Image:
        grid = self.grids[i]
        cube = self.grid.world_to_cube(self.target_to_reference(grid.points_world(), i))
        return grid.image(
            ((np.linalg.norm(cube, axis=-1) < 0.7) + (np.linalg.norm(cube, axis=-1) < 0.35)).astype(np.uint8)
        )

    def points_mm(self, i: int) -> np.ndarray:
        """The same points of the anatomy at each time (N, 3), LPS mm."""
        cube = np.random.default_rng([8, self.number]).uniform(-0.6, 0.6, (COMPARED, 3))
        return self.reference_to_target(self.grid.cube_to_world(cube), i)


def _intensities(patient: Patient, cube: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The anatomy (..., 3) in the reference's cube as a scanner shows it."""
    index = (np.moveaxis(cube, -1, 0)[::-1] + 1) / 2 * (np.reshape(patient.texture.shape, (3, 1, 1, 1)) - 1)
    texture = map_coordinates(patient.texture, index, order=3, mode="mirror", prefilter=False)
    r = np.linalg.norm(cube / 0.95, axis=-1)
    body = np.clip(4 * (1 - r) + 0.5, 0, 1)
    noise = draw.standard_normal(r.shape)
    if patient.modality in ("ct", "cbct"):
        lung = np.clip(4 * (0.6 - np.linalg.norm(cube - np.array([0.3, 0.1, 0.0]), axis=-1)) + 0.5, 0, 1)
        tissue = 400 * (texture - 0.5)
        hu = -1000 + body * (1000 + tissue + lung * (-850 - tissue + 500 * texture**2))
        if patient.modality == "ct":
            return np.clip(np.rint(hu + 10 * noise), -1024, 3071).astype(np.int16)
        cupped = (hu + 1000) * (1 - 0.15 * (1 - np.minimum(r, 1) ** 2)) * draw.uniform(0.9, 1.1)
        return np.clip(np.rint(cupped + 40 * noise), 0, None).astype(np.uint16)
    if patient.modality == "mr":
        bias = np.exp(0.4 * np.sin(cube @ np.array([1.0, 0.7, -0.5])))
        value = np.hypot(body * bias * (0.2 + texture) + 0.02 * noise, 0.02 * noise[::-1])
        return (patient.scale * draw.uniform(0.8, 1.2) * value).astype(np.float32)
    if patient.modality == "pet":
        uptake = body * np.clip(texture - np.quantile(texture, 0.6), 0, None) * (1 + 0.1 * noise)
        return (patient.scale * np.clip(uptake, 0, None)).astype(np.float32)
    return np.clip(np.rint(255 * body * (0.1 + 0.8 * texture) + 3 * noise), 0, 255).astype(np.uint8)


# -- drawing one


def drawn(seed: int, number: int) -> Patient:
    """The patient of that number."""
    draw = np.random.default_rng([seed, number])

    def of(choices: Sequence[Any], p: Sequence[float] | None = None) -> Any:
        return choices[draw.choice(len(choices), p=p)]

    defect = of(list(DEFECTS)) if draw.random() < 0.06 else ""
    images = int(draw.integers(2, 13))
    body = bool(draw.random() < 0.6)  # as wide as part of one; else anything, down to 2 mm
    while True:
        size = np.rint(np.exp(draw.uniform(np.log(12 if body else FEWEST), np.log(MOST), 3))).astype(int)
        if not body and draw.random() < 0.3:
            size[draw.integers(3)] = FEWEST  # a few slices
        if draw.random() < 0.3:
            size[:2] = size[:2].max()
        spacing = np.exp(draw.uniform(np.log(0.5), np.log(8), 3))
        if draw.random() < 0.5:
            spacing[1] = spacing[0]
        wide = not body or ((size - 1) * spacing).min() >= 1.2 * THIN_MM
        if wide and (size * spacing).max() <= MOST_MM and 1.5 * size.prod() * images <= MOST_VOXELS:
            break
    if defect == "fewer than 4 slices":
        size[draw.integers(3)] = draw.integers(1, FEWEST)
    modality = of(MODALITIES)
    longitudinal = bool(draw.random() < 0.5)
    times, period = _times(draw, images, longitudinal)
    reference = int(draw.integers(images))
    suffix = of([*SUFFIXES, "mixed", "4D"])
    if modality == "ct" and not defect and draw.random() < 0.4:
        suffix = "dicom"
    orientation, axes = _axes(draw)
    x, y, z = (float(v) for v in draw.uniform(-300, 300, 3))
    first = Grid(tuple(size.tolist()), tuple(spacing.tolist()), (x, y, z), tuple(axes.ravel()))
    differ = suffix != "4D" and not defect and bool(draw.random() < 0.3)
    grids = tuple(_other(draw, first) if differ else first for _ in range(images))
    grid = grids[reference]
    extent, half = np.array(grid.extent_mm), np.maximum(grid.half_extent_mm, 1e-6)
    amount = _amount(times, period)
    # In mm, waves are as long along every axis, so that they bend thin slabs no more than cubes.
    vectors = draw.uniform(-1, 1, (2, 3)) * 3 * half / half.max()
    directions = draw.uniform(-1, 1, (2, 3)) * 0.08
    poses = np.stack([np.eye(4)] * images)
    if longitudinal:
        for i in range(images):
            if i != reference:
                angle = min(0.1, 0.2 * extent.min() / extent.max())
                poses[i, :3, :3] = Rotation.from_rotvec(draw.uniform(-angle, angle, 3)).as_matrix()
                poses[i, :3, 3] = grid.centre_mm - poses[i, :3, :3] @ grid.centre_mm
                poses[i, :3, 3] += 0.03 * grid.vectors_to_world(extent * draw.uniform(-1, 1, 3))
    voxels = sum(g.voxels for g in grids)
    small = voxels <= FULL_VOXELS and float(np.prod(extent + 12)) <= FULL_MM3
    full = small and bool(draw.random() < (0.7 if body else 0.15))
    masks = [reference, *(i for i in range(images) if i != reference and draw.random() < 0.5)]
    landmarks = [reference, *(i for i in range(images) if i != reference and draw.random() < 0.7)]
    masked, marked = bool(draw.random() < 0.5), bool(draw.random() < 0.5)
    return Patient(
        number=number,
        modality=modality,
        orientation=orientation,
        grids=grids,
        times=times,
        period=period,
        reference=reference,
        amounts=tuple(amount(t) - amount(times[reference]) for t in times),
        waves=(directions, vectors, draw.uniform(0, 2 * np.pi, 2)),
        poses=poses,
        # Details of three voxels or more.
        texture=draw.random(tuple(int(np.clip(n / 3, 2, 12)) + 2 for n in grid.shape)),
        suffix=suffix,
        scale=float(10 ** draw.uniform(-3, 5)),
        masks=tuple(sorted(masks)) if masked else (),
        landmarks=tuple(sorted(landmarks)) if marked else (),
        guided=marked and len(landmarks) > 1 and bool(draw.random() < 0.3),
        prior=bool(draw.random() < 0.6),
        blend=full and bool(draw.random() < 0.15),
        full=full,
        align=of(["auto", "none", "rigid", "affine"]) if longitudinal else of(["auto", "none", "rigid"]),
        defect=defect,
    )


def _times(draw: np.random.Generator, images: int, longitudinal: bool) -> tuple[tuple[float, ...], float | None]:
    """Uneven ones: phases of a cycle, or days, of which some count from the year 1."""
    gaps = draw.uniform(0.3, 1.7, images)
    if longitudinal:
        days = np.cumsum(np.maximum(np.rint(gaps * draw.uniform(3, 60)), 1))
        start = draw.choice([0, date(2024, 2, 28).toordinal()])
        return tuple(float(day + start) for day in days - days[0]), None
    period = float(draw.choice([1.0, 10.0, 100.0, 4.2e3]))
    phases = (np.cumsum(gaps) - gaps[0]) / gaps.sum()
    return tuple(float(phase * period) for phase in phases), period


def _amount(times: tuple[float, ...], period: float | None) -> Callable[[float], float]:
    if period is not None:
        return lambda t: (1 - np.cos(2 * np.pi * t / period)) / 2
    first, span = times[0], times[-1] - times[0]
    return lambda t: (t - first) / span + 0.15 * np.sin(2 * np.pi * (t - first) / span)


def _axes(draw: np.random.Generator) -> tuple[str, np.ndarray]:
    """A name and direction cosines, columns: how the axes of an image lie in the world."""
    name = str(draw.choice(["axial", "permuted", "oblique", "oblique, left-handed", "nearly axial"]))
    if name == "axial":
        return name, np.eye(3)
    if name == "permuted":
        return name, np.eye(3)[draw.permutation(3)] * draw.choice([-1.0, 1.0], 3)
    if name == "nearly axial":
        return name, Rotation.from_rotvec(draw.uniform(-0.1, 0.1, 3)).as_matrix()
    axes = Rotation.random(random_state=int(draw.integers(2**31))).as_matrix()
    return name, axes * [1, 1, np.sign(np.linalg.det(axes)) * (-1 if "left" in name else 1)]


def _other(draw: np.random.Generator, grid: Grid) -> Grid:
    """About the same box, scanned along other axes with other voxels."""
    order, signs = draw.permutation(3), draw.choice([-1.0, 1.0], 3)
    axes = np.reshape(grid.direction, (3, 3))[:, order] * signs
    axes = Rotation.from_rotvec(draw.uniform(-0.02, 0.02, 3)).as_matrix() @ axes
    size = np.maximum(np.rint(np.array(grid.size)[order] * draw.uniform(0.8, 1.15, 3)), FEWEST).astype(int)
    spacing = np.array(grid.extent_mm)[order] * draw.uniform(0.95, 1.1, 3) / (size - 1)
    origin = grid.centre_mm - axes @ (spacing * (size - 1) / 2)
    return Grid(tuple(size.tolist()), tuple(spacing.tolist()), tuple(origin.tolist()), tuple(axes.ravel()))


# -- as a user has it: in files


def write(patient: Patient, folder: Path) -> dict[str, Any]:
    """The patient's files; the arguments of `load_series`."""
    images = [patient.image(i) for i in range(len(patient.grids))]
    times: list[Any] = list(patient.times)
    which = -1 if patient.reference == 0 else 0
    if patient.defect == "NaN voxels":
        images[which] = sitk.Cast(images[which], sitk.sitkFloat32)
        images[which].SetPixel([0, 0, 0], float("nan"))
    elif patient.defect == "a constant image":
        images[which] = images[which] * 0
    elif patient.defect == "dates as they are":
        times = [date(2026, 1, 1) + timedelta(days=k) for k in range(len(times))]
    elif patient.defect == "unsorted times":
        times = times[::-1]
    arguments: dict[str, Any] = {"times": times, "period": patient.period, "reference": patient.reference}
    if patient.suffix == "4D" and not patient.defect:
        dtype: Any = {"ct": "int16", "cbct": "uint16", "uint8": "uint8"}.get(patient.modality, "float32")
        write_nifti_4d(images, patient.times, folder / "series.nii.gz", dtype=dtype)
        arguments["images"] = folder / "series.nii.gz"
    elif patient.suffix == "dicom":
        (folder / "dicom").mkdir()
        for i, image in enumerate(images):
            day = (date(2024, 2, 20) + timedelta(days=i)).strftime("%Y%m%d")
            write_dicom_series(image, folder / "dicom" / str(i), patient_id="p", date=day, description=f"scan {i}")
        arguments["images"] = folder / "dicom"
    else:
        suffixes = SUFFIXES if patient.suffix in ("mixed", "4D") else (patient.suffix,)
        arguments["images"] = [folder / f"scan{i}{suffixes[i % len(suffixes)]}" for i in range(len(images))]
        for image, path in zip(images, arguments["images"], strict=True):
            write_image(image, path)
    if patient.masks:
        arguments["masks"] = {i: folder / f"mask{i}.nii.gz" for i in patient.masks}
        for i, path in arguments["masks"].items():
            write_image(patient.labels(i), path)
    if patient.landmarks:
        arguments["landmarks"] = {i: folder / f"points{i}.csv" for i in patient.landmarks}
        for i, path in arguments["landmarks"].items():
            write_landmarks(patient.points_mm(i)[:30], path)
    return arguments


# -- through the pipeline


class WrongAnswerError(Exception):
    """An answer that is not right; what a series fails with if nothing else was raised."""


def require(right: object, what: str) -> None:
    if not right:
        raise WrongAnswerError(what)


def through(patient: Patient, folder: Path) -> Row:
    """All stages of one series: the columns of its row.

    Raises:
        WrongAnswerError: an answer is not right.
        Exception: whatever else a user would meet.
    """
    row: dict[str, Any] = {}
    clock = time.process_time()

    def done(stage: str) -> None:
        nonlocal clock
        row[f"{stage}_seconds"] = time.process_time() - clock
        clock = time.process_time()

    arguments = write(patient, folder)
    done("write")
    series = load_series(**arguments)
    done("load")
    _check_read(patient, series)
    clock = time.process_time()
    net = fit_reference(series, progress=False, iterations=20) if patient.prior else None
    done("ref_net")
    options: dict[str, Any] = {"landmarks": 0.02} if patient.guided else {}
    levels = FAST.def_net.levels if patient.full else SHORT
    appearance: Any = "blend" if patient.blend else "reference"
    align: Any = patient.align
    model = fit_deformation(
        series, net, align=align, appearance=appearance, levels=levels, progress=False, **options
    )
    done("fit")
    row |= {
        "functions": model.def_net.time_basis.size,
        "lattice": model.lattice.voxels,
        "steps": len(model.history),
    }
    row |= _answers(patient, series, model, folder)
    done("answers")
    return {**row, **_motion(patient, model)}


def _check_read(patient: Patient, series: Series) -> None:
    """Each voxel where it was written, whatever way the file's axes go."""
    require(len(series) == len(patient.grids), "load: the number of images")
    require(series.times == patient.times, "load: the times")
    for i in (0, patient.reference, len(series) - 1):
        written, read = patient.image(i), series.images[i]
        index = np.argwhere(np.ones(patient.grids[i].shape, bool))[:: max(1, patient.grids[i].voxels // 100)]
        there = Grid.of(read).world_to_index(patient.grids[i].index_to_world(index[:, ::-1].astype(float)))
        require(np.abs(there - np.rint(there)).max() < 1e-2, f"load: voxels of image {i} lie elsewhere")
        values = sitk.GetArrayViewFromImage(read)[tuple(np.rint(there).astype(int).T[::-1])]
        require(np.array_equal(values, sitk.GetArrayViewFromImage(written)[tuple(index.T)]), f"load: image {i}")


def _answers(patient: Patient, series: Series, model: STNeRP, folder: Path) -> dict[str, Any]:
    """Everything that a model answers, from the model and from its file."""
    first, last = series.targets[0], series.targets[-1]
    between = (series.times[first] + series.times[first - 1 if first else 1]) / 2
    grid = series.grid
    found = asked(patient, series, model, between)
    saved = STNeRP.load(model.save(folder / "model.pt"))
    again = asked(patient, series, saved, between)
    for name, value in found.items():
        require(np.isfinite(value).all(), f"{name}: is not finite everywhere")
        require(np.array_equal(value, again[name]), f"{name}: differs after saving and loading")
    reference, inside = series.reference_time, model.grid.points_world().reshape(-1, 3)[:: grid.voxels // 50 + 1]
    require(np.abs(model.map_points(inside, reference) - inside).max() < 1e-9, "the reference time moves points")
    back_mm, seen = [], []
    for i in (first, last):
        t, points_mm = series.times[i], patient.points_mm(patient.reference)
        there = model.map_points(points_mm, t, inverse=True)
        back_mm.append(tre_mm(model.map_points(there, t), points_mm))
        seen.append(grid.contains(there) & Grid.of(series.images[i]).contains(there))
    t = series.times[last]
    target = Grid.of(series.images[last])
    _check_files(model, t, target, folder)
    folded = folding(found["jacobian"])
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in found.values()))
    return {
        "back_max_mm": float(np.max(back_mm, where=seen, initial=0.0)),
        "back_outside_max_mm": float(np.max(back_mm, where=~np.array(seen), initial=0.0)),
        "folded_voxels": folded["folded_voxels"],
        "jacobian_min": folded["jacobian_min"],
        "digest": digest.hexdigest()[:16],
    }


def asked(patient: Patient, series: Series, model: STNeRP, between: float) -> dict[str, np.ndarray]:
    """Answers as arrays, each drawn on the grid that was asked for."""
    last = series.targets[-1]
    t, target = series.times[last], series.images[last]
    mask = series.masks[series.reference] or patient.labels(patient.reference)
    images = {
        "image between": (model.image(between), series.grid),
        "image on the target": (model.image(t, grid=target), Grid.of(target)),
        "displacement": (model.displacement(between), series.grid),
        "jacobian": (model.jacobian(t), series.grid),
        "labels": (model.propagate(mask, t), Grid.of(mask)),
    }
    if patient.blend:
        images["blend"] = (model.image(between, appearance="blend"), series.grid)
    for name, (image, grid) in images.items():
        require(Grid.of(image).is_close(grid), f"{name}: on another grid")
    points_mm = patient.points_mm(patient.reference)
    answers = {name: sitk.GetArrayFromImage(image) for name, (image, _) in images.items()}
    answers["points"] = model.map_points(points_mm, t)
    answers["points back"] = model.map_points(points_mm, between, inverse=True)
    known = set(np.unique(sitk.GetArrayViewFromImage(mask)).tolist()) | {0}
    require(set(np.unique(answers["labels"]).tolist()) <= known, "labels: that the mask doesn't have")
    return answers


def _check_files(model: STNeRP, t: float, target: Grid, folder: Path) -> None:
    """What other tools get is the model."""
    exact = sitk.ReadTransform(str(write_transform(model, t, folder / "exact.h5", target)))
    points_mm = target.cube_to_world(np.random.default_rng(0).uniform(-1, 1, (50, 3)))
    through_itk = np.array([exact.TransformPoint(point) for point in points_mm.tolist()])
    require(np.abs(through_itk - model.map_points(points_mm, t)).max() < FILE_MM, "exact.h5: is another map")
    field = sitk.ReadImage(str(write_transform(model, t, folder / "field.nii.gz", target)), sitk.sitkVectorFloat64)
    wanted = sitk.GetArrayFromImage(model.displacement(t, target))
    require(np.abs(sitk.GetArrayFromImage(field) - wanted).max() < FILE_MM, "field.nii.gz: is another field")
    velocity = sitk.ReadImage(str(write_velocity(model, t, folder / "velocity.nrrd")))
    require(np.isfinite(sitk.GetArrayFromImage(velocity)).all(), "velocity.nrrd: is not finite")


def _motion(patient: Patient, model: STNeRP) -> dict[str, Any]:
    """How far points are from where they belong, without any motion and by the model; mean over all images."""
    still_mm, error_mm = [], []
    for i, t in enumerate(patient.times):
        if i != patient.reference:
            truth = patient.points_mm(patient.reference)
            points_mm = patient.points_mm(i)
            still_mm.append(tre_mm(points_mm, truth).mean())
            error_mm.append(tre_mm(model.map_points(points_mm, t), truth).mean())
    return {"no_motion_mm": float(np.mean(still_mm)), "error_mm": float(np.mean(error_mm))}


# -- one series after another


def one(patient: Patient, scratch: str | None) -> Row:
    """A series' row, whatever happens to it."""
    x, y, z = patient.grid.size
    row: dict[str, Any] = {
        "series": patient.number,
        "outcome": "fitted",
        "reason": "",
        "modality": patient.modality,
        "files": patient.suffix,
        "size": f"{x}x{y}x{z}",
        "spacing_mm": "x".join(f"{s:.2f}" for s in patient.grid.spacing_mm),
        "least_mm": min(patient.grid.extent_mm),
        "orientation": patient.orientation,
        "grids": "differ" if any(grid is not patient.grids[0] for grid in patient.grids) else "one",
        "images": len(patient.grids),
        "voxels": patient.voxels,
        "time": "periodic" if patient.period else "longitudinal",
        "align": patient.align,
        "prior": patient.prior,
        "masks": len(patient.masks),
        "landmarks": len(patient.landmarks),
        "guided": patient.guided,
        "blend": patient.blend,
        "fit": "all steps" if patient.full else "3 steps a level",
        "aligned": patient.align != "none" and (patient.align != "auto" or patient.period is None),
        "defect": patient.defect,
    }
    begin = time.process_time(), time.perf_counter()
    failure: Exception | None = None
    with tempfile.TemporaryDirectory(prefix="load-", dir=scratch) as folder, counted_warnings() as count:
        try:
            row |= through(patient, Path(folder))
            if patient.defect:
                row |= {"outcome": "failed", "reason": f"accepted {patient.defect}"}
        except Exception as error:  # its row tells
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".replace(folder, "")
            right = isinstance(error, InputError) and patient.defect
            refused = bool(right and re.search(DEFECTS[patient.defect], str(error)))
            row |= {"outcome": "refused" if refused else "failed", "reason": reason}
            failure = None if refused else error
    if failure is not None:
        logger.error("series %d", patient.number, exc_info=failure)
    row |= {"warnings": count[0], "seconds": time.process_time() - begin[0]}
    row["wall_seconds"] = time.perf_counter() - begin[1]
    return row | {"memory_mib": memory_mib(), "files_open": len(os.listdir("/proc/self/fd"))}


@contextmanager
def counted_warnings() -> Iterator[list[int]]:
    """How many lines the library logs as warnings, which are kept off the terminal; Python's own are errors."""
    count, library = [0], logging.getLogger("stnerp")

    class Counter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            count[0] += record.levelno == logging.WARNING

    counter, propagates = Counter(), library.propagate
    library.addHandler(counter)
    library.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield count
    finally:
        library.removeHandler(counter)
        library.propagate = propagates


def memory_mib() -> float:
    """Resident, when all that is not used has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def main(arguments: list[str]) -> None:
    """All series, then the first ones again."""
    settings = settings_of(Settings(), arguments)
    torch.set_num_threads(1)  # one thread: sums in one order, and its seconds are those of the work
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    out = Path(settings.out)
    scratch = settings.scratch if Path(settings.scratch).is_dir() else None
    before = memory_mib()
    rows: list[Row] = []
    again: list[Row] = []
    last = settings.first + settings.series
    numbers = [*range(settings.first, last), *range(settings.first, min(last, settings.first + settings.again))]
    for k, number in enumerate(numbers):
        row = one(drawn(settings.seed, number), scratch)
        (rows if k < settings.series else again).append(row)
        logger.info(
            "%d: %s %s %s, %d images, %s: %.1f s, %.0f MiB%s",
            number, row["outcome"], row["size"], row["modality"], row["images"], row["fit"], row["seconds"],
            row["memory_mib"], f"; {row['reason']}" if row["reason"] else "",
        )  # fmt: skip
        write_csv(out / "load.csv", [*rows, *({**row, "outcome": f"again: {row['outcome']}"} for row in again)])
        (out / "load.md").write_text(report(settings, before, rows, again), encoding="utf-8")
    logger.info("wrote %s, %s", out / "load.csv", out / "load.md")


# -- what it shows


def motion_text(rows: list[Row]) -> str:
    """Whether points are nearer to where they belong than without any motion."""
    error_mm, still_mm = (np.array([row[name] for row in rows]) for name in ("error_mm", "no_motion_mm"))
    farther = [
        f"{row['series']} ({row['size']} voxels of {row['spacing_mm']} mm, {row['error_mm']:.2g} for "
        f"{row['no_motion_mm']:.2g} mm)"
        for row in rows
        if row["error_mm"] > 1.5 * row["no_motion_mm"]
    ]
    # A few steps, or a thin slab, promise nothing.
    told = ", ".join(farther) if rows[0]["fit"] == "all steps" and rows[0]["least_mm"] >= THIN_MM else ""
    return (
        f"points are {np.median(error_mm):.2f} mm from where they belong, {np.median(still_mm):.2f} without any "
        f"motion (medians of {len(rows)} series); nearer than that in {int((error_mm < still_mm).sum())}, farther "
        f"by half or more in {len(farther)}{': ' if told else ''}{told}."
    )


CLASSES = (0, 10_000, 100_000, 1_000_000, MOST_VOXELS)
SETTLED = 10  # series after which what is loaded once is loaded


def report(settings: Settings, before: float, rows: list[Row], again: list[Row]) -> str:
    """load.md of the series so far."""
    fitted = [row for row in rows if row["outcome"] == "fitted"]
    parts = [
        f"# {len(rows)} random series",
        about(settings, rows),
        "## Outcome",
        markdown_table(outcomes(rows)),
        *(f"- Series {row['series']} failed: {row['reason']}" for row in rows if row["outcome"] == "failed"),
        "Series of each kind, refused ones included: " + kinds(rows),
        "## Memory",
        memory_text(before, rows),
        "## Time",
        "Seconds are of the processor, one thread; voxels are those of all images of a series. The line is that "
        "of all series of the table, by least squares of relative errors; *measured / line* is 1 where it holds.",
    ]
    for fit in ("3 steps a level", "all steps"):
        same = [row for row in fitted if row["fit"] == fit]
        if len(same) > len(REGRESSORS):
            parts += [f"### Fits of {fit}", line_text(same), markdown_table(by_size(same))]
    parts += ["### The last beside the first", drift_text(fitted, again)] if len(fitted) > len(REGRESSORS) else []
    parts += ["## Answers", answers_text(fitted)] if fitted else []
    return "\n\n".join(part for part in parts if part) + "\n"


def about(settings: Settings, rows: list[Row]) -> str:
    facts = machine()
    asked = f"series={settings.series} first={settings.first} again={settings.again} seed={settings.seed}"
    hours, minutes = sum(row["wall_seconds"] for row in rows) / 3600, sum(row["seconds"] for row in rows) / 60
    return (
        f"`python benchmarks/load.py {asked}`: each series is written to files, loaded, fitted and asked, all in "
        "one process. load.csv has a row for each.\n\n"
        f"{facts['cpu']}, {facts['threads']} thread, {facts['versions']}, {facts['date']}, "
        f"commit {facts['commit']}; {minutes:.0f} min of the processor, {hours:.1f} h of the wall"
    )


def outcomes(rows: list[Row]) -> list[Row]:
    """How many were fitted, rightly refused by what was wrong with them, and how many failed."""
    count = {"fitted": 0, **{f"refused, as it should be: {defect}": 0 for defect in DEFECTS}, "failed": 0}
    for row in rows:
        what = str(row["outcome"])
        count[f"refused, as it should be: {row['defect']}" if what == "refused" else what] += 1
    return [{"outcome": what, "series": n} for what, n in count.items()]


def kinds(rows: list[Row]) -> str:
    """What was drawn, and how often."""
    told = []
    for name in ("modality", "files", "orientation", "grids", "time", "align", "prior", "guided", "blend", "fit"):
        values = [str(row[name]) for row in rows]
        told.append(f"{name}: " + ", ".join(f"{value} {values.count(value)}" for value in sorted(set(values))))
    with_masks, with_points = (sum(bool(row[name]) for row in rows) for name in ("masks", "landmarks"))
    told.append(f"masks {with_masks}; landmarks {with_points}")
    told.append("images {} to {}; voxels of all images {} to {}".format(
        *(end(int(row[name]) for row in rows) for name in ("images", "voxels") for end in (min, max))
    ))  # fmt: skip
    return "; ".join(told) + "."


def memory_text(before: float, rows: list[Row]) -> str:
    """Resident memory after each series, and whether it grows."""
    held = np.array([row["memory_mib"] for row in rows])
    told = [f"{before:.0f} MiB after the imports", f"{held[0]:.0f} after the first series"]
    settled = held[SETTLED:]
    if len(settled) > 2:
        told.append(f"{held[SETTLED - 1]:.0f} after {SETTLED}")
        slope, spread = slope_of(settled)
        told.append(f"{settled.max():.0f} at most, {held[-1]:.0f} at the end")
        told.append(
            f"slope after the first {SETTLED}: {slope:.3f} MiB a series, ± {spread:.3f} (two standard errors)"
        )
        half = len(settled) // 2
        told.append(f"of the second half alone: {slope_of(settled[half:])[0]:.3f}")
    files = [row["files_open"] for row in rows]
    told.append(f"files open: {files[0]} after the first, {files[-1]} at the end")
    return (
        "Resident, after each series, once Python has collected its garbage and malloc has given back what is "
        "free: " + "; ".join(told) + f". Peak while a series was at work: {peak_memory_mib():.0f} MiB."
    )


def slope_of(values: np.ndarray) -> tuple[float, float]:
    """Of a straight line through values one apart, and twice its standard error."""
    line = linregress(np.arange(len(values)), values)
    return float(line.slope), 2 * float(line.stderr)


#: What a fit's time is made of; none of them can be negative.
REGRESSORS: dict[str, Callable[[Row], float]] = {
    "s": lambda row: 1.0,
    "s for each image that is compared": lambda row: row["images"] - 1.0,
    "more where it is pre-aligned": lambda row: (row["images"] - 1.0) * row["aligned"],
    "µs a voxel": lambda row: row["voxels"] / 1e6,
    "µs a free velocity": lambda row: row["lattice"] * row["functions"] * 3 / 1e6,
}


def line_of(rows: list[Row]) -> np.ndarray:
    """The coefficients of `REGRESSORS`."""
    seconds = np.array([row["fit_seconds"] for row in rows])
    columns = np.array([[of(row) for of in REGRESSORS.values()] for row in rows])
    return nnls(columns / seconds[:, None], np.ones(len(rows)))[0]


def over_line(rows: list[Row], line: np.ndarray) -> np.ndarray:
    """Measured seconds over those of the line."""
    return np.array([row["fit_seconds"] / (line @ [of(row) for of in REGRESSORS.values()]) for row in rows])


def line_text(rows: list[Row]) -> str:
    line = line_of(rows)
    ratios = over_line(rows, line)
    terms = " + ".join(f"{value:.3g} {name}" for name, value in zip(REGRESSORS, line, strict=True))
    middle = np.percentile(ratios, (10, 50, 90))
    return (
        f"{len(rows)} series; seconds of a fit = {terms}. Measured over it: median {middle[1]:.2f}, "
        f"four fifths within {middle[0]:.2f} to {middle[2]:.2f}, {ratios.min():.2f} to {ratios.max():.2f} in all."
    )


def by_size(rows: list[Row]) -> Sequence[Row]:
    """Medians of the series of each size."""
    line, table = line_of(rows), []
    for low, high in pairwise(CLASSES):
        same = [row for row in rows if low < row["voxels"] <= high]
        if same:

            def per_voxel(stage: str, of: list[Row] = same) -> float:
                return float(np.median([1e6 * row[f"{stage}_seconds"] / row["voxels"] for row in of]))

            table.append({
                "voxels": f"{low:,} to {high:,}",
                "series": len(same),
                "load µs/voxel": per_voxel("load"),
                "fit µs/voxel": per_voxel("fit"),
                "answers µs/voxel": per_voxel("answers"),
                "fit s": float(np.median([row["fit_seconds"] for row in same])),
                "measured / line": float(np.median(over_line(same, line))),
            })  # fmt: skip
    return table


def drift_text(fitted: list[Row], again: list[Row]) -> str:
    """Whether the last series are slower than the first, of the same size and in themselves."""
    lines = {fit: line_of([row for row in fitted if row["fit"] == fit]) for fit in {row["fit"] for row in fitted}}
    ratios = np.concatenate([over_line([row], lines[row["fit"]]) for row in fitted])
    part = min(50, len(ratios) // 2)
    told = (
        f"Measured over the line of the same steps, median: {np.median(ratios[:part]):.2f} in the first {part} "
        f"fitted series, {np.median(ratios[-part:]):.2f} in the last {part}."
    )
    first = {row["series"]: row for row in fitted}
    pairs = [(first[row["series"]], row) for row in again if row["outcome"] == "fitted" and row["series"] in first]
    if not pairs:
        return told
    slower = [b["fit_seconds"] / a["fit_seconds"] for a, b in pairs]
    return (
        f"{told} The first {len(again)} series once more at the end: {len(pairs)} fits took "
        f"{np.median(slower):.2f} times as long (median; {min(slower):.2f} to {max(slower):.2f}), "
        f"and {sum(a['digest'] == b['digest'] for a, b in pairs)} of them gave the same answers to the bit."
    )


def answers_text(fitted: list[Row]) -> str:
    """Accuracy, invertibility, folding."""
    told = []
    for fit in ("all steps", "3 steps a level"):
        for what, thin in ((f"at least {THIN_MM:g} mm wide along every axis", False), ("thinner", True)):
            same = [row for row in fitted if row["fit"] == fit and (row["least_mm"] < THIN_MM) == thin]
            if same:
                told.append(f"- Fits of {fit}, images {what}: {motion_text(same)}")
    back, outside = (np.array([row[f"back_{where}max_mm"] for row in fitted]) for where in ("", "outside_"))
    folded = [row for row in fitted if row["folded_voxels"]]
    return "\n".join([
        *told,
        f"- Points to time t and back: {back.max():.2g} mm off at most, {np.median(back):.1g} in the median "
        f"series; more than {BACK_MM} mm in {int((back > BACK_MM).sum())}. Of points that the field of view loses "
        f"at time t: {outside.max():.2g} mm at most, more than {BACK_MM} mm in {int((outside > BACK_MM).sum())}.",
        f"- Folded voxels: none in {len(fitted) - len(folded)} of {len(fitted)}"
        + "".join(f"; {row['folded_voxels']} in series {row['series']}" for row in folded) + ".",
        f"- Warnings of the library: {sum(row['warnings'] for row in fitted)} lines in "
        f"{sum(bool(row['warnings']) for row in fitted)} series.",
    ])  # fmt: skip


if __name__ == "__main__":
    start(main)

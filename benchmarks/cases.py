"""The patients that methods are compared on, as files: what a method may read, and the truth about it.

Simulated patients are written into a folder once, before any clock runs; real ones stay where they are
(a 4D file is split, so that nobody reads an image that is held out).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from data import PatientData, load_data, moving_scene
from fresh import write_json
from hydra import compose, initialize_config_dir
from machine import ROOT
from omegaconf import DictConfig, OmegaConf

from stnerp import Grid, InputError, Series, load_series
from stnerp.baselines.interpolation import linear_blend
from stnerp.io.image import write_image
from stnerp.io.landmarks import write_landmarks
from stnerp.lungs import body_of, lungs_of
from stnerp.motion import Sliding

logger = logging.getLogger("stnerp.benchmarks")

POINTS = 5000  # of each region of a simulated patient
WALL_MM = 20.0  # the chest wall that slides is scored this far around the lungs


@dataclass(frozen=True)
class Plan:
    """Which images of which data, and what for.

    Attributes:
        data: a file of configs/data.
        pairs: the images that every method registers to the reference, and that are scored as "seen".
            Methods that take two images fit these alone; of a series' 9 targets, 3.
        held_out: images that no method sees.
        known_every: instead of both: every nth image is known and a pair, all others are held out.
        changes: to the values of that file.
        about: a line below the case's table.
    """

    data: str
    pairs: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    known_every: int | None = None
    changes: Mapping[str, Any] | None = None
    about: str = ""


# Phases 5 and 6 are end-exhale, 2 and 4 the neighbours of the one held out.
PAIRS, HELD_OUT = (2, 4, 6), (3,)

PLANS = {
    "phantom": Plan("phantom", PAIRS, HELD_OUT, about="10 phases of the procedural thorax, breathing 15 mm."),
    "chest_breathing": Plan(
        "chest_breathing",
        PAIRS,
        HELD_OUT,
        changes={"noise_hu": 20},
        about="A real CT that breathes by a known motion, 10 phases; fresh noise of 20 HU, not on the reference.",
    ),
    "chest_longitudinal": Plan(
        "chest_breathing",
        PAIRS,
        HELD_OUT,
        changes={
            "motion": "longitudinal",
            "phases": 7,
            "motion_settings": {"tumour_centre_mm": [-52.0, -152.0, 675.0]},  # the right hilum
            "noise_hu": 20,
        },
        about="The same CT, weekly for six weeks: the right hilum shrinks by 30 %, the tissue shifts by 4 mm; "
        "fresh noise of 20 HU, not on the reference.",
    ),
    "sliding": Plan(
        "phantom",
        PAIRS,
        HELD_OUT,
        changes={"motion": "sliding"},
        about="10 phases of a phantom whose lungs slide along a chest wall that stands still.",
    ),
    "lung_followup": Plan("lung_followup", pairs=(1,), about="Baseline and follow-up CT from the raw files."),
    "thorax_4dct": Plan("thorax_4dct", pairs=(1,), about="Two phases of a real 4D CT; no landmarks."),
    "cine_mr": Plan("cine_mr", known_every=4, about="25 phases of a heartbeat; every 4th is known."),
}


@dataclass(frozen=True)
class Case:
    """A patient in files.

    Attributes:
        name, about: of the case.
        made_from: everything that the files depend on.
        images: one file each, in order of time.
        times, reference, period: as in `stnerp.Series`.
        window: intensities that matter, low and high, for every method and every score.
        align: pre-alignment: "none" within one breath or heartbeat, "affine" between scans.
        pairs, held_out: indices of images, see `Plan`.
        masks, landmarks, label_names: the truth, see `configs/data/files.yaml`.
        regions: how many of the landmarks belong to each region, in their order; the first one's are the
            case's headline.
    """

    name: str
    about: str
    made_from: dict[str, Any]
    images: list[str]
    times: list[float]
    reference: int
    period: float | None
    window: list[float]
    align: Literal["none", "affine"]
    pairs: list[int]
    held_out: list[int]
    masks: list[str] | None
    landmarks: list[str] | None
    label_names: dict[str, str]
    regions: dict[str, int]

    @property
    def known(self) -> list[int]:
        """Images that a method may see."""
        return [i for i in range(len(self.images)) if i not in self.held_out]

    @property
    def simulated(self) -> bool:
        """Whether its motion is known: `data.moving_scene` of what it was made from."""
        return self.made_from["data"]["kind"] != "files"

    def known_series(self) -> Series:
        """The known images, read from their files."""
        return load_series(
            [self.images[i] for i in self.known],
            [self.times[i] for i in self.known],
            reference=self.known.index(self.reference),
            period=self.period,
            window=self.window,
        )

    def weights(self, index: int) -> dict[int, float]:
        """The known images before and after an image, by how near they are in time; they add up to 1."""
        known = [self.times[i] for i in self.known]
        weights = linear_blend(list(np.eye(len(known))), known, self.times[index], self.period)
        return {i: float(w) for i, w in zip(self.known, weights, strict=True) if w > 0}

    def truth(self) -> PatientData:
        """All images with masks and landmarks, for the scores."""
        keys = ("images", "times", "reference", "period", "masks", "landmarks", "window", "label_names")
        values = {key: getattr(self, key) for key in keys}
        return load_data(OmegaConf.create({"kind": "files", "contours": None, **values}))

    def regions_of(self, points: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The rows of an array with one row per landmark, region by region."""
        start = 0
        for name, count in self.regions.items():
            yield name, points[start : start + count]
            start += count

    @staticmethod
    def load(path: str | Path) -> Case:
        """Read what `prepare` wrote; the files that it wrote are named relative to it."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        for kind in ("images", "masks", "landmarks"):
            values[kind] = values[kind] and [str(Path(path).parent / name) for name in values[kind]]
        return Case(**values)


def prepare(name: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a case into a folder of its own, unless it is there; returns the path of its description.

    Args:
        name: of `PLANS`.
        folder: where the cases are.
        changes: values of the `data` section that are to be other than the plan's, say a smaller phantom.

    Raises:
        InputError: an unknown name or value, or data that can't be read.
    """
    if name not in PLANS:
        raise InputError(f"cases: unknown {name!r}; give one or more of {', '.join(PLANS)}, or all")
    plan = PLANS[name]
    values = _data_section(plan.data, {**(plan.changes or {}), **(changes or {})})
    made_from = json.loads(json.dumps({"plan": asdict(plan), "data": values}))
    path = folder / name / "case.json"
    if path.is_file() and Case.load(path).made_from == made_from:
        return path
    logger.info("writing the images of %s", name)
    partial = folder / f".{name}"
    for old in (partial, path.parent):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        case = (_real if values["kind"] == "files" else _simulated)(values, partial)
        count = len(case["images"])
        known = [i for i in range(count) if plan.known_every and i % plan.known_every == 0]
        pairs = [i for i in known if i != case["reference"]] if known else list(plan.pairs)
        held_out = [i for i in range(count) if i not in known] if known else list(plan.held_out)
        if not {*pairs, *held_out} <= set(range(count)) - {case["reference"]}:
            raise InputError(f"{name}: its pairs and held-out images need others than these {count} images")
        align = "none" if case["period"] is not None else "affine"
        about = {"name": name, "about": plan.about, "made_from": made_from, "align": align}
        write_json(partial / "case.json", {**about, **case, "pairs": pairs, "held_out": held_out})
        partial.rename(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _data_section(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A file of configs/data with all its defaults, changed."""
    section = OmegaConf.merge(_config(name), OmegaConf.create(dict(changes)))
    return OmegaConf.to_container(section, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


@lru_cache
def _config(name: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train_def", [f"data={name}", "out=unused"]).data


def _real(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A patient's own files; those of a 4D file are written one by one."""
    patient = load_data(OmegaConf.create(values))
    series, images = patient.series, values["images"]
    if isinstance(images, str):
        images = [f"image_{i:02d}.nii.gz" for i in range(len(series))]
        for image, name in zip(series.images, images, strict=True):
            write_image(image, folder / name)
    else:
        images = _absolute(images)
    points = series.landmarks[series.reference]
    return {
        **_common(patient),
        "images": images,
        "masks": _absolute(values["masks"]),
        "landmarks": _absolute(values["landmarks"]),
        "regions": {} if points is None else {"landmarks": len(points)},
    }


def _simulated(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Images, masks and dense points of a known motion, written to files."""
    patient = load_data(OmegaConf.create(values))
    series, scene = patient.series, moving_scene(values)
    files: dict[str, list[str]] = {"images": [], "masks": [], "landmarks": []}
    regions = _regions(series.reference_image, scene.motion)
    rng = np.random.default_rng(values["seed"])
    reference_mm = np.concatenate([_drawn(name, mask, scene.motion, rng) for name, mask in regions.items()])
    for i, (image, mask) in enumerate(zip(series.images, series.masks, strict=True)):
        for kind, volume in {"images": image, "masks": mask}.items():
            if volume is not None:
                files[kind].append(f"{kind}_{i:02d}.nii.gz")
                write_image(volume, folder / files[kind][-1])
        files["landmarks"].append(f"points_{i:02d}.csv")
        points_mm = scene.map_points(reference_mm, series.times[i], inverse=True)
        write_landmarks(points_mm, folder / files["landmarks"][-1])
    counts = dict.fromkeys(regions, len(reference_mm) // len(regions))
    return {**_common(patient), **files, "masks": files["masks"] or None, "regions": counts}


def _common(patient: PatientData) -> dict[str, Any]:
    series = patient.series
    return {
        "times": list(series.times),
        "reference": series.reference,
        "period": series.period,
        "window": [series.window.low, series.window.high],
        "label_names": {str(label): name for label, name in patient.label_names.items()},
    }


def _absolute(files: Sequence[str] | None) -> list[str] | None:
    return None if files is None else [str(Path(file).resolve()) for file in files]


# -- where a simulated patient is scored


def _regions(image: sitk.Image, motion: object) -> dict[str, sitk.Image]:
    """Lungs and body of a CT; where the lungs slide, also the chest wall that they slide along."""
    body = body_of(image)
    lungs = lungs_of(image, body)
    if not isinstance(motion, Sliding):
        return {"lungs": lungs, "body": body}
    near = sitk.SignedMaurerDistanceMap(lungs, squaredDistance=False, useImageSpacing=True) < WALL_MM
    grid = Grid.of(image)
    still = grid.image((~motion.slides(grid.points_world())).astype(np.uint8))
    return {"lungs": lungs, "chest wall": body & near & still, "body": body}


def _drawn(name: str, region: sitk.Image, motion: object, rng: np.random.Generator) -> np.ndarray:
    """`POINTS` points (N, 3), LPS mm, evenly drawn from a region, anywhere within its voxels."""
    inside = np.argwhere(sitk.GetArrayViewFromImage(region))[:, ::-1]
    index = inside[rng.integers(len(inside), size=4 * POINTS)] + rng.uniform(-0.5, 0.5, (4 * POINTS, 3))
    points_mm = Grid.of(region).index_to_world(index)
    if isinstance(motion, Sliding) and name != "body":
        # Voxels straddle the surface that slides; points belong to one side.
        points_mm = points_mm[motion.slides(points_mm) == (name == "lungs")]
    return points_mm[:POINTS]

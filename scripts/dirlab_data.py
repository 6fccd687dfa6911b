"""The DIR-Lab cases that a config names: the owners' files, or a phantom that is written in their layout first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from configuration import DictConfig, OmegaConf

from stnerp import Grid, InputError
from stnerp.io.dirlab import (
    EXTREME_PHASES,
    GRIDS,
    HEAD_TO_FEET,
    LANDMARKS,
    SAMPLED_LANDMARKS,
    SAMPLED_PHASES,
    DirLabCase,
    dirlab_case,
    dirlab_grid,
    write_case,
)
from stnerp.metrics import tre_mm
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, Phantom

WIDTH_MM = 345.0  # the phantom's body with some air beside it; a narrower field of view shows a smaller patient
SIDE_MM = (5.0, 2.0)  # how far the chest's front and sides move for 15 mm of the diaphragm

Section = dict[str, Any]


def section_of(config: DictConfig) -> Section:
    """The `data` section as plain values.

    Raises:
        InputError: another kind, or a scale, amplitudes or phases that aren't usable.
    """
    section: Section = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if section.get("kind") not in ("dirlab", "dirlab_phantom"):
        raise InputError(f"data.kind: {section.get('kind')!r} must be dirlab or dirlab_phantom")
    if section["kind"] == "dirlab_phantom":
        scale, amplitudes = section["scale"], section["amplitudes_si_mm"]
        if not (isinstance(scale, int | float) and 0 < scale <= 1):
            raise InputError(f"data.scale: {scale!r} must be a number above 0, at most 1")
        if not (isinstance(amplitudes, list) and len(amplitudes) == len(GRIDS)):
            raise InputError(f"data.amplitudes_si_mm: give {len(GRIDS)} numbers, of cases 1 to {len(GRIDS)}")
        if not set(EXTREME_PHASES) <= set(section["phases"]):
            raise InputError("data.phases: must name 0 and 50, end of inhalation and of exhalation")
    return section


def made_from(section: Section, number: int) -> Section:
    """Everything that a case's files depend on."""
    if section["kind"] == "dirlab":
        return {"kind": "dirlab", "folder": section["folder"]}
    made = {name: section[name] for name in ("kind", "scale", "phases", "noise_hu")}
    return {
        **made,
        "amplitude_si_mm": section["amplitudes_si_mm"][number - 1],
        "seed": section["seed"] + number - 1,
    }


def case_of(section: Section, number: int) -> DirLabCase:
    """A case, ready to be read; a phantom's is written where it isn't there yet.

    Raises:
        InputError: no such case, a motion that would fold, or (MissingFileError) the files aren't there.
    """
    if number not in GRIDS:
        raise InputError(f"cases: {number!r} must be a whole number from 1 to {len(GRIDS)}")
    if section["kind"] == "dirlab":
        return dirlab_case(section["folder"], number)
    return _stand_in(Path(section["folder"]), number, made_from(section, number))


def phantom_grids(number: int, scale: float) -> tuple[Grid, Grid, float]:
    """A stand-in's grid, that grid around the phantom, and how much smaller the patient is than the phantom."""
    full = GRIDS[number]
    pixel = full.spacing_mm[0] / scale
    wanted = (pixel, pixel, max(pixel, full.spacing_mm[2]))
    x, y, z = (max(8, round(n * s / w)) for n, s, w in zip(full.size, full.spacing_mm, wanted, strict=True))
    sx, sy, sz = (n * s / m for n, s, m in zip(full.size, full.spacing_mm, (x, y, z), strict=True))
    shrunk = max(1.0, WIDTH_MM / (x * sx))
    px, py, pz = sx * shrunk, sy * shrunk, sz * shrunk
    origin = (-(x - 1) / 2 * px, -(y - 1) / 2 * py, (z - 1) / 2 * pz)  # centred; the first slice is the highest
    return dirlab_grid((x, y, z), (sx, sy, sz)), Grid((x, y, z), (px, py, pz), origin, HEAD_TO_FEET), shrunk


def breathing_phantom(number: int, made: Mapping[str, Any]) -> tuple[Phantom, float]:
    """The phantom of a stand-in, in its own world, and how much smaller the patient is."""
    _, around, shrunk = phantom_grids(number, made["scale"])
    amplitude = made["amplitude_si_mm"] * shrunk
    ap, lr = (side * amplitude / 15.0 for side in SIDE_MM)
    motion = Breathing(*BOX_MM, amplitude_si_mm=amplitude, amplitude_ap_mm=ap, amplitude_lr_mm=lr)
    return Phantom(grid=around, motion=motion, noise_hu=made["noise_hu"], seed=made["seed"]), shrunk


def known_motion(section: Section, number: int) -> Callable[[np.ndarray], np.ndarray]:
    """A stand-in's own motion: points (..., 3) in LPS mm from T50 to T00, not rounded to voxels."""
    phantom, shrunk = breathing_phantom(number, made_from(section, number))
    origin = np.asarray(phantom.grid.origin_mm)

    def target_to_reference(points_mm: np.ndarray) -> np.ndarray:
        return (phantom.map_points(points_mm * shrunk + origin, EXTREME_PHASES[1] / 100) - origin) / shrunk

    return target_to_reference


def known_motion_errors_mm(section: Section, number: int) -> tuple[np.ndarray, np.ndarray]:
    """What the motion that a stand-in was made with scores on its landmarks: errors (300,), and snapped."""
    case = case_of(section, number)
    target_mm, reference_mm = case.landmarks(EXTREME_PHASES[1]), case.landmarks(EXTREME_PHASES[0])
    found_mm = known_motion(section, number)(target_mm)
    snapped_mm = case.grid.index_to_world(np.rint(case.grid.world_to_index(found_mm)))
    return tre_mm(found_mm, reference_mm), tre_mm(snapped_mm, reference_mm)


def _stand_in(folder: Path, number: int, made: Section) -> DirLabCase:
    """Write a case of the phantom, unless it is there; T10 is the time 0.1 of a breath.

    As in the set, a landmark is a voxel of T00, and of another phase the voxel that it moves to.
    """
    grid, around, _ = phantom_grids(number, made["scale"])
    about = folder / f"case{number}.json"
    made = json.loads(json.dumps(made))
    if not (about.is_file() and json.loads(about.read_text(encoding="utf-8")) == made):
        about.unlink(missing_ok=True)
        phantom, shrunk = breathing_phantom(number, made)
        chosen = around.index_to_world(np.rint(around.world_to_index(phantom.landmarks(0.0))))
        moved = {p: phantom.map_points(chosen, p / 100, inverse=True) for p in SAMPLED_PHASES}
        images = {p: phantom.image(p / 100) for p in made["phases"]}
        for image in images.values():
            image.SetSpacing(grid.spacing_mm)
            image.SetOrigin(grid.origin_mm)
        points = {p: (at - np.asarray(around.origin_mm)) / shrunk for p, at in moved.items()}
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"Case{number}[PD]*"):
            shutil.rmtree(old)
        write_case(
            folder,
            number,
            images,
            {p: points[p][:LANDMARKS] for p in EXTREME_PHASES},
            {p: points[p][:SAMPLED_LANDMARKS] for p in SAMPLED_PHASES},
            overwrite=True,
        )
        about.write_text(json.dumps(made) + "\n", encoding="utf-8")
    return dirlab_case(folder, number, grid)

"""Every method on a case: from the files of the known images to answers about any image.

All answers have one form (scripts/answers.py), so that one code scores them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from answers import Answers
from cases import Case
from data import moving_scene
from pair_methods import MODULES

from stnerp import Grid, STNeRP, fit_deformation, fit_reference
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.device import device_of
from stnerp.io.image import read_image, read_labels
from stnerp.lungs import body_of, lungs_of
from stnerp.preprocess import normalised
from stnerp.window import Window


@dataclass(frozen=True)
class Method:
    """How to run a method.

    Attributes:
        fit: takes the case, `seed`, `device` and the options of the command line.
        seeded: whether runs differ by chance; else one is enough.
        imports: modules, or "module:attribute", that are imported before the clock starts.
        unseen_only: whether it adds nothing where no image is held out.
        simulated_only: whether the case's motion must be known.
    """

    fit: Callable[..., Answers]
    seeded: bool = False
    imports: tuple[str, ...] = ()
    unseen_only: bool = False
    simulated_only: bool = False

    def answers(self, case: Case) -> bool:
        """Whether it has something to say about a case."""
        return bool(case.held_out or not self.unseen_only) and (case.simulated or not self.simulated_only)


# -- nothing to fit

UNSEEN_ONLY = "scored on unseen images alone: on the others they are the truth"


def no_motion(case: Case, *, seed: int, device: str) -> Answers:
    """The reference where its header places it: where every method starts."""
    return Answers(registration=lambda index, grid: registration_of(grid, lambda points_mm: points_mm))


def known_motion(case: Case, *, seed: int, device: str) -> Answers:
    """The motion that made the case, at every voxel: what voxels and noise leave of PSNR and Dice."""
    scene = moving_scene(case.made_from["data"])

    def registration(index: int, grid: Grid) -> PairRegistration:
        return registration_of(grid, lambda points_mm: scene.map_points(points_mm, case.times[index]))

    return Answers(registration=registration, note="no registration: the motion that made the images")


def nearest_phase(case: Case, *, seed: int, device: str) -> Answers:
    """The known image nearest in time, with its own contours and landmarks."""
    series = case.known_series()

    def nearest(index: int) -> int:
        weights = case.weights(index)
        return max(weights, key=lambda i: weights[i])  # the earlier one of two that are as near

    def image(index: int, grid: Grid) -> sitk.Image | None:
        return series.images[case.known.index(nearest(index))] if index in case.held_out else None

    return Answers(image=image, copy_of=nearest, note=UNSEEN_ONLY)


def linear_blend(case: Case, *, seed: int, device: str) -> Answers:
    """The known images before and after, mixed."""
    series = case.known_series()
    arrays = {i: normalised(image, series.window) for i, image in zip(case.known, series.images, strict=True)}

    def image(index: int, grid: Grid) -> sitk.Image | None:
        if index not in case.held_out:
            return None
        mixed = sum(weight * arrays[i] for i, weight in case.weights(index).items())
        return grid.image(series.window.denormalise(np.asarray(mixed)))

    return Answers(image=image, note=UNSEEN_ONLY)


# -- one model of all times


def stnerp_fast(
    case: Case,
    *,
    seed: int,
    device: str,
    prior: bool = False,
    appearance: Literal["reference", "blend"] = "reference",
    ref_net: dict[str, Any] | None = None,
    **def_net: Any,
) -> Answers:
    """The default preset; options are any of its settings, those of the Ref-Net under `ref_net`."""
    series = case.known_series()
    common: dict[str, Any] = {"device": device, "seed": seed, "progress": False}
    net = fit_reference(series, **common, **(ref_net or {})) if prior else None
    model = fit_deformation(series, net, align=case.align, appearance=appearance, **common, **def_net)
    note = f"preset fast, {'with' if prior else 'without'} Ref-Net"
    if appearance == "blend":
        note += f"; its images are blends of the known neighbours, moved, and {UNSEEN_ONLY}"
    return _answers_of(model, case, note, appearance)


def stnerp_paper(
    case: Case,
    *,
    seed: int,
    device: str,
    iterations: int | None = None,
    ref_iterations: int | None = None,
    ref_points: int | None = None,
    spacing_mm: float | None = None,
) -> Answers:
    """The paper's preset. To the letter on a GPU; on a CPU, where that takes days, shortened.

    Args:
        iterations, ref_iterations: of Def-Net and Ref-Net; the paper's: 2000 each.
        ref_points: voxels in a step of the Ref-Net's fit; the paper's: all.
        spacing_mm: of the voxels that Def-Net compares, one image a step; the paper's: its own, all images.
    """
    on_cpu = device_of(device).type == "cpu"
    series = case.known_series()
    ref_net: dict[str, Any] = {"iterations": ref_iterations or (1000 if on_cpu else 2000)}
    if points := ref_points or (8192 if on_cpu else None):
        ref_net["fraction_per_step"] = min(1.0, points / series.grid.voxels)
    steps, spacing = iterations or (100 if on_cpu else 2000), spacing_mm or (10.0 if on_cpu else None)
    levels = [(spacing, spacing, steps, None if spacing is None else 1)]
    common: dict[str, Any] = {"preset": "paper", "device": device, "seed": seed, "progress": False}
    net = fit_reference(series, **common, **ref_net)
    model = fit_deformation(series, net, align=case.align, levels=levels, **common)
    note = f"preset paper; Ref-Net {ref_net['iterations']} of 2000 iterations, {points or 'all'} voxels a step; "
    voxels = "all voxels of all images" if spacing is None else f"voxels of {spacing:g} mm of one image"
    return _answers_of(model, case, f"{note}Def-Net {steps} of 2000 iterations, {voxels} a step")


def _answers_of(
    model: STNeRP, case: Case, note: str, appearance: Literal["reference", "blend"] = "reference"
) -> Answers:
    times = case.times

    def image(index: int, grid: Grid) -> sitk.Image | None:
        if appearance == "blend" and index not in case.held_out:
            return None
        return model.image(times[index], grid, appearance=appearance)

    return Answers(
        fitted=len(case.known) - 1,
        registration=lambda index, grid: PairRegistration(model.displacement(times[index], grid)),
        image=image,
        note=note,
    )


# -- one pair at a time


def pairwise(
    case: Case, *, seed: int, device: str, function: str, takes: tuple[str, ...] = (), **options: Any
) -> Answers:
    """A method of `stnerp.baselines` on each pair of the case.

    For an unseen image the displacements of the known images before and after it are mixed, where both
    were registered (the reference's own is zero) and lie on one grid.

    Args:
        function: its name, and that of its module.
        takes: what it can be given beyond the pair: "device", "mask" (the target's lungs), "masks" (both images').
        options: any of its settings.
    """
    register = getattr(importlib.import_module(f"stnerp.baselines.{function}"), function)
    reference, window = read_image(case.images[case.reference]), Window.of(case.window)
    found: dict[int, PairRegistration] = {}
    note = ""
    for i in case.pairs:
        target = read_image(case.images[i])
        more: dict[str, Any] = {"device": device} if "device" in takes else {}
        lungs = _lungs(case, i, target) if {"mask", "masks"} & set(takes) else None
        if "mask" in takes and lungs is not None:
            more["mask"] = lungs
            note = "points drawn in the lungs: elsewhere its answers mean little"
        if "masks" in takes and lungs is not None:
            more |= {"reference_mask": _lungs(case, case.reference, reference), "target_mask": lungs}
            note = "trained on both images' lungs as well"
        found[i] = register(reference, target, window=window, align=case.align, seed=seed, **more, **options)

    def registration(index: int, grid: Grid) -> PairRegistration | None:
        if index in found:
            return found[index]
        weights = {i: w for i, w in case.weights(index).items() if i != case.reference}
        if not weights.keys() <= found.keys():
            return None
        fields = [found[i].displacement for i in weights]
        if not all(Grid.of(image).is_close(grid) for image in (reference, *fields)):
            return None
        mixed = sum(w * sitk.GetArrayViewFromImage(u) for w, u in zip(weights.values(), fields, strict=True))
        return PairRegistration(grid.image(np.asarray(mixed)))

    return Answers(fitted=len(found), registration=registration, note=note)


def _lungs(case: Case, index: int, target: sitk.Image) -> sitk.Image | None:
    """The lungs of an image: its mask's where it has one, found by thresholds in simulated CT, else None."""
    label = next((int(label) for label, name in case.label_names.items() if name == "lung"), None)
    if label is not None and case.masks is not None:
        return sitk.Cast(read_labels(case.masks[index]) == label, sitk.sitkUInt8)
    return lungs_of(target, body_of(target)) if "lungs" in case.regions else None


def _pair(function: str, seeded: bool = True, takes: tuple[str, ...] = ()) -> Method:
    imports = (MODULES[function],) if function in MODULES else ()
    return Method(partial(pairwise, function=function, takes=takes), seeded, imports)


METHODS = {
    "no_motion": Method(no_motion),
    "known_motion": Method(known_motion, simulated_only=True),
    "nearest_phase": Method(nearest_phase, unseen_only=True),
    "linear_blend": Method(linear_blend, unseen_only=True),
    "stnerp_fast": Method(stnerp_fast, seeded=True),
    "stnerp_fast_prior": Method(partial(stnerp_fast, prior=True), seeded=True),
    "stnerp_fast_blend": Method(partial(stnerp_fast, appearance="blend"), seeded=True, unseen_only=True),
    "stnerp_paper": Method(stnerp_paper, seeded=True),
    "elastix_bspline": _pair("elastix_bspline"),
    "ants_syn": _pair("ants_syn"),
    "greedy": _pair("greedy"),
    "convexadam": _pair("convexadam", seeded=False),
    "dlir": _pair("dlir", takes=("device",)),
    "anatomy_cnn": _pair("anatomy_cnn", takes=("masks", "device")),
    "idir": _pair("idir", takes=("mask", "device")),
    "cycle_idir": _pair("cycle_idir", takes=("mask", "device")),
}

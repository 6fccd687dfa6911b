"""Methods that answer about every image of a series after they saw some of them, by name, all called in one way.

`METHODS[name](patient, known, kept, align=..., seed=..., device=..., **settings)` gives back `Answers`, and
how many seconds it took. Images are named by their index in the whole series. `kept` holds what doesn't depend
on which images are known (a Ref-Net, the registration of a pair) for the next call with the same method and
patient.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import labels
import numpy as np
import pair_methods
import SimpleITK as sitk
from answers import Answers, known_registration
from data import PatientData

from stnerp import Grid, RefNet, Series, fit_deformation, fit_reference
from stnerp.baselines.interpolation import linear_blend as blended
from stnerp.baselines.interpolation import nearest_phase as nearest
from stnerp.baselines.pair import PairRegistration, registration_of

Kept = dict[Any, Any]
SeriesMethod = Callable[..., tuple[Answers, float]]


# -- nothing to fit


def no_motion(patient: PatientData, known: Sequence[int], kept: Kept, **settings: Any) -> tuple[Answers, float]:
    """The reference where its header places it."""
    return Answers(registration=lambda index, grid: registration_of(grid, lambda points_mm: points_mm)), 0.0


def known_motion(patient: PatientData, known: Sequence[int], kept: Kept, **settings: Any) -> tuple[Answers, float]:
    """The motion that made a stand-in."""
    return Answers(registration=partial(known_registration, patient)), 0.0


def nearest_image(
    patient: PatientData, known: Sequence[int], kept: Kept, **settings: Any
) -> tuple[Answers, float]:
    """The known image nearest in time in place of an unknown one, with its own contours and landmarks."""
    series = patient.series
    times = [series.times[i] for i in known]

    def copy_of(index: int) -> int:
        return int(nearest([np.asarray(i) for i in known], times, series.times[index], series.period))

    def image(index: int, grid: Grid) -> sitk.Image | None:
        return None if index in known else drawn_on(series, copy_of(index), grid)

    return Answers(image=image, copy_of=copy_of, drawn_from=lambda index: [copy_of(index)]), 0.0


def linear_blend(patient: PatientData, known: Sequence[int], kept: Kept, **settings: Any) -> tuple[Answers, float]:
    """The known images before and after, mixed."""

    def image(index: int, grid: Grid) -> sitk.Image | None:
        if index in known:
            return None
        parts = [weight * drawn_on(patient.series, i, grid) for i, weight in around(patient, known, index).items()]
        mixed = parts[0]
        for part in parts[1:]:
            mixed = mixed + part
        return mixed

    return Answers(image=image, drawn_from=lambda index: list(around(patient, known, index))), 0.0


def around(patient: PatientData, known: Sequence[int], index: int) -> dict[int, float]:
    """The known images before and after an image, and the weight of each in a linear blend."""
    series = patient.series
    times = [series.times[i] for i in known]
    weights = blended(list(np.eye(len(known))), times, series.times[index], series.period)
    return {i: float(weight) for i, weight in zip(known, weights, strict=True) if weight > 0}


def drawn_on(series: Series, index: int, grid: Grid) -> sitk.Image:
    """An image of the series on another's grid, where their headers place them, float32."""
    place = (grid.origin_mm, grid.spacing_mm, grid.direction)
    outside = series.window.low
    return sitk.Resample(
        series.images[index], grid.size, sitk.Transform(), sitk.sitkLinear, *place, outside, sitk.sitkFloat32
    )


# -- one model of all times


def st_nerp(
    patient: PatientData,
    known: Sequence[int],
    kept: Kept,
    *,
    align: Literal["auto", "none", "rigid", "affine"],
    seed: int,
    device: str,
    preset: str,
    prior: bool,
    progress: bool = False,
    appearance: Literal["reference", "blend"] = "reference",
    ref_net: dict[str, Any] | None = None,
    **def_net: Any,
) -> tuple[Answers, float]:
    """The library's model; settings are those of Def-Net, those of Ref-Net under `ref_net`."""
    series = patient.series.subset(known)
    common: dict[str, Any] = {"preset": preset, "device": device, "seed": seed, "progress": progress}
    net: RefNet | None = None
    seconds = 0.0
    if prior:
        if "ref_net" not in kept:
            start = time.perf_counter()
            net = fit_reference(series, **common, **(ref_net or {}))
            kept["ref_net"] = net, time.perf_counter() - start
        net, seconds = kept["ref_net"]
    start = time.perf_counter()
    model = fit_deformation(series, net, align=align, appearance=appearance, **common, **def_net)
    seconds += time.perf_counter() - start
    times = patient.series.times

    def image(index: int, grid: Grid) -> sitk.Image | None:
        if appearance == "blend" and index in known:
            return None  # it would be the image itself
        return model.image(times[index], grid, appearance=appearance)

    answers = Answers(
        fitted=len(known) - 1,
        registration=lambda index, grid: PairRegistration(model.displacement(times[index], grid)),
        image=image,
        rendered=None if net is None else network_alone(net).image(),
    )
    return answers, seconds


def network_alone(ref_net: RefNet) -> RefNet:
    """A Ref-Net without the voxels that it keeps beside its network."""
    alone = copy.deepcopy(ref_net)
    alone.register_buffer("remainder", None)
    return alone


# -- one pair at a time


def bar_of(method: str, progress: bool) -> dict[str, bool]:
    """`progress` for a pair method that shows how far it is: other packages' don't."""
    return {} if method in pair_methods.MODULES else {"progress": progress}


def pairwise(
    patient: PatientData, known: Sequence[int], kept: Kept, *, method: str, progress: bool = False, **settings: Any
) -> tuple[Answers, float]:
    """A method for pairs: each known image registered to the reference.

    For an unknown image the displacements of the known ones before and after it are mixed (the reference's: zero).
    """
    series = patient.series
    for i in known:
        if i != series.reference and i not in kept:
            images = series.reference_image, series.images[i]
            asked = {"window": series.window, **bar_of(method, progress), **settings}
            found, seconds = pair_methods.timed(method, *images, **asked)
            kept[i] = found, seconds
    pairs: dict[int, PairRegistration] = {i: kept[i][0] for i in known if i != series.reference}

    def registration(index: int, grid: Grid) -> PairRegistration:
        if index in pairs and Grid.of(pairs[index].displacement).is_close(grid):
            return pairs[index]
        weights = {i: weight for i, weight in around(patient, known, index).items() if i in pairs}

        def target_to_reference(points_mm: np.ndarray) -> np.ndarray:
            moved = points_mm.copy()
            for i, weight in weights.items():
                moved += weight * (pairs[i].map_points(points_mm) - points_mm)
            return moved

        reference_at = next((found.reference_at for found in pairs.values()), None)
        return replace(registration_of(grid, target_to_reference), reference_at=reference_at)

    seconds = sum(kept[i][1] for i in pairs)
    return Answers(fitted=len(pairs), registration=registration), seconds


# "w/o t": the same networks, each image by itself (the paper's ablation, Table III).
WITHOUT_TIME = {
    "stnerp_fast_without_t": "stnerp_fast_prior",
    "stnerp_paper_without_t": "stnerp_paper",
}
PEERS = [name for name in pair_methods.METHODS if not name.startswith(("stnerp", "no_motion"))]

METHODS: dict[str, SeriesMethod] = {
    "no_motion": no_motion,
    "known_motion": known_motion,
    "nearest_image": nearest_image,
    "linear_blend": linear_blend,
    "stnerp_fast": partial(st_nerp, preset="fast", prior=False),
    "stnerp_fast_prior": partial(st_nerp, preset="fast", prior=True),
    "stnerp_fast_blend": partial(st_nerp, preset="fast", prior=False, appearance="blend"),
    "stnerp_paper": partial(st_nerp, preset="paper", prior=True),
    "stnerp_paper_without_prior": partial(st_nerp, preset="paper", prior=False),
    **{name: partial(pairwise, method=pair) for name, pair in WITHOUT_TIME.items()},
    **{name: partial(pairwise, method=name) for name in PEERS},
}

LABELS = {name: labels.LABELS[name] for name in METHODS}

"""Methods that register a target to a reference, by name, all called in one way.

`METHODS[name](reference, target, window=..., align=..., seed=..., device=..., **settings)` gives back a
`PairRegistration`; settings are the method's own, see `stnerp.baselines`. A method whose package isn't
installed raises `MissingDependencyError`, which says how to get it.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import labels
import SimpleITK as sitk

from stnerp import Grid
from stnerp.baselines.anatomy_cnn import anatomy_cnn
from stnerp.baselines.ants_syn import ants_syn
from stnerp.baselines.convexadam import convexadam
from stnerp.baselines.cycle_idir import cycle_idir
from stnerp.baselines.dlir import dlir
from stnerp.baselines.elastix_bspline import elastix_bspline
from stnerp.baselines.greedy import greedy
from stnerp.baselines.idir import idir
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.baselines.st_nerp import st_nerp
from stnerp.lungs import body_of, lungs_of
from stnerp.window import Window

PairMethod = Callable[..., PairRegistration]


def no_motion(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
    """The reference where its header places it: where every method starts."""
    return registration_of(Grid.of(target), lambda points_mm: points_mm)


def on_cpu(method: PairMethod) -> PairMethod:
    """A method that has no choice of a device."""

    @wraps(method)
    def register(reference: sitk.Image, target: sitk.Image, *, device: str, **settings: Any) -> PairRegistration:
        return method(reference, target, **settings)

    return register


def in_lungs(method: PairMethod) -> PairMethod:
    """A method that draws its points from the target's lungs, found by thresholds: CT in HU alone."""

    @wraps(method)
    def register(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
        return method(reference, target, mask=lungs_of(target, body_of(target)), **settings)

    return register


@wraps(anatomy_cnn)
def lungs_meet(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
    """The anatomically constrained CNN, with both images' lungs found by thresholds: CT in HU alone."""
    masks = {
        "reference_mask": lungs_of(reference, body_of(reference)),
        "target_mask": lungs_of(target, body_of(target)),
    }
    return anatomy_cnn(reference, target, **masks, **settings)


METHODS: dict[str, PairMethod] = {
    "no_motion": no_motion,
    "stnerp_fast": partial(st_nerp, preset="fast", prior=False),
    "stnerp_fast_prior": partial(st_nerp, preset="fast", prior=True),
    "stnerp_paper": partial(st_nerp, preset="paper", prior=True),
    "stnerp_paper_without_prior": partial(st_nerp, preset="paper", prior=False),
    "ants_syn": on_cpu(ants_syn),
    "elastix_bspline": on_cpu(elastix_bspline),
    "greedy": on_cpu(greedy),
    "convexadam": on_cpu(convexadam),
    "dlir": dlir,
    "anatomy_cnn": lungs_meet,
    "idir": in_lungs(idir),
    "cycle_idir": in_lungs(cycle_idir),
}

#: All that a table of pairs may show; the known motion is asked of the data, not of two images.
NAMES = ("no_motion", "known_motion", *(name for name in METHODS if name != "no_motion"))

LABELS = {name: labels.LABELS[name] for name in NAMES}

#: What the packages of peers are imported by.
MODULES = {
    "ants_syn": "ants",
    "elastix_bspline": "itk:elastix_registration_method",
    "greedy": "picsl_greedy",
    "convexadam": "convexAdam.convex_adam_MIND",
}


def ready(modules: Iterable[str]) -> None:
    """Import modules, or "module:attribute", so that no clock counts it; what is missing a method says itself."""
    for name in modules:
        with suppress(ImportError, AttributeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, _, attribute = name.partition(":")
            getattr(importlib.import_module(module), attribute or "__name__")


def timed(
    method: str, reference: sitk.Image, target: sitk.Image, *, window: Any, **settings: Any
) -> tuple[PairRegistration, float]:
    """What a method finds, and in how many seconds; its package is imported before.

    Args:
        window: a `Window`, or what `Window.of` takes: options may give a method another one than the data's.
    """
    ready([MODULES[method]] if method in MODULES else [])
    window = Window.of(window, (reference, target))
    start = time.perf_counter()
    found = METHODS[method](reference, target, window=window, **settings)
    return found, time.perf_counter() - start

"""A fit's random numbers are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stnerp import InputError, fit_deformation, fit_reference, load_series
from stnerp.baselines.cycle_idir import cycle_idir
from stnerp.baselines.dlir import dlir
from stnerp.baselines.idir import idir
from stnerp.geometry import Grid
from stnerp.seeding import own_random_numbers

GRID = Grid((12, 11, 10), (3.0, 3.0, 3.0), (0.0, 0.0, 0.0))
IMAGES = [GRID.image(np.random.default_rng(i).random(GRID.shape, np.float32)) for i in range(2)]
SERIES = load_series(IMAGES, [0.0, 1.0], window=(0, 1))
PAIR = {"window": SERIES.window, "align": "none", "device": "cpu"}
FITS: dict[str, Callable[[Any], object]] = {
    "Ref-Net": lambda seed: fit_reference(SERIES, iterations=2, seed=seed, progress=False, device="cpu"),
    "Def-Net": lambda seed: fit_deformation(
        SERIES, levels=[(6.0, 12.0, 2, None)], align="none", seed=seed, progress=False, device="cpu"
    ),
    "IDIR": lambda seed: idir(*IMAGES, iterations=2, points_per_step=20, seed=seed, **PAIR),
    "cycle IDIR": lambda seed: cycle_idir(*IMAGES, iterations=2, points_per_step=20, seed=seed, **PAIR),
    "DLIR": lambda seed: dlir(*IMAGES, iterations=(1,), spacings_mm=(6.0,), seed=seed, **PAIR),
}


def after(between: Callable[[], object]) -> torch.Tensor:
    torch.manual_seed(11)
    between()
    return torch.rand(4)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_leaves_the_callers_random_numbers(name: str) -> None:
    assert torch.equal(after(lambda: FITS[name](3)), after(lambda: None))


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("seed", [None, 1.5, 2**70])
def test_what_is_no_seed_is_refused(name: str, seed: object) -> None:
    with pytest.raises(InputError, match=rf"^seed: {seed} must be a whole number"):
        FITS[name](seed)


def test_an_error_gives_them_back_as_well() -> None:
    @own_random_numbers
    def failing() -> None:
        torch.manual_seed(3)
        raise ValueError("no")

    def attempt() -> None:
        with pytest.raises(ValueError, match="no"):
            failing()

    assert torch.equal(after(attempt), after(lambda: None))
    assert failing.__name__ == "failing"

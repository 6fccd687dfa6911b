"""A fit's random numbers are its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stnerp import fit_deformation, fit_reference, load_series
from stnerp.baselines.dlir import dlir
from stnerp.baselines.idir import idir
from stnerp.geometry import Grid
from stnerp.seeding import own_random_numbers

GRID = Grid((12, 11, 10), (3.0, 3.0, 3.0), (0.0, 0.0, 0.0))
IMAGES = [GRID.image(np.random.default_rng(i).random(GRID.shape, np.float32)) for i in range(2)]
SERIES = load_series(IMAGES, [0.0, 1.0], window=(0, 1))
PAIR = {"window": SERIES.window, "align": "none", "seed": 3, "device": "cpu"}
FITS: dict[str, Callable[[], object]] = {
    "Ref-Net": lambda: fit_reference(SERIES, iterations=2, seed=3, progress=False, device="cpu"),
    "Def-Net": lambda: fit_deformation(
        SERIES, levels=[(6.0, 12.0, 2, None)], align="none", seed=3, progress=False, device="cpu"
    ),
    "IDIR": lambda: idir(*IMAGES, iterations=2, points_per_step=20, **PAIR),
    "DLIR": lambda: dlir(*IMAGES, iterations=(1,), spacings_mm=(6.0,), **PAIR),
}


def after(between: Callable[[], object]) -> torch.Tensor:
    torch.manual_seed(11)
    between()
    return torch.rand(4)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_leaves_the_callers_random_numbers(name: str) -> None:
    assert torch.equal(after(FITS[name]), after(lambda: None))


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

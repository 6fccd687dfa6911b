"""Settings of methods in a table's `options`: what a method doesn't have, or not in that form, is said at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stnerp import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from method_options import check_options
from pair_methods import METHODS as OF_PAIRS
from series_methods import METHODS as OF_SERIES

RIGHT: list[dict[str, Any]] = [
    {},
    {"dlir": {"iterations": [2], "learning_rate": 1, "cohort": None, "window": [-900, 100], "device": "cpu"}},
    {"ants_syn": {"metric": "cc", "seed": 3}},
    {"idir": {"weight": 0.5, "regulariser": "hyperelastic", "as_published": True}},
    {"stnerp_fast": {"levels": [[15, 30, 4]], "diffusion": 0.1}},
    {"stnerp_fast_prior": {"ref_net": {"iterations": 2}, "align": "none"}},
    {"known_motion": {}},
]


@pytest.mark.parametrize("options", RIGHT)
@pytest.mark.parametrize("methods", [OF_PAIRS, OF_SERIES], ids=["pairs", "series"])
def test_what_a_method_takes(options: dict[str, Any], methods: dict[str, Any]) -> None:
    check_options(options, methods)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dlir": {"iterations": 2}}, "options: dlir: iterations: 2 must be a list of whole numbers, '[...]'"),
        ({"dlir": {"iterations": [2.5]}}, "iterations: [2.5] must be a list of whole numbers"),
        ({"dlir": {"iteration": [2]}}, "options: dlir: unknown setting iteration; known: cohort, iterations, "),
        ({"anatomy_cnn": {"spacings_mm": "8"}}, "anatomy_cnn: spacings_mm: '8' must be a list of numbers"),
        ({"anatomy_cnn": {"target_mask": "a.nii"}}, "anatomy_cnn: unknown setting target_mask; known: cohort, "),
        ({"ants_syn": {"metric": "mi"}}, "ants_syn: metric: 'mi' must be one of mattes, cc"),
        ({"greedy": {"radius": 2.0}}, "greedy: radius: 2.0 must be a whole number"),
        ({"idir": {"iterations": True}}, "idir: iterations: True must be a whole number"),
        ({"idir": {"weight": "big"}}, "idir: weight: 'big' must be a number"),
        ({"cycle_idir": {"as_published": 1}}, "cycle_idir: as_published: 1 must be true or false"),
        ({"stnerp_fast": {"diffussion": 0.1}}, "stnerp_fast: unknown setting diffussion; known: "),
        ({"stnerp_fast": {"diffusion": [1]}}, "stnerp_fast: diffusion: [1] must be a number"),
        ({"stnerp_fast_prior": {"ref_net": 2}}, "ref_net: 2 must be settings by name"),
        ({"stnerp_fast_prior": {"ref_net": {"iter": 2}}}, "stnerp_fast_prior: unknown setting iter; known: "),
    ],
)
@pytest.mark.parametrize("methods", [OF_PAIRS, OF_SERIES], ids=["pairs", "series"])
def test_what_it_does_not(options: dict[str, Any], says: str, methods: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        check_options(options, methods)
    assert str(caught.value).startswith("options: ")
    assert says in str(caught.value)


def test_without_time_is_a_pair_method_by_another_name() -> None:
    check_options({"stnerp_fast_without_t": {"levels": [[15, 30, 4]]}}, OF_SERIES)
    with pytest.raises(InputError, match="stnerp_fast_without_t: unknown setting times"):
        check_options({"stnerp_fast_without_t": {"times": 2}}, OF_SERIES)


def test_every_method_can_be_asked() -> None:
    for methods in (OF_PAIRS, OF_SERIES):
        for name in methods:
            check_options({name: {"seed": 1}}, methods)

"""Settings of methods in a table's `options`: what a method doesn't have, or not in that form, is said at once."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import optional

from stnerp import InputError
from stnerp.presets import preset_of

SCRIPTS = Path(__file__).parents[1] / "scripts"

RIGHT: list[dict[str, Any]] = [
    {},
    {"dlir": {"iterations": [2], "learning_rate": 1, "cohort": None, "window": [-900, 100], "device": "cpu"}},
    {"ants_syn": {"metric": "cc", "seed": 3}},
    {"greedy": {"device": "cpu", "window": "percentile", "align": "rigid"}},
    {"idir": {"weight": 0.5, "regulariser": "hyperelastic", "as_published": True, "window": "auto"}},
    {"stnerp_fast": {"levels": [[15, 30, 4]], "diffusion": 0.1, "init": __file__}},
    {"stnerp_fast_prior": {"ref_net": {"iterations": 2}, "align": "none", "network_mm": None}},
    {"known_motion": {}, "no_motion": {}},
]
OF_PAIRS_ALONE = {"stnerp_fast": {"window": "lung"}}
OF_SERIES_ALONE = {
    "stnerp_fast": {"align": "auto", "appearance": "blend", "guided_times": [0, 2.5]},
    "stnerp_fast_without_t": {"ref_net": None, "window": [-900, 100]},
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dlir": {"iterations": 2}}, "options: dlir: iterations: 2 must be a list of whole numbers, '[...]'"),
    ({"dlir": {"iterations": [2.5]}}, "iterations: [2.5] must be a list of whole numbers"),
    ({"dlir": {"iterations": []}}, "iterations: [] must be a list of whole numbers, '[...]', not empty"),
    ({"dlir": {"iterations": [1e3]}}, "must be a list of whole numbers, '[...]', without a point or exponent"),
    ({"dlir": {"iteration": [2]}}, "options: dlir: unknown setting iteration; known: cohort, iterations, "),
    ({"anatomy_cnn": {"spacings_mm": "8"}}, "anatomy_cnn: spacings_mm: '8' must be a list of numbers"),
    ({"anatomy_cnn": {"target_mask": "a.nii"}}, "anatomy_cnn: unknown setting target_mask; known: cohort, "),
    ({"ants_syn": {"metric": "mi"}}, "ants_syn: metric: 'mi' must be one of mattes, cc"),
    ({"greedy": {"radius": 2.0}}, "greedy: radius: 2.0 must be a whole number, without a point or exponent"),
    ({"idir": {"iterations": True}}, "idir: iterations: True must be a whole number"),
    ({"idir": {"iterations": 1e3}}, "idir: iterations: 1000.0 must be a whole number, without a point"),
    ({"idir": {"weight": "big"}}, "idir: weight: 'big' must be a number"),
    ({"idir": {1: 2}}, "idir: 1: a setting's name must be a text"),
    ({"cycle_idir": {"as_published": 1}}, "cycle_idir: as_published: 1 must be true or false"),
    # What all methods have.
    ({"greedy": {"progress": False}}, "greedy: progress: is the table's own; give progress= beside options="),
    ({"idir": {"progress": False}}, "idir: progress: is the table's own"),
    ({"elastix_bspline": {"align": "auto"}}, "elastix_bspline: align: 'auto' must be one of none, rigid, affine"),
    ({"idir": {"align": None}}, "idir: align: None must be one of none, rigid, affine"),
    ({"stnerp_fast": {"align": None}}, "stnerp_fast: align: None must be one of "),
    ({"idir": {"seed": "a"}}, "idir: seed: 'a' must be a whole number"),
    ({"stnerp_fast": {"seed": 1.0}}, "stnerp_fast: seed: 1.0 must be a whole number, without a point"),
    ({"idir": {"device": "gpu"}}, "idir: device: 'gpu' is not a device"),
    ({"greedy": {"device": None}}, "greedy: device: None is not a device"),
    ({"stnerp_fast": {"device": "gpu"}}, "stnerp_fast: device: 'gpu' is not a device"),
    ({"idir": {"window": "lungs"}}, "idir: window: unknown name 'lungs'"),
    ({"idir": {"window": None}}, "idir: window: None must be a preset's name or a pair"),
    # What a table fixes, and methods without settings.
    (
        {"stnerp_fast": {"prior": True}},
        "stnerp_fast: prior: is what this row of the table is of; ask for another row",
    ),
    ({"stnerp_fast": {"preset": "paper"}}, "stnerp_fast: preset: is what this row of the table is of"),
    ({"no_motion": {"a": 1}}, "no_motion: has no settings; leave out a"),
    ({"no_motion": {"seed": 1}}, "no_motion: has no settings; leave out seed"),
    ({"known_motion": {"a": 1, 2: 3}}, "known_motion: has no settings; leave out a, 2"),
    # Settings of both networks.
    ({"stnerp_fast": {"diffussion": 0.1}}, "stnerp_fast: unknown setting diffussion; known: "),
    ({"stnerp_fast": {"z": 1, "a": 1}}, "stnerp_fast: unknown setting z, a; known: "),
    ({"stnerp_fast": {"diffusion": [1]}}, "stnerp_fast: diffusion: [1] must be a number"),
    ({"stnerp_fast": {"diffusion": -1}}, "stnerp_fast: diffusion: -1 must be a finite number, not negative"),
    ({"stnerp_fast": {"squarings": 4.0}}, "squarings: 4.0 must be a whole number, without a point"),
    ({"stnerp_fast": {"levels": 2}}, "levels: 2 must be a list of (spacing_mm, "),
    ({"stnerp_fast": {"levels": [[15, 30, 4.5]]}}, "levels: iterations: 4.5 must be a whole number"),
    ({"stnerp_fast": {"levels": [{"spacing_mm": 8}]}}, "levels: {'spacing_mm': 8} must be (spacing_mm, "),
    ({"stnerp_fast": {"ref_net": {"iterations": 2}}}, "stnerp_fast: ref_net: this row has no Ref-Net"),
    ({"stnerp_fast_prior": {"ref_net": 2}}, "ref_net: 2 must be settings by name"),
    ({"stnerp_fast_prior": {"ref_net": {"iter": 2}}}, "prior: ref_net: unknown setting iter; known: "),
    ({"stnerp_fast_prior": {"ref_net": {1: 2}}}, "prior: ref_net: 1: a setting's name must be a text"),
    ({"stnerp_fast_prior": {"ref_net": {"layers": 0}}}, "prior: ref_net: layers: 0 must be at least 2"),
    ({"stnerp_fast_prior": {"ref_net": {"width": 8.0}}}, "prior: ref_net: width: 8.0 must be a whole number"),
    # Arguments of a fit.
    ({"stnerp_fast": {"series": 1}}, "stnerp_fast: unknown setting series; known: "),
    ({"stnerp_fast": {"settings": {}}}, "stnerp_fast: unknown setting settings; known: "),
    ({"stnerp_fast": {"checkpoint": "x"}}, "stnerp_fast: unknown setting checkpoint; known: "),
    ({"stnerp_fast": {"checkpoint_seconds": 1}}, "stnerp_fast: unknown setting checkpoint_seconds; known: "),
    ({"stnerp_fast": {"init": 5}}, "stnerp_fast: init: 5 must be a path"),
    ({"stnerp_fast": {"init": "not/there.pt"}}, "stnerp_fast: init: not/there.pt: no such file"),
]
WRONG_OF_PAIRS = [
    ({"stnerp_fast": {"align": "auto"}}, "stnerp_fast: align: 'auto' must be one of none, rigid, affine"),
    ({"stnerp_fast": {"appearance": "blend"}}, "stnerp_fast: unknown setting appearance; known: "),
    ({"stnerp_fast": {"guided_times": [1]}}, "stnerp_fast: unknown setting guided_times; known: "),
]
WRONG_OF_SERIES = [
    ({"nearest_image": {"a": 1}}, "nearest_image: has no settings"),
    ({"linear_blend": {"a": 1}}, "linear_blend: has no settings"),
    ({"stnerp_fast": {"window": "lung"}}, "stnerp_fast: window: a model of the whole series has its window; "),
    ({"stnerp_fast": {"appearance": "foo"}}, "appearance: 'foo' must be one of reference, blend"),
    ({"stnerp_fast": {"guided_times": 3}}, "guided_times: 3 must be a list of numbers, '[...]'"),
    ({"stnerp_fast": {"guided_times": []}}, "guided_times: [] must be a list of numbers, '[...]', not empty"),
    ({"stnerp_fast_blend": {"appearance": "reference"}}, "stnerp_fast_blend: appearance: is what this row "),
    ({"stnerp_fast_without_t": {"prior": False}}, "stnerp_fast_without_t: prior: is what this row "),
    ({"stnerp_fast_without_t": {"times": 2}}, "stnerp_fast_without_t: unknown setting times"),
]


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def check(options: dict[str, Any], kind: str) -> None:
    """`check_options` of methods for "pair" or "series"."""
    check_options = importlib.import_module("method_options").check_options
    check_options(options, importlib.import_module(f"{kind}_methods").METHODS)


@pytest.mark.parametrize("options", RIGHT)
@pytest.mark.parametrize("kind", ["pair", "series"])
def test_what_a_method_takes(options: dict[str, Any], kind: str) -> None:
    check(options, kind)


def test_what_a_pair_or_a_series_takes() -> None:
    check(OF_PAIRS_ALONE, "pair")
    check(OF_SERIES_ALONE, "series")


@pytest.mark.parametrize(
    ("options", "says", "kind"),
    [(*wrong, kind) for kind in ("pair", "series") for wrong in WRONG]
    + [(*wrong, "pair") for wrong in WRONG_OF_PAIRS]
    + [(*wrong, "series") for wrong in WRONG_OF_SERIES],
)
def test_what_it_does_not(options: dict[str, Any], says: str, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        check(options, kind)
    assert str(caught.value).startswith("options: ")
    assert says in str(caught.value)


def test_without_time_is_a_pair_method_by_another_name() -> None:
    check({"stnerp_fast_without_t": {"levels": [[15, 30, 4]]}}, "series")
    with pytest.raises(InputError, match="stnerp_fast_without_t: unknown setting times"):
        check({"stnerp_fast_without_t": {"times": 2}}, "series")


@pytest.mark.parametrize(
    ("kind", "method", "known", "unknown"),
    [
        ("pair", "stnerp_fast", {"init", "window"}, {"ref_net", "guided_times", "appearance", "preset", "prior"}),
        ("pair", "stnerp_fast_prior", {"ref_net", "init"}, {"guided_times", "appearance"}),
        ("series", "stnerp_fast", {"init", "guided_times", "appearance"}, {"ref_net", "window"}),
        ("series", "stnerp_fast_prior", {"ref_net", "init", "guided_times", "appearance"}, {"window"}),
        ("series", "stnerp_fast_blend", {"init", "guided_times"}, {"ref_net", "appearance"}),
        ("series", "stnerp_fast_without_t", {"ref_net", "init", "window"}, {"guided_times", "appearance"}),
    ],
)
def test_which_settings_are_told(kind: str, method: str, known: set[str], unknown: set[str]) -> None:
    with pytest.raises(InputError) as caught:
        check({method: {"no_such_setting": 1}}, kind)
    told = str(caught.value).partition("known: ")[2].split(", ")
    assert known | {"levels", "diffusion", "align", "seed", "device"} <= set(told)
    assert not unknown & set(told)
    assert "progress" not in told


@pytest.mark.parametrize("kind", ["pair", "series"])
def test_every_method_can_be_asked(kind: str) -> None:
    """For each of its settings, as it is without being asked for; and for nothing else."""
    options = importlib.import_module("method_options")
    methods = importlib.import_module(f"{kind}_methods").METHODS
    asked: dict[str, set[str]] = {}
    for name in methods:
        with pytest.raises(InputError, match=rf"options: {name}: .*no_such_setting"):
            check({name: {"no_such_setting": 1}}, kind)
        function, fixed = options.opened(methods[name])
        if name in options.NOTHING_TO_SET:
            assert not options.keywords_of(function)
            continue
        own, common = options.settings_of(function, fixed)
        parameters = inspect.signature(function).parameters.values()
        default = {one.name: one.default for one in parameters if one.default is not one.empty}
        if "preset" in fixed:
            default |= asdict(preset_of(fixed["preset"]).def_net) | {"init": None, "guided_times": None}
        given = {n: value for n, value in default.items() if n in own | common}
        for setting, value in given.items():
            check({name: {setting: value}}, kind)
        check({name: given}, kind)
        asked[name] = set(given)
    assert set(methods) - set(asked) == {name for name in options.NOTHING_TO_SET if name in methods}
    assert asked["idir"] >= {"align", "seed", "device", "iterations", "weight", "as_published"}
    assert asked["greedy"] >= {"align", "seed", "iterations", "update_sigma"}
    assert asked["stnerp_paper"] >= {"levels", "diffusion", "ref_net", "init"}

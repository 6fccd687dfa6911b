"""A method's settings, `options={idir: {iterations: 500}}`, checked by its signature before anything is fitted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pair_methods

from stnerp import InputError, StnerpError
from stnerp.device import device_of
from stnerp.presets import DefNetSettings, RefNetSettings, preset_of, with_changes
from stnerp.window import Window

Hints = Mapping[str, Any]

NOTHING_TO_SET = ("no_motion", "known_motion", "nearest_image", "linear_blend")

# What a table calls every method with. A method's own `align`, `seed`, `device` and `window` go before those.
COMMON = ("align", "seed", "device", "window", "progress")
# Of the arguments of `fit_deformation` that aren't settings of Def-Net, those that a table can give.
OF_ANY_FIT: Hints = {"init": Path | None}
OF_SERIES: Hints = {"guided_times": Sequence[float] | None}


def check_options(options: Mapping[str, Mapping[str, Any]], methods: Mapping[str, Callable[..., Any]]) -> None:
    """Each method's settings: whether it has them, and takes such values.

    Args:
        options: settings by method.
        methods: of pairs or of a series, by name.

    Raises:
        InputError: it hasn't, or doesn't; the message names method, setting, and the form that is right.
    """
    for name, given in options.items():
        try:
            if name in NOTHING_TO_SET:
                if given:
                    raise InputError(f"has no settings; leave out {_listed(given)}")
            else:
                check_settings(*opened(methods[name]), given)
        except StnerpError as error:
            raise InputError(f"options: {name}: {error}") from error


def check_settings(function: Callable[..., Any], fixed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Settings against the keywords of a function, some of which a table fixes; ST-NeRP's also by its presets.

    Raises:
        InputError: a setting that the function doesn't have, that is fixed, or with another value than it takes.
    """
    if not keywords_of(function):  # it takes whatever it is given
        return
    if taken := [name for name in given if name in fixed]:
        raise InputError(f"{_listed(taken)}: is what this row of the table is of; ask for another row in methods=")
    if "progress" in given:
        raise InputError("progress: is the table's own; give progress= beside options=")
    own, common = settings_of(function, fixed)
    if "window" in given and "window" not in common:
        raise InputError("window: a model of the whole series has its window; give data.window in place of it")
    if "ref_net" in given and "prior" in fixed and not fixed["prior"]:
        raise InputError("ref_net: this row has no Ref-Net; choose a row with the prior in methods=")
    check_values(given, own | common, sorted(own) + list(common))
    if "device" in given:
        device_of(given["device"])
    if "window" in given and given["window"] not in ("auto", "percentile"):  # these need images
        Window.of(given["window"])
    if given.get("init") is not None and not Path(given["init"]).is_file():
        raise InputError(f"init: {given['init']}: no such file; give that of a model")
    if "preset" in fixed:
        preset = preset_of(fixed["preset"])
        with_changes(preset.def_net, {name: given[name] for name in given if name in hints_of(DefNetSettings)})
        check_ref_net(given.get("ref_net") or {}, preset.ref_net)


def check_ref_net(given: Mapping[str, Any], preset: RefNetSettings) -> None:
    """Raises InputError, which begins with ref_net, for settings that Ref-Net doesn't take."""
    hints = hints_of(RefNetSettings)
    try:
        check_values(given, hints, sorted(hints))
        with_changes(preset, dict(given))
    except InputError as error:
        raise InputError(f"ref_net: {error}") from None


def settings_of(function: Callable[..., Any], fixed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Types of what can be set of a function: its own settings, and those that a table gives to all methods."""
    keywords = keywords_of(function)
    own = {name: hint for name, hint in keywords.items() if name not in (*COMMON, *fixed) and form_of(hint)}
    if "preset" in fixed:
        own |= {**hints_of(DefNetSettings), **OF_ANY_FIT}
        own |= {} if "window" in keywords else OF_SERIES
        if not fixed["prior"]:
            del own["ref_net"]
    # A peer on the CPU alone takes any device, and leaves it; a window and a device are checked by their readers.
    types = {"align": keywords.get("align"), "seed": int, "device": Any, "window": Any}
    return own, {name: hint for name, hint in types.items() if name in keywords or name == "device"}


def keywords_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments that are given by name alone."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {one.name: hints[one.name] for one in parameters if one.kind is one.KEYWORD_ONLY}


def hints_of(settings: type) -> dict[str, Any]:
    """The types of a network's settings; levels have their own check, `presets.with_changes`."""
    return {name: Any if name == "levels" else hint for name, hint in get_type_hints(settings).items()}


def check_values(given: Mapping[Any, Any], hints: Hints, known: Sequence[str]) -> None:
    """Settings against the types that they must have.

    Args:
        known: names as they are told.

    Raises:
        InputError: names that aren't text, or not known, or a value of another type.
    """
    if other := [name for name in given if not isinstance(name, str)]:
        raise InputError(f"{_listed(other)}: a setting's name must be a text, '{{iterations: 500}}'")
    if unknown := [name for name in given if name not in hints]:
        raise InputError(f"unknown setting {_listed(unknown)}; known: {', '.join(known)}")
    for name, value in given.items():
        if not fits(value, hints[name]):
            raise InputError(
                f"{name}: {value!r} must be {form_of(hints[name])}{_hint(value, form_of(hints[name]))}"
            )


def opened(method: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function in which a method is written, and those of its keywords that the table fixes."""
    fixed: dict[str, Any] = {}
    while True:
        if isinstance(method, partial):
            fixed, method = {**method.keywords, **fixed}, method.func
        elif "method" in fixed:  # of a series: a method for pairs by its name
            method = pair_methods.METHODS[fixed.pop("method")]
        else:
            return inspect.unwrap(method), fixed


def fits(value: Any, hint: Any) -> bool:
    """Whether a value out of YAML is of a type: a list is a tuple, too, a whole number a float, a text a path."""
    kind, within = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in within)
    if kind is Literal:
        return value in within
    if kind is tuple or kind is Sequence:
        return isinstance(value, list | tuple) and len(value) > 0 and all(fits(one, within[0]) for one in value)
    if kind is Mapping or kind is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, str if hint is Path else hint)


def form_of(hint: Any) -> str:
    """A type in words; empty: nothing that can be written in YAML."""
    kind, within = get_origin(hint), get_args(hint)
    plain = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        NoneType: "null",
    }
    if kind in (Union, UnionType):
        return " or ".join(form for form in map(form_of, within) if form and form != "null")
    if kind is Literal:
        return f"one of {', '.join(map(str, within))}"
    if kind is tuple or kind is Sequence:
        return f"a list of {plain[within[0]].removeprefix('a ')}s, '[...]'"
    if kind is Mapping or kind is dict:
        return "settings by name, '{...}'"
    return plain.get(hint, "")


# -- parts of the above


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def _hint(value: Any, form: str) -> str:
    """What else is to be said of a value that looks right and isn't."""
    if value in ([], ()):
        return ", not empty"
    numbers = value if isinstance(value, list | tuple) else [value]
    points = any(isinstance(one, float) and one.is_integer() for one in numbers)
    return ", without a point or exponent" if points and "whole number" in form else ""

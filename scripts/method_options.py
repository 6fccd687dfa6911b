"""A method's settings, `options={idir: {iterations: 500}}`, checked by its signature before anything is fitted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pair_methods

from stnerp import InputError, StnerpError, fit_deformation
from stnerp.presets import preset_of, with_changes

# What every method is called with; each has its own check where it is read.
COMMON = ("align", "window", "seed", "device", "progress")


def check_options(options: Mapping[str, Mapping[str, Any]], methods: Mapping[str, Callable[..., Any]]) -> None:
    """Each method's settings: whether it has them, and takes such values.

    Raises:
        InputError: it hasn't, or doesn't; the message names method, setting, and the form that is right.
    """
    for name, given in options.items():
        if name not in methods:  # the known motion has nothing to set
            continue
        function, fixed = opened(methods[name])
        try:
            check_settings(function, fixed, {key: value for key, value in given.items() if key not in COMMON})
        except StnerpError as error:
            raise InputError(f"options: {name}: {error}") from error


def check_settings(function: Callable[..., Any], fixed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Settings against the keywords of a function, some of which are fixed; ST-NeRP's against its presets, too."""
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    takes_more = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    keywords = [n for n, one in parameters.items() if one.kind is one.KEYWORD_ONLY and n not in COMMON]
    own = {n: hints[n] for n in keywords if form_of(hints[n])}
    unknown = sorted(set(given) - set(own))
    if unknown and not takes_more:
        raise InputError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(own))}")
    for name in given.keys() & own:
        if not fits(given[name], own[name]):
            raise InputError(f"{name}: {given[name]!r} must be {form_of(own[name])}")
    if "preset" in own:
        preset = preset_of(given.get("preset", fixed.get("preset", "fast")))
        elsewhere = {*own, *inspect.signature(fit_deformation).parameters}
        with_changes(preset.def_net, {n: value for n, value in given.items() if n not in elsewhere})
        with_changes(preset.ref_net, dict(given.get("ref_net") or {}))


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
    """Whether a value out of YAML is of a type: a list is a tuple, too, a whole number a float."""
    kind, within = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in within)
    if kind is Literal:
        return value in within
    if kind is tuple or kind is Sequence:
        return isinstance(value, list | tuple) and all(fits(one, within[0]) for one in value)
    if kind is Mapping or kind is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def form_of(hint: Any) -> str:
    """A type in words; empty: nothing that can be written in YAML."""
    kind, within = get_origin(hint), get_args(hint)
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    if kind in (Union, UnionType):
        return " or ".join(form for form in map(form_of, within) if form and form != "null")
    if kind is Literal:
        return f"one of {', '.join(map(str, within))}"
    if kind is tuple or kind is Sequence:
        return f"a list of {plain[within[0]].removeprefix('a ')}s, '[...]'"
    if kind is Mapping or kind is dict:
        return "settings by name, '{...}'"
    return plain.get(hint, "")

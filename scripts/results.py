"""Results that are kept in files, one each, so that the same command goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from stnerp import Grid, InputError, StnerpError, __version__
from stnerp.fit import REVISION
from stnerp.presets import FAST, FLOW, PAPER

logger = logging.getLogger("stnerp.scripts")

Record = dict[str, Any]


def recorded(
    path: Path, arguments: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
) -> tuple[Record, bool]:
    """The record of a measurement: read where there is one that succeeded, else made now.

    Whatever goes wrong is recorded in place of a result, so that other measurements go on.

    Args:
        path: of the record, a .json; its folder is made.
        arguments: everything that the result depends on, of types that JSON has; `scans`, if any, is what
            `check_scans` compares.
        measure: gives the result, of such types too.

    Returns:
        `arguments`, `result` (empty where it failed), `failure` (one line, empty where it didn't), `hardware`,
        `library`; and whether it was made now.

    Raises:
        InputError: the result there is of other arguments.
        OSError: it can't be read, or none be written.
    """
    asked = _read_again(arguments)
    before = _whole_record(path)
    if before is not None and not before["failure"]:
        if {"scans": asked.get("scans"), **before["arguments"]} != {"scans": None, **asked}:
            raise InputError(f"{path}: was measured with other settings; choose another out= or overwrite=true")
        return before, False
    result: Mapping[str, Any] = {}
    failure = ""
    logger.info("%s ...", path.stem)
    try:
        result = measure()
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        known = isinstance(error, StnerpError)
        failure = text if known else f"{type(error).__name__}: {text}"
        logger.debug("%s failed", path.stem, exc_info=not known)  # to the file only
    about = {"hardware": hardware(), "library": library()}
    record = {"arguments": asked, "result": dict(result), "failure": failure, **about}
    write_whole(path, record)
    return record, True


def write_whole(path: Path, values: Mapping[Any, Any]) -> None:
    """Values as JSON, whole or not at all: beside their place first, then into it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, by name; damaged ones are told and set aside."""
    return [record for _, record in _whole_records(folder)]


def record_of(path: Path) -> Record:
    """What a file holds.

    Raises:
        ValueError: that isn't a record.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(record, dict) and all(isinstance(record.get(n), dict) for n in ("arguments", "result"))):
        raise ValueError(f"{path}: holds no record of a measurement")
    return record


def _whole_records(folder: Path) -> Iterator[tuple[Path, Record]]:
    for path in sorted(folder.glob("[!.]*.json")):
        if (record := _whole_record(path)) is not None:
            yield path, record


def _whole_record(path: Path) -> Record | None:
    """A record; None where there is none, or a damaged one (a full disk, a bad copy), which is then set aside
    under another name, so that it is measured again.

    Raises:
        OSError: it can't be read just now, which says nothing of what it holds.
    """
    try:
        return record_of(path)
    except FileNotFoundError:  # another program has just set it aside
        return None
    except ValueError:
        aside = path.with_name(f"{path.name}.damaged")
    text = "%s: is damaged and is set aside as %s; what it held is measured again where it is asked for"
    logger.warning(text, path, aside.name)
    with suppress(FileNotFoundError):
        os.replace(path, aside)
    return None


def fingerprint_of_data(
    images: Iterable[sitk.Image | None], points: Iterable[np.ndarray | None] = (), about: object = ()
) -> str:
    """What tells the contents of images, masks and landmarks from others, wherever the files lie: 16 digits.

    Args:
        about: plain values that belong to them, such as times.
    """
    digest = hashlib.blake2b(repr(about).encode(), digest_size=8)
    for image in images:
        digest.update(repr(image and Grid.of(image)).encode())
        if image is not None:
            digest.update(np.ascontiguousarray(sitk.GetArrayViewFromImage(image)).data)
    for some in points:
        digest.update(repr(some is None).encode())
        if some is not None:
            digest.update(np.ascontiguousarray(some, dtype=float).data)
    return digest.hexdigest()


def check_scans(folder: Path, case: int, scans: str) -> None:
    """One state of a case's scans, contours and landmarks in a table, by its `fingerprint_of_data`.

    Raises:
        InputError: a result of other ones. Records of before there were fingerprints are taken as they are.
    """
    for path, record in _whole_records(folder):
        asked = record["arguments"]
        if asked["case"] == case and record["result"] and asked.get("scans", scans) != scans:
            raise InputError(
                f"{path.name}: case {case} had other scans, times, contours or landmarks when it was measured; "
                "choose another out= or overwrite=true"
            )


def listed(name: str, value: object, kind: type) -> list[Any]:
    """A setting that must be a list, not empty, of one type.

    Raises:
        InputError: it isn't.
    """
    if not (isinstance(value, list) and value and all(type(one) is kind for one in value)):
        of = {int: "whole numbers", str: "names"}[kind]
        raise InputError(f"{name}: {value!r} must be a list of {of}, '[...]'")
    return value


def chosen_methods(methods: object, options: object, known: Collection[str]) -> list[str]:
    """The names in a list of methods, each once; `all`: every known one.

    Raises:
        InputError: methods that aren't a list of names, options that aren't a mapping of mappings, unknown names.
    """
    methods = list(known) if methods == "all" else listed("methods", methods, str)
    if not (isinstance(options, dict) and all(isinstance(value, dict) for value in options.values())):
        raise InputError(f"options: {options!r} must be settings by method, '{{idir: {{iterations: 500}}}}'")
    for name, given in {"methods": methods, "options": options}.items():
        unknown = [str(method) for method in given if method not in known]
        if unknown:
            raise InputError(f"{name}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return list(dict.fromkeys(methods))


def check_same(
    folder: Path,
    common: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    data: Mapping[int, Mapping[str, Any]],
) -> None:
    """One table, one preparation, one patient for a case and one set of options for a method.

    Args:
        common: what all records share.
        options: of each method that is asked for; records of others keep theirs.
        data: the section of each case that is asked for.

    Raises:
        InputError: a result of other ones. Failures of other ones are forgotten.
    """
    for path, record in _whole_records(folder):
        asked = record["arguments"]
        wanted = {
            "common": common,
            "options": options.get(asked["method"], asked["options"]),
            "data": data.get(asked["case"], asked.get("data")),
        }
        other = [name for name, value in _read_again(wanted).items() if asked.get(name) != value]
        if other and not record["failure"]:
            told = " and ".join("settings" if name == "common" else name for name in other)
            raise InputError(f"{path}: was measured with other {told}; choose another out= or overwrite=true")
        if other:
            path.unlink(missing_ok=True)


def _read_again(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are when a record is read again: no tuples, no numbers as keys."""
    again: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return again


def end_without_result(records: Sequence[Record]) -> None:
    """End the script with code 1 where nothing could be measured."""
    if not any(record["result"] for record in records):
        logger.error("nothing was measured; the table says why")
        sys.exit(1)


def notes(records: Sequence[Record], missing: Mapping[Any, str], labels: Mapping[str, str]) -> list[str]:
    """What was changed, is missing, failed or was measured by another version than the rest, a line each.

    Args:
        missing: cases that were left out, and why.
        labels: of the methods.
    """
    with_results = {str(record["arguments"]["case"]) for record in records if record["result"]}
    changed = {r["arguments"]["method"]: r["arguments"]["options"] for r in records if r["arguments"]["options"]}
    lines = [f"- {labels[method]} ran with {json.dumps(options)}" for method, options in changed.items()]
    for case, reason in missing.items():
        beside = "left out now, its results are of before: " if str(case) in with_results else ""
        lines.append(f"- case {case}: {beside}{reason}")
    failures: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["failure"]:
            key = record["arguments"]["method"], record["failure"]
            failures.setdefault(key, []).append(str(record["arguments"]["case"]))
    for (method, failure), cases in failures.items():
        lines.append(f"- {labels[method]}, case {', '.join(dict.fromkeys(cases))}: {failure}")
    versions: dict[str, list[str]] = {}
    for record in filter(lambda record: record["result"], records):
        asked = record["arguments"]
        measured = f"{labels[asked['method']]} (case {asked['case']})"
        versions.setdefault(record.get("library", "a version that isn't known"), []).append(measured)
    if len(versions) > 1:
        lines += [f"- by {version}: {', '.join(dict.fromkeys(own))}" for version, own in versions.items()]
    return lines


def library() -> str:
    """What computes results: the library's version, and what tells one state of fit and presets from another."""
    digest = hashlib.blake2b(repr((FAST, PAPER, FLOW)).encode(), digest_size=4).hexdigest()
    return f"stnerp {__version__}, fit {REVISION}, presets {digest}"


def hardware() -> str:
    """What a time was taken on: the processor, how many threads, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, threads: {torch.get_num_threads()}{gpu}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

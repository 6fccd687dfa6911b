"""Patients' series named in a YAML file: which images, when, and what is known at each.

    patient: p1                    # optional
    images: [a.nii.gz, b.nii.gz]   # relative to this file; a DICOM folder counts as one image
    times: [0, 12]                 # and all else, as in stnerp.load_series
    period: null
    reference: 0
    masks: [a_gtv.nii.gz, null]
    landmarks: {0: a.csv, 1: b.csv}
    label_names: {1: tumour}
    window: auto

A cohort is a list of such patients under the one key `patients`; each then needs its `patient`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from stnerp.errors import InputError, MissingFileError

_KEYS = ("patient", "images", "times", "period", "reference", "masks", "landmarks", "label_names", "window")


@dataclass(frozen=True)
class ManifestPatient:
    """One patient of a manifest.

    Attributes:
        patient: the name that the manifest gives, or its file's name without suffix.
        arguments: of `stnerp.load_series`; files as paths, without what the manifest leaves out.
        label_names: of the masks' labels.
    """

    patient: str
    arguments: dict[str, Any]
    label_names: dict[int, str]


def read_manifest(
    path: str | os.PathLike[str], patients: Collection[str] | None = None
) -> tuple[ManifestPatient, ...]:
    """The patients of a manifest, one or a cohort, in order. No image is read, but files must be there.

    Args:
        patients: names of those that are wanted; None: all. What files the others lack is no matter.

    Raises:
        MissingFileError: the manifest, or a file that it names, isn't there.
        InputError: no YAML of this form; the message names the file and the key.
    """
    path = Path(path)
    entries = _entries(path).items()
    wanted = [at for at in entries if patients is None or str(at[1]["patient"]) in patients]
    return tuple(_patient(entry, path, where) for where, entry in wanted)


def manifest_entries(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Each patient's part of a manifest as it stands there, by name. The files that it names need not be there.

    Raises:
        MissingFileError, InputError: as `read_manifest`, but for those files.
    """
    return {str(entry["patient"]): entry for entry in _entries(Path(path)).values()}


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, no references, which could stand for any amount of them, and no key twice: YAML would
    take the last without a word."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "a reference (*name); write the values out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    if not os.path.isfile(path):
        raise MissingFileError(f"{path}: no such manifest; check the path")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no date, 5000 digits
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not readable as text"
        raise InputError(f"{path}{line}: is no plain YAML: {problem}") from None


def _entries(path: Path) -> dict[str, dict[Any, Any]]:
    """Each patient's part, named and of the right form, by where it stands: `patients[0].`"""
    content = _load(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold keys and values (images: [...]); see stnerp/io/manifest.py")
    if "patients" not in content:
        named = content if content.get("patient") is not None else {**content, "patient": path.stem}
        _patient(named, path, "", there=False)
        return {"": named}
    _refuse_unknown(content, ("patients",), path, "")
    listed = content["patients"]
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: patients: must be a list of patients")
    entries = {f"patients[{i}].": entry for i, entry in enumerate(listed)}
    names = []
    for where, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("patient") is None:
            raise InputError(f"{path}: {where}patient: is missing; name every patient of a cohort")
        names.append(_patient(entry, path, where, there=False).patient)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: patients: {', '.join(twice)} is named twice; rename one")
    return entries


def _refuse_unknown(content: Mapping[Any, Any], known: Sequence[str], path: Path, where: str) -> None:
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise InputError(f"{path}: {where}{unknown[0]}: unknown key; known are {', '.join(known)}")


def _patient(content: dict[Any, Any], path: Path, where: str, there: bool = True) -> ManifestPatient:
    """What a named entry says; `there`: its files must be there."""
    _refuse_unknown(content, _KEYS, path, where)

    def wrong(key: str, wanted: str) -> NoReturn:
        raise InputError(f"{path}: {where}{key}: {content.get(key)!r} must be {wanted}")

    given = {key: value for key, value in content.items() if value is not None}
    patient = given.pop("patient")
    if isinstance(patient, bool) or not isinstance(patient, str | int) or patient == "":
        wrong("patient", "a name")
    if "images" not in given:
        raise InputError(f"{path}: {where}images: is missing; list the images' files")
    if not isinstance(given["images"], str | list) or not given["images"]:
        wrong("images", "a list of files, one 4D file, a folder of DICOM series or a pattern")
    for key in ("images", "masks", "landmarks"):
        if key in given:
            given[key] = _files(given[key], path, f"{where}{key}", there)
    if "times" in given and not (isinstance(given["times"], list) and all(map(_is_number, given["times"]))):
        wrong("times", "a list of numbers")
    if "period" in given and not _is_number(given["period"]):
        wrong("period", "a number or null")
    if "reference" in given and (isinstance(given["reference"], bool) or not isinstance(given["reference"], int)):
        wrong("reference", "the index of an image, from 0")
    window = given.get("window", "auto")
    if not (
        isinstance(window, str) or (isinstance(window, list) and list(map(_is_number, window)) == [True, True])
    ):
        wrong("window", "a name or [low, high]")
    names = given.pop("label_names", {})
    if not isinstance(names, dict) or not all(type(k) is int and isinstance(v, str) for k, v in names.items()):
        wrong("label_names", "names of labels, {1: tumour}")
    return ManifestPatient(str(patient), given, names)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _files(value: Any, path: Path, key: str, there: bool) -> Any:
    """Paths from the manifest's folder: of one, of a list with None where there is none, or by index."""
    if isinstance(value, str):
        return _file(value, path, key, there)
    if isinstance(value, list):
        return [None if one is None else _file(one, path, f"{key}[{i}]", there) for i, one in enumerate(value)]
    if isinstance(value, dict) and all(type(index) is int for index in value):
        return {
            index: _file(one, path, f"{key}[{index}]", there) for index, one in value.items() if one is not None
        }
    raise InputError(f"{path}: {key}: {value!r} must be a file, or files in a list or by index")


def _file(value: Any, path: Path, key: str, there: bool) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"{path}: {key}: {value!r} must be a file's name")
    found = path.parent / value
    if there and not os.path.exists(found) and not (glob.has_magic(value) and glob.glob(str(found))):
        raise MissingFileError(f"{path}: {key}: no such file or folder, {found}; check the name")
    return str(found)

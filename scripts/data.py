"""The series that a config names: a patient's files, a manifest's, one of 4D-Lung, a phantom or a CT that moves.

Where the truth is known, it is in the series itself: landmarks and masks of every image.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any, TypeGuard

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, OmegaConf
from four_d_lung_data import PATIENT, stand_in_motion, write_stand_in

from stnerp import InputError, MissingFileError, Series, load_series
from stnerp.errors import MissingContoursError
from stnerp.geometry import Grid, Triple
from stnerp.io.four_d_lung import FourDLung, breathing_series, index_4d_lung, longitudinal_series
from stnerp.io.image import read_image, read_labels
from stnerp.io.manifest import manifest_entries, read_manifest
from stnerp.motion import Breathing, Longitudinal, Sliding, world_box
from stnerp.phantom import BOX_MM, LABELS, TUMOUR_CENTRE_MM, MovedImage, Phantom

Motion = Breathing | Sliding | Longitudinal
KnownMotion = Callable[[np.ndarray, float, float], np.ndarray]
Loaded = tuple[dict[str, Any], dict[int, str]]  # arguments of load_series, and names of the masks' labels


@dataclass(frozen=True)
class PatientData:
    """What a config's `data` section stands for.

    Attributes:
        series: checked images.
        label_names: of the masks' labels; those without a name are "label 7".
        contours: labels to draw, and whose mean scores tables show.
        seconds: how long reading and checking took; neither making a simulated series counts nor finding the
            patient's files in a collection.
        nowhere: names of contours that were asked for and are drawn on no scan.
        known_motion: of a stand-in for 4D-Lung: points (..., 3), LPS mm, and two times of the series, to the same
            tissue's points at the second one.
    """

    series: Series
    label_names: dict[int, str]
    contours: list[int]
    seconds: float
    known_motion: KnownMotion | None = None
    nowhere: tuple[str, ...] = ()


def load_data(config: DictConfig) -> PatientData:
    """The series of a config's `data` section.

    Raises:
        InputError: as `load_series` and the readers, or an unknown kind, motion or setting of a motion.
    """
    with _naming_variable(config):
        return _load_data(config)


@contextmanager
def _naming_variable(config: DictConfig) -> Iterator[None]:
    """An error for what isn't in `root` names the environment variable that says where that is."""
    try:
        yield
    except MissingFileError as error:
        given: Any = OmegaConf.to_container(config, resolve=False)
        variable = re.match(r"\$\{oc\.env:(\w+)", str(given.get("root")))
        if variable is None or str(config.root) not in str(error):
            raise
        raise MissingFileError(f"{error}, or set {variable[1]} to a folder in place of {config.root}") from None


@contextmanager
def _naming_rois() -> Iterator[None]:
    """An error for contours that aren't drawn names the setting that chooses others, or none."""
    try:
        yield
    except MissingContoursError as error:
        plain = (name for name in error.there if re.fullmatch(r"\w[\w.-]*", name))  # as Hydra takes it unquoted
        others = [f"data.rois='[{name}]' or " for name in plain][:1]
        message = f"{error}: {''.join(others)}data.rois='[]'"
        raise MissingContoursError(message, error.absent, error.there) from None


def _load_data(config: DictConfig) -> PatientData:
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    if values.get("kind") not in _MAKERS:
        raise InputError(f"data.kind: {values.get('kind')!r} must be one of {', '.join(_MAKERS)}")
    for name, value in values.items():
        if value is not None and name in _FORMS and not _FORMS[name][0](value):
            raise InputError(f"data.{name}: {value!r} must be {_FORMS[name][1]}")
    if values["kind"] == "tcia_4d_lung_phantom":
        values |= {"root": str(write_stand_in(values)), "patient": PATIENT}
    if values["kind"] in ("tcia_4d_lung", "tcia_4d_lung_phantom"):
        values["collection"] = indexed(values["root"])
    start = time.perf_counter()
    with _naming_rois():
        arguments, label_names = _MAKERS[values["kind"]](values)
    seconds = 0.0 if values["kind"] in ("phantom", "simulated") else time.perf_counter() - start
    known_motion = None
    if values["kind"] == "tcia_4d_lung_phantom":
        landmarks, known_motion = stand_in_motion(values)
        arguments["landmarks"] = [landmarks(t) for t in arguments["times"]]
    start = time.perf_counter()
    series = load_series(**arguments)
    seconds += time.perf_counter() - start
    names = _label_names(label_names, series)
    return PatientData(series, names, _contours(values, names, label_names, series), seconds, known_motion)


def named_files(config: DictConfig) -> dict[str, Any]:
    """Arguments of `load_series` of a `data` section that names a patient's files, none of which is read.

    Raises:
        InputError: a section of another kind, or as `read_manifest`.
    """
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if values.get("kind") not in ("files", "manifest"):
        raise InputError(f"data.kind: {values.get('kind')!r} names no files of images")
    return _MAKERS[values["kind"]](values)[0]


def indexed(root: str) -> FourDLung:
    """`index_4d_lung` of a folder, which takes minutes for all patients: once, as long as no file changes."""
    return _indexed(root, os.path.realpath(root), _stamp(root))


@lru_cache(maxsize=2)
def _indexed(root: str, place: str, stamp: str) -> FourDLung:
    return index_4d_lung(root)


def _stamp(root: str) -> str:
    """Another one once a file below a folder is written, moved or removed."""
    digest = hashlib.blake2b()
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                about = os.stat(path)
            except OSError:  # a link to nowhere
                continue
            digest.update(f"{path}|{about.st_size}|{about.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _from_files(values: dict[str, Any]) -> Loaded:
    keys = ("images", "times", "reference", "period", "masks", "landmarks", "window")
    names = {int(label): str(name) for label, name in (values["label_names"] or {}).items()}
    return {key: values[key] for key in keys}, names


def _from_manifest(values: dict[str, Any]) -> Loaded:
    """The patient of a manifest, or the one of its patients that is asked for."""
    patients, wanted = list(manifest_entries(values["manifest"])), values["patient"]
    if wanted is None and len(patients) > 1:
        raise InputError(f"data.patient: choose one of {values['manifest']}: {', '.join(patients)}")
    name = patients[0] if wanted is None else str(wanted)
    if name not in patients:
        raise InputError(f"data.patient: no {wanted!r} in {values['manifest']}; there are: {', '.join(patients)}")
    (chosen,) = read_manifest(values["manifest"], [name])
    return chosen.arguments, chosen.label_names


def _from_4d_lung(values: dict[str, Any]) -> Loaded:
    """A 4D CT of a patient, or one phase of all of them."""
    collection, patient = values["collection"], str(values["patient"])
    rois = values["rois"] or []
    if values["series"] == "breathing":
        arguments = breathing_series(collection, patient, values["date"], rois)
    elif values["series"] == "longitudinal":
        arguments = longitudinal_series(
            collection,
            patient,
            values["phase"],
            rois,
            dates=values["dates"],
            allow_missing=values["allow_missing"],
        )
    else:
        raise InputError(f"data.series: {values['series']!r} must be breathing or longitudinal")
    arguments |= {"reference": values["reference"], "window": values["window"]}
    return arguments, {label: str(name) for label, name in enumerate(rois, 1)}


def moving_scene(values: dict[str, Any]) -> Phantom | MovedImage:
    """What moves by a known motion: the scene of a `data` section of kind phantom or simulated.

    Raises:
        InputError: as `load_data`.
    """
    if values["kind"] == "phantom":
        motion = _motion(values, BOX_MM, TUMOUR_CENTRE_MM)
        x, y, z = values["size"]
        return Phantom((x, y, z), values["spacing_mm"], motion, values["noise_hu"], values["seed"])
    ct = read_image(values["ct"])
    labels = None if values["labels"] is None else read_labels(values["labels"])
    if labels is not None and not Grid.of(labels).is_close(Grid.of(ct)):
        raise InputError(f"{values['labels']}: is not on the grid of {values['ct']}; resample it onto that")
    motion = _motion(values, world_box(Grid.of(ct)), None)
    return MovedImage(ct, motion, labels, noise_hu=values["noise_hu"], seed=values["seed"])


def _from_scene(values: dict[str, Any]) -> Loaded:
    """Images, masks and landmarks of a known motion."""
    scene = moving_scene(values)
    times = scene.times(values["phases"])
    with_labels = values["kind"] == "phantom" or values["labels"] is not None
    arguments = {
        "images": [scene.image(t) for t in times],
        "times": times,
        "reference": values["reference"],
        "period": scene.motion.period,
        "masks": [scene.labels(t) for t in times] if with_labels else None,
        "landmarks": [scene.landmarks(t) for t in times],
        "window": values["window"],
    }
    if values["kind"] == "phantom":
        return arguments, {label: name for name, label in LABELS.items()}
    return arguments, {int(label): str(name) for label, name in (values["label_names"] or {}).items()}


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _named_labels(value: object) -> bool:
    return isinstance(value, dict) and all(re.fullmatch(r"[0-9]{1,9}", str(label)) for label in value)


def _whole_triple(value: object) -> bool:
    return isinstance(value, list) and [type(n) is int and n >= 1 for n in value] == [True] * 3


# What a setting must look like, whose value goes further than to `load_series`, which checks its own arguments.
_FORMS: dict[str, tuple[Callable[[object], bool], str]] = {
    "label_names": (_named_labels, "names of labels, '{1: heart}'"),
    "contours": (_texts, "a list of names, '[heart]'"),
    "rois": (_texts, "a list of names, '[Tumor]'"),
    "size": (_whole_triple, "three whole numbers, voxels along x, y, z"),
    "spacing_mm": (lambda value: _number(value) and value > 0, "a positive number"),
    "noise_hu": (lambda value: _number(value) and value >= 0, "a number, 0 or more"),
    "seed": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
    "motion_settings": (lambda value: isinstance(value, dict), "settings of the motion, '{amplitude_si_mm: 10}'"),
    **dict.fromkeys(("phase", "amplitude_si_mm", "tumour_scale", "shift_mm"), (_number, "a number")),
    "dates": (lambda value: isinstance(value, list), "a list of dates"),
    **dict.fromkeys(("root", "manifest", "ct", "labels"), (lambda value: isinstance(value, str), "a path")),
}
_MAKERS: dict[str, Callable[[dict[str, Any]], Loaded]] = {
    "files": _from_files,
    "manifest": _from_manifest,
    "tcia_4d_lung": _from_4d_lung,
    "tcia_4d_lung_phantom": _from_4d_lung,
    "phantom": _from_scene,
    "simulated": _from_scene,
}


def _motion(values: dict[str, Any], box_mm: tuple[Triple, Triple], tumour_centre_mm: Triple | None) -> Motion:
    """The motion, at rest at the reference; the unit of time is the phase when it breathes, else the day."""
    phases, reference = values["phases"], values["reference"]
    if not (isinstance(phases, int) and phases >= 2):
        raise InputError(f"data.phases: {phases!r} must be a whole number, 2 or more")
    if not (isinstance(reference, int) and 0 <= reference < phases):
        raise InputError(f"data.reference: {reference!r} must be the index of an image, from 0 to {phases - 1}")
    settings: dict[str, Any] = {"centre_mm": box_mm[0], "half_size_mm": box_mm[1]}
    make: type[Motion]
    if values["motion"] in ("breathing", "sliding"):
        make = Breathing if values["motion"] == "breathing" else Sliding
        settings |= {"period": float(phases)}
    elif values["motion"] == "longitudinal":
        make = Longitudinal
        settings |= {} if tumour_centre_mm is None else {"tumour_centre_mm": tumour_centre_mm}
    else:
        raise InputError(f"data.motion: {values['motion']!r} must be breathing, sliding or longitudinal")
    settings |= values["motion_settings"] or {}
    try:
        return make(**settings, reference_time=make(**settings).times(phases)[reference])
    except TypeError as error:
        raise InputError(f"data.motion_settings: {str(error).split('()', 1)[-1].strip()}") from None


def _label_names(given: dict[int, str], series: Series) -> dict[int, str]:
    """A name for each label in the reference's mask, or in the first image's that has one.

    Raises:
        InputError: the scores of two labels would go into the same columns.
    """
    masks = [series.masks[series.reference], *series.masks]
    mask = next((mask for mask in masks if mask is not None), None)
    if mask is None:
        return {}
    found = [int(label) for label in np.unique(sitk.GetArrayViewFromImage(mask)) if label != 0]
    names = {label: given.get(label, f"label {label}") for label in found}
    for one, other in permutations(found, 2):
        column = names[one].replace(" ", "_")
        if names[other].replace(" ", "_") in (column, f"{column}_before"):  # _before: the fit, in metrics.csv
            raise InputError(
                f"data.label_names: {names[one]!r} and {names[other]!r}, of labels {one} and {other}, would share "
                "columns of metrics.csv; rename one"
            )
    return names


def _contours(values: dict[str, Any], names: dict[int, str], given: dict[int, str], series: Series) -> list[int]:
    """Labels of the contours that are asked for.

    Args:
        names: of the labels on the reference.
        given: names of labels, whether or not they are drawn.

    Raises:
        MissingContoursError: one that isn't on the reference; `there` also names those on other scans alone.
    """
    wanted = values["contours"]
    if wanted is None:
        return list(names)
    unknown = sorted(set(wanted) - set(names.values()))
    if unknown and values["kind"] != "phantom":  # a small phantom may lack some organs
        message = f"data.contours: no label {', '.join(unknown)}; known: {', '.join(names.values()) or 'none'}"
        masks = [sitk.GetArrayViewFromImage(mask) for mask in series.masks if mask is not None]
        drawn = [name for label, name in given.items() if any(np.any(mask == label) for mask in masks)]
        raise MissingContoursError(message, unknown, tuple(dict.fromkeys([*names.values(), *drawn])))
    return [label for label, name in names.items() if name in wanted]

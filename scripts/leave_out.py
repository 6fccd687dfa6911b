"""Tables of interpolation: some images of a series are left out of the fit, and everything is scored.

For each case, method and image left out: a record in results/, and slices of the image in pictures/.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from answers import all_scores, answer
from configuration import DictConfig, OmegaConf
from data import PatientData
from method_options import check_options
from results import (
    Record,
    check_same,
    check_scans,
    chosen_methods,
    fingerprint_of_data,
    listed,
    read_records,
    recorded,
)
from run_directory import logger, plain
from saved_slices import save_slices
from series_methods import METHODS, Kept
from truth import load_what_is_there, truth_of

from stnerp import InputError
from stnerp.baselines.pair import check_align
from stnerp.device import device_of
from stnerp.metrics import psnr_db, ssim
from stnerp.preprocess import normalised

T = TypeVar("T")


def changes_of(config: DictConfig) -> list[dict[str, Any]]:
    """What each case changes in the `data` section: `cases`, or the section as it is.

    Raises:
        InputError: cases that aren't a list of settings.
    """
    cases = plain(config.cases) if config.cases is not None else [{}]
    if not (isinstance(cases, list) and cases and all(isinstance(case, dict) for case in cases)):
        raise InputError(f"cases: {cases!r} must be settings of data, '[{{patient: a}}, {{patient: b}}]'")
    return cases


def case_data(config: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    """The `data` section of a case.

    Raises:
        InputError: a setting that the section doesn't have.
    """
    unknown = sorted(set(changes) - set(config.data))
    if unknown:
        raise InputError(
            f"cases: data has no setting {', '.join(map(str, unknown))}; it has {', '.join(config.data)}"
        )
    return OmegaConf.merge(config.data, OmegaConf.create(dict(changes)))  # type: ignore[return-value]


def common_of(config: DictConfig) -> dict[str, Any]:
    """What all records of a table share. Each case has data of its own, so that it's no part of this."""
    return {name: plain(config[name]) for name in ("align", "seed", "device")}


def load_case(config: DictConfig, changes: Mapping[str, Any]) -> tuple[PatientData, dict[str, Any]]:
    """A case, and its `data` section as plain values."""
    section = case_data(config, changes)
    return load_what_is_there(section), plain(section)


def align_of(config: DictConfig, patient: PatientData) -> str:
    """`align` for methods that don't know of periods: auto is affine unless the series is periodic."""
    return str(config.align if config.align != "auto" else "none" if patient.series.period else "affine")


def start_anew(config: DictConfig, out: Path, methods: Sequence[str], options: Mapping[str, Any]) -> None:
    """Check what is asked for, and, unless overwrite=true, against it what is there already.

    Raises:
        InputError: no such pre-alignment or device, or results of other settings, options or data.
    """
    if config.align != "auto":
        check_align(config.align)
    device_of(config.device)
    sections: dict[int, dict[str, Any]] = {}
    for number, changes in enumerate(changes_of(config), 1):
        with suppress(InputError):  # told when the case is read
            sections[number] = plain(case_data(config, changes))
    if config.overwrite:
        return
    own = {method: options.get(method, {}) for method in methods}
    check_same(out / "results", common_of(config), own, sections)


def readable_cases(
    config: DictConfig, out: Path, missing: dict[str, str], wanted_of: Callable[[PatientData], T]
) -> Iterator[tuple[dict[str, Any], PatientData, T]]:
    """Of each case what its records begin with, the patient, and what is wanted of it.

    With overwrite=true old results are removed once the first case is read, and not before: a folder's name with a
    slip would cost them.

    A case that can't be read, or doesn't have what is wanted, is told, put into `missing` with the reason, and
    left out; where `cases` isn't given, there is no other, and the error is raised. So is one whose results are
    of other scans, unless it is the only one.
    """

    def leave_out(number: int, error: InputError) -> None:
        missing[str(number)] = str(error)
        logger.error("case %d: left out: %s", number, error)

    old = [*(out / "results").glob("*.json"), *(out / "pictures").glob("*.npz")] if config.overwrite else []
    cases = changes_of(config)
    for number, changes in enumerate(cases, 1):
        try:
            patient, section = load_case(config, changes)
            wanted = wanted_of(patient)
        except InputError as error:
            if config.cases is None:
                raise
            leave_out(number, error)
            continue
        for path in old:
            path.unlink(missing_ok=True)
        old = []
        scans = scans_of(patient)
        try:
            check_scans(out / "results", number, scans)
        except InputError as error:
            if len(cases) == 1:
                raise
            leave_out(number, error)
            continue
        yield {"case": number, "data": section, "scans": scans}, patient, wanted


def scans_of(patient: PatientData) -> str:
    """What tells a patient's scans, times, contours and landmarks from others."""
    series = patient.series
    about = (series.times, series.period, series.reference, series.window, sorted(patient.label_names.items()))
    return fingerprint_of_data([*series.images, *series.masks], series.landmarks, about)


def records_of(out: Path, missing: Mapping[str, str]) -> list[Record]:
    """All records of a run directory.

    Raises:
        InputError: there is none.
    """
    records = read_records(out / "results")
    if not records:
        raise InputError(f"cases: none could be read; {next(iter(missing.values()))}")
    return records


def evaluate(config: DictConfig, out: Path) -> tuple[list[Record], dict[str, str]]:
    """All records of the run directory, and the cases that could not be read, with the reason.

    Raises:
        InputError: as `start_anew`, unknown methods, scans that can't be left out, or no case at all.
    """
    options = plain(config.options) or {}
    methods = chosen_methods(plain(config.methods), options, METHODS)
    check_options(options, METHODS)
    scans = list(dict.fromkeys(listed("held_out", plain(config.held_out), int)))
    start_anew(config, out, methods, options)
    missing: dict[str, str] = {}
    for about, patient, held_out in readable_cases(config, out, missing, partial(indices_of, scans)):
        common = common_of(config)
        settings = {**common, "align": align_of(config, patient), "progress": config.progress}
        for method in methods:
            kept: Kept = {}
            for scan, index in zip(scans, held_out, strict=True):
                stem = f"case{about['case']:02d}-without{scan}-{method}"
                arguments = {
                    **about,
                    "held_out": scan,
                    "method": method,
                    "options": options.get(method, {}),
                    "common": common,
                }
                pictures = out / "pictures" / stem
                make = partial(
                    measure, patient, index, method, kept, {**settings, **arguments["options"]}, pictures
                )
                record, new = recorded(out / "results" / f"{stem}.json", arguments, make)
                say(stem, record, new)
            del kept
            gc.collect()
    return records_of(out, missing), missing


def indices_of(scans: Sequence[int], patient: PatientData) -> list[int]:
    return [index_of(patient, scan) for scan in scans]


def index_of(patient: PatientData, scan: int) -> int:
    """Index of a scan by its number, from 1; the reference can't be left out.

    Raises:
        InputError: no such scan.
    """
    series = patient.series
    if not 1 <= scan <= len(series) or scan - 1 == series.reference:
        raise InputError(
            f"held_out: {scan!r} must be the number of a scan from 1 to {len(series)}, "
            f"other than the reference's, {series.reference + 1}"
        )
    return scan - 1


def measure(
    patient: PatientData, held_out: int, method: str, kept: Kept, settings: Mapping[str, Any], pictures: Path
) -> dict[str, Any]:
    """Scores of every image but the reference, from a fit without one of them.

    Returns:
        `images`, a row each; `seconds`; `truth`, as `truth_of`; with a Ref-Net also `prior_psnr_db`, `prior_ssim`,
        the reference that it draws against the voxels.
    """
    series = patient.series
    known = [i for i in range(len(series)) if i != held_out]
    answers, seconds = METHODS[method](patient, known, kept, **settings)
    rows = []
    for index in series.targets:
        given = answer(patient, answers, index)
        row: dict[str, Any] = {"scan": index + 1, "time": series.times[index], "unseen": index == held_out}
        if scores := all_scores(patient, given, index):
            rows.append(row | scores)
        if index == held_out or patient.contours:
            save_slices(pictures.with_name(f"{pictures.name}-scan{index + 1}.npz"), patient, answers, given, index)
    result: dict[str, Any] = {"images": rows, "seconds": patient.seconds + seconds, "truth": truth_of(patient)}
    if answers.rendered is not None:
        drawn, voxels = (normalised(image, series.window) for image in (answers.rendered, series.reference_image))
        result |= {"prior_psnr_db": min(psnr_db(drawn, voxels), 200.0), "prior_ssim": ssim(drawn, voxels)}
    return result


def say(name: str, record: Record, new: bool) -> None:
    """A line on a measurement."""
    if record["failure"]:
        logger.error("%s: failed: %s", name, record["failure"])
        return
    unseen = [row for row in record["result"]["images"] if row["unseen"]]
    told = [f"PSNR {row['psnr_db']:.2f} dB" for row in unseen if "psnr_db" in row]
    told += [f"TRE {row['tre_mean_mm']:.2f} mm" for row in unseen if "tre_mean_mm" in row]
    logger.info(
        "%s: %s%s", name, ", ".join([*told, f"{record['result']['seconds']:.1f} s"]), "" if new else " (before)"
    )

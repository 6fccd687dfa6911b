"""python scripts/eval_dirlab.py data=dirlab out=runs/table4 methods='[stnerp_fast,elastix_bspline]' cases='[1,2]'

Table IV: register end of inhalation (T00, the reference) to end of exhalation (T50, the target) of DIR-Lab's 4D
CTs, and measure how far T50's 300 landmarks, mapped to T00, are from where they are there, and how well T00's
lungs, found by thresholds, meet T50's. Without methods= and cases=: those of the config.
data=dirlab_phantom writes stand-ins first and takes those.

Writes into the run directory: config.yaml, results/ (a .json per case and method), and what they add up to:
metrics.csv (a row each), landmarks.csv (the error of each landmark), table_4.md; missing.json, where cases that
were asked for have no data; eval_dirlab.log. The same command goes on where it was stopped, and tries again what
failed; further cases and methods join the table. overwrite=true starts anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from answers import folding_of, summary_of_errors
from configuration import DictConfig, hydra
from dirlab_data import case_of, known_motion, section_of
from dirlab_table import sorted_records, write_tables
from method_options import check_options
from pair_methods import METHODS, NAMES, timed
from published import DIRLAB_DISPLACEMENT_MM
from results import (
    Record,
    check_same,
    check_scans,
    chosen_methods,
    end_without_result,
    fingerprint_of_data,
    listed,
    recorded,
    write_whole,
)
from run_directory import CONFIGS, launch, logger, plain, run_directory, write_config, wrote
from scores import everywhere, within
from series_methods import bar_of

from stnerp import Grid, InputError, MissingFileError
from stnerp.baselines.pair import PairRegistration, check_align, registration_of
from stnerp.device import device_of
from stnerp.io.dirlab import GRIDS, DirLabCase
from stnerp.labels import carried_labels
from stnerp.lungs import body_of, lungs_of
from stnerp.metrics import dice, surface_distances_mm, tre_mm, tre_summary
from stnerp.window import Window

INHALED, EXHALED = 0, 50  # phases T00 and T50
MISSING = "missing.json"


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="eval_dirlab")
def main(config: DictConfig) -> None:
    with run_directory(config, "eval_dirlab", ()) as out:
        cases, options = listed("cases", plain(config.cases), int), plain(config.options) or {}
        methods = chosen_methods(plain(config.methods), options, NAMES)
        check_options(options, METHODS)
        common = {name: plain(config[name]) for name in ("align", "window", "seed", "device")}
        common["data"] = section_of(config.data)
        check_align(common["align"])
        device_of(common["device"])
        if common["window"] not in ("auto", "percentile"):  # these need images
            Window.of(common["window"])
        results = out / "results"
        old = [*results.glob("*.json"), out / MISSING] if config.overwrite else []
        if not config.overwrite:
            check_same(results, common, {method: options.get(method, {}) for method in methods}, data={})
        wrote(write_config(config, out / "config.yaml"))

        missing = {} if config.overwrite else missing_before(out / MISSING)
        for number in dict.fromkeys(cases):
            try:
                case = case_of(common["data"], number)
                known = common["data"]["kind"] == "dirlab_phantom"
                pair = Pair(case, known_motion(common["data"], number) if known else None)
                scans = pair.fingerprint()
            except InputError as error:
                leave_out(missing, number, error)
                continue
            for path in old:  # not before a case is there: a folder's name with a slip would cost them
                path.unlink(missing_ok=True)
            old = []
            try:
                check_scans(results, number, scans)
            except InputError as error:
                if len(set(cases)) == 1:
                    raise
                leave_out(missing, number, error)
                continue
            missing.pop(number, None)
            if common["data"]["kind"] == "dirlab":
                pair.compare_with_published()
            for method in methods:
                arguments = {
                    "case": number,
                    "method": method,
                    "options": options.get(method, {}),
                    "common": common,
                    "scans": scans,
                }
                path = results / f"case{number:02d}-{method}.json"
                bar = bar_of(method, config.progress)
                record, new = recorded(path, arguments, partial(measure, pair, arguments, bar))
                say(path.stem, record, new)
        records = sorted_records(results)
        if not records:
            raise MissingFileError(next(iter(missing.values())))
        missing = {number: without_folder(reason, common["data"]) for number, reason in missing.items()}
        measured = {record["arguments"]["case"] for record in records if record["result"]}
        note_missing(out / MISSING, {n: reason for n, reason in missing.items() if n not in measured})
        write_tables(out, records, missing)
        wrote(out / "eval_dirlab.log")
        end_without_result(records)


# -- cases without data


def missing_before(path: Path) -> dict[int, str]:
    """Cases that were asked for and had no data, in this run directory, and why."""
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {int(number): str(reason) for number, reason in kept.items()}
    except (ValueError, AttributeError):
        logger.warning("%s: is damaged and ignored; ask again for cases without data, so that they count", path)
        return {}


def leave_out(missing: dict[int, str], number: int, error: InputError) -> None:
    """Tell that a case is left out, and why."""
    missing[number] = str(error)
    logger.error("case %s: left out: %s", number, str(error).partition("; request")[0])  # said once


def without_folder(reason: str, section: Mapping[str, Any]) -> str:
    """A reason that names the set's folder by its last name, since folders above it tell of a machine."""
    folder = Path(section.get("folder") or "")
    return reason.replace(str(folder), folder.name) if folder.name else reason


def note_missing(path: Path, missing: Mapping[int, str]) -> None:
    """Keep which cases had no data and have no results, so that tables of later runs count them, too."""
    kept = {number: reason for number, reason in missing.items() if number in GRIDS}
    if kept:
        write_whole(path, kept)
    else:
        path.unlink(missing_ok=True)


# -- one case, one method


class Pair:
    """The two phases of a case, read from their files when they are needed first.

    Raises:
        InputError: landmarks that aren't usable, or (MissingFileError) landmarks or images that aren't there.
    """

    def __init__(self, case: DirLabCase, motion: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.case, self.motion = case, motion  # target -> reference, of a stand-in
        self.reference_mm, self.target_mm = case.landmarks(INHALED), case.landmarks(EXHALED)
        for phase in (INHALED, EXHALED):
            if phase not in case.phases:
                case.image(phase)  # says what is missing
        self._read: tuple[sitk.Image, sitk.Image, float] | None = None

    def images(self) -> tuple[sitk.Image, sitk.Image, float]:
        """Reference, target, and how many seconds it took to read them."""
        if self._read is None:
            start = time.perf_counter()
            images = self.case.image(INHALED), self.case.image(EXHALED)
            self._read = (*images, time.perf_counter() - start)
        return self._read

    def fingerprint(self) -> str:
        """What tells its images and landmarks from others."""
        return fingerprint_of_data(self.images()[:2], (self.reference_mm, self.target_mm))

    @cached_property
    def lungs(self) -> tuple[sitk.Image, sitk.Image] | None:
        """Both lungs of the reference and of the target; the set has no contours, so they are found by thresholds.

        None, and a warning, where there are none.
        """
        try:
            reference, target = (lungs_of(image, body_of(image)) for image in self.images()[:2])
        except InputError as error:
            logger.warning("case %d: no Dice and HD95 of lungs: %s", self.case.number, error)
            return None
        return reference, target

    def known_registration(self) -> PairRegistration:
        """A stand-in's own motion at every voxel: what voxels leave of TRE, Dice and HD95.

        Raises:
            InputError: the owners' files.
        """
        if self.motion is None:
            raise InputError("known_motion: only of stand-ins is the motion known; leave it out of methods=")
        return registration_of(Grid.of(self.images()[1]), self.motion)

    def compare_with_published(self) -> None:
        """Warn where the landmarks are not as far apart as the owners say: a sample of theirs is within 10 %."""
        apart = float(tre_mm(self.target_mm, self.reference_mm).mean())
        known = DIRLAB_DISPLACEMENT_MM[self.case.number]
        if abs(apart - known) > 0.2 * known:
            text = "case %d: landmarks are %.2f mm apart on average, by the owners %.2f; are they this case's?"
            logger.warning(text, self.case.number, apart, known)


def measure(pair: Pair, arguments: Mapping[str, Any], bar: Mapping[str, bool]) -> dict[str, Any]:
    """Scores of a method on a case, and the error of each landmark."""
    reference, target, read_seconds = pair.images()
    common = arguments["common"]
    window = Window.of(common["window"], (reference, target))
    settings = {"window": window, **{name: common[name] for name in ("align", "seed", "device")}, **bar}
    if arguments["method"] == "known_motion":
        found, seconds = pair.known_registration(), 0.0
    else:
        found, seconds = timed(arguments["method"], reference, target, **{**settings, **arguments["options"]})
    # φ takes the target's points, of T50, to the reference, T00.
    predicted_mm, grid = found.map_points(pair.target_mm), Grid.of(reference)
    snapped_mm = grid.index_to_world(np.rint(grid.world_to_index(predicted_mm)))
    return {
        "tre_before_mean_mm": float(tre_mm(pair.target_mm, pair.reference_mm).mean()),
        **tre_summary(predicted_mm, pair.reference_mm, grid),
        **({} if pair.motion is None else errors_of_motion(predicted_mm, pair.motion(pair.target_mm))),
        **(meeting_of_lungs(found, *pair.lungs, pair.motion) if pair.lungs else {}),
        **folding_of(found.displacement),
        "seconds": read_seconds + seconds,
        "errors_mm": tre_mm(predicted_mm, pair.reference_mm).tolist(),
        "errors_snapped_mm": tre_mm(snapped_mm, pair.reference_mm).tolist(),
    }


def errors_of_motion(predicted_mm: np.ndarray, known_mm: np.ndarray) -> dict[str, float]:
    """Distances in mm from where a stand-in's own motion takes the landmarks: nothing is rounded to voxels."""
    summary = summary_of_errors(tre_mm(predicted_mm, known_mm))
    return {f"motion_error_{name}": summary[name] for name in ("mean_mm", "p95_mm")}


def meeting_of_lungs(
    found: PairRegistration,
    reference_lungs: sitk.Image,
    target_lungs: sitk.Image,
    motion: Callable[[np.ndarray], np.ndarray] | None,
) -> dict[str, float]:
    """Dice and HD95 in mm of the reference's lungs, carried to the target, with the target's own, as far as the
    reference's field of view reaches; Dice also with the reference's, carried by a motion that is known."""
    seen = found.propagate(everywhere(reference_lungs))
    carried, own = within(seen, found.propagate(reference_lungs), target_lungs)
    distances = surface_distances_mm(carried, own)
    scores = {"dice_lungs": dice(carried, own), "hd95_lungs_mm": distances["hd95_mm"]}
    if motion is not None:
        (moved,) = within(seen, carried_labels(reference_lungs, Grid.of(target_lungs), motion))
        scores["motion_dice_lungs"] = dice(carried, moved)
    return scores


def say(name: str, record: Record, new: bool) -> None:
    """A line on a measurement."""
    if record["failure"]:
        logger.error("%s: failed: %s", name, record["failure"])
    else:
        text = "%s: TRE %.2f mm, snapped %.2f mm, %.1f s%s"
        names = ("tre_mean_mm", "tre_snapped_mean_mm", "seconds")
        logger.info(text, name, *(record["result"][key] for key in names), "" if new else " (before)")


if __name__ == "__main__":
    launch(main)

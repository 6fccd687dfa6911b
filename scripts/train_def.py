"""python scripts/train_def.py out=runs/p1

Fit Def-Net (Eq. 6) to the series and the Ref-Net that train_ref.py left in the run directory, or, with
prior=false and data on the command line, to the reference's voxels. Writes into the run directory:
train_def.yaml, model.pt, def_net_history.csv, metrics.csv, pictures/, train_def.log. Interrupted, the same command
goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configuration import DictConfig, OmegaConf, hydra
from data import PatientData, load_data
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from run_directory import (
    CONFIGS,
    DEF_NET_CHECKPOINT,
    OWN_START,
    launch,
    logger,
    plain,
    replaced_fit,
    run_directory,
    settings_of,
    time_name,
    value_of,
    write_config,
    wrote,
)
from scores import CONTOUR_KEYS, contour_columns, draw, predict, score

from stnerp import InputError, RefNet, Series, fit_deformation
from stnerp.atomic import replacing
from stnerp.preprocess import normalised
from stnerp.ref_net import fingerprint_of
from stnerp.report import loss_curve, text_table, write_csv

WRITES = (
    "train_def.yaml",
    "model.pt",
    "def_net_history.csv",
    "metrics.csv",
    "pictures/loss.png",
    "pictures/t*.png",
)
OF_ANOTHER_FIT = ("summary.csv", "summary.md", "pictures/t*.png")  # also of eval_interpolation.py
NEEDS = {"ref_net.pt": "run train_ref.py with the same out= first, or pass prior=false"}
CHANGED = (
    "changed since ref_net.pt was fitted; leave that out, run train_ref.py anew with it and overwrite=true, "
    "or pass prior=false"
)
FROM_IMAGES = ("auto", "percentile")  # windows that depend on every scan


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train_def")
def main(config: DictConfig) -> None:
    needs = {} if config.prior is False else NEEDS
    with run_directory(config, "train_def", WRITES, needs, [DEF_NET_CHECKPOINT]) as out:
        value_of(config, "prior", bool)
        config = with_settings_of_ref_net(config, out / "config.yaml")
        ref_net = RefNet.load(out / "ref_net.pt") if config.prior else None
        patient = load_data(config.data)
        if ref_net is not None:
            refuse_other_reference(ref_net, patient.series)
            patient = with_window_of_ref_net(patient, ref_net, config)
        series = patient.series
        start = time.perf_counter()
        model = fit_deformation(
            series,
            ref_net,
            align=config.align,
            appearance=config.appearance,
            guided_times=plain(config.guided_times),
            init=kept_start(plain(config.init), out),
            device=config.device,
            seed=config.seed,
            progress=config.progress,
            checkpoint=out / DEF_NET_CHECKPOINT,
            **settings_of(config.preset.def_net),
        )
        seconds = patient.seconds + time.perf_counter() - start
        wrote(model.save(out / "model.pt", overwrite=True), write_config(config, out / "train_def.yaml"))
        replaced_fit(out, OF_ANOTHER_FIT)
        wrote(write_csv(out / "def_net_history.csv", model.history))
        wrote(loss_curve(out / "pictures" / "loss.png", model.history))
        rows = []
        for i in series.targets:
            prediction = predict(model, patient, i)
            rows.append(score(model, patient, prediction))
            title = f"{series.names[i]}, t = {series.times[i]:g}"
            if not prediction.covered.all():
                title += f"\n{rows[-1]['psnr_db']:.1f} dB where the reference reaches"
            wrote(draw(out / "pictures" / f"t{time_name(series.times[i])}.png", patient, prediction, title))
        wrote(write_csv(out / "metrics.csv", rows), out / "train_def.log")
        settings = model.settings
        for table in tables(rows, patient):
            logger.info("\n%s", table)
        if settings.contours > 0 or settings.landmarks > 0:
            logger.info("\ncontours or landmarks guided this fit: where they did, their scores are no test of it")
        logger.info("\nfiles to model: %.1f s%s", seconds, " besides the Ref-Net" if config.prior else "")


def kept_start(init: Any, out: Path) -> Any:
    """`init`, but a copy of the run's own model.pt: the result takes its place before the run is finished, and the
    same command must go on from the start that it had."""
    if isinstance(init, list):
        return [kept_start(each, out) for each in init]
    own, start = out / "model.pt", out / OWN_START
    if not isinstance(init, str) or Path(init).resolve() != own.resolve() or not own.is_file():
        return init
    if not ((out / DEF_NET_CHECKPOINT).is_file() and start.is_file()):  # else it is the unfinished fit's
        with replacing(start) as partial:
            shutil.copyfile(own, partial)
    return str(start)


def tables(rows: Sequence[Mapping[str, Any]], patient: PatientData) -> list[str]:
    """For the terminal: a table of images, one of landmarks and one of contours where they are known."""
    printed = []
    for beginnings in (("psnr", "ssim", "ncc", "folded_voxels"), ("landmarks", "tre_m")):
        columns = [name for name in rows[0] if name.startswith(beginnings)]
        if columns:
            printed.append(text_table(rows, ["time", *columns]))
    contours = []
    for row in rows:
        for name in patient.label_names.values():
            own = {
                key.format(suffix): row[column]
                for suffix in ("_before", "")
                for key, column in zip(CONTOUR_KEYS, contour_columns(name, suffix), strict=True)
                if column in row
            }
            if own:
                contours.append({"time": row["time"], "contour": name, **own})
    return [*printed, *([text_table(contours)] if contours else [])]


def with_settings_of_ref_net(config: DictConfig, path: Path) -> DictConfig:
    """Data and preset as train_ref.py saved them, changed by what the command line says about them.

    Raises:
        InputError: the command line asks for another Ref-Net.
    """
    if not path.is_file():
        return config
    saved = OmegaConf.load(path)
    merged = config.copy()
    merged.data, merged.preset = saved.data.copy(), saved.preset.copy()
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    for key in (override.key_or_group for override in overrides):
        sections = ("data", "preset") if key == "experiment" else (key,)
        for section in sections:
            if section.split(".")[0] in ("data", "preset"):
                OmegaConf.update(merged, section, OmegaConf.select(config, section), merge=False, force_add=True)
    if config.prior:
        fitted, wanted = settings_of(saved.preset.ref_net), settings_of(merged.preset.ref_net)
        changed = [name for name in {**fitted, **wanted} if fitted.get(name) != wanted.get(name)]
        if changed:
            raise InputError(f"preset.ref_net: {', '.join(changed)} {CHANGED}")
    return merged


def refuse_other_reference(ref_net: RefNet, series: Series) -> None:
    """Raises InputError unless the series has the reference of the Ref-Net; its other scans may be other ones."""
    if fingerprint_of(normalised(series.reference_image, ref_net.window)) != ref_net.fingerprint:
        raise InputError(f"data: the reference {CHANGED}")


def with_window_of_ref_net(patient: PatientData, ref_net: RefNet, config: DictConfig) -> PatientData:
    """A window that is found from the images stays what it was, however many scans there are by now; so it is in
    `config`, which is saved."""
    window, theirs = patient.series.window, ref_net.window
    if (window.low, window.high) == (theirs.low, theirs.high) or config.data.get("window") not in FROM_IMAGES:
        return patient
    logger.info("window: (%g, %g), of ref_net.pt; of these scans it would be (%g, %g)",
                *(theirs.low, theirs.high, window.low, window.high))  # fmt: skip
    config.data.window = [theirs.low, theirs.high]
    return replace(patient, series=replace(patient.series, window=theirs))


if __name__ == "__main__":
    launch(main)

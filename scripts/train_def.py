"""python scripts/train_def.py out=runs/p1

Fit Def-Net (Eq. 6) to the series and the Ref-Net that train_ref.py left in the run directory, or, with
prior=false and data on the command line, to the reference's voxels. Writes into the run directory:
train_def.yaml, model.pt, def_net_history.csv, metrics.csv, pictures/, train_def.log. Interrupted, the same command
goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configuration import DictConfig, OmegaConf, hydra
from data import PatientData, load_data
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from run_directory import (
    CONFIGS,
    DEF_NET_CHECKPOINT,
    launch,
    logger,
    plain,
    run_directory,
    settings_of,
    time_name,
    value_of,
    write_config,
    wrote,
)
from scores import CONTOUR_KEYS, contour_columns, draw, predict, score

from stnerp import InputError, RefNet, fit_deformation
from stnerp.report import loss_curve, text_table, write_csv

WRITES = (
    "train_def.yaml",
    "model.pt",
    "def_net_history.csv",
    "metrics.csv",
    "pictures/loss.png",
    "pictures/t*.png",
)
OF_ANOTHER_FIT = ("summary.csv", "summary.md")  # of eval_interpolation.py, whose model.pt is replaced
NEEDS = {"ref_net.pt": "run train_ref.py with the same out= first, or pass prior=false"}
# Data that can change while the reference, and so the Ref-Net, stays the same.
FREE_OF_REFERENCE = ("times", "period", "masks", "landmarks", "label_names", "contours", "labels", "rois")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train_def")
def main(config: DictConfig) -> None:
    needs = {} if config.prior is False else NEEDS
    with run_directory(config, "train_def", WRITES, needs, [DEF_NET_CHECKPOINT]) as out:
        value_of(config, "prior", bool)
        config = with_settings_of_ref_net(config, out / "config.yaml")
        patient = load_data(config.data)
        series = patient.series
        start = time.perf_counter()
        model = fit_deformation(
            series,
            RefNet.load(out / "ref_net.pt") if config.prior else None,
            align=config.align,
            appearance=config.appearance,
            guided_times=plain(config.guided_times),
            init=plain(config.init),
            device=config.device,
            seed=config.seed,
            progress=config.progress,
            checkpoint=out / DEF_NET_CHECKPOINT,
            **settings_of(config.preset.def_net),
        )
        seconds = patient.seconds + time.perf_counter() - start
        for name in OF_ANOTHER_FIT:
            (out / name).unlink(missing_ok=True)
        wrote(model.save(out / "model.pt", overwrite=True), write_config(config, out / "train_def.yaml"))
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
        InputError: the command line asks for another reference than the Ref-Net's, or for another Ref-Net.
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
        refuse_changes("data", saved.data, merged.data, FREE_OF_REFERENCE)
        refuse_changes("preset.ref_net", settings_of(saved.preset.ref_net), settings_of(merged.preset.ref_net))
    return merged


def refuse_changes(
    section: str, saved: Mapping[str, Any], wanted: Mapping[str, Any], free: Sequence[str] = ()
) -> None:
    """Raises InputError where settings differ from those of the Ref-Net that is there, but for those in `free`."""
    changed = [name for name in {**saved, **wanted} if name not in free and saved.get(name) != wanted.get(name)]
    if changed:
        raise InputError(
            f"{section}: {', '.join(changed)} changed since ref_net.pt was fitted; leave that out, "
            "run train_ref.py anew with it and overwrite=true, or pass prior=false"
        )


if __name__ == "__main__":
    launch(main)

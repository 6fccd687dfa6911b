"""python scripts/monitor.py out=runs/p1 roi=gtv.nii.gz times='[5,21]'

Follow a region of interest of the reference over time, measured or not: volume, centroid, extent, motion of its
surface, density. Writes into the run directory, monitor/: <roi>.csv, its columns as in stnerp/monitor.py, and
<roi>.png, at these times, the measured ones and over the whole measured range. The log is monitor.log.
"""

from __future__ import annotations

from pathlib import Path

import hydra
import numpy as np
from data import load_data
from omegaconf import DictConfig, OmegaConf
from run_directory import CONFIGS, check_free, launch, logger, run_directory, value_of, wrote

from stnerp import InputError, Series, STNeRP
from stnerp.io.image import read_labels
from stnerp.report import monitor_curves, text_table, write_csv

NEEDS = {"model.pt": "run train_def.py with the same out= first"}
PRINTED = (
    "roi", "time", "measured", "volume_ml", "volume_change_percent", "shift_mm", "surface_p95_mm",
    "density_change_percent", "intensity_change",
)  # fmt: skip


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="monitor")
def main(config: DictConfig) -> None:
    with run_directory(config, "monitor", (), NEEDS) as out:
        for setting, kind in {"curve_points": int, "scans": bool}.items():
            value_of(config, setting, kind)
        path, folder = Path(str(config.roi)), out / "monitor"
        name = roi_name(path)
        check_free(folder, [f"{name}.*"], config.overwrite)
        roi = read_labels(path)
        model = STNeRP.load(out / "model.pt")
        times = list(model.times) if config.times is None else times_of(config)
        series = fitted_series(out, model) if config.scans else None
        wanted = [*times, *model.times, *evenly(model, config.curve_points)]
        rows = model.monitor(roi, wanted, series, name)
        wrote(
            write_csv(folder / f"{name}.csv", rows),
            monitor_curves(folder / f"{name}.png", rows, time_label(model)),
            out / "monitor.log",
        )
        printed = [column for column in PRINTED if any(row.get(column) is not None for row in rows)]
        logger.info("\n%s", text_table([row for row in rows if row["time"] in times], printed))


def roi_name(path: Path) -> str:
    """The file's name without its ending."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def times_of(config: DictConfig) -> list[float]:
    """`times` as numbers; one number is a list of one."""
    given = OmegaConf.to_container(config.times) if OmegaConf.is_list(config.times) else [config.times]
    assert isinstance(given, list)
    if not given or not all(isinstance(t, int | float) and np.isfinite(t) for t in given):
        raise InputError(f"times: {given} must be numbers, times='[5,21]' say")
    return list(dict.fromkeys(float(t) for t in given))


def evenly(model: STNeRP, count: int) -> list[float]:
    """Evenly spaced times over the measured range."""
    return np.linspace(*measured_range(model), count).tolist()


def measured_range(model: STNeRP) -> tuple[float, float]:
    """First and last measured time; of a periodic series, one whole cycle."""
    first = model.times[0]
    return first, model.times[-1] if model.period is None else first + model.period


def time_label(model: STNeRP) -> str:
    return f"time ({model.time_unit})" if model.time_unit else "time"


def fitted_series(out: Path, model: STNeRP) -> Series:
    """The scans that the model in a run directory was fitted to, as its saved config names them.

    Raises:
        InputError: no config, scans that can't be read any more, or others than the model's.
    """
    saved = next((path for path in (out / "train_def.yaml", out / "config.yaml") if path.is_file()), None)
    if saved is None:
        raise InputError(f"{out}: holds neither train_def.yaml nor config.yaml, which name the model's scans")
    series = load_data(OmegaConf.load(saved).data).series
    if set(model.times) <= set(series.times) and series.grid.is_close(model.grid):
        return series.subset(series.times.index(t) for t in model.times)
    raise InputError(f"{saved}: names other scans than those of model.pt; run train_def.py again")


if __name__ == "__main__":
    launch(main)

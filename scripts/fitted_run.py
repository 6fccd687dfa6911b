"""What scripts ask of a finished run, and of the command line about it: its model's times, its scans, a ROI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from configuration import DictConfig, OmegaConf
from data import load_data

from stnerp import InputError, Series, STNeRP

NEEDS = {"model.pt": "run train_def.py with the same out= first"}


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

"""python scripts/trust.py out=runs/p1

How far to trust a fit: "ok" or "look here", and why, for every scan and the middle of every gap. Writes into
the run directory, trust/: trust.csv, trust.png and maps (NIfTI) for each time: t5_uncertainty_mm, the distance of
other fits; t5_inverse_consistency_mm; and where there is a scan, t5_correlation (NaN where both are flat) and
t5_difference, between it and the moved reference. The log is trust.log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, hydra
from fitted_run import NEEDS, fitted_align, fitted_series, measured_range, times_of
from rois import read_rois, together
from run_directory import (
    CONFIGS,
    MADE,
    check_free,
    launch,
    logger,
    plain,
    run_directory,
    time_name,
    value_of,
    wrote,
)

from stnerp import InputError, Series, STNeRP
from stnerp.agreement import working_grid
from stnerp.geometry import Grid
from stnerp.io.image import write_image
from stnerp.monitor import label_points
from stnerp.preprocess import normalised
from stnerp.report import trust_overview, write_csv
from stnerp.trust import Limits, Verdict, inverse_consistency_mm, refits, uncertainty_mm, verdicts

MAPS = ("uncertainty_mm", "inverse_consistency_mm", "correlation", "difference")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="trust")
def main(config: DictConfig) -> None:
    with run_directory(config, "trust", (), NEEDS) as out:
        value_of(config, "refits", int)
        limits, folder = limits_of(config), out / MADE["trust"]
        model = STNeRP.load(out / "model.pt", config.device)
        roi = roi_of(config, model.grid)
        times = middle_and_measured(model) if config.times is None else times_of(config)
        check_free(folder, ["trust.*", *(f"t{time_name(t)}_*" for t in times)], config.overwrite)
        series = fitted_series(out, model)
        fits = []
        if config.refits:
            align = fitted_align(out) if config.align is None else config.align
            common = {"align": align, "device": config.device, "progress": config.progress}
            fits = refits(series, config.refits, seed=config.seed + 1, **common)
        found = verdicts(model, series, times, fits=fits, roi=roi, limits=limits)
        folder.mkdir(exist_ok=True)
        if config.overwrite:  # those of other times are of another fit, or of another command
            for old in (path for name in MAPS for path in folder.glob(f"t*_{name}.nii.gz")):
                old.unlink()
        columns = []
        for verdict in found:
            maps = maps_of(model, series, fits, verdict)
            for name, image in maps.items():
                path = folder / f"t{time_name(verdict.time)}_{name}.nii.gz"
                write_image(image, path, overwrite=config.overwrite)
                wrote(path)
            columns.append(column(model, verdict, maps, roi))
        wrote(
            write_csv(folder / "trust.csv", [verdict.row() for verdict in found]),
            trust_overview(folder / "trust.png", columns, limit_mm=limits.uncertainty_mm),
            out / "trust.log",
        )
        for verdict in found:
            row = verdict.row()
            reason = f": {row['reason']}" if row["reason"] else ""
            logger.info("t = %s: %s%s", time_name(verdict.time), row["verdict"], reason)


def roi_of(config: DictConfig, reference: Grid) -> sitk.Image | None:
    """Where to judge, if not everywhere."""
    if config.roi is None:
        return None
    return together(read_rois(Path(str(config.roi)), plain(config.rois), reference))


def limits_of(config: DictConfig) -> Limits:
    """The limits, some changed.

    Raises:
        InputError: one that doesn't exist, or isn't a number.
    """
    given = {} if config.limits is None else plain(config.limits)
    if not isinstance(given, dict):
        raise InputError(f"limits: {given!r} must say which, limits='{{uncertainty_mm: 2}}' say")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return Limits(**given)
    except TypeError:
        known = ", ".join(Limits.__dataclass_fields__)
        raise InputError(f"limits: {', '.join(map(str, given))} must be some of {known}") from None


def middle_and_measured(model: STNeRP) -> list[float]:
    """The measured times, and the middle of every gap."""
    ends = np.array([*model.times, measured_range(model)[1]])
    middles = (ends[1:] + ends[:-1]) / 2
    return sorted({*model.times, *middles.tolist()})


def maps_of(model: STNeRP, series: Series, fits: list[STNeRP], verdict: Verdict) -> dict[str, sitk.Image]:
    """Those `MAPS` that a time has, on coarse voxels over its scan, or over the scan that is nearest in time."""
    t = verdict.time
    nearest = min(range(len(series)), key=lambda i: abs(series.times[i] - t))
    maps = {"inverse_consistency_mm": inverse_consistency_mm(model, t)}
    if fits:
        grid = working_grid(Grid.of(series.images[nearest]))
        maps["uncertainty_mm"] = uncertainty_mm(model, fits, t, grid)
    if (found := verdict.agreement) is not None:
        comparable = np.where(found.structure, found.correlation, np.nan)
        maps["correlation"] = found.grid.image(comparable.astype(np.float32))
        maps["difference"] = found.grid.image(found.difference.astype(np.float32))
    return maps


def column(model: STNeRP, verdict: Verdict, maps: dict[str, sitk.Image], roi: sitk.Image | None) -> dict[str, Any]:
    """What `trust_overview` shows of one time: the model's image, and the maps."""
    centre_mm = model.grid.centre_mm if roi is None else label_points(roi).mean(0)
    grid = Grid.of(maps["uncertainty_mm"] if "uncertainty_mm" in maps else maps["inverse_consistency_mm"])
    image = model.image(verdict.time, grid.with_spacing(2.0))
    return {
        "title": f"t = {time_name(verdict.time)}{'' if verdict.measured else ', no scan'}",
        "ok": verdict.ok,
        "centre_mm": model.map_points(centre_mm[None], verdict.time, inverse=True)[0],
        "image": Grid.of(image).image(normalised(image, model.window)),
        "correlation": maps.get("correlation"),
        "uncertainty_mm": maps.get("uncertainty_mm"),
    }


if __name__ == "__main__":
    launch(main)

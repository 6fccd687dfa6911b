"""python scripts/monitor.py out=runs/p1 roi=gtv.nii.gz times='[5,21]'

Follow a region of interest of the reference over time, measured or not: volume, centroid, extent, motion of its
surface, density. Writes into the run directory, monitor/: <roi>.csv, its columns as in stnerp/monitor.py, and
<roi>.png, at these times, the measured ones and over the whole measured range. The log is monitor.log.
"""

from __future__ import annotations

import glob
from pathlib import Path

from configuration import DictConfig, hydra
from fitted_run import NEEDS, evenly, fitted_series, read_label_roi, roi_name, time_label, times_of
from run_directory import CONFIGS, check_free, launch, logger, run_directory, value_of, wrote

from stnerp import STNeRP
from stnerp.report import monitor_curves, text_table, write_csv

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
        check_free(folder, [f"{glob.escape(name)}.*"], config.overwrite)
        roi = read_label_roi(path)
        model = STNeRP.load(out / "model.pt", config.device)
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


if __name__ == "__main__":
    launch(main)

"""python scripts/monitor.py out=runs/p1 roi=gtv.nii.gz times='[5,21]'

Follow regions of interest of the reference over time, measured or not: volume, centroid, extent, motion of their
surface, density. Writes into the run directory, monitor/: <roi>.csv, its columns as in stnerp/monitor.py, and
<roi>.png, at these times, the measured ones and over the whole measured range. Further times join those that are
there. The log is monitor.log.
"""

from __future__ import annotations

from pathlib import Path

from configuration import DictConfig, hydra
from fitted_run import NEEDS, evenly, fitted_series, roi_name, time_label, times_of
from roi_table import check_same, joined, rows_before
from rois import read_rois
from run_directory import CONFIGS, MADE, launch, logger, plain, run_directory, value_of, wrote

from stnerp import STNeRP
from stnerp.report import monitor_curves, text_table, write_csv

PRINTED = (
    "roi", "time", "measured", "volume_ml", "volume_change_percent", "shift_mm", "surface_p95_mm",
    "density_change_percent", "intensity_change", "covered_percent",
)  # fmt: skip


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="monitor")
def main(config: DictConfig) -> None:
    with run_directory(config, "monitor", (), NEEDS) as out:
        for setting, kind in {"curve_points": int, "scans": bool, "names": bool}.items():
            value_of(config, setting, kind)
        path, folder = Path(str(config.roi)), out / MADE["monitor"]
        table, picture = (folder / f"{roi_name(path)}.{ending}" for ending in ("csv", "png"))
        before = [] if config.overwrite else rows_before(table)
        model = STNeRP.load(out / "model.pt", config.device)
        rois = read_rois(path, plain(config.rois), model.grid, config.names)
        times = list(model.times) if config.times is None else times_of(config)
        series = fitted_series(out, model) if config.scans else None
        wanted = joined([*times, *model.times, *evenly(model, config.curve_points)], before)
        rows = [row for name, roi in rois.items() for row in model.monitor(roi, wanted, series, name)]
        check_same(before, rows, table)
        wrote(write_csv(table, rows), monitor_curves(picture, rows, time_label(model)), out / "monitor.log")
        printed = [column for column in PRINTED if any(row.get(column) is not None for row in rows)]
        logger.info("\n%s", text_table([row for row in rows if row["time"] in times], printed))


if __name__ == "__main__":
    launch(main)

"""python scripts/propagate_points.py out=runs/p1 points=fiducials.fcsv times='[5,21]'

Carry points of the reference, or with from_time= of another time, to other times, measured or not. Writes into the
run directory, points/: <points>_t5.csv for each time, x_mm,y_mm,z_mm (LPS) in the order of the file. The log says
how far they move, and is propagate_points.log.
"""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
from configuration import DictConfig, hydra
from fitted_run import NEEDS, roi_name, times_of
from run_directory import CONFIGS, MADE, check_free, launch, logger, run_directory, time_name, wrote

from stnerp import InputError, STNeRP
from stnerp.io.landmarks import read_landmarks, write_landmarks


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="propagate_points")
def main(config: DictConfig) -> None:
    with run_directory(config, "propagate_points", (), NEEDS) as out:
        times, marked = times_of(config), config.from_time
        if not (marked is None or (isinstance(marked, int | float) and np.isfinite(marked))):
            raise InputError(f"from_time: {marked!r} must be a number, or null for the reference")
        path, folder = Path(str(config.points)), out / MADE["propagate_points"]
        files = {t: folder / f"{roi_name(path)}_t{time_name(t)}.csv" for t in times}
        check_free(folder, [glob.escape(file.name) for file in files.values()], config.overwrite)
        model = STNeRP.load(out / "model.pt", config.device)
        points_mm = read_landmarks(path, model.grid)
        reference_mm = points_mm if marked is None else model.map_points(points_mm, marked)
        outside = np.count_nonzero(~model.grid.contains(reference_mm))
        if outside:
            logger.warning("%s: %d of %d points lie outside the reference", path, outside, len(points_mm))
        folder.mkdir(exist_ok=True)
        for t, file in files.items():
            there_mm = model.map_points(reference_mm, t, inverse=True)
            write_landmarks(there_mm, file, overwrite=config.overwrite)
            wrote(file)
            moved_mm = np.linalg.norm(there_mm - points_mm, axis=1)
            told = time_name(t), len(moved_mm), moved_mm.mean(), moved_mm.max()
            logger.info("t = %s: %d points moved by %.1f mm on average, %.1f at most", *told)
        wrote(out / "propagate_points.log")


if __name__ == "__main__":
    launch(main)

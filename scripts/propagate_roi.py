"""python scripts/propagate_roi.py out=runs/p1 roi=gtv.nii.gz times='[5,21]'

Carry contours of the reference to other times (Eq. 7, 8), measured or not. Writes into the run directory,
roi/: <roi>_t5.nii.gz and a picture for each time, the volume and centroid at these times and over the whole
measured range (<roi>_curve.csv, <roi>_curve.png; monitor.py draws more of what it says), to which further times
join. The log is propagate_roi.log.
"""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, hydra
from fitted_run import NEEDS, evenly, measured_range, read_label_roi, roi_name, time_label, times_of
from roi_table import check_same, joined, rows_before
from run_directory import CONFIGS, MADE, check_free, launch, logger, run_directory, time_name, value_of, wrote

from stnerp import STNeRP
from stnerp.geometry import Grid
from stnerp.io.image import write_image
from stnerp.monitor import around, check_roi, label_points
from stnerp.preprocess import normalised
from stnerp.report import overview, roi_curves, text_table, write_csv

PRINTED = ("roi", "time", "measured", "volume_ml", "centroid_x_mm", "centroid_y_mm", "centroid_z_mm")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="propagate_roi")
def main(config: DictConfig) -> None:
    with run_directory(config, "propagate_roi", (), NEEDS) as out:
        value_of(config, "curve_points", int)
        times = times_of(config)
        path, folder = Path(str(config.roi)), out / MADE["propagate_roi"]
        name = roi_name(path)
        check_free(folder, [f"{glob.escape(name)}_t{time_name(t)}.*" for t in times], config.overwrite)
        table, curves = (folder / f"{name}_curve.{ending}" for ending in ("csv", "png"))
        before = [] if config.overwrite else rows_before(table)
        roi = read_label_roi(path)
        model = STNeRP.load(out / "model.pt", config.device)
        check_roi(roi, model.grid, str(path))
        low, high = measured_range(model)
        wanted = joined([*times, *model.times, *evenly(model, config.curve_points)], before)
        rows = model.monitor(roi, wanted, name=name)
        check_same(before, rows, table)
        folder.mkdir(exist_ok=True)
        reference = normalised(model.image(model.reference_time), model.window)
        for t in times:
            stem = f"{name}_t{time_name(t)}"
            carried, picture = folder / f"{stem}.nii.gz", folder / f"{stem}.png"
            write_image(model.propagate(roi, t, whole_grid(model, roi, t)), carried, overwrite=config.overwrite)
            wrote(carried, draw(picture, model, roi, t, name, reference))
        inside = [row for row in rows if low <= row["time"] <= high or model.period is None]
        wrote(write_csv(table, rows), roi_curves(curves, inside, time_label(model)), out / "propagate_roi.log")
        logger.info("\n%s", text_table([row for row in rows if row["time"] in times], PRINTED))


def whole_grid(model: STNeRP, roi: sitk.Image, t: float) -> Grid:
    """The ROI's own grid, unless the ROI at time t leaves it (scans far apart): then one continued to hold it."""
    own, carried = Grid.of(roi), model.map_points(label_points(roi), t, inverse=True)
    if own.contains(carried).all():
        return own
    logger.warning("t = %g: the ROI lies partly outside its own grid there; its file has a larger one", t)
    corners = own.index_to_world(np.array([[0.0, 0.0, 0.0], np.asarray(own.size) - 1.0]))
    return around(np.concatenate([carried, corners]), own)


def draw(path: Path, model: STNeRP, roi: sitk.Image, t: float, name: str, reference: np.ndarray) -> Path:
    """The image at time t with the ROI carried there."""
    carried = sitk.GetArrayFromImage(model.propagate(roi, t, model.grid))
    return overview(
        path,
        reference=reference,
        target=None,
        prediction=normalised(model.image(t), model.window),
        displacement_mm=sitk.GetArrayFromImage(model.displacement(t)),
        grid=model.grid,
        contours={name: (None, carried)},
        title=f"{name}, t = {time_name(t)}",
    )


if __name__ == "__main__":
    launch(main)

"""python scripts/propagate_roi.py out=runs/p1 roi=gtv.nii.gz times='[5,21]'

Carry contours of the reference to other times (Eq. 7, 8), measured or not. Writes into the run directory,
roi/: <roi>_t5.nii.gz and a picture for each time, the volume and centroid at these times and over the whole
measured range (<roi>_curve.csv, <roi>_curve.png). The log is propagate_roi.log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import SimpleITK as sitk
from omegaconf import DictConfig, OmegaConf
from run_directory import CONFIGS, check_free, launch, logger, run_directory, time_name, value_of, wrote

from stnerp import InputError, STNeRP
from stnerp.geometry import Grid
from stnerp.io.image import read_labels, write_image
from stnerp.metrics import roi_measures
from stnerp.preprocess import normalised
from stnerp.report import overview, roi_curves, text_table, write_csv

NEEDS = {"model.pt": "run train_def.py with the same out= first"}
MARGIN_MM = 10.0  # around a carried ROI, when it is cut out to be measured


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="propagate_roi")
def main(config: DictConfig) -> None:
    with run_directory(config, "propagate_roi", (), NEEDS) as out:
        value_of(config, "curve_points", int)
        times = times_of(config)
        path = Path(str(config.roi))
        name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
        folder = out / "roi"
        check_free(folder, [f"{name}_curve.*", *(f"{name}_t{time_name(t)}.*" for t in times)], config.overwrite)
        roi = read_labels(path)
        model = STNeRP.load(out / "model.pt")
        check_inside(roi, model.grid, str(path))
        low, high = measured_range(model)
        folder.mkdir(exist_ok=True)
        reference = normalised(model.image(model.reference_time), model.window)
        for t in times:
            stem = f"{name}_t{time_name(t)}"
            carried, picture = folder / f"{stem}.nii.gz", folder / f"{stem}.png"
            write_image(model.propagate(roi, t, whole_grid(model, roi, t)), carried, overwrite=config.overwrite)
            wrote(carried, draw(picture, model, roi, t, name, reference))
        rows = curve(model, roi, name, times, config.curve_points)
        inside = [row for row in rows if low <= row["time"] <= high or model.period is None]
        unit = f" ({model.time_unit})" if model.time_unit else ""
        wrote(
            write_csv(folder / f"{name}_curve.csv", rows),
            roi_curves(folder / f"{name}_curve.png", inside, f"time{unit}"),
            out / "propagate_roi.log",
        )
        logger.info("\n%s", text_table([row for row in rows if row["time"] in times]))


def times_of(config: DictConfig) -> list[float]:
    """`times` as numbers; one number is a list of one."""
    given = OmegaConf.to_container(config.times) if OmegaConf.is_list(config.times) else [config.times]
    assert isinstance(given, list)
    if not given or not all(isinstance(t, int | float) and np.isfinite(t) for t in given):
        raise InputError(f"times: {given} must be numbers, times='[5,21]' say")
    return list(dict.fromkeys(float(t) for t in given))


def check_inside(roi: sitk.Image, grid: Grid, name: str) -> None:
    """Refuse a ROI that is empty or outside the reference image; warn of one that is partly outside."""
    inside = grid.contains(label_points(roi))
    if inside.size == 0:
        raise InputError(f"{name}: is empty; draw the ROI, or export it again")
    if not inside.any():
        raise InputError(
            f"{name}: lies outside the reference image altogether; is it drawn on the reference, of this patient?"
        )
    if not inside.all():
        logger.warning("%s: %.1f %% of it lies outside the reference image", name, 100 * (1 - inside.mean()))


def label_points(roi: sitk.Image) -> np.ndarray:
    """Centres of the voxels with a label, (N, 3), LPS mm."""
    index = np.argwhere(sitk.GetArrayViewFromImage(roi))[:, ::-1].astype(float)
    return Grid.of(roi).index_to_world(index)


def curve(
    model: STNeRP, roi: sitk.Image, name: str, times: list[float], curve_points: int
) -> list[dict[str, Any]]:
    """Volume and centroid of each label at the wanted, the measured and evenly spaced times."""
    dense = np.linspace(*measured_range(model), curve_points).tolist()
    labels = [int(label) for label in np.unique(sitk.GetArrayViewFromImage(roi)) if label != 0]
    points = label_points(roi)
    rows = []
    for t in sorted({*times, *model.times, *dense}):
        carried = model.propagate(roi, t, around(model.map_points(points, t, inverse=True), Grid.of(roi)))
        for label in labels:
            title = name if len(labels) == 1 else f"{name} label {label}"
            measured = t in model.times
            rows.append({"roi": title, "time": t, "measured": measured, **roi_measures(carried, label)})
    return rows


def measured_range(model: STNeRP) -> tuple[float, float]:
    """First and last measured time; of a periodic series, one whole cycle."""
    first = model.times[0]
    return first, model.times[-1] if model.period is None else first + model.period


def whole_grid(model: STNeRP, roi: sitk.Image, t: float) -> Grid:
    """The ROI's own grid, unless the ROI at time t leaves it (scans far apart): then one continued to hold it."""
    own, carried = Grid.of(roi), model.map_points(label_points(roi), t, inverse=True)
    if own.contains(carried).all():
        return own
    logger.warning("t = %g: the ROI lies partly outside its own grid there; its file has a larger one", t)
    corners = own.index_to_world(np.array([[0.0, 0.0, 0.0], np.asarray(own.size) - 1.0]))
    return around(np.concatenate([carried, corners]), own)


def around(points_mm: np.ndarray, grid: Grid) -> Grid:
    """Voxels of a grid, continued past its edges, that hold these points and a margin: no more is computed."""
    index = grid.world_to_index(points_mm)
    margin = MARGIN_MM / np.asarray(grid.spacing_mm)
    start = np.floor(index.min(0) - margin).astype(int)
    end = np.ceil(index.max(0) + margin).astype(int)
    x, y, z = (int(n) for n in end - start + 1)
    ox, oy, oz = (float(value) for value in grid.index_to_world(start.astype(float)))
    return Grid((x, y, z), grid.spacing_mm, (ox, oy, oz), grid.direction)


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
        title=f"{name}, t = {t:g}",
    )


if __name__ == "__main__":
    launch(main)

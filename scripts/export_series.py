"""python scripts/export_series.py out=runs/p1 frames=20 roi=gtv.nii.gz

The images at any times, measured or not, as files that other programs show. Writes into the run directory,
series/: series.nii.gz, a 4D NIfTI (with series.json where the times aren't evenly spaced); film.gif and film.mp4,
a slice that moves, with the ROI's contours; roi.nii.gz, its labels in 4D, where labels were given. The log is
export_series.log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, hydra
from fitted_run import NEEDS, measured_range, times_of
from rois import read_structures
from run_directory import CONFIGS, MADE, check_free, launch, logger, plain, run_directory, value_of, wrote

from stnerp import InputError, MissingDependencyError, STNeRP
from stnerp.contours import Solid
from stnerp.film import COLOURS, Rgb, frame, plane_grid, write_gif, write_mp4
from stnerp.geometry import Grid
from stnerp.io.image import read_image, read_labels
from stnerp.io.nifti_4d import VoxelType, write_nifti_4d
from stnerp.io.rtstruct import Roi
from stnerp.monitor import check_roi
from stnerp.window import Window

LEAST_HU = 100  # a window narrower than that isn't of HU, which whole numbers keep
WRITES = ("series.*", "roi.*", "film.*")
MASKS = Callable[[float, Grid], list[np.ndarray]]


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="export_series")
def main(config: DictConfig) -> None:
    with run_directory(config, "export_series", (), NEEDS) as out:
        for setting in ("frames", "pixels"):
            if value_of(config, setting, int) < 1:  # type: ignore[operator]
                raise InputError(f"{setting}: {config[setting]} must be a number above 0")
        folder = out / MADE["export_series"]
        check_free(folder, WRITES, config.overwrite)
        model = STNeRP.load(out / "model.pt", config.device)
        times = evenly(model, config.frames) if config.times is None else sorted(times_of(config))
        grid, dtype = grid_of(model, config.grid), voxel_type(model, config.dtype)
        labels, rois = roi_of(config, model.grid)
        label_dtype = None if labels is None else label_type(labels, str(config.roi))
        folder.mkdir(exist_ok=True)
        for old in (path for pattern in WRITES for path in folder.glob(pattern)):
            old.unlink()  # a ROI of other times, say
        film(config, model, times, labels, rois, folder)  # first: it takes seconds, and finds mistakes
        common = {"time_unit": model.time_unit, "overwrite": config.overwrite}
        images = (model.image(t, grid, appearance=config.appearance) for t in times)
        write_nifti_4d(images, times, folder / "series.nii.gz", dtype=dtype, **common)
        wrote(folder / "series.nii.gz", *beside(folder / "series.json"))
        if labels is not None and label_dtype is not None:
            carried = (model.propagate(labels, t, grid) for t in times)
            write_nifti_4d(carried, times, folder / "roi.nii.gz", dtype=label_dtype, **common)
            wrote(folder / "roi.nii.gz", *beside(folder / "roi.json"))
        wrote(out / "export_series.log")


def evenly(model: STNeRP, count: int) -> list[float]:
    """Evenly spaced times over the measured range; of a cycle without its end, which is its start."""
    low, high = measured_range(model)
    return np.linspace(low, high, count, endpoint=model.period is None).tolist()


def grid_of(model: STNeRP, given: object) -> Grid:
    if given is None:
        return model.grid
    if isinstance(given, int | float) and not isinstance(given, bool):
        if not 0 < given < np.inf:
            raise InputError(f"grid: {given} mm must be a spacing above 0, or an image's file")
        return model.grid.with_spacing(float(given))
    return Grid.of(read_image(str(given)))


def voxel_type(model: STNeRP, given: str) -> VoxelType:
    """What holds the model's intensities: whole numbers where they are HU, which alone go below 0."""
    if given not in ("auto", "int16", "float32"):
        raise InputError(f"dtype: {given!r} must be auto, int16 or float32")
    if given == "auto":
        window = model.window
        hounsfield = window.low < 0 and window.name != "percentile" and window.high - window.low >= LEAST_HU
        return "int16" if hounsfield else "float32"
    return given  # type: ignore[return-value]


def roi_of(config: DictConfig, reference: Grid) -> tuple[sitk.Image | None, list[Roi]]:
    """Labels, or the ROIs of a structure set, or neither."""
    if config.roi is None:
        return None, []
    path = Path(str(config.roi))
    rois = read_structures(path, plain(config.rois), reference)
    if rois is not None:
        return None, rois
    labels = read_labels(path)
    check_roi(labels, reference, str(path))
    return labels, []


def label_type(labels: sitk.Image, name: str) -> VoxelType:
    """The smaller of two types that holds all labels."""
    values = sitk.GetArrayViewFromImage(labels)
    low, high = int(values.min()), int(values.max())
    types: tuple[VoxelType, ...] = ("uint16", "int32")
    for dtype in types:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise InputError(f"{name}: labels from {low} to {high} don't fit into 32 bits; number them anew")


def beside(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def film(
    config: DictConfig,
    model: STNeRP,
    times: list[float],
    labels: sitk.Image | None,
    rois: list[Roi],
    folder: Path,
) -> None:
    """The slice at all times, as GIF and, where imageio-ffmpeg is there, as MP4."""
    masks, middle_mm, colours = carried_masks(model, labels, rois)
    through = middle_mm if config.through_mm is None else point_of(plain(config.through_mm))
    plane = plane_grid(model.grid, config.plane, through, config.pixels)
    window = model.window if config.window is None else Window.of(plain(config.window))
    unit = f" {model.time_unit}" if model.time_unit else ""

    def frames() -> Iterator[np.ndarray]:
        for t in times:
            image = model.image(t, plane, outside=model.window.low, appearance=config.appearance)
            values = sitk.GetArrayFromImage(image)[0]
            yield frame(values, window, masks(t, plane), colours, f"t = {t:.4g}{unit}", config.plane)

    drawn = list(frames())
    write_gif(drawn, folder / "film.gif", config.frames_per_second, colours, overwrite=config.overwrite)
    wrote(folder / "film.gif")
    try:
        write_mp4(drawn, folder / "film.mp4", config.frames_per_second, overwrite=config.overwrite)
    except MissingDependencyError as error:
        logger.warning("film.mp4 left out: %s", error)
    else:
        wrote(folder / "film.mp4")


def carried_masks(
    model: STNeRP, labels: sitk.Image | None, rois: list[Roi]
) -> tuple[MASKS, np.ndarray, tuple[Rgb, ...]]:
    """What gives the masks (rows, columns) of all ROIs at a time, the ROIs' middle in LPS mm, their colours."""
    if labels is not None:
        array = sitk.GetArrayViewFromImage(labels)
        known = [int(label) for label in np.unique(array) if label != 0]
        middle_mm = Grid.of(labels).index_to_world(np.argwhere(array)[:, ::-1].mean(0))

        def of_labels(t: float, plane: Grid) -> list[np.ndarray]:
            carried = sitk.GetArrayFromImage(model.propagate(labels, t, plane))[0]
            return [carried == label for label in known]

        return of_labels, middle_mm, COLOURS
    if not rois:
        return (lambda t, plane: []), model.grid.centre_mm, COLOURS
    solids = [Solid.of(roi.contours, roi.thickness_mm) for roi in rois]

    def of_solids(t: float, plane: Grid) -> list[np.ndarray]:
        reference_mm = model.map_points(plane.points_world(), t)
        return [solid.distance_mm(reference_mm)[0] > 0 for solid in solids]

    middle_mm = np.concatenate([points for roi in rois for points in roi.contours]).mean(0)
    return of_solids, middle_mm, tuple(roi.color or COLOURS[i % len(COLOURS)] for i, roi in enumerate(rois))


def point_of(given: object) -> np.ndarray:
    try:
        point = np.array(given, float)
    except (TypeError, ValueError):
        point = np.zeros(0)
    if point.shape != (3,) or not np.isfinite(point).all():
        raise InputError(f"through_mm: {given} must be three numbers, x y z in LPS mm")
    return point


if __name__ == "__main__":
    launch(main)

"""python scripts/export_transforms.py out=runs/p1 times='[5,21]'

The deformation at any time in files that other tools apply (docs/transforms.md). Writes into the run directory,
transforms/, for each time t: the fields t5_target_to_reference.nii.gz and t5_reference_to_target.nii.gz, a .txt
beside each for elastix' transformix, the ITK transform t5_target_to_reference.h5, and t5_velocity.nii.gz. Tells
what each is for, and how far a field is from the model between its voxels. The log is export_transforms.log.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, hydra
from fitted_run import NEEDS, times_of
from run_directory import CONFIGS, MADE, check_free, launch, logger, run_directory, time_name, wrote

from stnerp import InputError, STNeRP
from stnerp.baselines.pair import PairRegistration
from stnerp.geometry import Grid
from stnerp.io.image import read_image
from stnerp.io.transforms import FIELDS, write_transform, write_transformix, write_velocity

POINTS = 10_000  # at which a field is compared with the model
LEAST_SHARE = 0.95  # of what the reference shows, inside its own grid at another time
SHARE_MM = 10.0  # between the points of which that share is counted


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="export_transforms")
def main(config: DictConfig) -> None:
    with run_directory(config, "export_transforms", (), NEEDS) as out:
        times, folder = times_of(config), out / MADE["export_transforms"]
        if config.suffix not in FIELDS:
            raise InputError(f"suffix: {config.suffix!r} must be one of {', '.join(FIELDS)}")
        check_free(folder, [f"t{time_name(t)}_*" for t in times], config.overwrite)
        grid, inverse_grid = (grid_of(config[name]) for name in ("grid", "inverse_grid"))
        model = STNeRP.load(out / "model.pt", config.device)
        folder.mkdir(exist_ok=True)
        for t in times:
            stem = folder / f"t{time_name(t)}"
            if grid is None:
                check_share(model, t)
            export_fields(model, t, stem, config.suffix, grid, inverse=False, overwrite=config.overwrite)
            export_composite(model, t, stem, grid, config.overwrite)
            export_fields(model, t, stem, config.suffix, inverse_grid, inverse=True, overwrite=config.overwrite)
            export_velocity(model, t, stem, config.suffix, config.overwrite)
        wrote(out / "export_transforms.log")


def grid_of(path: str | None) -> Grid | None:
    return None if path is None else Grid.of(read_image(path))


def export_fields(
    model: STNeRP, t: float, stem: Path, suffix: str, grid: Grid | None, inverse: bool, overwrite: bool
) -> None:
    """One direction as a field, and its parameters for transformix."""
    path = f"{stem}_{'reference_to_target' if inverse else 'target_to_reference'}"
    images = ["reference.nii.gz", f"at_{stem.name}.nii.gz"]
    moving, fixed = reversed(images) if inverse else images
    field = write_transform(model, t, path + suffix, grid, inverse=inverse, overwrite=overwrite)
    parameters = write_transformix(field, path + ".txt", outside=model.window.low, overwrite=overwrite)
    apart_mm = between_voxels_mm(model, t, field, inverse)
    wrote(field)
    logger.info("  %s", use_of(t, inverse))
    logger.info("  antsApplyTransforms -d 3 -i %s -r %s -o drawn.nii.gz -t %s", moving, fixed, field)
    logger.info(
        "  exact at its voxels; between them %.4f mm from the model on average, %.4f in 1 %%, %.4f at most",
        *(apart_mm.mean(), np.percentile(apart_mm, 99), apart_mm.max()),
    )
    wrote(parameters)
    logger.info("  the same, for elastix: transformix -in %s -out folder -tp %s", moving, parameters)


def export_composite(model: STNeRP, t: float, stem: Path, grid: Grid | None, overwrite: bool) -> None:
    path = write_transform(model, t, f"{stem}_target_to_reference.h5", grid, overwrite=overwrite)
    wrote(path)
    logger.info("  %s", use_of(t, inverse=False))
    logger.info(
        '  exact everywhere: sitk.Resample(reference, target, sitk.ReadTransform("%s"), sitk.sitkLinear, %g)',
        *(path, model.window.low),
    )
    logger.info("  3D Slicer: drag it in as a transform; the reference and its contours below it are those of t")


def export_velocity(model: STNeRP, t: float, stem: Path, suffix: str, overwrite: bool) -> None:
    wrote(write_velocity(model, t, f"{stem}_velocity{suffix}", overwrite=overwrite))
    logger.info("  target -> reference, after pre-alignment: %d squarings", model.settings.squarings)


def use_of(t: float, inverse: bool) -> str:
    if inverse:
        return f"reference -> target: draws the image of t = {t:g} as the reference; takes reference points to t"
    return f"target -> reference: draws the reference at t = {t:g}; takes points of t to the reference"


def between_voxels_mm(model: STNeRP, t: float, field: Path, inverse: bool) -> np.ndarray:
    """How far what a file says, read linearly, is from the model, at random points (N,)."""
    found = PairRegistration(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    cube = np.random.default_rng(0).uniform(-1, 1, (POINTS, 3))
    points_mm = Grid.of(found.displacement).cube_to_world(cube)
    return np.linalg.norm(found.map_points(points_mm) - model.map_points(points_mm, t, inverse), axis=1)


def check_share(model: STNeRP, t: float) -> None:
    """Warn where much of the anatomy, at time t, has left the reference's grid (scans far apart)."""
    points_mm = model.grid.with_spacing(SHARE_MM).points_world().reshape(-1, 3)
    share = float(model.grid.contains(model.map_points(points_mm, t, inverse=True)).mean())
    if share < LEAST_SHARE:
        logger.warning(
            "t = %g: only %.0f %% of what the reference shows lies in its own grid then; outside a field, tools "
            "move nothing; give an image of that time, grid=...",
            *(t, 100 * share),
        )


if __name__ == "__main__":
    launch(main)

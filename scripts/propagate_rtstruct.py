"""python scripts/propagate_rtstruct.py out=runs/p1 rtstruct=plan.dcm target=ct_day21 t=21

Carry the contours of a DICOM RT structure set, drawn on the reference scan, to the scan at time t. Writes into
the run directory, rtstruct/: t21.dcm, a structure set of the target's series, in its slices and of its patient,
unapproved; t21.csv, volumes and shifts; t21.png, the contours on the target. The log is propagate_rtstruct.log.
A target that the fit hasn't seen, in a frame of reference of its own, is refused unless target_placed=true.
Neither the log, the table nor the picture says who the patient is or, unless names=true, what the ROIs are called.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, hydra
from fitted_run import NEEDS, FittedScan, fitted_scans
from PIL import Image
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

from stnerp import InputError, STNeRP
from stnerp.contours import contour_mask, contour_volume
from stnerp.film import COLOURS, Plane, frame, plane_grid
from stnerp.geometry import Grid
from stnerp.io.dicom import DicomSeries, dicom_series, read_dicom_series, series_grid
from stnerp.io.rtstruct import Roi, StructureSet, carried_rois, plain_name, read_rtstruct, shown, write_structures
from stnerp.report import text_table, write_csv
from stnerp.time_basis import index_at

# Interpreted types of what doesn't move with the patient: DICOM PS3.3 C.8.8.8.1.
NOT_ANATOMY = {"SUPPORT", "FIXATION", "ISOCENTER", "REGISTRATION", "DOSE_MEASUREMENT", "BRACHY_ACCESSORY", "BOLUS"}


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="propagate_rtstruct")
def main(config: DictConfig) -> None:
    with run_directory(config, "propagate_rtstruct", (), NEEDS) as out:
        for setting in ("names", "same_patient", "target_placed"):
            value_of(config, setting, bool)
        t = time_of(config)
        folder, stem = out / MADE["propagate_rtstruct"], f"t{time_name(t)}"
        check_free(folder, [f"{glob.escape(stem)}.*"], config.overwrite)
        structures, target = read_rtstruct(str(config.rtstruct)), one_series(str(config.target), "target")
        if config.same_patient and structures.patient_id != target.patient_id:
            raise InputError(
                "target: has another patient's ID than the structure set; if they are the same person, "
                "pass same_patient=false"
            )
        rois = wanted_rois(structures, plain(config.rois))
        model = STNeRP.load(out / "model.pt", config.device)
        check_places(config, out, model, structures, rois, target)
        check_inside(rois, model.grid, structures.path)
        grid = series_grid(target)

        def to_target(points_mm: np.ndarray) -> np.ndarray:
            return model.map_points(points_mm, t, inverse=True)

        carried = carried_rois(rois, grid, lambda points_mm: model.map_points(points_mm, t), to_target)
        if not any(roi.contours or len(roi.points) for roi in carried):
            raise InputError(f"target: no ROI reaches the scan in {target.folder}; is it the one at t = {t:g}?")
        folder.mkdir(exist_ok=True)
        write_structures(
            carried,
            target,
            folder / f"{stem}.dcm",
            title=f"stnerp t={t:g}"[:16],
            description=f"stnerp, computed, t = {t:g}",
            source_uid=structures.uid,
            overwrite=config.overwrite,
        )
        rows = measures(rois, carried, grid, outside_percents(rois, grid, to_target), config.names)
        wrote(
            folder / f"{stem}.dcm",
            write_csv(folder / f"{stem}.csv", rows),
            draw(folder / f"{stem}.png", read_dicom_series(target), carried, model),
            out / "propagate_rtstruct.log",
        )
        logger.info("\n%s", text_table(rows))


def time_of(config: DictConfig) -> float:
    if type(config.t) not in (int, float) or not np.isfinite(config.t):
        raise InputError(f"t: {config.t!r} must be one number, the time of the target scan: t=21 say")
    return float(config.t)


def one_series(folder: str, name: str) -> DicomSeries:
    """The only series in a folder."""
    found = dicom_series(folder)
    if len(found) > 1:
        raise InputError(f"{name}: {folder} holds {len(found)} DICOM series; give a folder with one")
    return found[0]


def check_places(
    config: DictConfig,
    out: Path,
    model: STNeRP,
    structures: StructureSet,
    rois: Sequence[Roi],
    target: DicomSeries,
) -> None:
    """Refuse a target or contours that don't lie where the model has the patient; one warning of what nobody can
    check.

    Raises:
        InputError: as `check_target`, `check_frame`.
    """
    t, unchecked = time_of(config), []
    try:
        scans, reason = fitted_scans(out, model), ""
    except InputError as error:
        scans, reason = [], str(error)
    if not config.target_placed:
        if scans:
            check_target(target, t, scans, model.period)
        else:
            unchecked.append(f"whether the patient lies in {target.folder} where the model says")
    drawn_on = next((scan.series for scan in scans if scan.time == model.reference_time), None)
    if config.reference is not None:
        check_reference(structures, rois, one_series(str(config.reference), "reference"))
    elif drawn_on is not None and structures.frame_uid:
        check_reference(structures, rois, drawn_on)
    elif drawn_on is None or drawn_on.series_uid not in structures.series_uids:
        check_frame(rois, rois[0].frame_uid, structures.path, f"ROI {rois[0].number}")
        reason = reason or f"{structures.path} names no frame of reference"
        unchecked.append(f"whether {structures.path} was drawn on the reference")
    if unchecked:
        logger.warning("can't check %s (%s): look at the picture", ", nor ".join(unchecked), reason)


def check_target(target: DicomSeries, t: float, scans: Sequence[FittedScan], period: float | None) -> None:
    """Refuse a target of which it isn't known where the patient lies in it at time t.

    Raises:
        InputError: a scan of the fit's at another time; one that the fit hasn't seen, in none of its frames of
            reference.
    """
    same = [scan for scan in scans if scan.series.series_uid == target.series_uid]
    # Phases may share a series, but no slices.
    same = [scan for scan in same if set(scan.series.image_uids) & set(target.image_uids)] or same
    if same and not is_time_of(t, same, period):
        times = " or ".join(f"{scan.time:.15g}" for scan in same)
        raise InputError(
            f"t: {target.folder} is the fit's scan at t = {times}, not {t:g}; give t={times}, or pass "
            "target_placed=true to draw contours of another time in it"
        )
    framed = [scan for scan in scans if target.frame_uid and scan.series.frame_uid == target.frame_uid]
    if not same and not framed:
        raise InputError(
            f"target: the fit hasn't seen the scan in {target.folder}, and where the patient lay in it isn't "
            "known; fit with it (train_def.py with it among data.images), or pass target_placed=true if its frame "
            "of reference is known to be the model's"
        )
    if not same and len(framed) < len(scans) and not is_time_of(t, framed, period):
        logger.warning(
            "target: is in the frame of reference of the scan at t = %s; whether the patient lies at t = %g as in "
            "that one isn't known: look at the picture",
            *(" or ".join(f"{scan.time:g}" for scan in framed), t),
        )


def is_time_of(t: float, scans: Sequence[FittedScan], period: float | None) -> bool:
    """Whether t is the time of one of the scans, but for rounding as people do and for whole periods."""
    return index_at([scan.time for scan in scans], t, period, within=1e-5 * max(1.0, abs(t))) is not None


def check_frame(rois: Sequence[Roi], frame_uid: str, path: str, whose: str) -> None:
    others = ", ".join(str(roi.number) for roi in rois if roi.frame_uid != frame_uid)
    if others:
        raise InputError(
            f"{path}: ROI {others}: in another frame of reference than {whose}; give the structure set that was "
            "drawn on the reference, or choose ROIs that were with rois="
        )


def check_reference(structures: StructureSet, rois: Sequence[Roi], reference: DicomSeries) -> None:
    """Refuse contours of another frame of reference; warn of those that were drawn on another series of it."""
    check_frame(rois, reference.frame_uid, structures.path, reference.folder)
    if reference.series_uid not in structures.series_uids:
        logger.warning(
            "%s: was drawn on another series than %s, in the same frame", structures.path, reference.folder
        )


def wanted_rois(structures: StructureSet, wanted: list[int | str] | int | str | None) -> list[Roi]:
    """Those asked for by number or name; else all that are drawn and move with the patient."""
    drawn = [roi for roi in structures.rois if roi.contours or len(roi.points)]
    if wanted is None:
        for roi in drawn:
            if roi.interpreted_type in NOT_ANATOMY:
                logger.warning("ROI %d: is %s, left out; rois= takes it along", roi.number, roi.interpreted_type)
        chosen = [roi for roi in drawn if roi.interpreted_type not in NOT_ANATOMY]
    else:
        asked = wanted if isinstance(wanted, list) else [wanted]
        chosen = [roi for one in asked for roi in drawn if one == roi.number or _named(one, roi)]
        missing = [one for one in asked if not any(one == roi.number or _named(one, roi) for roi in chosen)]
        if missing:
            numbers = ", ".join(str(roi.number) for roi in drawn)
            raise InputError(f"rois: {missing} aren't drawn in {structures.path}; its ROIs are number {numbers}")
    if not chosen:
        raise InputError(f"{structures.path}: no ROI of the patient's anatomy is drawn; choose some with rois=")
    return list(dict.fromkeys(chosen))


def _named(wanted: int | str, roi: Roi) -> bool:
    return plain_name(str(wanted)) == plain_name(roi.name)


def check_inside(rois: Sequence[Roi], grid: Grid, name: str) -> None:
    """Refuse contours outside the reference image; warn of those that are partly outside."""
    shares = {}
    for roi in rois:
        points = np.concatenate([*roi.contours, roi.points])
        shares[roi.number] = float(grid.contains(points).mean())
    if not any(shares.values()):
        raise InputError(
            f"{name}: lies outside the reference image altogether; was it drawn on the reference scan?"
        )
    for number, share in shares.items():
        if share < 1:
            logger.warning(
                "ROI %d: %.1f %% of its points lie outside the reference image", number, 100 * (1 - share)
            )


def outside_percents(
    rois: Sequence[Roi], target: Grid, to_target: Callable[[np.ndarray], np.ndarray]
) -> list[float]:
    """How much of each ROI of the reference, in percent of its points, comes to lie outside the target."""
    outside = []
    for roi in rois:
        points_mm = to_target(np.concatenate([*roi.contours, roi.points]))
        outside.append(100 * float(1 - target.contains(points_mm).mean()))
        if outside[-1] > 0:
            logger.warning(
                "ROI %d: %.3g %% of its points lie outside the target: its volume there is of what is drawn, its "
                "shift is left open",
                *(roi.number, outside[-1]),
            )
    return outside


def measures(
    rois: Sequence[Roi], carried: Sequence[Roi], target: Grid, outside: Sequence[float], names: bool
) -> list[dict[str, Any]]:
    """Volume of each ROI there and here, and how far its centroid moved, without voxels: of the contours.

    The centroid of what the target's edge cuts is none of the ROI's: where anything is outside, shifts are None.
    """
    rows = []
    for before, after, percent in zip(rois, carried, outside, strict=True):
        there, here = (_volume_and_centroid(roi, target.spacing_mm[2]) for roi in (before, after))
        slices = {round(float(target.world_to_index(points)[0, 2])) for points in after.contours}
        shift_mm = here[1] - there[1] if percent == 0 else [None] * 3
        rows.append(
            {
                "roi": before.number,
                **({"name": shown(before.name)} if names else {}),
                "type": before.interpreted_type,
                "slices": len(slices),
                "volume_reference_ml": there[0],
                "volume_ml": here[0],
                "outside_percent": percent,
                **{f"shift_{axis}_mm": value for axis, value in zip("xyz", shift_mm, strict=True)},
            }
        )
    return rows


def _volume_and_centroid(roi: Roi, thickness_mm: float) -> tuple[float, np.ndarray]:
    """Of an ROI of points: no volume, and their mean."""
    if roi.contours:
        return contour_volume(roi.contours, roi.thickness_mm or thickness_mm)
    return 0.0, roi.points.mean(0) if len(roi.points) else np.full(3, np.nan)


def draw(path: Path, image: sitk.Image, rois: Sequence[Roi], model: STNeRP) -> Path:
    """The target in three planes through the smallest ROI, with the contours in their own colours."""
    drawn = [roi for roi in rois if roi.contours]
    through = middle_mm(rois, Grid.of(image))
    colours = [roi.color or COLOURS[i % len(COLOURS)] for i, roi in enumerate(drawn)]
    pictures = []
    outside = model.window.low
    for plane in get_args(Plane):
        pixels = plane_grid(Grid.of(image), plane, through)
        onto = pixels.image(np.zeros(pixels.shape, np.uint8))
        cut = sitk.Resample(image, onto, sitk.Transform(), sitk.sitkLinear, outside, sitk.sitkFloat32)
        masks = [contour_mask(roi.contours, pixels, roi.thickness_mm)[0] for roi in drawn]
        pictures.append(frame(sitk.GetArrayFromImage(cut)[0], model.window, masks, colours, plane=plane))
    rows = max(len(picture) for picture in pictures)
    padded = [np.pad(picture, ((0, rows - len(picture)), (0, 8), (0, 0))) for picture in pictures]
    Image.fromarray(np.concatenate(padded, axis=1)).save(path)
    return path


def middle_mm(rois: Sequence[Roi], target: Grid) -> np.ndarray:
    """The middle of the smallest ROI with contours, else of the single points, else of the target; LPS mm."""
    drawn = [np.concatenate(roi.contours) for roi in rois if roi.contours]
    if drawn:
        return min(drawn, key=lambda points: float(np.ptp(points, axis=0).prod())).mean(0)
    points = np.concatenate([np.empty((0, 3)), *(roi.points for roi in rois)])
    return points.mean(0) if len(points) else target.centre_mm


if __name__ == "__main__":
    launch(main)

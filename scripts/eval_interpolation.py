"""python scripts/eval_interpolation.py data=phantom held_out='[3]' out=runs/demo

Leave images out, fit to the rest, and predict them; beside it what needs no registration: the nearest image
and the blend of the two neighbours. Writes into the run directory: config.yaml, ref_net.pt, model.pt,
metrics.csv (each image), summary.csv and summary.md (means), def_net_history.csv, pictures/,
eval_interpolation.log. Interrupted, the same command goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from configuration import DictConfig, OmegaConf, hydra
from data import PatientData, load_data
from run_directory import (
    CONFIGS,
    DEF_NET_CHECKPOINT,
    REF_NET_CHECKPOINT,
    launch,
    logger,
    replaced_fit,
    run_directory,
    settings_of,
    time_name,
    value_of,
    write_config,
    wrote,
)
from scores import all_reach, contour_scores, draw, everywhere, landmark_errors, predict, resampled_labels

from stnerp import Grid, InputError, Series, STNeRP, fit_deformation, fit_reference
from stnerp.baselines.interpolation import linear_blend, nearest_phase
from stnerp.metrics import folding, jacobian_determinant, psnr_db, ssim, tre_summary
from stnerp.preprocess import normalised, on_grid
from stnerp.report import loss_curve, markdown_table, text_table, write_csv

WRITES = (
    "config.yaml",
    "ref_net.pt",
    "model.pt",
    "metrics.csv",
    "summary.csv",
    "summary.md",
    "def_net_history.csv",
    "pictures/loss.png",
    "pictures/t*.png",
)
OF_ANOTHER_FIT = ("train_def.yaml", "pictures/t*.png")
CHECKPOINTS = (REF_NET_CHECKPOINT, DEF_NET_CHECKPOINT)
STNERP, SEEN, BLENDED = "stnerp", "stnerp, seen images", "stnerp, appearance=blend"
NO_MOTION, NEAREST, BLEND = "reference, no motion", "nearest phase", "linear blend"
OF_SOME = "_images"  # after a score: of how many images its mean is


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="eval_interpolation")
def main(config: DictConfig) -> None:
    with run_directory(config, "eval_interpolation", WRITES, checkpoints=CHECKPOINTS) as out:
        for name, kind in {"prior": bool, "max_pictures": int}.items():
            value_of(config, name, kind)
        patient = load_data(config.data)
        series = patient.series
        held_out = held_out_of(config, series)
        known = series.subset(i for i in range(len(series)) if i not in held_out)
        logger.info("held out: %s", ", ".join(f"{series.names[i]} (t = {series.times[i]:g})" for i in held_out))

        start = time.perf_counter()
        common = {"device": config.device, "seed": config.seed, "progress": config.progress}
        ref_net = None
        if config.prior:
            settings = settings_of(config.preset.ref_net)
            ref_net = fit_reference(known, checkpoint=out / REF_NET_CHECKPOINT, **common, **settings)
        model = fit_deformation(
            known,
            ref_net,
            checkpoint=out / DEF_NET_CHECKPOINT,
            align=config.align,
            appearance=config.appearance,
            **common,
            **settings_of(config.preset.def_net),
        )
        seconds = patient.seconds + time.perf_counter() - start
        wrote(model.save(out / "model.pt", overwrite=True), write_config(config, out / "config.yaml"))
        replaced_fit(out, OF_ANOTHER_FIT)
        if ref_net is not None:
            wrote(ref_net.save(out / "ref_net.pt", overwrite=True))
        wrote(write_csv(out / "def_net_history.csv", model.history))
        wrote(loss_curve(out / "pictures" / "loss.png", model.history))

        drawn = {held_out[k] for k in evenly(len(held_out), config.max_pictures)}
        rows: list[dict[str, Any]] = []
        arrays = [on_reference(known, i) for i in range(len(known))]
        for i in series.targets:
            rows += evaluate(model, patient, known, arrays, i)
            if i in drawn:
                path = out / "pictures" / f"t{time_name(series.times[i])}.png"
                title = f"{series.names[i]}, t = {series.times[i]:g}, never seen"
                wrote(draw(path, patient, predict(model, patient, i), title))
        summary = summarise(rows)
        wrote(write_csv(out / "metrics.csv", rows), write_csv(out / "summary.csv", summary))
        columns = columns_of(summary, patient)
        notes = of_some(summary, columns)
        listed = "".join(f"- {note}\n" for note in notes)
        (out / "summary.md").write_text(
            markdown_table(summary, columns) + "\n" + (f"\n{listed}" if notes else ""), encoding="utf-8"
        )
        wrote(out / "summary.md", out / "eval_interpolation.log")
        logger.info("\n%s", "\n".join([text_table(summary, columns), *notes]))
        if config.targets:
            logger.info("\n%s", text_table(compared(summary, OmegaConf.to_container(config.targets))))
        logger.info("\nfiles to model: %.1f s", seconds)


def held_out_of(config: DictConfig, series: Series) -> list[int]:
    """Indices of the images that the fit doesn't see.

    Raises:
        InputError: neither or both of `held_out` and `known_every` are given, or they leave too little.
    """
    given, every = config.held_out, config.known_every
    if (given is None) == (every is None):
        raise InputError("held_out: give either held_out='[3]' or known_every=4")
    if every is not None:
        if not (isinstance(every, int) and 2 <= every < len(series)):
            raise InputError(f"known_every: {every!r} must be a whole number from 2 to {len(series) - 1}")
        return [i for i in range(len(series)) if i % every]
    indices = list(given) if OmegaConf.is_list(given) else [given]
    if not indices or not all(isinstance(i, int) and 0 <= i < len(series) for i in indices):
        raise InputError(f"held_out: {indices} must be indices of images, from 0 to {len(series) - 1}")
    return sorted(set(indices))


def evaluate(
    model: STNeRP, patient: PatientData, known: Series, arrays: Sequence[np.ndarray], index: int
) -> list[dict[str, Any]]:
    """One row per method (for an image that the fit saw: the model alone), on the reference's grid.

    Where fields of view differ, PSNR and SSIM are of the voxels that all have in common: the image, those that are
    shown in its place, and the reference after it is moved.

    Args:
        known: the series of the fit, and its images on the reference's grid, in [0, 1].
        index: of the image, in the whole series.
    """
    series, t, grid = patient.series, patient.series.times[index], known.grid
    held_out = t not in known.times
    target = on_reference(series, index)
    indices = [np.asarray(i) for i in range(len(known))]
    nearest = int(nearest_phase(indices, known.times, t, known.period))
    weights = linear_blend(list(np.eye(len(known))), known.times, t, known.period)
    shown_here = [series.images[index]]
    if held_out:
        shown_here += [known.images[i] for i in {nearest, *np.flatnonzero(weights).tolist()}]
    common = all_reach(shown_here, known.reference_image)
    shown = everywhere(known.reference_image)
    if common is not None:
        common &= sitk.GetArrayFromImage(model.propagate(shown, t)) != 0

    def row(method: str, image: np.ndarray, **more: Any) -> dict[str, Any]:
        about = {"method": method, "time": t, "image": series.names[index]}
        percent = 100.0 if common is None else 100 * float(common.mean())
        return {**about, **likeness(image), "covered_percent": percent, **more}

    def likeness(image: np.ndarray) -> dict[str, float]:
        return {"psnr_db": psnr_db(image, target, mask=common), "ssim": ssim(image, target, mask=common)}

    mask = known.masks[known.reference]
    scan = series.images[index]
    carried, seen = (None if m is None else model.propagate(m, t, scan) for m in (mask, shown))
    displacement_mm = sitk.GetArrayFromImage(model.displacement(t))
    own = row(
        STNERP if held_out else SEEN,
        normalised(model.image(t), series.window),
        **landmark_errors(model, patient, index),
        **contour_scores(patient, index, carried, seen),
        **folding(jacobian_determinant(displacement_mm, grid)),
    )
    if not held_out:
        return [own]
    copies = {NO_MOTION: known.reference, NEAREST: nearest}
    rows = [row(name, arrays[i], **copied(patient, index, known, i)) for name, i in copies.items()]
    rows += [row(BLEND, linear_blend(arrays, known.times, t, known.period)), own]
    if model.flow is not None:
        # The contours and landmarks are the deformation's: only the picture is another.
        image = normalised(model.image(t, appearance="blend"), series.window)
        rows.append(own | {"method": BLENDED, **likeness(image)})
    return rows


def copied(patient: PatientData, index: int, known: Series, copy: int) -> dict[str, Any]:
    """Scores of a known image's own landmarks and contours, shown in place of those at `index`."""
    series = patient.series
    scores: dict[str, Any] = {}
    shown_mm, true_mm = known.landmarks[copy], series.landmarks[index]
    if shown_mm is not None and true_mm is not None:
        grids = Grid.of(known.images[copy]), Grid.of(series.images[index])
        both = grids[0].contains(shown_mm) & grids[1].contains(true_mm)
        scores |= tre_summary(shown_mm[both], true_mm[both])
        scores["landmarks_outside"] = int(np.count_nonzero(~both))
    mask = known.masks[copy]
    if mask is not None:
        labels, seen = (resampled_labels(m, series.images[index]) for m in (mask, everywhere(known.images[copy])))
        scores |= contour_scores(patient, index, labels, seen, source=mask)
    return scores


def on_reference(series: Series, index: int) -> np.ndarray:
    """An image in [0, 1], resampled onto the reference's grid where its own differs."""
    scan = series.images[index]
    return on_grid(normalised(scan, series.window), Grid.of(scan), series.grid)[0]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per method: how many images, the mean of each score over them, and the sum of folded voxels.

    Where a score is known of some of them alone (an image without a contour, or where one is lost, whose HD95 is
    NaN): of how many, as `<score>_images`.
    """
    summary = []
    for method in (NO_MOTION, NEAREST, BLEND, STNERP, BLENDED, SEEN):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        mean: dict[str, Any] = {"method": method, "images": len(own)}
        for name in dict.fromkeys(name for row in own for name in row):
            known = [row[name] for row in own if isinstance(row.get(name), int | float)]
            values = [value for value in known if math.isfinite(value)]
            if values and name != "time":
                mean[name] = sum(values) if name == "folded_voxels" else float(np.mean(values))
                if len(values) < len(own):
                    mean[f"{name}{OF_SOME}"] = len(values)
        summary.append(mean)
    return summary


def of_some(summary: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """A line for each mean that isn't over all of its method's images."""
    return [
        f"{row['method']}: {name} over {row[name + OF_SOME]} of {row['images']} images, the others have none"
        for row in summary
        for name in columns
        if name + OF_SOME in row
    ]


def columns_of(summary: Sequence[Mapping[str, Any]], patient: PatientData) -> list[str]:
    """Columns for the terminal: all images and landmarks, and the contours that are drawn."""
    wanted = ["method", "images", "psnr_db", "ssim", "tre_mean_mm", "tre_median_mm", "tre_p95_mm"]
    for label in patient.contours:
        name = patient.label_names[label].replace(" ", "_")
        wanted += [f"dice_{name}", f"hd95_{name}_mm"]
    known = {name for row in summary for name in row}
    return [name for name in [*wanted, "folded_voxels"] if name in known]


def compared(summary: Sequence[Mapping[str, Any]], targets: Any) -> list[dict[str, Any]]:
    """What stnerp reached on the images that it never saw, beside what it should reach.

    Raises:
        InputError: a target that isn't {at_most: number} or {at_least: number}.
    """
    reached = next(row for row in summary if row["method"] == STNERP)
    rows = []
    for name, target in targets.items():
        bound, wanted = next(iter(target.items())) if isinstance(target, dict) and target else ("", 0)
        if bound not in ("at_most", "at_least"):
            raise InputError(f"targets.{name}: {target!r} must be {{at_most: number}} or {{at_least: number}}")
        value = reached.get(name, math.nan)
        met = value <= wanted if bound == "at_most" else value >= wanted
        rows.append(
            {"unseen": name, "stnerp": value, "target": f"{bound} {wanted:g}".replace("_", " "), "met": met}
        )
    return rows


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to count - 1, evenly spaced."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, most))}) if most > 0 else []


if __name__ == "__main__":
    launch(main)

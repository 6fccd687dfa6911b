"""python benchmarks/guidance.py

What contours and landmarks at two times of a breath do at the other times, where the images alone say too
little: a phantom with known motion under heavy noise. Prints a table and writes guidance.md into `out`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from machine import machine
from run import settings_of, start

from stnerp import Series, STNeRP, fit_deformation, load_series, metrics
from stnerp.phantom import LABELS, Phantom
from stnerp.report import markdown_table, text_table

logger = logging.getLogger("stnerp.benchmarks")

FIELD_OF_VIEW_MM = (360.0, 280.0, 180.0)
GUIDING_LANDMARKS, POINTS = 20, 300  # landmarks that guide, and do not count; points of each organ that count


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where the table is written.
        spacing_mm, noise_hu: of the images.
        phases: of a breath, with the reference.
        guided_times: in breaths.
        levels: of every fit.
        seeds: of the fits; the table holds means.
    """

    out: str = "runs/guidance"
    spacing_mm: float = 6.0
    noise_hu: float = 300.0
    phases: int = 10
    guided_times: Any = field(default_factory=lambda: [0.3, 0.6])
    levels: Any = field(default_factory=lambda: [[18, 16, 40], [12, 12, 40], [6, 8, 20]])
    seeds: Any = field(default_factory=lambda: [0])


GUIDANCE: dict[str, dict[str, Any]] = {
    "none": {},
    "contours 0.05": {"contours": 0.05},
    "contours 0.2": {"contours": 0.2},
    "contours 1": {"contours": 1.0},
    "landmarks 0.02": {"landmarks": 0.02},
    "both, 0.2 and 0.02": {"contours": 0.2, "landmarks": 0.02},
}


def main(arguments: list[str]) -> None:
    """A fit without and with each kind of guidance, scored at guided, at unguided and at unmeasured times."""
    settings = settings_of(Settings(), arguments)
    x, y, z = (round(length / settings.spacing_mm) for length in FIELD_OF_VIEW_MM)
    phantom = Phantom((x, y, z), settings.spacing_mm, noise_hu=settings.noise_hu, n_landmarks=200)
    times = phantom.times(settings.phases)
    series = load_series(
        [phantom.image(t) for t in times],
        times,
        period=1.0,
        window="ct",
        masks=[phantom.labels(t) for t in times],
        landmarks=[phantom.landmarks(t)[:GUIDING_LANDMARKS] for t in times],
    )
    groups = {
        "guided": settings.guided_times,
        "unguided": [t for t in times[1:] if t not in settings.guided_times],
        "unmeasured": [t + 0.5 / settings.phases for t in times],
    }
    rows = []
    for name, weights in GUIDANCE.items():
        clock = time.process_time()
        models = [
            fit_deformation(
                series,
                None,
                seed=seed,
                levels=settings.levels,
                window_mm=3 * settings.spacing_mm,
                guided_times=settings.guided_times if weights else None,
                progress=False,
                **weights,
            )
            for seed in settings.seeds
        ]
        seconds = (time.process_time() - clock) / len(models)
        for group, scored in groups.items():
            scores = [score(model, phantom, series, t) for model in models for t in scored]
            means = {measure: float(np.mean([row[measure] for row in scores])) for measure in scores[0]}
            rows.append({"guidance": name, "times": group, **means, "cpu_seconds": seconds})
        logger.info("%s", text_table(rows[-len(groups) :]))
    path = Path(settings.out) / "guidance.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(settings, arguments, rows), encoding="utf-8")
    logger.info("wrote %s", path)


def score(model: STNeRP, phantom: Phantom, series: Series, t: float) -> dict[str, float]:
    """TRE (mm) of landmarks that didn't guide and of points inside organs, and Dice of the carried labels."""
    reference = series.masks[series.reference]
    assert reference is not None
    inside = sitk.GetArrayViewFromImage(reference)
    points = {"lung": phantom.reference_landmarks[GUIDING_LANDMARKS:]}
    rng = np.random.default_rng(0)
    for organ in ("tumour", "liver", "heart"):
        voxels = phantom.grid.points_world()[inside == LABELS[organ]]
        points[organ] = rng.permutation(voxels)[:POINTS]
    row = {}
    for organ, at_reference in points.items():
        at_t = phantom.map_points(at_reference, t, inverse=True)
        row[f"tre_{organ}_mm"] = float(metrics.tre_mm(model.map_points(at_t, t), at_reference).mean())
    carried, true = model.propagate(reference, t), phantom.labels(t)
    return row | {
        f"dice_{organ}": metrics.dice(carried, true, LABELS[organ]) for organ in ("tumour", "liver", "heart")
    }


def report(settings: Settings, arguments: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, with what it was measured on."""
    about = machine()
    known = " and ".join(f"{t:g}" for t in settings.guided_times)
    return f"""# Guidance by contours and landmarks

`python benchmarks/guidance.py {" ".join(arguments)}`

The phantom breathes by 15 mm: {settings.phases} images of {settings.spacing_mm:g} mm voxels under white noise of
{settings.noise_hu:g} HU, in which liver and heart nearly vanish. At t = {known} of a breath and on the reference
(t = 0) the contours of all organs are known, or {GUIDING_LANDMARKS} landmarks in the lungs, and guide the
fit there alone. *guided*: these times; *unguided*: the other images; *unmeasured*: times half-way between images.
TRE in mm, of landmarks that did not guide (lung) and of points inside organs, and Dice of the carried contours:
means over these times and the seeds. The number behind the guidance is its weight.

{markdown_table(rows)}

- levels: {settings.levels}, preset fast otherwise, without Ref-Net; seeds {settings.seeds}
- machine: {about["cpu"]}, {about["threads"]} thread; CPU seconds, since other programs ran beside it
- versions: {about["versions"]}
- date: {about["date"]}
"""


if __name__ == "__main__":
    start(main)

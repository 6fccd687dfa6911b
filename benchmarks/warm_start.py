"""python benchmarks/warm_start.py

How many steps, and how much time, a fit saves that starts from another patient's, from several patients', from the
same patient's before the newest scan, or from a quick registration: on phantoms, whose motion is known. Prints a
table and writes warm_start.md into `out`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from machine import machine
from run import settings_of, start

from stnerp import Series, STNeRP, fit_deformation, load_series, metrics
from stnerp.baselines.greedy import greedy
from stnerp.errors import MissingDependencyError
from stnerp.motion import Breathing, Longitudinal
from stnerp.phantom import BOX_MM, TUMOUR_CENTRE_MM, Phantom
from stnerp.report import markdown_table, text_table

logger = logging.getLogger("stnerp.benchmarks")

FIELD_OF_VIEW_MM = (360.0, 280.0, 180.0)
Score = Callable[[STNeRP], float]  # mean TRE in mm over landmarks and images
Row = dict[str, Any]


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where the table is written.
        spacing_mm: of the images.
        phases: of a breath; scans of a follow-up.
        steps: of each fit, half of them on coarse voxels and half on the images' own.
        close_enough: a fit is as good as another whose error is so many times as large.
    """

    out: str = "runs/warm_start"
    spacing_mm: float = 4.0
    phases: int = 6
    steps: Any = field(default_factory=lambda: [2, 4, 8, 16, 32, 64])
    close_enough: float = 1.05


def main(arguments: list[str]) -> None:
    """Fits of some lengths from every start, cold ones first."""
    settings = settings_of(Settings(), arguments)
    spacing, phases = settings.spacing_mm, settings.phases
    rows: list[Row] = []

    # A cycle: the patient, and three others who breathe less or more, one of them larger, in other phases.
    series, score = breathing(spacing, phases, seed=0)
    others = [
        fit_deformation(breathing(spacing, n, seed, amplitude_mm, size)[0], None, **fit_of(settings, 32))
        for seed, n, amplitude_mm, size in (
            (1, phases, 11.0, 1.06),
            (2, phases - 1, 18.0, 0.97),
            (3, phases, 13.0, 1.0),
        )
    ]
    rows += fits("breathing", "cold", series, score, settings)
    rows += fits("breathing", "another patient", series, score, settings, init=others[0])
    rows += fits("breathing", "mean of three patients", series, score, settings, init=others)
    try:
        clock = time.process_time()
        pairs = {
            series.times[i]: greedy(series.reference_image, series.images[i], window=series.window, align="none")
            for i in series.targets
        }
        spent = time.process_time() - clock
        rows += fits("breathing", "greedy", series, score, settings, spent, init=pairs)
    except MissingDependencyError as error:
        logger.warning("%s", error)

    # A follow-up: the newest scan is added to a series that has been fitted.
    series, score = follow_up(spacing, phases)
    before = fit_deformation(series.subset(range(phases - 1)), None, align="none", **fit_of(settings, 32))
    rows += fits("follow-up", "cold", series, score, settings)
    rows += fits("follow-up", "before the newest scan", series, score, settings, init=before)

    found = saved(rows, settings.close_enough)
    path = Path(settings.out) / "warm_start.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(settings, arguments, found, rows), encoding="utf-8")
    logger.info("%s\nwrote %s", text_table(found), path)


def breathing(
    spacing_mm: float, phases: int, seed: int, amplitude_mm: float = 15.0, size: float = 1.0
) -> tuple[Series, Score]:
    """A patient with vessels, noise and a depth of breath of their own, so many times as large as the phantom."""
    phantom = phantom_of(spacing_mm, Breathing(*BOX_MM, amplitude_si_mm=amplitude_mm), seed)
    return series_of(phantom, phases, size, period=1.0)


def follow_up(spacing_mm: float, scans: int) -> tuple[Series, Score]:
    """Six weeks in which a tumour shrinks and what surrounds it shifts."""
    motion = Longitudinal(*BOX_MM, TUMOUR_CENTRE_MM, shift_mm=8.0)
    return series_of(phantom_of(spacing_mm, motion, seed=0), scans)


def phantom_of(spacing_mm: float, motion: Breathing | Longitudinal, seed: int) -> Phantom:
    x, y, z = (round(length / spacing_mm) for length in FIELD_OF_VIEW_MM)
    return Phantom((x, y, z), spacing_mm, motion, seed=seed, n_landmarks=200)


def series_of(
    phantom: Phantom, count: int, size: float = 1.0, period: float | None = None
) -> tuple[Series, Score]:
    """The phantom's images, enlarged, and the error of a model of them."""
    times = phantom.times(count)
    images = [phantom.image(t) for t in times]
    for image in images:
        image.SetSpacing([size * s for s in image.GetSpacing()])
        image.SetOrigin([size * o for o in image.GetOrigin()])

    def error_mm(model: STNeRP) -> float:
        found = [model.map_points(size * phantom.landmarks(t), t) for t in times[1:]]
        return float(np.mean([metrics.tre_mm(f, size * phantom.reference_landmarks) for f in found]))

    return load_series(images, times, period=period, window="ct"), error_mm


def fit_of(settings: Settings, steps: int) -> dict[str, Any]:
    s = settings.spacing_mm
    return {"levels": [(2 * s, 12, steps // 2), (s, 8, steps - steps // 2)], "progress": False}


def fits(
    case: str, name: str, series: Series, score: Score, settings: Settings, spent: float = 0.0, **init: Any
) -> list[Row]:
    """A row for each length; the seconds include `spent`, what the start itself took."""
    rows = []
    for steps in settings.steps:
        clock = time.process_time()
        model = fit_deformation(series, None, align="none", **init, **fit_of(settings, steps))
        seconds = spent + time.process_time() - clock
        rows.append({"case": case, "start": name, "steps": steps, "cpu_seconds": seconds, "tre_mm": score(model)})
        logger.info("%s", text_table(rows[-1:]))
    return rows


def saved(rows: Sequence[Row], close_enough: float) -> list[Row]:
    """Of each start: the fewest steps after which it is as good as the best cold fit, and their seconds."""
    found = []
    for case, name in dict.fromkeys((row["case"], row["start"]) for row in rows):
        best = min(row["tre_mm"] for row in rows if row["case"] == case and row["start"] == "cold")
        own = [row for row in rows if (row["case"], row["start"]) == (case, name)]
        good = [row for row in own if row["tre_mm"] <= close_enough * best]
        found.append(good[0] if good else {**own[-1], "steps": f"more than {own[-1]['steps']}"})
    return found


def report(settings: Settings, arguments: Sequence[str], found: Sequence[Row], rows: Sequence[Row]) -> str:
    """Both tables as Markdown, with what they were measured on."""
    about = machine()
    wide = []
    for case, name in dict.fromkeys((row["case"], row["start"]) for row in rows):
        own = [row for row in rows if (row["case"], row["start"]) == (case, name)]
        cells = {f"{row['steps']} steps": f"{row['tre_mm']:.2f} ({row['cpu_seconds']:.1f})" for row in own}
        wide.append({"case": case, "start": name, **cells})
    return f"""# Warm starts

`python benchmarks/warm_start.py {" ".join(arguments)}`

Phantoms of {settings.spacing_mm:g} mm voxels with 20 HU of noise. *breathing*: {settings.phases} images of a
breath of 15 mm. The other patients have other vessels and noise, breathe by 11, 18 and 13 mm, and are 6 % larger,
3 % smaller and as large; *another patient* is the first of them. Their anatomy and the kind of their motion are
the same, which real patients' are not: read it as the most that a start can save. *greedy*: each image registered
to the reference by it. *follow-up*: {settings.phases} scans in six weeks, and a fit of all but the newest. Half of
the steps are on coarse voxels, half on the images' own. TRE in mm, mean over 200 landmarks in the lungs and all
images. Seconds are CPU seconds of one thread, since other programs ran beside it; they include the start (aligning
the two patients, or all of greedy), but not the fits that were there before.

As good as the best cold fit (at most {settings.close_enough:g} times its error):

{markdown_table(found)}

All of them, TRE in mm (CPU seconds):

{markdown_table(wide)}

- preset fast but for its levels, without Ref-Net, seed 0; after a start, a tenth of the learning rate
- machine: {about["cpu"]}, {about["threads"]} thread
- versions: {about["versions"]}
- date: {about["date"]}
"""


if __name__ == "__main__":
    start(main)

"""python benchmarks/scale.py sizes='[[64,64,34],[128,128,68],[256,256,136]]' phases='[2,4,6,8,10]' out=runs/scale

Time and memory of a fit and of one rendered phase, against the number of voxels (of `at_phases` images) and
against the number of phases (of images of `at_size`). The images are the phantom's, always of the same body,
and are read from files. Each point runs in a process of its own and is kept, as in run.py. Writes into `out`:
images/, results/, scale.csv, scale.png. The default goes up to a whole 4D CT's 512 x 512 x 136.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from fresh import recorded
from machine import peak_gpu_memory_mib, peak_memory_mib, wait_for_gpu
from plain_axes import plain_axes
from run import rerun_of, settings_of, start, whole_numbers

from stnerp import InputError, fit_deformation, fit_reference, load_series
from stnerp.io.image import write_image
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, Phantom
from stnerp.report import DPI, text_table, write_csv

logger = logging.getLogger("stnerp.benchmarks")

FIELD_OF_VIEW_MM = (360.0, 280.0, 180.0)
PERIOD = 10.0

Size = tuple[int, int, int]


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where everything is written.
        sizes: voxels x, y, z of the images of the first sweep, and `at_phases`, how many images.
        phases: numbers of images of the second sweep, and `at_size`, their voxels.
        prior: with a Ref-Net or without.
        seed, device: of the fit.
        timeout_s, rerun: as in run.py.
        options: settings of the fit, `options.levels=...`; those of the Ref-Net under `options.ref_net`.
    """

    out: str = "runs/scale"
    sizes: Any = field(
        default_factory=lambda: [[64, 64, 34], [128, 128, 68], [256, 256, 68], [256, 256, 136], [512, 512, 136]]
    )
    at_phases: int = 2
    phases: Any = field(default_factory=lambda: [2, 4, 6, 8, 10])
    at_size: Any = field(default_factory=lambda: [144, 112, 72])
    prior: bool = False
    seed: int = 0
    device: str = "auto"
    timeout_s: float = 7200.0
    rerun: Any = False
    options: dict[str, Any] = field(default_factory=dict)


def main(arguments: list[str]) -> None:
    """Both sweeps, then the table and the plot."""
    settings = settings_of(Settings(), arguments)
    at_size = size_of(settings.at_size)
    points = {(size_of(size), settings.at_phases) for size in settings.sizes}
    points |= {(at_size, phases) for phases in whole_numbers(settings.phases, "phases")}
    # Small ones first: they tell whether the large ones will do.
    rows = [point(settings, *p) for p in sorted(points, key=lambda p: np.prod(p[0]) * p[1])]
    out = Path(settings.out)
    columns = [name for name in rows[0] if name.endswith(("size", "phases", "_seconds", "_mib"))]
    logger.info("%s\nwrote %s", text_table(rows, columns), write_csv(out / "scale.csv", rows))
    good = [row for row in rows if not row["failure"]]
    by_size = [row for row in good if row["phases"] == settings.at_phases]
    by_phases = [row for row in good if row["size"] == name_of(at_size)]
    logger.info("wrote %s", plot(out / "scale.png", by_size, by_phases))


def point(settings: Settings, size: Size, phases: int) -> dict[str, Any]:
    """One row: a fit to so many images of this size."""
    out, name = Path(settings.out), name_of(size)
    times = [k * PERIOD / phases for k in range(phases)]
    arguments = {
        "images": write_phantom(out / "images" / name, size, times),
        "times": times,
        "prior": settings.prior,
        "seed": settings.seed,
        "device": settings.device,
        "options": settings.options,
    }
    path = out / "results" / f"{name}-{phases}.json"
    record = recorded(path, "scale:measure", arguments, settings.timeout_s, rerun_of(settings.rerun))
    logger.info("%s: %s", path.stem, record["failure"] or f"{record['result']['fit_seconds']:.1f} s")
    about = {"size": name, "voxels": int(np.prod(size)), "phases": phases, "failure": record["failure"]}
    return {**about, **record["result"], **record["machine"], "options": json.dumps(settings.options)}


def write_phantom(folder: Path, size: Size, times: Sequence[float]) -> list[str]:
    """The phantom's images at these times, each in a file, unless it is there; their paths."""
    x, y, z = (length / n for length, n in zip(FIELD_OF_VIEW_MM, size, strict=True))
    phantom = Phantom(size, (x, y, z), Breathing(*BOX_MM, period=PERIOD))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"t{t:.4f}.nii.gz" for t in times]
    for path, t in zip(paths, times, strict=True):
        if not path.is_file():
            logger.info("writing %s", path)
            write_image(phantom.image(t), path)
    return [str(path.resolve()) for path in paths]


def measure(
    images: list[str], times: list[float], prior: bool, seed: int, device: str, options: dict[str, Any]
) -> dict[str, float]:
    """Seconds and peak memory (MiB, so far) after each stage; called in a process of its own."""
    result = {"start_memory_mib": peak_memory_mib()}
    clock = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal clock
        wait_for_gpu()
        result[f"{stage}_seconds"] = time.perf_counter() - clock
        result[f"{stage}_memory_mib"] = peak_memory_mib()
        clock = time.perf_counter()

    common: dict[str, Any] = {"device": device, "seed": seed, "progress": False}
    def_net = {name: value for name, value in options.items() if name != "ref_net"}
    series = load_series(images, times, period=PERIOD)
    done("load")
    net = None
    if prior:
        net = fit_reference(series, **common, **options.get("ref_net", {}))
        done("ref_net")
    model = fit_deformation(series, net, **common, **def_net)
    done("fit")
    model.image((times[0] + times[1]) / 2)
    done("render")
    result["gpu_memory_mib"] = peak_gpu_memory_mib()
    return result


def name_of(size: Size) -> str:
    return "x".join(map(str, size))


def size_of(value: Any) -> Size:
    """Raises: InputError: not three whole numbers."""
    numbers = whole_numbers(value, "sizes, at_size")
    if len(numbers) != 3:
        raise InputError(f"sizes, at_size: {value!r} must be three whole numbers (x, y, z)")
    return numbers[0], numbers[1], numbers[2]


# -- the plot

STAGES = {
    "load": ("#868e96", "s"),
    "ref_net": ("#7b52ab", "D"),
    "fit": ("#e6550d", "o"),
    "render": ("#1c7ed6", "^"),
}


def plot(path: Path, by_size: Sequence[dict[str, Any]], by_phases: Sequence[dict[str, Any]]) -> Path:
    """Seconds and memory of each stage against voxels and against phases, and the slopes of straight lines."""
    from matplotlib.figure import Figure

    figure = Figure((9, 7), dpi=DPI, facecolor="white", layout="constrained")
    for row, (unit, label) in enumerate(
        {"seconds": "seconds", "memory_mib": "peak memory so far, above the start, MiB"}.items()
    ):
        for column, (rows, x, axis) in enumerate(
            [(by_size, "voxels", "voxels of an image"), (by_phases, "phases", "images in the series")]
        ):
            panel = figure.add_subplot(2, 2, 2 * row + column + 1)
            _panel(panel, sorted(rows, key=lambda r: r[x]), x, unit)
            panel.set_xlabel(axis, fontsize=9)
            panel.set_ylabel(label, fontsize=9)
            if rows and row == 0:
                other = f"{rows[0]['phases']} images" if x == "voxels" else f"{rows[0]['size']} voxels"
                panel.set_title(other, fontsize=10, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _panel(panel: Any, rows: Sequence[dict[str, Any]], x: str, unit: str) -> None:
    for stage, (colour, marker) in STAGES.items():
        # What the packages take would flatten the memory's slope.
        base = "start_memory_mib" if unit == "memory_mib" else ""
        own = [(row[x], row[name] - row.get(base, 0.0)) for row in rows if (name := f"{stage}_{unit}") in row]
        own = [(voxels, value) for voxels, value in own if value > 0]
        if not own:
            continue
        xs, ys = np.array(own, float).T
        label = stage.replace("ref_net", "Ref-Net")
        if len(set(xs)) > 1:
            slope = np.polyfit(np.log(xs), np.log(ys), 1)[0]
            label += f", slope {slope:.2f}"
        panel.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    plain_axes(panel)
    if x == "phases":
        panel.set_xticks([row[x] for row in rows])
        panel.minorticks_off()
    if panel.lines:  # a stage that took no more memory than the start has no line
        panel.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    start(main)

"""python benchmarks/floors.py size='[144,112,72]' phases=4 out=runs/floors

How near each stage of a fit comes to what the machine can do. First the machine: the rate of a matrix product
(FLOP/s; on a GPU also in TF32, which the paper's Ref-Net is fitted in) and of a copy (bytes/s), in float32. Then
one step of each stage: its matrix products, as PyTorch counts them, and the bytes that it can't do without
(below); the larger of both times is its floor. The images are the phantom's. Writes floors.csv and floors.md
into `out`.

Bytes of a step of Def-Net, for one image: 4 B for each of
- lattice: 3 numbers read, 3 read at moved points, 3 written, for each squaring; twice as many backwards;
- voxels: 3 coordinates, the moved image, the fixed one, and 3 images averaged along 3 axes, read and written;
  twice as many backwards.
Ref-Net's networks: their inputs, and each layer's output, written and read; twice as many backwards.
A rendered phase: 3 coordinates, 3 displacements and 1 intensity for each voxel, in float64 as the model has them.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from machine import machine, wait_for_gpu
from run import settings_of, start
from scale import PERIOD, size_of, write_phantom

from stnerp import Grid, Series, fit_deformation, fit_reference, load_series
from stnerp.device import device_of, tensor_cores
from stnerp.presets import FAST, PAPER, Level
from stnerp.report import markdown_table, write_csv

logger = logging.getLogger("stnerp.benchmarks")


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where everything is written.
        size: voxels x, y, z of the images.
        phases: how many images.
        points: of a step of the paper's Ref-Net.
        device: auto, cpu, cuda.
        repeats: steps of which the median counts.
    """

    out: str = "runs/floors"
    size: Any = field(default_factory=lambda: [144, 112, 72])
    phases: int = 4
    points: int = 8192
    device: str = "auto"
    repeats: int = 5


def main(arguments: list[str]) -> None:
    """The machine's rates, then every stage beside its floor."""
    settings = settings_of(Settings(), arguments)
    out, device = Path(settings.out), device_of(settings.device)
    rate, bytes_per_s = product_rate(device), copy_rate(device)
    with tensor_cores(device):
        fast_rate = product_rate(device)
    said = f"{rate / 1e9:.0f} GFLOP/s" + (f", {fast_rate / 1e9:.0f} in TF32," if device.type == "cuda" else "")
    said += f" and {bytes_per_s / 1e9:.1f} GB/s"
    logger.info("%s", said)
    rows = []
    for name, run, moved in stages(settings, device):
        flops, spent = cost(run, settings.repeats, device)
        floor = max(flops / (fast_rate if name.startswith("Ref-Net paper") else rate), moved / bytes_per_s)
        rows.append(
            {
                "stage": name,
                "GFLOP": f"{flops / 1e9:.3g}",
                "MB": f"{moved / 1e6:.3g}",
                "floor ms": f"{1e3 * floor:.3g}",
                "measured ms": f"{1e3 * spent:.3g}",
                "fraction": f"{floor / spent:.2f}",
            }
        )
        logger.info("%s", rows[-1])
    about = {key: str(value) for key, value in machine().items()}
    rates = f"{said} on {about['gpu'] or about['cpu']}"
    write_csv(out / "floors.csv", [{**row, **about} for row in rows])
    text = f"{rates}, {about['threads']} threads; {about['versions']}; {about['date']}\n\n{markdown_table(rows)}\n"
    (out / "floors.md").write_text(text, encoding="utf-8")
    logger.info("wrote %s", out / "floors.md")


# -- the machine


def product_rate(device: torch.device) -> float:
    """FLOP/s of a large float32 matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.rand(n, n, device=device)
    return 2 * n**3 / seconds(lambda: a @ a, 7)


def copy_rate(device: torch.device, numbers: int = 2**26) -> float:
    """Bytes/s of reading and writing as many float32 numbers, into memory that is there already."""
    a = torch.rand(numbers, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * numbers / seconds(lambda: b.copy_(a), 7)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that doesn't count."""
    spent = []
    for _ in range(repeats + 1):
        wait_for_gpu()
        begin = time.perf_counter()
        call()
        wait_for_gpu()
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[1:])


def cost(run: Callable[[int], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Floating-point operations of matrix products, and seconds, of one step: what more of them add to a run, so
    that what comes before the steps doesn't count; on a GPU nor do the first steps, which are recorded."""

    def flops(steps: int) -> float:
        with FlopCounterMode(display=False) as counter:
            run(steps)
        return float(counter.get_total_flops())

    few, many = STEPS[device.type]
    spent = seconds(lambda: run(many), repeats) - seconds(lambda: run(few), repeats)
    return flops(2) - flops(1), max(spent, 1e-9) / (many - few)  # replayed steps aren't counted: no PyTorch runs


# -- the stages

STEPS = {"cpu": (1, 5), "cuda": (4, 64)}  # what lies between them is timed
Stage = tuple[str, Callable[[int], object], float]  # name, so many steps, bytes of a step


def stages(settings: Settings, device: torch.device) -> list[Stage]:
    """Steps of both Ref-Nets, of each level of the fast Def-Net for all its images, and a rendered phase."""
    size, count = size_of(settings.size), settings.phases
    name = "x".join(map(str, size))
    times = [k * PERIOD / count for k in range(count)]
    images = write_phantom(Path(settings.out) / "images" / name, size, times)
    series = load_series(images, times, period=PERIOD)
    voxels, paper, fast = series.grid.voxels, PAPER.ref_net, FAST.ref_net
    paper_numbers = 3 + 2 * paper.fourier_width + (paper.layers - 1) * paper.width
    fast_points = int(fast.fraction_per_step * voxels)
    fast_numbers = 3 + 9 * fast.grid_levels * fast.grid_features + 2 * fast.decoder_width
    found: list[Stage] = [
        (
            f"Ref-Net paper, {settings.points} points",
            ref_net_steps(series, "paper", settings.points / voxels, device),
            3 * 2 * 4 * settings.points * paper_numbers,
        ),
        (
            f"Ref-Net fast, {fast_points} points",
            ref_net_steps(series, "fast", fast.fraction_per_step, device),
            3 * 2 * 4 * fast_points * fast_numbers,
        ),
    ]
    for level in FAST.def_net.levels:
        found.append(
            (
                f"Def-Net fast, {level.spacing_mm:g} mm, {count - 1} images",
                def_net_steps(series, level, device),
                (count - 1) * def_net_bytes(series.grid, level),
            )
        )
    model = fit_deformation(series, None, levels=[(16, 16, 1)], device=device, progress=False)

    def render(steps: int) -> None:
        for step in range(steps):
            model.image((0.37 + step / 100) * PERIOD)

    return [*found, (f"one phase of {name}", render, 8 * 7.0 * voxels)]


def ref_net_steps(series: Series, preset: str, fraction: float, device: torch.device) -> Callable[[int], object]:
    """So many steps of Eq. 3."""

    def run(steps: int) -> None:
        common: dict[str, Any] = {"preset": preset, "device": device, "progress": False, "remainder": 0.0}
        fit_reference(series, iterations=steps, fraction_per_step=fraction, **common)

    return run


def def_net_steps(series: Series, level: Level, device: torch.device) -> Callable[[int], object]:
    """So many steps of Eq. 6 on one level."""

    def run(steps: int) -> None:
        levels = [replace(level, iterations=steps)]
        fit_deformation(series, None, levels=levels, region="image", device=device, progress=False)

    return run


def def_net_bytes(grid: Grid, level: Level) -> float:
    """What a step has to read and write for one image."""
    lattice = level.lattice(grid).voxels
    voxels = min(level.voxels(grid).voxels, FAST.def_net.voxels_per_step or 10**12)
    return 3 * 4 * (9.0 * FAST.def_net.squarings * lattice + (3 + 1 + 1 + 2 * 3 * 3) * voxels)


if __name__ == "__main__":
    start(main)

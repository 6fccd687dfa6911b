"""python benchmarks/ref_net.py image=chest_ct/ct.nii.gz fits=fast,fast_alone,paper_short,paper out=runs/ref_net

How well Ref-Net knows an image, and how long it takes from the file. Each fit runs in a process of its own and is
kept, as in run.py. Writes into `out`: results/, ref_net.csv, ref_net.md.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from fresh import recorded
from machine import peak_gpu_memory_mib, peak_memory_mib, wait_for_gpu
from run import chosen, rerun_of, settings_of, start

from stnerp import InputError, fit_reference, load_series
from stnerp.preprocess import normalised
from stnerp.report import markdown_table, write_csv

logger = logging.getLogger("stnerp.benchmarks")

#: Settings of each fit. A CPU can't afford all voxels in a step: it draws some. In a given time many small steps
#: learn most.
FITS: dict[str, dict[str, Any]] = {
    "fast": {},
    "fast_alone": {"remainder": 0.0},
    "paper_short": {"preset": "paper", "points": 1024, "iterations": 1500, "decay": "cosine"},
    "paper": {"preset": "paper", "points": 8192},
}
LABELS = {
    "fast": "fast",
    "fast_alone": "fast, the network alone (`remainder=0`)",
    "paper_short": "paper's network and first rate, along a cosine, in small steps",
    "paper": "paper's network and rate",
}


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        image: a file of a 3D image.
        out: where everything is written.
        fits: names, or all.
        options: of fits, `options.paper.points=1000000`; points: voxels drawn in a step.
        seed, device, timeout_s, rerun: as in run.py.
    """

    image: str = "???"
    out: str = "runs/ref_net"
    fits: Any = "all"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    timeout_s: float = 7200.0
    rerun: Any = False


def main(arguments: list[str]) -> None:
    """Every fit that is asked for, then the table."""
    settings = settings_of(Settings(), arguments)
    if not Path(settings.image).is_file():
        raise InputError(f"image: {settings.image} is not a file")
    names, out = chosen(settings.fits, list(FITS), "fits"), Path(settings.out)
    chosen(list(settings.options), list(FITS), "options")
    rows, table = [], []
    for name in names:
        asked = {
            "image": str(Path(settings.image).resolve()),
            "seed": settings.seed,
            "device": settings.device,
            "options": {**FITS[name], **settings.options.get(name, {})},
        }
        path = out / "results" / f"{name}.json"
        record = recorded(path, "ref_net:measure", asked, settings.timeout_s, rerun_of(settings.rerun))
        result = record["result"]
        rows.append({"fit": name, "failure": record["failure"], **result, **record["machine"]})
        logger.info("%s: %s", name, record["failure"] or f"{result['psnr_db']:.2f} dB, {result['seconds']:.1f} s")
        if result:
            table.append(
                {
                    "fit": LABELS[name],
                    "steps": f"{result['iterations']}",
                    "voxels a step": f"{result['points']}",
                    "PSNR dB": f"{result['psnr_db']:.1f}",
                    "s": f"{result['seconds']:.1f}",
                    "memory MiB": f"{result['peak_memory_mib']:.0f}",
                }
            )
    write_csv(out / "ref_net.csv", rows)
    about = rows[0]
    text = f"{about['gpu'] or about['cpu']}, {about['threads']} threads; {about['versions']}; {about['date']}\n\n"
    (out / "ref_net.md").write_text(f"{text}{markdown_table(table)}\n", encoding="utf-8")
    logger.info("wrote %s", out / "ref_net.md")


def measure(image: str, seed: int, device: str, options: dict[str, Any]) -> dict[str, float]:
    """From the file to a network; PSNR over all voxels. Called in a process of its own."""
    settings = dict(options)
    begin = time.perf_counter()
    series = load_series([image, image])  # a series has two images at least; one of them is learnt
    voxels = series.grid.voxels
    if (points := settings.pop("points", None)) is not None:
        settings["fraction_per_step"] = min(1.0, points / voxels)
    net = fit_reference(series, seed=seed, device=device, progress=False, **settings)
    wait_for_gpu()
    spent = time.perf_counter() - begin
    error = np.mean((net.render() - normalised(series.reference_image, series.window)) ** 2, dtype=np.float64)
    return {
        "voxels": voxels,
        "iterations": net.settings.iterations,
        "points": round(net.settings.fraction_per_step * voxels),
        "seconds": spent,
        "psnr_db": -10 * math.log10(max(float(error), 1e-30)),
        "peak_memory_mib": peak_memory_mib(),
        "gpu_memory_mib": peak_gpu_memory_mib(),
    }


if __name__ == "__main__":
    start(main)

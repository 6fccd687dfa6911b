"""One method on one case: what it costs from the files to a model that answers, and how good its answers are."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cases import Case
from machine import peak_gpu_memory_mib, peak_memory_mib, wait_for_gpu
from methods import METHODS
from pair_methods import ready
from scoring import score, summary

from stnerp import Grid


def measure(
    case: str, made_from: dict[str, Any], method: str, seed: int, device: str, options: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table; called in a process of its own.

    Args:
        case: path of a case's description.
        made_from: the case's, so that a result of other data is not taken for this one's.
        method: of `METHODS`.
        options: of the method.

    Returns:
        `seconds` from files to model, `seconds_per_pair`, `render_seconds` (registration and image of one
        time), `peak_memory_mib`, of which the process held `start_memory_mib` before, `gpu_memory_mib`,
        and the scores, `seen_...` over the case's pairs, `unseen_...` over the images held out.
    """
    patient, chosen = Case.load(case), METHODS[method]
    ready(chosen.imports)
    for i in patient.known:
        Path(patient.images[i]).read_bytes()  # no method pays for a cold disk
    start_memory = peak_memory_mib()

    start = time.perf_counter()
    answers = chosen.fit(patient, seed=seed, device=device, **options)
    wait_for_gpu()
    seconds = time.perf_counter() - start
    costs = {
        "seconds": seconds,
        "seconds_per_pair": seconds / answers.fitted if answers.fitted else None,
        "fitted_pairs": answers.fitted,
        "start_memory_mib": start_memory,
        "peak_memory_mib": peak_memory_mib(),
        "gpu_memory_mib": peak_gpu_memory_mib(),
    }

    truth = patient.truth()
    drawn = (patient.held_out or patient.pairs)[0]
    grid = Grid.of(truth.series.images[drawn])
    start = time.perf_counter()
    answers.registration(drawn, grid)
    if answers.image is not None:
        answers.image(drawn, grid)
    wait_for_gpu()
    costs["render_seconds"] = time.perf_counter() - start

    scores: dict[str, Any] = {}
    for which, indices in {"seen": patient.pairs, "unseen": patient.held_out}.items():
        rows = [score(patient, truth, answers, i) for i in indices]
        if all(row for row, _ in rows):  # a mean over some of the images would compare unlike things
            scores |= {f"{which}_{name}": value for name, value in summary(rows).items()}
    return {"note": answers.note, "regions": ", ".join(patient.regions), **costs, **scores}

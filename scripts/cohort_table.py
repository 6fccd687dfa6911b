"""What has become of a cohort's patients: each one's state, seconds, scores and error; the mean of those done."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cohort_job import claimed
from series_tables import MEASURES, means, with_contour_means

from stnerp import MissingDependencyError
from stnerp.report import markdown_table, write_csv

DONE, FAILED, RUNNING, UNFINISHED = "done", "failed", "running", "not done"

EXPLAINED = """\
Each patient: the mean over its images; where scans were held out, over those. Last row: mean ± standard deviation
over the patients that are done. TRE and HD95 in mm; HD95 and Dice are means over the contours; a contour that is
lost in an image has a Dice of 0 there, and its patient no HD95. Folded: voxels with |J| ≤ 0 in an image. Time: all
steps, from starting Python to the last picture."""

Row = dict[str, Any]


def read_job(path: Path) -> Row:
    """A patient's `steps`, its `data`, the `seconds` that each step took which is done, and the last `failure`."""
    job: Row = json.loads(path.read_text(encoding="utf-8"))
    return job


def status_of(job: Row, path: Path) -> str:
    """What has become of a patient. A job that was killed wrote nothing: it is not done. Nor is one whose scores
    somebody has removed."""
    log = path.with_suffix(".log")
    if log.is_file():
        with log.open("ab") as file:
            if not claimed(file, shared=True):
                return RUNNING
    if job["failure"]:
        return FAILED
    scores = path.parents[1] / path.stem / "metrics.csv"
    return DONE if set(job["seconds"]) == set(job["steps"]) and scores.is_file() else UNFINISHED


def row_of(out: Path, name: str) -> Row:
    """A patient's row of summary.csv; `error` says why it isn't done."""
    path = out / "jobs" / f"{name}.json"
    job = read_job(path)
    status = status_of(job, path)
    row: Row = {"patient": name, "status": status, "seconds": sum(job["seconds"].values()) or None}
    if status == DONE:
        row |= scores_of(out / name / "metrics.csv")
    said = {
        FAILED: job["failure"],
        UNFINISHED: f"ended without a word, killed perhaps, or deleted; see {path.with_suffix('.log')}",
        RUNNING: "another command works on it",
    }
    row["error"] = said.get(status)
    return row


def scores_of(path: Path) -> Row:
    """Means over a patient's images of what metrics.csv says about stnerp; of those held out, where some were.

    A distance is NaN where its contour is lost in an image: the mean of the others would flatter.
    """
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("method", "stnerp") == "stnerp"]
    scores = [dict(_measured(with_contour_means(dict(_numbers_of(row))))) for row in rows]
    names = dict.fromkeys(name for row in scores for name in row)
    mean = {name: float(np.mean([row[name] for row in scores if name in row])) for name in names}
    return {"images": len(rows), **mean}


def _numbers_of(row: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    for name, text in row.items():
        if name not in ("method", "time", "image") and text and not math.isinf(float(text)):
            yield name, float(text)


def _measured(row: Row) -> Iterator[tuple[str, float]]:
    """An image's scores without those that had nothing to compare, NaN all of them. The distance of a contour that
    is lost, whose Dice is 0, stays."""
    for name, value in row.items():
        contour = name.removeprefix("hd95").removeprefix("mean_surface_distance").removesuffix("_mm")
        if not (math.isnan(value) and math.isnan(row.get(f"dice{contour}", math.nan))):
            yield name, value


def write_summary(out: Path, names: Iterable[str]) -> list[Row]:
    """summary.csv and summary.md of what is done by now; their rows."""
    rows = [row_of(out, name) for name in names]
    columns = [*dict.fromkeys(name for row in rows for name in row if name != "error"), "error"]
    write_csv(out / "summary.csv", [{name: row.get(name) for name in columns} for row in rows])
    missing = [row for row in rows if row["status"] != DONE]
    lines = [
        f"# {out.name}: {len(rows) - len(missing)} of {len(rows)} patients done",
        "",
        markdown_table(cells(rows)),
    ]
    if missing:
        lines += ["", *(f"- {row['patient']}: {row['status']}: {row['error']}" for row in missing)]
    (out / "summary.md").write_text("\n".join([*lines, "", EXPLAINED]) + "\n", encoding="utf-8")
    return rows


def cells(rows: Sequence[Row]) -> list[Row]:
    """A row for each patient and one for those that are done, as the tables of series write them."""
    done = [row for row in rows if row["status"] == DONE]
    table = [{"patient": row["patient"], "status": row["status"], **_scores([row])} for row in rows]
    if done:
        table.append({"patient": "mean", "status": f"{len(done)} {DONE}", **_scores(done)})
    titles = [title for title, _ in MEASURES.values()]
    columns = ["patient", "status", *titles[:2], "TRE before mm", *titles[2:], "time s"]
    return [{name: row[name] for name in columns if name in row} for row in table]


def _scores(rows: Sequence[Row]) -> Row:
    cells = means(rows)
    before = means([{"tre_mean_mm": row.get("tre_mean_before_mm")} for row in rows])
    if before:
        cells["TRE before mm"] = before["TRE mm"]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    if seconds:
        cells["time s"] = f"{np.mean(seconds):.1f}"
    return cells


def write_tensorboard(out: Path, names: Iterable[str]) -> list[Path]:
    """The loss of each patient's fits at each step, for TensorBoard.

    Raises:
        MissingDependencyError: TensorBoard isn't installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependencyError("tensorboard=true: pip install 'stnerp[tensorboard]'") from None
    folders = []
    for name in names:
        folder = out / "tensorboard" / name
        shutil.rmtree(folder, ignore_errors=True)  # else the same curve is drawn twice
        with SummaryWriter(str(folder)) as writer:
            for path in sorted((out / name).glob("*_history.csv")):
                with path.open(encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        writer.add_scalar(path.stem, float(row["loss"]), int(row["step"]))
        folders.append(folder)
    return folders

"""python benchmarks/table.py out=runs/benchmark

What run.py measured, as tables and a plot: benchmark.csv has a row per run; benchmark.md a table per case
with medians over seeds; accuracy_time.png error against wall time. run.py calls this by itself.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from cases import PLANS
from labels import LABELS
from methods import METHODS
from plain_axes import plain_axes

from stnerp import InputError
from stnerp.report import DPI, markdown_table, write_csv

Row = dict[str, Any]

EXPLAINED = """\
*seen*: the images that every method registers to the reference; *unseen*: held out from all of them. A method
for pairs answers an unseen time by mixing the displacements of its neighbours; blank: it has no answer.
Each row gives medians over its seeds. TRE (mm) over all points of these images together: mean / median / 95th
percentile. PSNR (dB, in the case's window as [0, 1]), SSIM, Dice and HD95: means over these images, of each
label in the order in which the column names them, where the reference reaches. Folded: voxels with |J| ≤ 0, all
seen and unseen images added, of the worst seed. SD log J: mean over the seen images. Time: seconds from files to a
model that answers, of all that the method fits; per pair: divided by the number of images fitted. Memory: the most
that the process held, and in brackets how much of it came after its packages were loaded."""


def write_tables(out: Path) -> list[Path]:
    """Write benchmark.csv, benchmark.md and accuracy_time.png from the results in `out`; nothing without any."""
    rows = read_rows(out / "results")
    if not rows:
        return []
    written = [write_csv(out / "benchmark.csv", rows), out / "benchmark.md"]
    written[1].write_text(markdown(rows), encoding="utf-8")
    if any("seconds" in row for row in rows):
        written.append(plot(out / "accuracy_time.png", rows))
    print(*(f"wrote {path}" for path in written), sep="\n")
    return written


def read_rows(folder: Path) -> list[Row]:
    """One row per run, in the order of cases, methods and seeds."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("[!.]*.json")]
    rows = []
    for record in records:
        asked, plan = record["arguments"], record["arguments"]["made_from"]["plan"]
        row = {"case": Path(asked["case"]).parent.name, "method": asked["method"], "seed": asked["seed"]}
        about = {"about": plan["about"], "device": asked["device"], "options": json.dumps(asked["options"])}
        rows.append({**row, "failure": record["failure"], **record["result"], **record["machine"], **about})
    order = {name: i for i, name in enumerate([*PLANS, *METHODS])}
    last = len(order)
    return sorted(rows, key=lambda r: (order.get(r["case"], last), order.get(r["method"], last), r["seed"]))


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row per case and method: the median of every number over the runs that didn't fail."""
    result = []
    for case, method in dict.fromkeys((row["case"], row["method"]) for row in rows):
        own = [row for row in rows if (row["case"], row["method"]) == (case, method)]
        good = [row for row in own if not row["failure"]]
        median: Row = {"case": case, "method": method, "seeds": len(good), "failures": len(own) - len(good)}
        for name in dict.fromkeys(name for row in good for name in row):
            values = [row[name] for row in good if _is_number(row.get(name))]
            if values and name != "seed":
                worst = name.endswith("folded_voxels")  # a seed that folds is not to be hidden by the others
                median[name] = float(max(values) if worst else np.median(values))
        median |= {name: good[0][name] if good else "" for name in ("note", "regions")}
        median["options"] = own[0]["options"]
        median["failure"] = next((row["failure"] for row in own if row["failure"]), "")
        result.append(median)
    return result


def markdown(rows: Sequence[Row]) -> str:
    """The whole report: what it was measured on, and a table per case."""
    parts = ["# Benchmark", _measured_on(rows), EXPLAINED]
    table = medians(rows)
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in table if row["case"] == case]
        about = next(row["about"] for row in rows if row["case"] == case)
        regions = _regions(own)
        if len(regions) > 1:
            others = "".join(f"; TRE {name}: in the {name}" for name in regions[1:])
            about += f" TRE: of points in the {regions[0]}{others}."
        parts += [f"## {case}", about, _table([_cells(row, own) for row in own])]
        if labels := _labels(own):
            contours = [_contour_cells(row, labels) for row in own]
            parts.append(_table([cells for cells in contours if any(list(cells.values())[1:])]))
        parts.append("\n".join(line for row in own for line in _notes(row)))
    return "\n\n".join(filter(None, parts)) + "\n"


def _cells(row: Row, of_case: Sequence[Row]) -> dict[str, str]:
    """A row of the Markdown table, as text."""
    cells = {"method": str(LABELS.get(row["method"], row["method"]))}
    for which in ("seen", "unseen"):
        keys = [f"{which}_tre_{key}_mm" for key in ("mean", "median", "p95")]
        cells[f"TRE {which}"] = _together(row, keys, 2)
        for region in _regions(of_case)[1:]:
            cells[f"TRE {region} {which}"] = _number(row.get(f"{which}_tre_{region.replace(' ', '_')}_mean_mm"), 2)
    for which in ("seen", "unseen"):
        cells[f"PSNR {which}"] = _number(row.get(f"{which}_psnr_db"), 2)
        cells[f"SSIM {which}"] = _number(row.get(f"{which}_ssim"), 3)
    folded = [row[name] for name in ("seen_folded_voxels", "unseen_folded_voxels") if name in row]
    cells["folded"] = f"{sum(folded):.0f}" if folded else ""
    cells["SD log J"] = _number(row.get("seen_sd_log_jacobian"), 3)
    cells["time s"] = _seconds(row.get("seconds"))
    cells["per pair s"] = _seconds(row.get("seconds_per_pair"))
    cells["pairs"] = f"{row['fitted_pairs']:.0f}" if row.get("fitted_pairs") else ""
    cells["memory MiB"] = _number(row.get("peak_memory_mib"), 0)
    if cells["memory MiB"]:
        cells["memory MiB"] += f" (+{row['peak_memory_mib'] - row['start_memory_mib']:.0f})"
    if any(other.get("gpu_memory_mib") for other in of_case):
        cells["GPU MiB"] = _number(row.get("gpu_memory_mib"), 0)
    return {**cells, "seeds": str(row["seeds"]), "failures": str(row["failures"])}


def _contour_cells(row: Row, labels: Sequence[str]) -> dict[str, str]:
    """A row of the table of contours, as text."""
    names = ", ".join(name.replace("_", " ") for name in labels)
    cells = {"method": str(LABELS.get(row["method"], row["method"]))}
    for which in ("seen", "unseen"):
        cells[f"Dice {which} ({names})"] = _together(row, [f"{which}_dice_{name}" for name in labels], 3)
        cells[f"HD95 mm {which}"] = _together(row, [f"{which}_hd95_{name}_mm" for name in labels], 1)
    return cells


def _notes(row: Row) -> list[str]:
    """What to know about a method's settings, and why it failed where it did."""
    options = "" if row["options"] == "{}" else f"changed on the command line: {row['options']}"
    about = "; ".join(filter(None, (row["note"], options)))
    name = LABELS.get(row["method"], row["method"])
    return [f"- {name}: {about}."] * bool(about) + [f"- {name} failed: {row['failure']}"] * bool(row["failure"])


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Without the columns that are empty in all rows."""
    return markdown_table(rows, [name for name in rows[0] if any(row[name] for row in rows)])


def _measured_on(rows: Sequence[Row]) -> str:
    """Hardware, versions, dates, commits; several of a kind are all named, for then it wasn't one run."""
    machines = {f"{row['cpu']}, {row['cores']} cores{_gpu(row)}, {row['system']}" for row in rows}
    days = sorted(str(row["date"])[:10] for row in rows)
    seeds = sorted({row["seed"] for row in rows})
    lines = {
        "machine": machines,
        "device": {row["device"] for row in rows},
        "versions": {row["versions"] for row in rows},
        "commit": {row["commit"] for row in rows},
        "date": dict.fromkeys([days[0], days[-1]]),
        "seeds": [", ".join(map(str, seeds))],
    }
    text = "\n".join(f"- {name}: {' | '.join(sorted(map(str, values)))}" for name, values in lines.items())
    if len(machines) > 1:
        text += "\n- **these runs come from more than one machine: don't compare their times**"
    return text


def _gpu(row: Row) -> str:
    return f", {row['gpu']}" if row["gpu"] else ""


# -- the plot

COLOURS = {
    "stnerp_fast": ("#e6550d", "o"),
    "stnerp_fast_prior": ("#a63603", "s"),
    "stnerp_fast_blend": ("#f2b134", "p"),
    "stnerp_paper": ("#fdae6b", "D"),
    "elastix_bspline": ("#1c7ed6", "^"),
    "ants_syn": ("#1f9e89", "v"),
    "greedy": ("#7b52ab", "P"),
    "convexadam": ("#d6336c", "X"),
    "dlir": ("#5c940d", "h"),
    "anatomy_cnn": ("#96640f", "d"),
    "idir": ("#868e96", "<"),
    "cycle_idir": ("#343a40", ">"),
}
LINES = {"no_motion": (0, (1, 2)), "nearest_phase": (0, (4, 2)), "linear_blend": (0, (6, 2, 1, 2))}


def plot(path: Path, rows: Sequence[Row]) -> Path:
    """Error (or PSNR, where no landmarks are known) against wall time, a panel per case.

    Without the known motion, which has neither.
    """
    from matplotlib.figure import Figure

    table = [row for row in medians(rows) if "seconds" in row and row["method"] != "known_motion"]
    cases = list(dict.fromkeys(row["case"] for row in table))
    across = min(3, len(cases))
    down = math.ceil(len(cases) / across)
    figure = Figure((4.3 * across, 3.5 * down + 0.9), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel in panels[len(cases) :]:
        panel.set_visible(False)
    for panel, case in zip(panels, cases, strict=False):
        own = [row for row in table if row["case"] == case]
        with_points = any("seen_tre_mean_mm" in row or "unseen_tre_mean_mm" in row for row in own)
        _panel(panel, own, "tre_mean_mm" if with_points else "psnr_db")
        region = _regions(own)[0] if with_points else ""
        of = "" if region in ("", "landmarks") else f" in the {region}"
        panel.set_title(case, fontsize=10, loc="left", weight="bold")
        panel.set_ylabel(f"mean TRE{of}, mm" if with_points else "PSNR, dB", fontsize=9)
        fitted = sorted({int(row["fitted_pairs"]) for row in own if row.get("fitted_pairs")})
        some = f" (methods for pairs: {fitted[0]} of {fitted[-1]} images)" if len(fitted) > 1 else ""
        panel.set_xlabel(f"files to model, s{some}", fontsize=9)
    shown = {row["method"] for row in table}
    handles = [*_method_handles(shown), *_marker_handles(table)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * across), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _panel(panel: Any, rows: Sequence[Row], score: str) -> None:
    values: list[float] = []  # of the points
    lines: list[float] = []
    for row in rows:
        method = row["method"]
        for which in ("seen", "unseen"):
            value = row.get(f"{which}_{score}")
            if value is None or not np.isfinite(value):
                continue
            (lines if method in LINES else values).append(value)
            if method in LINES:
                colour = "0.35" if which == "unseen" else "0.7"
                panel.axhline(value, color=colour, linewidth=1, linestyle=LINES[method], zorder=1)
            else:
                colour, marker = COLOURS.get(method, ("black", "*"))
                face, size = (colour, 6.5) if which == "seen" else ("none", 8.5)  # both show, one on the other
                style = {"color": colour, "markerfacecolor": face, "markersize": size, "linestyle": "none"}
                panel.plot(row["seconds"], value, marker=marker, zorder=3, **style)
    panel.set_xscale("log")
    seconds = [row["seconds"] for row in rows if row["method"] not in LINES]
    if seconds:
        panel.set_xlim(min(seconds) / 1.6, max(seconds) * 1.6)
    if score == "tre_mean_mm" and values and min(values) > 0:
        shown = [*values, *(value for value in lines if value < 3 * max(values))]  # 35 mm would flatten the rest
        panel.set_yscale("log")
        panel.set_ylim(min(shown) / 1.25, max(shown) * 1.25)
    plain_axes(panel)


def _method_handles(shown: Iterable[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    shown = set(shown)
    points = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, label=LABELS[name])
        for name, (colour, marker) in COLOURS.items()
        if name in shown
    ]
    lines = [
        Line2D([], [], linestyle=style, color="0.35", label=LABELS[name])
        for name, style in LINES.items()
        if name in shown
    ]
    return points + lines


def _marker_handles(rows: Sequence[Row]) -> list[Any]:
    """What filled and hollow mean, where both occur."""
    from matplotlib.lines import Line2D

    if not any(name.startswith("unseen_") for row in rows for name in row):
        return []
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "0.3"}
    return [
        Line2D([], [], **style, label="filled, light line: seen images"),
        Line2D([], [], **style, markerfacecolor="white", label="hollow, dark line: unseen images"),
    ]


# -- parts of the above


def _regions(rows: Sequence[Row]) -> list[str]:
    """Names of the regions whose points are scored, the headline's first."""
    names = next((str(row["regions"]) for row in rows if row.get("regions")), "")
    return names.split(", ") if names else []


def _labels(rows: Sequence[Row]) -> list[str]:
    """Names of the labels that are scored, as they are part of a column's name."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = (name.partition("seen_dice_")[2] for name in names)  # of unseen_dice_ too
    return list(dict.fromkeys(name for name in found if name))


def _together(row: Mapping[str, Any], names: Sequence[str], digits: int) -> str:
    cells = [_number(row.get(name), digits) for name in names]
    return " / ".join(cell or "–" for cell in cells) if any(cells) else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def main(arguments: list[str]) -> None:
    settings = dict(argument.partition("=")[::2] for argument in arguments)
    if set(settings) - {"out"}:
        raise InputError(f"{', '.join(settings)}: give out=, the folder that run.py wrote into")
    if not write_tables(Path(settings.get("out", "runs/benchmark"))):
        raise InputError("out: holds no results/*.json; run benchmarks/run.py first")


if __name__ == "__main__":
    from run_directory import launch

    launch(lambda: main(sys.argv[1:]))

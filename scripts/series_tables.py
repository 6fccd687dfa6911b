"""Rows of the series' tables, from records of eval_4dct_*.py and eval_longitudinal_*.py, as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import Record, notes
from run_directory import logger, wrote
from series_methods import LABELS, METHODS
from truth import lacking_lines

from stnerp.report import markdown_table, text_table, write_csv

Row = dict[str, Any]

# Columns of the tables, and how many digits; Dice and HD95 are means over the contours of `data.contours`.
MEASURES = {
    "psnr_db": ("PSNR dB", 2),
    "ssim": ("SSIM", 3),
    "tre_mean_mm": ("TRE mm", 2),
    "dice": ("Dice", 3),
    "motion_dice": ("Dice motion", 3),
    "hd95_mm": ("HD95 mm", 2),
    "folded_voxels": ("folded", 0),
    "sd_log_jacobian": ("SD log J", 3),
}

NOTHING = "Nothing was measured."
PATHS = ("manifest", "root", "folder", "images", "ct")  # settings of data

CARRIED = """\
A voxel gets the label that has most weight around the point it comes from, in the paper the nearest (Eq. 7, 8):
carried by the known motion to the third of a stand-in's five scans, a tumour has a Dice of 0.953 here, with the
nearest label 0.931."""

PARTS = """\
"(n of m)": the mean of n of the row's m images; with the others there is nothing to compare, or a contour is lost.
Methods whose numbers differ are compared over different images."""

EXPLAINED = f"""\
Cells: mean ± standard deviation over cases and images. PSNR and SSIM: in the window as [0, 1], on the scan's own
grid; where what is shown (the reference, or images in its place) has another, over the voxels that this reaches.
TRE: of the scan's landmarks, mapped to the reference, in mm, without snapping. Dice and HD95: means over the
reference's contours (`data.contours`), carried to the scan, where the reference reaches; a contour that is lost
has a Dice of 0 and no HD95.
{PARTS}
{CARRIED}
*Dice motion*: with the same contours carried by a stand-in's own motion, so that the scan's
voxels, into which its own contours are cut anew, cost nothing. Folded: mean number of voxels with |J| ≤ 0 in an
image. Time: seconds from files to a model that answers for the whole series, Ref-Net and pre-alignment included;
methods for pairs: all of their pairs. For an unseen scan, methods for pairs mix the displacements of the scans
before and after it; IDIR draws its points in the lungs, elsewhere its answers mean little. DLIR and the CNN with
anatomical constraints are fitted to the pair itself here, without a cohort and without key points: not what their
authors published. *Nearest image* and *linear blend* need no registration. Empty: no answer, or nothing known to
compare it with."""


def image_rows(records: Iterable[Record]) -> list[Row]:
    """A row for each image that was scored, with what it is a result of."""
    rows = []
    for record in records:
        asked = record["arguments"]
        about = {name: asked[name] for name in ("case", "held_out", "scheme", "method") if name in asked}
        contours = asked.get("data", {}).get("contours")
        rows += [about | with_contour_means(image, contours) for image in record["result"].get("images", [])]
    return rows


def with_contour_means(image: Mapping[str, Any], contours: Sequence[str] | None = None) -> Row:
    """An image's row with means over the contours that it has or that were carried there.

    `dice` and `hd95_mm`; `motion_dice` where the motion is known. What train_def.py says of before the fit,
    `dice_lung_before`, is no other contour.

    A contour that is lost has no HD95: then there is no mean of them, NaN.

    Args:
        contours: names of those that count; None: all.
    """
    row = dict(image)

    def scored(kind: str) -> list[str]:
        names = [key.removeprefix(kind) for key, value in image.items() if key.startswith(kind) and value == value]
        return [name for name in names if contours is None or name in (c.replace(" ", "_") for c in contours)]

    names = [
        name
        for name in scored("dice_")
        if not name.endswith("_before") or f"dice_{name.removesuffix('_before')}" not in image
    ]
    if names:
        row["dice"] = float(np.mean([image[f"dice_{name}"] for name in names]))
        if distances := [image[f"hd95_{name}_mm"] for name in names if f"hd95_{name}_mm" in image]:
            row["hd95_mm"] = float(np.mean(distances))
    if moved := scored("motion_dice_"):
        row["motion_dice"] = float(np.mean([image[f"motion_dice_{name}"] for name in moved]))
    return row


def means(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> Row:
    """Mean ± standard deviation of each measure, by the name of its column; of how many rows, if not all."""
    cells: Row = {}
    for name, (title, digits) in MEASURES.items():
        values = [row[name] for row in rows if row.get(name) is not None and np.isfinite(row[name])]
        if values:
            spread = f" ± {np.std(values):.{digits}f}" if len(values) > 1 and name != "folded_voxels" else ""
            some = f" ({len(values)} of {len(rows)})" if len(values) < len(rows) else ""
            mean = float(np.mean(values))
            few = name == "folded_voxels" and mean < 10  # one in many images is not none
            cells[f"{prefix}{title}"] = (f"{mean:.2g}" if few else f"{mean:.{digits}f}") + spread + some
    return cells


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that have a result, by method, in the order of `METHODS`."""
    found = {m: [r for r in records if r["arguments"]["method"] == m and r["result"]] for m in METHODS}
    return {method: own for method, own in found.items() if own}


def seconds(records: Sequence[Record]) -> str:
    return f"{np.mean([record['result']['seconds'] for record in records]):.1f}"


def rows_of_methods(records: Sequence[Record], rows: Sequence[Row]) -> list[Row]:
    """A row per method: the unseen images, those that the fit saw, and the time."""
    table = []
    for method, own in by_method(records).items():
        mine = [row for row in rows if row["method"] == method]
        row: Row = {"method": LABELS[method], "fits": str(len(own))}
        row |= means([r for r in mine if r["unseen"]], "unseen ")
        row |= means([r for r in mine if not r["unseen"]], "seen ")
        table.append({**row, "time s": seconds(own)})
    return table


def about(records: Sequence[Record]) -> str:
    """Which data, settings and machine the table is of."""
    cases = {r["arguments"]["case"]: r["arguments"]["data"] for r in records}
    common = records[0]["arguments"]["common"]
    lines = [f"- case {number}: {told(section)}" for number, section in sorted(cases.items())]
    lines.append(f"- pre-alignment: {common['align']}; seed: {common['seed']}")
    lines.append(f"- times: on {' | '.join(sorted({record['hardware'] for record in records}))}")
    return "\n".join(lines)


def told(section: Mapping[str, Any]) -> str:
    """A `data` section in a line."""
    names = ["kind", *PATHS, "patient", "series", "date", "dates", "phase", "days", "rois", "contours"]
    names += ["size", "spacing_mm", "amplitude_si_mm"]
    names += ["tumour_scale", "shift_mm", "motion", "noise_hu", "phases", "seed", "window"]
    parts = [f"{name} {_as_told(name, section[name])}" for name in names if section.get(name) is not None]
    stand_in = section["kind"] in ("phantom", "simulated", "tcia_4d_lung_phantom")
    return ("**stand-in, don't compare with the paper's figures**; " if stand_in else "") + ", ".join(parts)


def _as_told(name: str, value: Any) -> str:
    """A setting's value; of a path the last name, since folders above it tell of a machine."""
    if isinstance(value, list):
        return f"[{', '.join(_as_told(name, one) for one in value)}]"
    return (Path(str(value)).name or str(value)) if name in PATHS else str(value)


def write_report(
    out: Path,
    name: str,
    title: str,
    records: Sequence[Record],
    rows: Sequence[Row],
    sections: Sequence[tuple[str, Sequence[Row]]],
    missing: Mapping[str, str],
    explained: str = EXPLAINED,
) -> None:
    """metrics.csv (a row per image) and `name`.md (tables with headings; the first has none, and is logged)."""
    wrote(write_csv(out / "metrics.csv", rows))
    parts = [f"# {title}", about(records)]
    measured = any(record["result"] for record in records)
    for heading, table in sections:
        parts += [f"## {heading}"] if heading else [] if measured else [NOTHING]
        parts += [markdown_table(table)] if table else []
        if not heading:
            parts.append(explained)
    if lines := [*notes(records, missing, LABELS), *lacking_lines(records, rows)]:
        parts += ["## What is changed or missing", "\n".join(lines)]
    path = out / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    wrote(path)
    logger.info("\n%s\n", text_table(sections[0][1]) if measured else NOTHING)

"""python scripts/figures.py out=runs/table3

The paper's figures from what eval_4dct_interpolation.py or an eval_longitudinal_*.py left in a run directory,
without a fit: metrics.csv, results/ and pictures/. Whatever is there is drawn, into figures/:

- along_series-*.png: PSNR and SSIM of every image of a case, the one left out marked (Figure 4)
- slices-*.png: reference, reference as Ref-Net draws it, target, prediction, deformation (Figures 5 and 6)
- contours-*.png: target and prediction of every image with their contours (red), and the deformation (Figure 7)
- dice.png: box plots of Dice, by method and range (Figure 8)
- methods-*.png: a pair, registered by every method: prediction with contours, and deformation (Figures 9 and 10)

Deformations are drawn as the paper does it: x is blue, y green, z red; grey: no motion.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from configuration import DictConfig, hydra
from labels import LABELS
from results import chosen_methods, record_of
from run_directory import CONFIGS, launch, plain, run_directory, wrote
from saved_slices import Slices, load_slices
from series_tables import image_rows

from stnerp import InputError
from stnerp.report import bgr, new_figure, save_figure

PANEL_INCH = 1.5
STEM = re.compile(r"case(?P<case>\d+)-(?:without(?P<without>\d+)|(?P<pair>(?:long|short)\d+to\d+))-(?P<rest>.+)")
# Whose output is drawn.
DRAWN = (
    "eval_4dct_interpolation.py",
    "eval_longitudinal_interpolation.py",
    "eval_longitudinal_ablation.py",
    "eval_longitudinal_registration.py",
)
Draws = Callable[[Path, Sequence[Mapping[str, str]], Sequence[Path]], list[Path]]
Panel = tuple[np.ndarray, np.ndarray | None]  # grey or RGB, and a mask to draw over it


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="figures")
def main(config: DictConfig) -> None:
    with run_directory(
        config, "figures", ("figures/*.png",), {"metrics.csv": f"run one of {', '.join(DRAWN)} first"}
    ) as out:
        with open(out / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        methods = None if config.methods is None else chosen_methods(plain(config.methods), {}, LABELS)
        draw_all = figures_of(rows, out)
        chosen = [row for row in rows if methods is None or row["method"] in methods]
        files = [path for path in sorted((out / "pictures").glob("*.npz")) if kept(path, methods)]
        if not chosen:
            raise InputError(f"methods: {out / 'metrics.csv'} has none of {methods}")
        written = draw_all(out, chosen, files)
        if not written:
            raise InputError(
                f"{out}: nothing to draw, metrics.csv has no Dice and pictures/ no slices of these methods"
            )
        wrote(*written)


def figures_of(rows: Sequence[Mapping[str, str]], out: Path) -> Draws:
    """What draws such rows of metrics.csv.

    Raises:
        InputError: rows of a script whose output isn't drawn here.
    """
    columns = set(rows[0]) if rows else set()
    if {"case", "held_out", "method"} <= columns:
        return series_figures
    if {"case", "scheme", "method"} <= columns:
        return pair_figures
    raise InputError(
        f"{out / 'metrics.csv'}: isn't of {', '.join(DRAWN[:-1])} or {DRAWN[-1]}, whose output is drawn here"
    )


def series_figures(out: Path, rows: Sequence[Mapping[str, str]], files: Sequence[Path]) -> list[Path]:
    folder = out / "figures"
    return [*along_series(folder, rows), *slices_figures(folder, files), *contour_figures(folder, files)]


def pair_figures(out: Path, rows: Sequence[Mapping[str, str]], files: Sequence[Path]) -> list[Path]:
    folder = out / "figures"
    return [*dice_boxes(folder, rows), *method_figures(folder, files, scores_of(out / "results"))]


def kept(path: Path, methods: Sequence[str] | None) -> bool:
    parts = STEM.fullmatch(path.stem)
    return parts is not None and (methods is None or method_of(path) in methods)


def method_of(path: Path) -> str:
    parts = STEM.fullmatch(path.stem)
    assert parts is not None
    return re.sub(r"-scan\d+$", "", parts["rest"])


def number(row: Mapping[str, str], name: str) -> float:
    return float(row[name]) if row.get(name) else float("nan")


def scores_of(results: Path) -> dict[str, Mapping[str, Any]]:
    """Each pair's scores by the name of its record, which its picture shares."""
    records = {path.stem: record_of(path) for path in results.glob("[!.]*.json")}
    return {name: row for name, record in records.items() for row in image_rows([record])}


# -- curves and boxes


def along_series(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    """Figure 4: PSNR and SSIM of every image, for each case and image left out."""
    written = []
    for case, scan in sorted({(row["case"], row["held_out"]) for row in rows}):
        mine = [row for row in rows if (row["case"], row["held_out"]) == (case, scan)]
        figure = new_figure((9.0, 3.4), layout="constrained")
        for panel, (name, title) in zip(
            figure.subplots(1, 2), {"psnr_db": "PSNR dB", "ssim": "SSIM"}.items(), strict=True
        ):
            for method in dict.fromkeys(row["method"] for row in mine):
                own = sorted((number(row, "scan"), number(row, name)) for row in mine if row["method"] == method)
                style = "o-" if len(own) > 1 else "D"
                panel.plot(*np.transpose(own), style, markersize=4, linewidth=1.2, label=LABELS[method])
            panel.axvline(float(scan), color="0.6", linewidth=6, alpha=0.3, zorder=0)
            panel.set_xlabel("scan")
            panel.set_ylabel(title)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"Case {case}, scan {scan} (grey) left out of the fit", fontsize=10)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
        written.append(save_figure(figure, folder / f"along_series-case{case}-without{scan}.png"))
    return written


def dice_boxes(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    """Figure 8: Dice of the carried contours, a box per method, a panel per range."""
    rows = [row for row in rows if row.get("dice")]
    schemes = [scheme for scheme in ("long", "short") if any(row["scheme"] == scheme for row in rows)]
    if not schemes:
        return []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = new_figure((1.5 + 4.0 * len(schemes), 1.2 + 0.34 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharey=True, sharex=True, squeeze=False)[0]
    for panel, scheme in zip(panels, schemes, strict=True):
        values = [
            [number(r, "dice") for r in rows if (r["scheme"], r["method"]) == (scheme, method)]
            for method in methods
        ]
        panel.boxplot(values, orientation="horizontal", widths=0.6, medianprops={"color": "tab:red"})
        panel.set_yticks(range(1, len(methods) + 1), [LABELS[method] for method in methods])
        panel.set_xlabel("Dice")
        panel.set_title(f"{scheme} range", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return [save_figure(figure, folder / "dice.png")]


# -- slices


def slices_figures(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Figures 5 and 6: rows as in the paper, a column per slice, for each image that was left out."""
    written = []
    for path in files:
        parts = STEM.fullmatch(path.stem)
        assert parts is not None
        if path.stem.endswith(f"-scan{parts['without']}"):
            slices = load_slices(path)
            names = {
                "reference": "reference",
                "rendered": "reference,\nby Ref-Net",
                "target": "target",
                "prediction": "prediction",
            }
            grid = [(title, grey(slices, name)) for name, title in names.items() if name in slices]
            if "displacement_mm" in slices:
                grid.append(("deformation", colours(slices, scale_mm(slices))))
            title = f"Case {parts['case']}, scan {parts['without']}, never seen: {LABELS[method_of(path)]}"
            written.append(draw(folder / f"slices-{path.stem}.png", grid, slices["pixel_mm"], title))
    return written


def contour_figures(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Figure 7: for each fit, the middle slice of every image, with its contours."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(re.sub(r"-scan\d+$", "", path.stem), []).append(path)
    written = []
    for stem, own in groups.items():
        parts = STEM.fullmatch(stem)
        own.sort(key=lambda path: int(path.stem.rpartition("-scan")[2]))
        loaded = [(int(path.stem.rpartition("-scan")[2]), load_slices(path)) for path in own]
        loaded = [(scan, slices) for scan, slices in loaded if "mask" in slices and "carried" in slices]
        if len(loaded) < 2 or parts is None:
            continue
        scale = max(scale_mm(slices) for _, slices in loaded)
        grid: list[tuple[str, list[Panel]]] = []
        for title, name, mask in (("target", "target", "mask"), ("prediction", "prediction", "carried")):
            grid.append((title, [middle(grey(slices, name, mask)) for _, slices in loaded]))
        if all("displacement_mm" in slices for _, slices in loaded):
            grid.append(("deformation", [middle(colours(slices, scale)) for _, slices in loaded]))
        heads = [f"scan {scan}{', unseen' if str(scan) == parts['without'] else ''}" for scan, _ in loaded]
        title = f"Case {parts['case']}, without scan {parts['without']}: {LABELS[method_of(own[0])]}"
        written.append(draw(folder / f"contours-{stem}.png", grid, loaded[0][1]["pixel_mm"], title, heads))
    return written


def method_figures(folder: Path, files: Sequence[Path], scores: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Figures 9 and 10: for each pair, the target, and each method's prediction and deformation."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        parts = STEM.fullmatch(path.stem)
        assert parts is not None
        groups.setdefault((parts["case"], parts["pair"]), []).append(path)
    written = []
    for (case, pair), own in sorted(groups.items()):
        in_order = sorted(own, key=lambda path: list(LABELS).index(method_of(path)))
        loaded = [(path, load_slices(path)) for path in in_order]
        first = loaded[0][1]
        scale = max(scale_mm(slices) for _, slices in loaded)
        blank: Panel = (np.ones_like(first["target"][0], dtype=float), None)
        predictions, deformations = [middle(grey(first, "target", "mask"))], [blank]
        heads = ["target"]
        for path, slices in loaded:
            predictions.append(middle(grey(slices, "prediction", "carried")))
            deformations.append(middle(colours(slices, scale)) if "displacement_mm" in slices else blank)
            row = scores.get(path.stem, {})
            heads.append(
                LABELS[method_of(path)].replace(", ", ",\n")
                + (f"\nDice {row['dice']:.3f}" if "dice" in row else "")
                + f"\nfolded {row.get('folded_voxels', 0)}"
            )
        grid = [("prediction", predictions), ("deformation", deformations)]
        path = folder / f"methods-case{case}-{pair}.png"
        written.append(draw(path, grid, first["pixel_mm"], f"Case {case}, {described(pair)}", heads))
    return written


def described(pair: str) -> str:
    """long1to4 in words."""
    scheme, earlier, later = re.fullmatch(r"(long|short)(\d+)to(\d+)", pair).groups()  # type: ignore[union-attr]
    return f"{scheme} range, scan {earlier} to {later}"


def grey(slices: Slices, name: str, mask: str | None = None) -> list[Panel]:
    """The panels of an image, a slice each, with its contours where they are known."""
    masks = slices.get(mask) if mask is not None else None
    return [(image.astype(float), None if masks is None else masks[k]) for k, image in enumerate(slices[name])]


def colours(slices: Slices, scale: float) -> list[Panel]:
    return [(bgr(u.astype(float), scale), None) for u in slices["displacement_mm"]]


def scale_mm(slices: Slices) -> float:
    """The largest component of a displacement, in mm."""
    return float(np.abs(slices["displacement_mm"]).max()) or 1.0 if "displacement_mm" in slices else 1.0


def middle(panels: Sequence[Panel]) -> Panel:
    return panels[len(panels) // 2]


def draw(
    path: Path,
    grid: Sequence[tuple[str, Sequence[Panel]]],
    pixel_mm: np.ndarray,
    title: str,
    heads: Sequence[str] | None = None,
) -> Path:
    """Rows of panels with a name on the left, millimetres to scale; contours filled in red."""
    height, width = grid[0][1][0][0].shape[:2]
    ratio = height * pixel_mm[0] / (width * pixel_mm[1])
    columns = max(len(panels) for _, panels in grid)
    lines = max((head.count("\n") + 1 for head in heads or []), default=0)
    left, top = 0.95, 0.32 + 0.15 * lines
    size = (left + columns * PANEL_INCH, top + len(grid) * PANEL_INCH * ratio)
    figure = new_figure(size)
    figure.text(0.5, 1 - 0.16 / size[1], title, ha="center", va="center", fontsize=9, weight="bold")
    for i, (name, panels) in enumerate(grid):
        y = top + i * PANEL_INCH * ratio
        at = 1 - (y + PANEL_INCH * ratio / 2) / size[1]
        figure.text((left - 0.06) / size[0], at, name, ha="right", va="center", fontsize=8)
        for k, (image, mask) in enumerate(panels):
            x = left + k * PANEL_INCH
            box = (x, size[1] - y - PANEL_INCH * ratio, PANEL_INCH * 0.98, PANEL_INCH * ratio * 0.98)
            panel = figure.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
            panel.set_axis_off()
            panel.imshow(image, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="antialiased")
            if mask is not None and mask.any():
                over = np.zeros((*mask.shape, 4))
                over[mask] = (1, 0, 0, 0.45)
                panel.imshow(over, aspect="auto", interpolation="nearest")
            if i == 0 and heads:
                panel.set_title(heads[k], fontsize=7, pad=2)
    return save_figure(figure, path)


if __name__ == "__main__":
    launch(main)

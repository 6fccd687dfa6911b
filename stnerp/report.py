"""Pictures and tables of a result. The only file that knows matplotlib, and only while it draws."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError, MissingDependencyError
from stnerp.geometry import Grid
from stnerp.metrics import psnr_db

Row = Mapping[str, Any]
Contours = Mapping[str, tuple[np.ndarray | None, np.ndarray]]

COLOURS = ("#e6550d", "#1f9e89", "#7b52ab", "#d6336c", "#b8860b", "#1c7ed6")
DPI = 150
PANELS_INCH = (7.5, 11.0)  # the most that the panels of an overview take, width and height
GAP_INCH = 0.06
CENTROID = {  # panels of curves over time
    "centroid x, to left (mm)": ["shift_x_mm"],
    "centroid y, to posterior (mm)": ["shift_y_mm"],
    "centroid z, to head (mm)": ["shift_z_mm"],
}


# -- pictures


def overview(
    path: str | Path,
    *,
    reference: np.ndarray,
    target: np.ndarray | None,
    prediction: np.ndarray,
    displacement_mm: np.ndarray,
    grid: Grid,
    contours: Contours | None = None,
    title: str | None = None,
    window: tuple[float, float] = (0, 1),
    mask: np.ndarray | None = None,
) -> Path:
    """Reference, target, prediction, their difference and the deformation in three planes, as a picture.

    Upright whatever the grid's orientation (the grid's axis nearest to each of the patient's is taken for
    it): head up, anterior up in axial slices, the patient's right on the left, millimetres to scale. The
    slices go through the centre of the contours or, without any, through the centre of the motion (voxels
    weighted by its square).

    Args:
        path: where to write; the ending gives the format (.png, .pdf, ...).
        reference, target, prediction: (z, y, x); without a target (an unmeasured time) its row and the
            difference's are left out.
        displacement_mm: target to reference, world LPS mm, (z, y, x, 3).
        grid: of all arrays.
        contours: name -> (true or None, predicted), masks (z, y, x) that are non-zero inside.
        title: a line on top.
        window: intensities shown as black and white.
        mask: (z, y, x), non-zero where the PSNR counts; None: everywhere.

    Returns:
        The path written.

    Raises:
        InputError: arrays that don't fit the grid, a path that can't be written.
        MissingDependencyError: matplotlib isn't installed.
    """
    contours = contours or {}
    arrays = {"reference": reference, "target": target, "prediction": prediction, "mask": mask}
    arrays |= {f"contour {name}, predicted": pair[1] for name, pair in contours.items()}
    arrays |= {f"contour {name}, true": pair[0] for name, pair in contours.items()}
    for name, array in arrays.items():
        if array is not None and np.shape(array) != grid.shape:
            raise InputError(f"{name}: shape {np.shape(array)} does not fit the grid's {grid.shape}")
    if np.shape(displacement_mm) != (*grid.shape, 3):
        raise InputError(
            f"displacement: shape {np.shape(displacement_mm)} does not fit the grid's {(*grid.shape, 3)}"
        )

    low, high = window
    scale_mm = float(np.abs(displacement_mm).max()) or 1.0
    masks = {
        name: tuple(None if m is None else _upright(np.asarray(m) != 0, grid) for m in pair)
        for name, pair in contours.items()
    }
    grey = {"cmap": "gray", "vmin": low, "vmax": high}
    rows: list[tuple[str, np.ndarray, dict[str, Any]]] = [("reference", _upright(reference, grid), grey)]
    if target is not None:
        difference = np.abs(np.asarray(target, float) - prediction)
        most = (high - low) / 4
        psnr = psnr_db(prediction, target, data_range=high - low, mask=mask)
        rows += [
            ("target", _upright(target, grid), grey),
            ("prediction", _upright(prediction, grid), grey),
            (
                f"|target − prediction|\n0 (black) to {most:.3g}\nPSNR {psnr:.1f} dB",
                _upright(difference, grid),
                {"cmap": "inferno", "vmin": 0, "vmax": most},
            ),
        ]
    else:
        rows += [("prediction", _upright(prediction, grid), grey)]
    rows += [("deformation\n(blue x, green y,\nred z)", bgr(_upright(displacement_mm, grid), scale_mm), {})]

    spacing = Grid.of(sitk.DICOMOrient(grid.image(np.zeros(grid.shape, np.uint8)), "LPS")).spacing_mm
    centre = _centre(_upright(displacement_mm, grid), [m for pair in masks.values() for m in pair])
    (nz, ny, nx), (sx, sy, sz) = rows[0][1].shape, spacing
    sides_mm = [(nx * sx, ny * sy), (nx * sx, nz * sz), (ny * sy, nz * sz)]

    # One scale for all panels: widths side by side, rows as high as the highest plane.
    wide_mm, high_mm = sum(w for w, _ in sides_mm), max(h for _, h in sides_mm)
    inch = min(PANELS_INCH[0] / wide_mm, PANELS_INCH[1] / (len(rows) * high_mm))
    left, top, below = 1.45, 0.62 if title else 0.34, 0.95 if masks else 0.62
    width = left + wide_mm * inch + 2 * GAP_INCH + 0.12
    height = top + len(rows) * (high_mm * inch + GAP_INCH) + below
    figure = new_figure((width, height))

    def axes(x: float, y_from_top: float, w: float, h: float) -> Any:
        panel = figure.add_axes((x / width, 1 - (y_from_top + h) / height, w / width, h / height))
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_visible(False)
        return panel

    if title:
        figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=11, weight="bold")
    y = top
    for name, volume, style in rows:
        middle = 1 - (y + high_mm * inch / 2) / height
        figure.text((left - 0.1) / width, middle, name, ha="right", va="center", fontsize=8)
        x = left
        for plane, (w_mm, h_mm) in enumerate(sides_mm):
            w, h = w_mm * inch, h_mm * inch
            panel = axes(x, y + (high_mm - h_mm) * inch / 2, w, h)
            panel.imshow(_slice(volume, plane, centre), aspect="auto", interpolation="antialiased", **style)
            if name in ("target", "prediction"):
                _draw_contours(panel, masks, plane, centre)
            if y == top:
                _letters(panel, ("R", "A") if plane == 0 else ("R", "S") if plane == 1 else ("A", "S"))
                middle = (x + w / 2) / width
                where = ("axial", "coronal", "sagittal")[plane]
                figure.text(middle, 1 - (top - 0.12) / height, where, ha="center", va="center", fontsize=8)
            x += w + GAP_INCH
        y += high_mm * inch + GAP_INCH

    # The colours' scale: a bar for each component, from its smallest to its largest value.
    bar = (width - left - 0.12 - 2 * 0.25) / 3
    for i, label in enumerate(("x  (to left)", "y  (to posterior)", "z  (to head)")):
        ramp = np.zeros((1, 128, 3))
        ramp[..., i] = np.linspace(-scale_mm, scale_mm, 128)
        panel = axes(left + i * (bar + 0.25), y + 0.1, bar, 0.12)
        panel.imshow(bgr(ramp, scale_mm), aspect="auto", extent=(-1, 1, 0, 1))
        ticks = panel.set_xticks([-1, 0, 1], [f"−{_text(scale_mm, 2)}", "0", f"+{_text(scale_mm, 2)}"], fontsize=7)
        for tick, side in zip(ticks, ("left", "center", "right"), strict=True):
            tick.label1.set_horizontalalignment(side)
        panel.tick_params(length=0, pad=2)
        panel.set_xlabel(label, fontsize=7, labelpad=1)
    figure.text(
        (left - 0.1) / width,
        1 - (y + 0.16) / height,
        "mm, target to reference",
        ha="right",
        va="center",
        fontsize=7,
    )
    if masks:
        _contour_legend(figure, list(masks), any(true is not None for true, _ in masks.values()))
    return save_figure(figure, path)


def loss_curve(path: str | Path, history: Sequence[Row]) -> Path:
    """The loss over the steps of a fit and, below it, each of its terms, as a picture.

    A panel has a logarithmic axis where all its values are positive and span a factor of ten. A dotted
    line marks each new level. Steps that start anew at a level are counted on.

    Args:
        path: where to write.
        history: one entry a step with `step`, `level` (optional), `loss`; every other number is a term.

    Returns:
        The path written.

    Raises:
        InputError: an empty history, a path that can't be written.
        MissingDependencyError: matplotlib isn't installed.
    """
    if not history:
        raise InputError("history: empty; nothing to draw")
    steps = np.array([row.get("step", i) for i, row in enumerate(history)], float)
    if np.any(np.diff(steps) <= 0):
        steps = np.arange(len(history), dtype=float)
    levels = [row.get("level") for row in history]
    starts = [i for i in range(len(levels)) if levels[i] is not None and (i == 0 or levels[i] != levels[i - 1])]
    terms = [name for name in _columns(history) if name not in ("step", "level", "loss")]
    terms = [name for name in terms if all(_is_number(row.get(name, 0.0)) for row in history)]

    names = ["loss", *terms]
    heights = [1.8, *(1.0 for _ in terms)]
    figure = new_figure((6.5, 1.4 * sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for name, panel, colour in zip(names, panels, _colours(len(names)), strict=True):
        values = np.array([row.get(name, np.nan) for row in history], float)
        panel.plot(steps, values, color=colour, linewidth=1.2)
        finite = values[np.isfinite(values)]
        if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
            panel.set_yscale("log")
        for i in starts:
            if i > 0:
                panel.axvline(steps[i], color="0.6", linewidth=0.8, linestyle=":")
            if name == "loss":
                where = {"xycoords": ("data", "axes fraction"), "ha": "left", "va": "bottom"}
                text = f"level {_text(levels[i], 4)}"
                panel.annotate(text, (steps[i], 1.01), fontsize=7, color="0.35", **where)
        _plain(panel)
        panel.set_ylabel(name, fontsize=9)
    figure.align_ylabels(panels)
    panels[-1].set_xlabel("step", fontsize=9)
    return save_figure(figure, path)


def roi_curves(path: str | Path, rows: Sequence[Row], time_label: str = "time") -> Path:
    """Volume and centroid of regions of interest over time, as a picture.

    The centroid is shown relative to the reference's; dots mark measured times.

    Args:
        path: where to write.
        rows: one entry a time (and region) with `time`, `volume_ml`, `shift_x_mm`, `shift_y_mm`, `shift_z_mm`
            (world LPS, as from `stnerp.monitor.monitor`), and optionally `roi` (its name) and `measured` (whether
            there is a scan of that time).
        time_label: of the time axis, with its unit.

    Returns:
        The path written.

    Raises:
        InputError: no rows, a key that is missing, a path that can't be written.
        MissingDependencyError: matplotlib isn't installed.
    """
    panels = {"volume (ml)": ["volume_ml"], **CENTROID}
    _check_rows(rows, [key for keys in panels.values() for key in keys])
    return _time_curves(path, rows, panels, time_label)


def monitor_curves(path: str | Path, rows: Sequence[Row], time_label: str = "time") -> Path:
    """What `stnerp.monitor.monitor` says of regions of interest over time, as a picture.

    Volume (and, dotted, the count of voxels), shift of the centroid, mean and 95th percentile (dotted) of the
    surface's displacement, density, and the extent's three sides; where scans were compared, the change of their
    intensity. Dots mark measured times.

    Args:
        path: where to write.
        rows: as from `stnerp.monitor.monitor`.
        time_label: of the time axis, with its unit.

    Returns:
        The path written.

    Raises:
        InputError: no rows, a key that is missing, a path that can't be written.
        MissingDependencyError: matplotlib isn't installed.
    """
    panels = {
        "volume (ml); dotted: voxels counted": ["volume_ml", "voxel_volume_ml"],
        **CENTROID,
        "displacement of the surface (mm); dotted: 95 %": ["surface_mean_mm", "surface_p95_mm"],
        "density, by the change of volume (%)": ["density_change_percent"],
        "extent (mm); dotted: y, dashed: z": ["extent_x_mm", "extent_y_mm", "extent_z_mm"],
    }
    _check_rows(rows, [key for keys in panels.values() for key in keys])
    if any(row.get("intensity_change") is not None for row in rows):
        panels["mean intensity of the scans, change"] = ["intensity_change"]
    return _time_curves(path, rows, panels, time_label)


def trust_overview(path: str | Path, columns: Sequence[Row], *, limit_mm: float, title: str | None = None) -> Path:
    """What is to be trusted, a column for each time: image, local correlation with the scan, and uncertainty.

    Coronal slices, upright, through a point of each column. The uncertainty's colours end at twice its limit.

    Args:
        path: where to write.
        columns: of each time `title`, `ok` (its verdict), `centre_mm` (LPS, what the slice goes through), and
            `image` (in [0, 1]), `correlation`, `uncertainty_mm`: SimpleITK images of one field of view, or None.
        limit_mm: uncertainty that is still normal.
        title: a line on top.

    Returns:
        The path written.

    Raises:
        InputError: no columns, a path that can't be written.
        MissingDependencyError: matplotlib isn't installed.
    """
    if not columns:
        raise InputError("columns: empty; nothing to draw")
    styles = {
        "image": ("image", {"cmap": "gray", "vmin": 0, "vmax": 1}),
        "correlation": ("local correlation\nwith the scan", {"cmap": "cividis", "vmin": 0, "vmax": 1}),
        "uncertainty_mm": ("uncertainty\n(mm)", {"cmap": "inferno", "vmin": 0, "vmax": 2 * limit_mm}),
    }
    rows = [name for name in styles if any(column.get(name) is not None for column in columns)]
    shapes = [_coronal(c[name], c["centre_mm"]) for c in columns for name in rows if c.get(name) is not None]
    tall = max(aspect * cut.shape[0] / cut.shape[1] for cut, aspect in shapes)
    width = max(len(columns) * 1.5 + 1.4, 4.0)
    figure = new_figure((width, (1.5 * tall + 0.15) * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for name, panels in zip(rows, axes, strict=True):
        label, style = styles[name]
        drawn = None
        for column, panel in zip(columns, panels, strict=True):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_frame_on(False)
            image = column.get(name)
            if image is None:
                continue
            cut, aspect = _coronal(image, column["centre_mm"])
            drawn = panel.imshow(cut, aspect=aspect, interpolation="nearest", **style)
        panels[0].set_ylabel(label, fontsize=8)
        if name != "image":
            figure.colorbar(drawn, ax=panels, shrink=0.8).ax.tick_params(labelsize=7)
    for column, panel in zip(columns, axes[0], strict=True):
        word, colour = ("ok", COLOURS[1]) if column["ok"] else ("look here", COLOURS[0])
        panel.set_title(f"{column['title']}\n{word}", fontsize=8, color=colour)
    if title:
        figure.suptitle(title, fontsize=10, weight="bold")
    return save_figure(figure, path)


def bgr(displacement_mm: np.ndarray, scale_mm: float) -> np.ndarray:
    """A displacement (..., 3) as RGB colours (..., 3) in [0, 1]: x is blue, y green, z red.

    No motion is mid-grey; a component of +scale_mm is its colour in full, -scale_mm none of it.
    """
    return np.clip(0.5 + 0.5 * np.asarray(displacement_mm)[..., ::-1] / scale_mm, 0, 1)


# -- tables


def write_csv(path: str | Path, rows: Sequence[Row]) -> Path:
    """Rows as CSV (UTF-8): columns in the order they first appear, floats with six significant digits.

    A value that a row lacks, or None, is an empty cell. Text that a spreadsheet would run as a formula (a region
    named `=cmd()`, say) gets a `'` before it.

    Returns:
        The path written.

    Raises:
        InputError: a path that can't be written.
    """
    path = Path(path)
    columns = _columns(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if columns:
                writer.writerow(map(_inert, columns))
            digits = {column: 15 if column == "time" else 6 for column in columns}  # seconds since 1970 take more
            writer.writerows([_inert(_text(row.get(name), n)) for name, n in digits.items()] for row in rows)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another place") from error
    return path


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table (empty without rows), floats with four significant digits."""
    if not rows:
        return ""
    columns = list(columns or _columns(rows))
    cells = [[_text(row.get(column), 4).replace("|", "\\|") for column in columns] for row in rows]
    rule = ["---:" if _numeric(rows, column) else "---" for column in columns]
    heads = [column.replace("|", "\\|") for column in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *cells])


def text_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned columns for a terminal (empty without rows), floats with four significant digits."""
    if not rows:
        return ""
    columns = list(columns or _columns(rows))
    lines = [columns, *([_text(row.get(column), 4) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    right = [_numeric(rows, column) for column in columns]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


# -- parts of the above


def _check_rows(rows: Sequence[Row], needed: Sequence[str]) -> None:
    if not rows:
        raise InputError("rows: empty; nothing to draw")
    for row in rows:
        if missing := {"time", *needed} - row.keys():
            raise InputError(f"rows: an entry lacks {', '.join(sorted(missing))}")


def _time_curves(
    path: str | Path, rows: Sequence[Row], panels: Mapping[str, Sequence[str]], time_label: str
) -> Path:
    """A panel for each title, with a line for each of its columns and each region; dots mark measured times.

    Times at which a column has no value (None) are left out.
    """
    regions = list(dict.fromkeys(str(row.get("roi", "")) for row in rows))
    high = (len(panels) + 1) // 2
    figure = new_figure((7.5, 2.4 * high + 0.4), layout="constrained")
    axes = figure.subplots(high, 2, sharex=True).ravel()
    for region, colour in zip(regions, _colours(len(regions)), strict=True):
        own = sorted((r for r in rows if str(r.get("roi", "")) == region), key=lambda r: float(r["time"]))
        for panel, columns in zip(axes, panels.values(), strict=False):
            for column, style in zip(columns, ("solid", "dotted", "dashed"), strict=False):
                known = [row for row in own if row.get(column) is not None]
                times = np.array([row["time"] for row in known], float)
                values = np.array([row[column] for row in known], float)
                measured = np.array([bool(row.get("measured", False)) for row in known], bool)
                panel.plot(times, values, color=colour, linewidth=1.4, linestyle=style, label=region)
                if style == "solid":
                    panel.plot(times[measured], values[measured], "o", color=colour, markersize=4.5)
    for panel, title in zip(axes, panels, strict=False):
        _plain(panel)
        panel.set_title(title, fontsize=9, loc="left")
    for panel in axes[len(panels) - 2 : len(panels)]:  # the lowest of each column
        panel.set_xlabel(time_label)
        panel.tick_params(labelbottom=True)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)

    handles, names = axes[1].get_legend_handles_labels() if regions != [""] else ([], [])
    if any(row.get("measured") for row in rows):
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], linestyle="none", marker="o", color="0.3", markersize=4.5))
        names.append("measured")
    if names:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return save_figure(figure, path)


def new_figure(size_inch: tuple[float, float], **arguments: Any) -> Any:
    """A figure of its own: pyplot, and with it the user's backend and windows, is left alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed for pictures; install it with: pip install 'stnerp[scripts]'"
        ) from error
    return Figure(figsize=size_inch, dpi=DPI, facecolor="white", **arguments)


def save_figure(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
            text.set_parse_math(False)  # a name with two `$` in it is no formula
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another place") from error
    except ValueError as error:  # matplotlib's word for an unknown ending
        raise InputError(f"{path}: {error}") from error
    return path


def _upright(array: np.ndarray, grid: Grid) -> np.ndarray:
    """An array in the order S, P, L of the patient's axes; world vectors keep their components."""
    array = np.asarray(array, np.uint8 if np.asarray(array).dtype == bool else np.float32)
    return sitk.GetArrayFromImage(sitk.DICOMOrient(grid.image(array), "LPS"))


def _slice(volume: np.ndarray, plane: int, centre: Sequence[int]) -> np.ndarray:
    """Axial, coronal or sagittal slice of an upright volume, its first row on top."""
    z, y, x = centre
    if plane == 0:
        return volume[z]
    return volume[::-1, y] if plane == 1 else volume[::-1, :, x]


def _coronal(image: sitk.Image, point_mm: Sequence[float]) -> tuple[np.ndarray, float]:
    """The coronal slice of an image nearest to a point, head up, and its pixels' height over width."""
    upright = sitk.DICOMOrient(image, "LPS")
    grid = Grid.of(upright)
    y = int(np.clip(np.rint(grid.world_to_index(np.asarray(point_mm, float))[1]), 0, grid.size[1] - 1))
    return sitk.GetArrayFromImage(upright)[::-1, y], grid.spacing_mm[2] / grid.spacing_mm[0]


def _centre(displacement_mm: np.ndarray, masks: Sequence[np.ndarray | None]) -> list[int]:
    """Voxel (z, y, x) that the slices go through."""
    inside = [mask for mask in masks if mask is not None and mask.any()]
    weight = sum(mask.astype(float) for mask in inside) if inside else (displacement_mm**2).sum(-1)
    total = np.sum(weight, dtype=float)
    if not total > 0:
        return [n // 2 for n in displacement_mm.shape[:3]]
    return [
        round(float(np.sum(weight, axis=tuple({0, 1, 2} - {axis}), dtype=float) @ np.arange(n) / total))
        for axis, n in enumerate(displacement_mm.shape[:3])
    ]


def _draw_contours(panel: Any, masks: Mapping[str, Any], plane: int, centre: Sequence[int]) -> None:
    for pair, colour in zip(masks.values(), _colours(len(masks)), strict=True):
        for mask, style in zip(pair, ("solid", "dashed"), strict=True):
            cut = None if mask is None else _slice(mask, plane, centre)
            if cut is not None and cut.min() < cut.max():
                panel.contour(cut, levels=[0.5], colors=[colour], linewidths=1.1, linestyles=style)


def _contour_legend(figure: Any, names: list[str], with_truth: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linewidth=1.5) for c in _colours(len(names))]
    handles += [Line2D([], [], color="0.3", linewidth=1.1, linestyle="dashed")]
    names = [*names, "predicted"]
    if with_truth:
        handles.append(Line2D([], [], color="0.3", linewidth=1.1))
        names = [*names, "true"]
    figure.legend(
        handles,
        names,
        loc="lower center",
        ncols=min(len(names), 5),
        frameon=False,
        fontsize=8,
        borderaxespad=0.2,
    )


def _letters(panel: Any, letters: tuple[str, str]) -> None:
    """The patient's side at the left and at the top of a panel."""
    from matplotlib.patheffects import withStroke

    for letter, x, y in zip(letters, (0.03, 0.5), (0.5, 0.96), strict=True):
        text = panel.text(x, y, letter, transform=panel.transAxes, fontsize=7, color="white")
        text.set(ha="left" if x < 0.5 else "center", va="center" if y == 0.5 else "top")
        text.set_path_effects([withStroke(linewidth=1.5, foreground="black")])


def _plain(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _numeric(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds nothing but numbers."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(_is_number(value) for value in values)


def _inert(cell: str) -> str:
    """A cell of a table that no spreadsheet takes for a formula (OWASP, CSV injection); numbers stay."""
    if not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _text(value: object, digits: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, float | np.floating):
        return str(value)
    value = float(value)
    if not np.isfinite(value) or 0 < abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    # Significant digits, but never an exponent, and never fewer digits than the integer part has.
    whole = abs(value) >= 10**digits
    return np.format_float_positional(value, precision=0 if whole else digits, fractional=bool(whole), trim="-")

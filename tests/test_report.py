"""Pictures are upright, coloured as documented and of the expected size; tables hold what they were given."""

import csv

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional

from stnerp import report
from stnerp.errors import InputError
from stnerp.geometry import Grid

matplotlib = optional("matplotlib", "scripts")
imread = optional("matplotlib.image", "scripts").imread

ROTATION = np.array([[2, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3
# A body of about 36 x 24 x 30 mm (x, y, z in the patient) in several orientations.
GRIDS = {
    "LPS": Grid((18, 12, 6), (2.0, 2.0, 5.0), (-18.0, 30.0, 7.0)),
    "RAS": Grid((18, 12, 6), (2.0, 2.0, 5.0), (18.0, 30.0, 7.0), (-1, 0, 0, 0, -1, 0, 0, 0, 1)),
    "LPI": Grid((18, 12, 6), (2.0, 2.0, 5.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, -1)),
    "PIR": Grid((12, 15, 9), (2.0, 2.0, 4.0), direction=(0, 0, -1, 1, 0, 0, 0, -1, 0)),
    "tilted": Grid(
        (18, 12, 6), (2.0, 2.0, 5.0), (1.0, 2.0, 3.0), (0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, 1.0)
    ),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def overview(path, grid, **changes):
    image = np.random.default_rng(0).random(grid.shape)
    arguments = {
        "reference": image,
        "target": image,
        "prediction": image * 0.9,
        "displacement_mm": np.zeros((*grid.shape, 3)),
        "grid": grid,
    }
    return report.overview(path, **(arguments | changes))


def blob(grid: Grid, towards: tuple[float, float, float]) -> np.ndarray:
    """1 in the outer 30 % of the grid on the side that the world direction points to."""
    along = (grid.points_world() - grid.centre_mm) @ np.asarray(towards, float)
    return (along > 0.4 * along.max()).astype(np.float32)


def slices(array: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """The axial, coronal and sagittal slices as drawn, through the middle."""
    upright = report._upright(array, grid)
    return [report._slice(upright, plane, [n // 2 for n in upright.shape[:3]]) for plane in range(3)]


def brighter(a: np.ndarray, b: np.ndarray) -> bool:
    return a.mean() > b.mean() + 0.2


@every_grid
def test_the_patient_is_upright_and_his_right_on_the_left(grid):
    _, coronal, sagittal = slices(blob(grid, (0, 0, 1)), grid)
    for cut in (coronal, sagittal):
        half = cut.shape[0] // 2
        assert brighter(cut[:half], cut[half:])  # head up

    axial, _, sagittal = slices(blob(grid, (0, -1, 0)), grid)
    assert brighter(axial[: axial.shape[0] // 2], axial[axial.shape[0] // 2 :])  # anterior up
    assert brighter(sagittal[:, : sagittal.shape[1] // 2], sagittal[:, sagittal.shape[1] // 2 :])  # or left

    axial, coronal, _ = slices(blob(grid, (-1, 0, 0)), grid)
    for cut in (axial, coronal):
        half = cut.shape[1] // 2
        assert brighter(cut[:, :half], cut[:, half:])  # the patient's right on the left


def panels_of(monkeypatch):
    """The axes of the next figure, caught when it is saved."""
    kept = []
    save = report.save_figure

    def keep(figure, path):
        kept.append(figure)
        return save(figure, path)

    monkeypatch.setattr(report, "save_figure", keep)
    return kept


@every_grid
def test_the_head_is_at_the_top_of_the_picture(tmp_path, grid, monkeypatch):
    figures = panels_of(monkeypatch)
    image = blob(grid, (0, 0, 1))
    path = overview(tmp_path / "o.png", grid, reference=image, target=image, prediction=image)
    pixels = imread(path)[..., :3].mean(-1)
    coronal = figures[0].axes[1].get_window_extent()
    rows = len(pixels) - np.array([coronal.y1, coronal.y0]).round().astype(int)
    panel = pixels[rows[0] : rows[1], round(coronal.x0) : round(coronal.x1)]
    assert brighter(panel[: len(panel) // 3], panel[-len(panel) // 3 :])


@every_grid
def test_millimetres_are_to_scale(tmp_path, grid, monkeypatch):
    figures = panels_of(monkeypatch)
    overview(tmp_path / "o.png", grid)
    spacing_mm = Grid.of(sitk.DICOMOrient(grid.image(np.zeros(grid.shape)), "LPS")).spacing_mm
    scales = []
    for axes, (across, up) in zip(figures[0].axes[:3], [(0, 1), (0, 2), (1, 2)], strict=True):
        height, width = axes.images[0].get_array().shape[:2]
        extent = axes.get_window_extent()
        scales += [extent.width / (width * spacing_mm[across]), extent.height / (height * spacing_mm[up])]
    np.testing.assert_allclose(scales, scales[0], rtol=1e-6)


def test_bgr_of_pure_components():
    unit = 4.0 * np.eye(3)
    # x is blue, y green, z red: in RGB, the last, the middle, the first channel; rest stays mid-grey.
    np.testing.assert_allclose(report.bgr(unit, 4.0), [[0.5, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 0.5]])
    np.testing.assert_allclose(report.bgr(-unit, 4.0), [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    np.testing.assert_allclose(report.bgr(np.zeros(3), 4.0), 0.5)


@every_grid
@pytest.mark.parametrize(("component", "channel"), [(0, 2), (1, 1), (2, 0)])
def test_world_displacement_has_its_colour_in_the_picture(tmp_path, grid, component, channel, monkeypatch):
    figures = panels_of(monkeypatch)
    displacement_mm = np.zeros((*grid.shape, 3))
    displacement_mm[..., component] = 3.0
    path = overview(tmp_path / "o.png", grid, displacement_mm=displacement_mm)
    pixels = imread(path)[..., :3]
    extent = figures[0].axes[4 * 3].get_window_extent()  # fifth row, axial
    colour = pixels[len(pixels) - round((extent.y0 + extent.y1) / 2), round((extent.x0 + extent.x1) / 2)]
    expected = np.full(3, 0.5)
    expected[channel] = 1
    np.testing.assert_allclose(colour, expected, atol=1 / 255)  # 8 bits a channel


def test_slices_go_through_the_motion_or_through_the_contour():
    displacement_mm = np.zeros((10, 10, 10, 3))
    displacement_mm[2, 7, 5] = 3.0
    assert report._centre(displacement_mm, []) == [2, 7, 5]
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[6:9, 1:4, 8] = 1
    assert report._centre(displacement_mm, [None, mask]) == [7, 2, 8]
    assert report._centre(np.zeros((10, 8, 6, 3)), [np.zeros_like(mask)]) == [5, 4, 3]


def test_contours_are_drawn_on_target_and_prediction_only(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    grid = GRIDS["LPS"]
    mask = np.zeros(grid.shape, bool)
    mask[2:4, 3:8, 4:9] = True
    contours = {"GTV": (mask, np.roll(mask, 1, axis=1)), "heart": (None, mask), "lost": (None, mask & False)}
    overview(tmp_path / "o.png", grid, contours=contours, title="with contours")
    drawn = [len(axes.collections) for axes in figures[0].axes]
    # 5 rows of 3 panels, then 3 bars: GTV true and predicted, heart predicted.
    assert drawn == [0, 0, 0, 3, 3, 3, 3, 3, 3, *[0] * 9]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "GTV", "heart", "lost", "predicted", "true",
    ]  # fmt: skip


def test_without_a_target_there_is_no_difference(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    overview(tmp_path / "o.png", GRIDS["PIR"], target=None)
    assert len(figures[0].axes) == 3 * 3 + 3
    assert not any("PSNR" in text.get_text() for text in figures[0].texts)


def test_the_difference_has_its_psnr(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    grid = GRIDS["LPS"]
    overview(tmp_path / "o.png", grid, target=np.full(grid.shape, 0.5), prediction=np.full(grid.shape, 0.4))
    assert any("PSNR 20.0 dB" in text.get_text() for text in figures[0].texts)
    off = np.full(grid.shape, 0.4)
    off[3:] = 0.0
    mask = np.arange(len(off))[:, None, None] < np.full(grid.shape, 3)
    overview(tmp_path / "o.png", grid, target=np.full(grid.shape, 0.5), prediction=off, mask=mask)
    assert any("PSNR 20.0 dB" in text.get_text() for text in figures[1].texts)


def test_text_does_not_overlap_the_panels(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    overview(
        tmp_path / "o.png",
        GRIDS["PIR"],
        displacement_mm=np.full((*GRIDS["PIR"].shape, 3), 123.456),
        title="t",
    )
    figure = figures[0]
    panels = [axes.get_window_extent() for axes in figure.axes]
    for text in figure.texts:
        extent = text.get_window_extent()
        assert not any(extent.overlaps(panel) for panel in panels), text.get_text()
        assert extent.x0 >= 0, text.get_text()
    ticks = [t.get_window_extent() for axes in figure.axes[-3:] for t in axes.get_xticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(ticks) for b in ticks[:i])


def test_a_single_slice_can_be_drawn(tmp_path):
    grid = Grid((20, 30, 1), (1.0, 1.0, 1.0))
    assert overview(tmp_path / "o.png", grid).stat().st_size > 0


@pytest.mark.parametrize("name", ["reference", "target", "prediction", "displacement_mm"])
def test_arrays_that_do_not_fit_are_named(tmp_path, name):
    with pytest.raises(InputError, match=name.removesuffix("_mm")):
        overview(tmp_path / "o.png", GRIDS["LPS"], **{name: np.zeros((2, 3, 4))})


HISTORY = [
    {"step": i, "level": level, "loss": 10.0 ** (-i / 10), "smoothness": 1e-3 * i - 1e-3, "note": "text"}
    for level in (8, 4)
    for i in range(20)
]


def test_loss_curve(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    pixels = imread(report.loss_curve(tmp_path / "loss.png", HISTORY))
    loss, smoothness = figures[0].axes  # the note is no number, so it has no panel
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), np.arange(40))  # levels follow one another
    assert (loss.get_yscale(), smoothness.get_yscale()) == ("log", "linear")  # smoothness starts below 0
    assert [text.get_text() for text in loss.texts] == ["level 8", "level 4"]
    np.testing.assert_allclose(pixels.shape[:2], figures[0].get_size_inches()[::-1] * report.DPI, atol=1)
    assert pixels.min() < 0.2  # something is drawn


def test_loss_curve_of_a_negative_loss_is_linear(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    report.loss_curve(tmp_path / "loss.png", [{"step": i, "loss": -0.5 - i / 100} for i in range(5)])
    assert [axes.get_yscale() for axes in figures[0].axes] == ["linear"]


ROI_ROWS = [
    {
        "roi": roi,
        "time": t,
        "volume_ml": 20 - t,
        "shift_x_mm": 2 + t,
        "shift_y_mm": 0.0,
        "shift_z_mm": -3 * t,
        "measured": t % 2 == 0,
    }
    for roi in ("GTV", "heart")
    for t in (3, 0, 1, 2)
]


def test_roi_curves(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    pixels = imread(report.roi_curves(tmp_path / "roi.png", ROI_ROWS, "time (days)"))
    volume, x, _, z = figures[0].axes
    line, dots = volume.lines[:2]
    np.testing.assert_array_equal(line.get_xydata(), [[0, 20], [1, 19], [2, 18], [3, 17]])
    np.testing.assert_array_equal(dots.get_xydata(), [[0, 20], [2, 18]])
    np.testing.assert_array_equal(x.lines[0].get_ydata(), [2, 3, 4, 5])  # from the reference, not the earliest
    np.testing.assert_array_equal(z.lines[0].get_ydata(), [0, -3, -6, -9])
    assert len(volume.lines) == 4
    np.testing.assert_allclose(pixels.shape[:2], figures[0].get_size_inches()[::-1] * report.DPI, atol=1)


def test_monitor_curves(tmp_path, monkeypatch):
    figures = panels_of(monkeypatch)
    names = ["volume_ml", "voxel_volume_ml", "density_change_percent", "surface_mean_mm", "surface_p95_mm"]
    names += [f"{name}_{axis}_mm" for name in ("shift", "extent") for axis in "xyz"]
    rows = [
        {"roi": "GTV", "time": t, "measured": t != 1, **{name: t + i for i, name in enumerate(names)}}
        for t in (2, 0, 1)
    ]
    for row in rows:
        row["intensity_change"] = None if row["time"] == 1 else -40.0
    report.monitor_curves(tmp_path / "m.png", rows, "time (days)")
    volume, *_, intensity = figures[0].axes
    np.testing.assert_array_equal(volume.lines[0].get_xydata(), [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(volume.lines[1].get_xydata(), [[0, 0], [2, 2]])  # dots: measured
    np.testing.assert_array_equal(volume.lines[2].get_ydata(), [1, 2, 3])  # dotted: the count
    np.testing.assert_array_equal(intensity.lines[0].get_xydata(), [[0, -40], [2, -40]])  # not at 1
    with pytest.raises(InputError, match="surface_mean_mm"):
        report.monitor_curves(tmp_path / "m.png", ROI_ROWS)
    for row in rows:
        del row["intensity_change"]
    report.monitor_curves(tmp_path / "m.png", rows, "time (days)")  # seven panels: the right column ends above
    labelled = [panel.get_xlabel() for panel in figures[-1].axes]
    assert labelled == [""] * 5 + ["time (days)"] * 2 + [""]
    assert [panel.xaxis.get_tick_params()["labelbottom"] for panel in figures[-1].axes[4:7]] == [False, True, True]


@every_grid
def test_trust_overview_is_upright_and_says_where_to_look(tmp_path, grid, monkeypatch):
    figures = panels_of(monkeypatch)
    image = grid.image(blob(grid, (0, 0, 1)))
    columns = [
        {"title": "t = 0", "ok": True, "centre_mm": grid.centre_mm, "image": image, "uncertainty_mm": image},
        {"title": "t = 1", "ok": False, "centre_mm": grid.centre_mm, "image": image, "correlation": image},
    ]
    report.trust_overview(tmp_path / "t.png", columns, limit_mm=3.0)
    panels = figures[0].axes[:6]
    assert [bool(panel.images) for panel in panels] == [True, True, False, True, True, False]
    cut = np.asarray(panels[0].images[0].get_array())
    assert brighter(cut[: len(cut) // 2], cut[len(cut) // 2 :])  # head up
    assert [panel.get_title().split("\n")[1] for panel in panels[:2]] == ["ok", "look here"]
    with pytest.raises(InputError, match="columns"):
        report.trust_overview(tmp_path / "t.png", [], limit_mm=3.0)


def test_empty_or_incomplete_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="rows"):
        report.roi_curves(tmp_path / "roi.png", [])
    with pytest.raises(InputError, match="volume_ml"):
        report.roi_curves(tmp_path / "roi.png", [{key: 1.0 for key in ROI_ROWS[0] if key != "volume_ml"}])
    with pytest.raises(InputError, match="history"):
        report.loss_curve(tmp_path / "loss.png", [])


def test_drawing_leaves_pyplot_and_its_backend_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    overview(tmp_path / "new" / "folder" / "o.png", GRIDS["LPS"])
    assert dict(matplotlib.rcParams) == before


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        report.write_csv(tmp_path / "file" / "rows.csv", [{"a": 1}])
    with pytest.raises(InputError, match="file"):
        report.loss_curve(tmp_path / "file" / "loss.png", HISTORY)
    with pytest.raises(InputError, match="nonsense"):
        report.loss_curve(tmp_path / "loss.nonsense", HISTORY)


# -- tables

ROWS = [
    {"method": "elastix", "tre_mm": 1.0612345678, "landmarks": 300},
    {"method": "a|b, c", "tre_mm": np.float32(0.2), "folded": None, "size": 1234567.8},
]


def test_csv_reads_back(tmp_path):
    path = report.write_csv(tmp_path / "new" / "rows.csv", ROWS)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines == [
        ["method", "tre_mm", "landmarks", "folded", "size"],
        ["elastix", "1.06123", "300", "", ""],
        ["a|b, c", "0.2", "", "", "1234568"],
    ]


def test_times_keep_their_digits(tmp_path):
    rows = [{"time": 1735689600.25, "mm": 1.23456789}, {"time": 45000.123}]
    path = report.write_csv(tmp_path / "rows.csv", rows)
    assert path.read_text(encoding="utf-8").split() == ["time,mm", "1735689600.25,1.23457", "45000.123,"]


@pytest.mark.parametrize("name", ["=1+1", "+1 mm", "-A1", "@SUM(A1)", "\t=1+1", "'=1+1"])
def test_csv_holds_no_formula(name, tmp_path):
    """Names of regions and patients come from files; a spreadsheet would run them. Numbers stay numbers."""
    path = report.write_csv(tmp_path / "rows.csv", [{name: name, "mm": -1.5, "days": "-3", "tre": float("-inf")}])
    with path.open(newline="", encoding="utf-8") as file:
        head, cells = csv.reader(file)
    assert head[0] == cells[0] == "'" + name.removeprefix("'")
    assert cells[1:] == ["-1.5", "-3", "-inf"]


def test_names_in_pictures_are_no_formulas(tmp_path):
    figure = report.new_figure((2, 1))
    figure.text(0.5, 0.5, "$\\frac$")  # as mathematics: ValueError
    report.save_figure(figure, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (3.0, "3"), (100.0, "100"), (-31.23456, "-31.23"),
        (0.001234567, "0.001235"), (12345.6, "12346"),
        (1e-7, "1e-07"), (float("nan"), "nan"), (float("-inf"), "-inf"),
        (9999.97, "10000"), (True, "True"), (7, "7"),
    ],
)  # fmt: skip
def test_four_digits(value, text):
    assert report._text(value, 4) == text


def test_markdown_table():
    assert report.markdown_table(ROWS, ["method", "tre_mm"]).splitlines() == [
        "| method | tre_mm |",
        "| --- | ---: |",
        "| elastix | 1.061 |",
        "| a\\|b, c | 0.2 |",
    ]


def test_text_table_is_aligned():
    assert report.text_table(ROWS, ["method", "tre_mm", "landmarks"]).splitlines() == [
        "method   tre_mm  landmarks",
        "-------  ------  ---------",
        "elastix   1.061        300",
        "a|b, c      0.2",
    ]


def test_no_rows_no_table(tmp_path):
    assert report.markdown_table([]) == report.text_table([]) == ""
    assert report.write_csv(tmp_path / "rows.csv", []).read_text() == ""

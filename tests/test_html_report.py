"""The page: what is in the file, and what a browser makes of it, pixel by pixel against the model."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DIRECTIONS, make_grid, optional
from torch import nn

from stnerp import InputError, Series, STNeRP, html_report, load_series
from stnerp.def_net import DefNet, def_net_of
from stnerp.geometry import Grid, index_points
from stnerp.html_report import Structure, write_html_report
from stnerp.presets import DefNetSettings, Level
from stnerp.time_basis import TimeBasis
from stnerp.window import Window

SCRIPTS = Path(__file__).parents[1] / "scripts"

TIMES, HELD_OUT = (0.0, 2.0, 5.0), 3.0
JULIAN_DAYS = (2460000.0, 2460002.0, 2460007.0)
# Axes to the patient's back, feet and right, all sizes and spacings different.
GRID = Grid((26, 20, 24), (3.0, 4.0, 2.5), (30.0, -40.0, 60.0), (0, 0, -1, 1, 0, 0, 0, -1, 0))
SETTINGS = DefNetSettings(layers=2, width=8, fourier_width=4, levels=(Level(6, 6, 1),))
WINDOW = Window(-1000.0, 1000.0, "ct")
EVIL = '</script><img src=x onerror="window.injected=1">\'{{7*7}}'


class Breath(DefNet):
    """Smooth, some millimetres long, other along each of the patient's axes; grows with time."""

    def __init__(self, grid: Grid, times: tuple[float, ...]) -> None:
        super().__init__(grid, TimeBasis(times, times[0]))
        self.weight, self.first = nn.Parameter(torch.zeros(1)), times[0]

    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        x, y, z = (2 * points).unbind(-1)
        velocity = torch.stack([1.4 + 0.4 * torch.sin(z), 0.3 * torch.cos(x), -0.8 + 0.4 * torch.cos(y)], dim=-1)
        return torch.stack([(t - self.first) * velocity for t in times])


def smooth(grid: Grid) -> np.ndarray:
    """An image in [0, 1] without symmetry, and a bright corner: the patient's left, front and head."""
    x, y, z = np.moveaxis(grid.points_world() - grid.centre_mm, -1, 0)
    waves = 0.35 + 0.15 * np.sin((x + 0.5 * y) / 7) + 0.15 * np.cos((z - 0.8 * y) / 7)
    return np.where((x > 15) & (y < -15) & (z > 15), 0.95, waves).astype(np.float32)


def ball(grid: Grid, centre_mm: np.ndarray, radius_mm: float) -> sitk.Image:
    inside = np.linalg.norm(grid.points_world() - centre_mm, axis=-1) < radius_mm
    return grid.image(inside.astype(np.uint8))


@pytest.fixture(scope="module", autouse=True)
def _few_times() -> Iterator[None]:
    """A page of fewer times than usual, to save the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report, "FRAMES", 10)
        patch.setattr(html_report, "CURVE_POINTS", 5)
        yield


def breathing(grid: Grid, times: tuple[float, ...] = TIMES) -> STNeRP:
    return STNeRP(
        def_net=Breath(grid, times),
        ref_net=None,
        reference_voxels=smooth(grid),
        settings=SETTINGS,
        alignments=np.stack([np.eye(4)] * 3),
        window=WINDOW,
        time_unit="day",
    )


@pytest.fixture(scope="module")
def model() -> STNeRP:
    return breathing(GRID)


@pytest.fixture(scope="module")
def series(model: STNeRP) -> Series:
    """Scans of other noise than the model's, one of them at a time that the fit doesn't know."""
    draw = np.random.default_rng(1)
    images = []
    for t in (0.0, 2.0, HELD_OUT, 5.0):
        array = sitk.GetArrayFromImage(model.image(t))
        images.append(GRID.image(array + draw.normal(0, 40, array.shape).astype(np.float32)))
    return load_series(images, [0.0, 2.0, HELD_OUT, 5.0], window=WINDOW)


@pytest.fixture(scope="module")
def structures(model: STNeRP) -> list[Structure]:
    """A ball on the model's grid, of a name that would do harm, and one on a grid of its own."""
    first = ball(GRID, GRID.centre_mm, 12.0)
    fine = Grid((30, 30, 30), (1.0, 1.0, 1.2), tuple(GRID.centre_mm - [25.0, 8.0, 10.0]))
    second = ball(fine, GRID.centre_mm - [10.0, -8.0, -6.0], 9.0)
    return [Structure(EVIL, first, 1, {5.0: model.propagate(first, 5.0)}), Structure("tumour", second)]


@pytest.fixture(scope="module")
def page(
    model: STNeRP, series: Series, structures: list[Structure], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_html_report(
        tmp_path_factory.mktemp("page") / "report.html",
        model,
        series=series,
        structures=structures,
        tables={"Each image": [{"time": 2.0, "tre_mean_mm": "1.23456789", EVIL: EVIL}]},
        settings={"preset.def_net.width": 128, EVIL: EVIL},
        title=EVIL,
    )


# -- what is in the file


class Elements(HTMLParser):
    """Every element of a page, with its attributes and the text right inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1][2].append(data)

    def named(self, name: str) -> str:
        return next("".join(text) for _, attributes, text in self.found if attributes.get("id") == name)


def elements(page: Path) -> Elements:
    return Elements(page.read_text(encoding="utf-8"))


def data_of(page: Path) -> Any:
    return json.loads(elements(page).named("page-data"))


def bytes_of(page: Path, name: str) -> bytes:
    return gzip.decompress(base64.b64decode(elements(page).named(name)))


def test_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) < 20e6
    for tag, attributes, _ in elements(page).found:
        for name in ("src", "href", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in text
    assert "fetch(" not in text
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_names_stay_text(page: Path) -> None:
    found = elements(page)
    assert not [tag for tag, _, _ in found.found if tag in ("img", "iframe", "object")]
    scripts = [attributes for tag, attributes, _ in found.found if tag == "script"]
    assert [s for s in scripts if s.get("type") is None] == [{}] * 3  # the page's own, and no other
    assert json.loads(found.named("page-data"))["structures"][0]["name"] == EVIL
    title = next("".join(text) for tag, _, text in found.found if tag == "title")
    assert title == EVIL


def test_only_the_pages_own_script_may_run(page: Path) -> None:
    found = elements(page)
    policy = next(a["content"] for tag, a, _ in found.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    for kind, count in {"script": 3, "style": 1}.items():
        texts = ["".join(t) for tag, a, t in found.found if tag == kind and a.get("type") is None]
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        named = " ".join(f"'sha256-{digest}'" for digest in digests)
        assert f"{kind}-src {named};" in policy
        assert len(digests) == count


def test_times_are_the_scans_and_many_between(page: Path) -> None:
    data = data_of(page)
    assert [(scan["time"], scan["kind"]) for scan in data["scans"]] == [
        (0, "reference"), (2, "seen"), (3, "unseen"), (5, "seen"),
    ]  # fmt: skip
    assert {0, 2, 3, 5} <= set(data["frames"])
    assert len(data["frames"]) >= html_report.FRAMES
    assert data["unit"] == "day"


@pytest.mark.parametrize("period", [None, 7.0])
def test_frames_are_even_and_end_where_the_cycle_begins(period: float | None) -> None:
    times = html_report._times([0.0, 1.0, 5.0], period, 40)
    end = 5.0 if period is None else 7.0
    assert {0.0, 1.0, 5.0} <= set(times)
    assert (times[-1] == end) == (period is None)
    gaps = np.diff([*times, end] if period is not None else times)
    assert gaps.min() > 0
    assert gaps.max() <= end / 40 + 1e-9


def test_shapes_and_weights_give_the_motion_back(page: Path, model: STNeRP) -> None:
    data = data_of(page)
    nx, ny, nz = data["lattice"]
    shapes = np.frombuffer(bytes_of(page, "shapes"), "<i2").reshape(-1, nz, ny, nx, 3) * data["step_mm"]
    assert len(shapes) < 6  # of 11 times
    grid = Grid.of(sitk.DICOMOrient(GRID.image(np.zeros(GRID.shape)), "LPS"))
    lattice = grid.with_spacing(html_report.LATTICE_MM)
    assert lattice.size == (nx, ny, nz)
    for k in (0, 5, len(data["frames"]) - 1):
        expected = sitk.GetArrayFromImage(model.displacement(data["frames"][k], lattice))
        found = np.tensordot(data["weights"][k], shapes, axes=1)
        # The page's axes are the patient's; every shape is rounded.
        assert np.abs(found - expected).max() < html_report.TOLERANCE_MM + len(shapes) * data["step_mm"] / 2


def test_displacements_are_along_the_pages_axes(oblique_grid: Grid) -> None:
    tilted = breathing(oblique_grid)
    grid = html_report._upright(oblique_grid)
    axes = np.reshape(grid.direction, (3, 3))
    assert (np.abs(axes).argmax(0) == [0, 1, 2]).all()
    assert (np.diag(axes) > 0).all()  # left, back, head, as nearly as the grid's axes allow
    voxels = index_points(grid.shape)[1:-1, 1:-1, 1:-1]
    found = voxels + html_report._axis_mm(tilted, 2.0, grid)[1:-1, 1:-1, 1:-1] / grid.spacing_mm
    came_from = tilted.map_points(grid.index_to_world(voxels).reshape(-1, 3), 2.0)
    assert found.reshape(-1, 3) == pytest.approx(grid.world_to_index(came_from), abs=1e-6)


def test_no_motion_has_a_page_too(model: STNeRP) -> None:
    weights, shapes, step_mm = html_report._modes(np.zeros((4, 3, 3, 3, 3)))
    assert np.isfinite(weights).all()
    assert not np.tensordot(weights, shapes * step_mm, axes=1).any()


def test_curves_are_the_monitors(page: Path, model: STNeRP, structures: list[Structure]) -> None:
    data = data_of(page)
    row = model.monitor(structures[1].mask, [5.0])[0]
    assert len(data["curve_times"]) >= html_report.CURVE_POINTS
    own = data["structures"][1]["curves"][data["curve_times"].index(5)]
    assert own == pytest.approx([row[key] for key, _ in data["curves"]], rel=1e-6, abs=1e-6)
    # What was drawn at t = 5, here by the model itself, counts voxels of 30 mm³: 12 mm of radius are 240 of them.
    drawn = data["structures"][0]["drawn"]
    first = dict(zip((key for key, _ in data["curves"]), data["structures"][0]["curves"][-1], strict=True))
    assert drawn["shift_x_mm"] == pytest.approx([5, first["shift_x_mm"]], abs=0.5)
    assert drawn["volume_ml"] == pytest.approx([5, first["volume_ml"]], rel=0.05)


def test_images_get_coarser_until_they_fit(
    model: STNeRP, series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [GRID.image(np.random.default_rng(i).uniform(-1000, 1000, GRID.shape)) for i in range(4)]
    noisy = load_series(noise, series.times, window=WINDOW)
    monkeypatch.setattr(html_report, "IMAGE_BYTES", 20_000)
    grid, images = html_report._images(model, noisy, None)
    assert sum(len(html_report._packed(image)) for image in images) <= 20_000
    assert grid.voxels > 1500  # but not for nothing
    assert html_report._images(model, noisy, 5.0)[0].spacing_mm == pytest.approx((5, 5, 5), abs=0.6)


def test_refuses(model: STNeRP, series: Series, tmp_path: Path) -> None:
    other = load_series([ball(GRID.with_spacing(5.0), GRID.centre_mm, 9.0)] * 2, [0, 1])
    with pytest.raises(InputError, match="series: "):
        write_html_report(tmp_path / "a.html", model, series=other)
    with pytest.raises(InputError, match="heart: its mask has no voxel of value 7"):
        write_html_report(
            tmp_path / "a.html", model, structures=[Structure("heart", ball(GRID, GRID.centre_mm, 9.0), 7)]
        )
    with pytest.raises(InputError, match="spacing_mm: -1"):
        write_html_report(tmp_path / "a.html", model, spacing_mm=-1)
    mask = ball(GRID, GRID.centre_mm, 9.0)
    with pytest.raises(InputError, match="structure b: another has the same mask and label"):
        write_html_report(tmp_path / "a.html", model, structures=[Structure("a", mask), Structure("b", mask)])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        write_html_report(tmp_path / "file" / "a.html", model, spacing_mm=20)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), ("", ""), ("1.23456789", "1.235"), (0.5, "0.5"), ("elastix", "elastix"), (True, "True"),
     ("nan", "nan"), (12345.6, "12346"), ("300", "300"), (7, "7"), ([8, 8, 60], "[8, 8, 60]"), (1e-7, "1e-07"),
     ("007", "007"), ("2024_01", "2024_01"), ("1e3", "1e3"), ("007.50", "007.50"), ("-0.50000", "-0.5")],
)  # fmt: skip
def test_numbers_have_four_digits(value: object, text: str) -> None:
    assert html_report._text(value) == text


def test_times_of_a_table_have_all_digits() -> None:
    rows = [{"time": "2460002.25", "ssim": "0.987654"}, {"time": 2460007.0}]
    assert html_report._table(rows)["rows"] == [["2460002.25", "0.9877"], ["2460007", ""]]


def test_headings_have_units() -> None:
    headings = ["tre_mean_mm", "psnr_db", "folded_percent", "ssim", "method"]
    assert [html_report._heading(name) for name in headings] == [
        "tre mean (mm)", "psnr (dB)", "folded (%)", "ssim", "method",
    ]  # fmt: skip


# -- in a browser


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page in Chromium, 1280 x 800, unpacked and drawn."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Chromium and its driver (Debian, Ubuntu: apt-get install chromium chromium-driver)")
    webdriver = optional("selenium.webdriver", "dev")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "hide-scrollbars",
        "force-device-scale-factor=1", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        opened.set_script_timeout(60)
        go_to_page(opened, page)
        yield opened
    finally:
        opened.quit()


def go_to_page(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    browser.execute_async_script(
        "const done = arguments[0], wait = () => byId('desk').hidden && byId('problem').hidden"
        " ? setTimeout(wait, 20) : done(); wait()"
    )


@pytest.fixture
def shown(browser: Any) -> Any:
    """The page as it opens: at the reference, nothing compared, all contours, no deformation."""
    click(browser, "input[value=nothing][name=compare]")
    click(browser, "input[value=nothing][name=deformation]")
    browser.execute_script(
        "setPlaying(false); state.t = 0; state.cross = page.start.slice(); setWipe(50);"
        "state.shown = new Set(structures.keys()); structuresChanged()"
    )
    settled(browser)
    return browser


def settled(browser: Any) -> None:
    """Until what was asked for is drawn: two frames later, and images unpacked."""
    browser.execute_async_script(
        "const done = arguments[0]; const wait = () => waiting || (compared() && !images.has(compared().image))"
        " ? requestAnimationFrame(wait) : requestAnimationFrame(() => setTimeout(done, 10)); wait()"
    )


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def go_to(browser: Any, t: float, cross: Sequence[int] | None = None) -> None:
    browser.execute_script("goTo(arguments[0]); if (arguments[1]) state.cross = arguments[1]", t, cross)
    settled(browser)


def pixels(browser: Any, plane: str, layer: str = "model") -> np.ndarray:
    """A canvas as (rows, columns, RGBA)."""
    width, height, data = browser.execute_script(
        "const canvas = panes[arguments[0]][arguments[1]];"
        "const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "let text = ''; for (const byte of data) text += String.fromCharCode(byte);"
        "return [canvas.width, canvas.height, btoa(text)]",
        plane,
        layer,
    )
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)


def as_seen(image: sitk.Image, plane: str, cross: Sequence[int]) -> np.ndarray:
    """A slice of an image as a radiologist sees it, through a voxel (x, y, z) of the page, 0 to 255."""
    volume = 255 * WINDOW.normalise(sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS")))
    x, y, z = cross
    return {"axial": volume[z], "coronal": volume[::-1, y], "sagittal": volume[::-1, :, x]}[plane]


PLANES = ("axial", "coronal", "sagittal")
CROSS = [14, 11, 9]


def test_opens_without_an_error(browser: Any) -> None:
    assert browser.execute_script("return byId('problem').hidden")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize("t", [0.0, 2.0, HELD_OUT, 5.0, 4.03])
def test_the_picture_is_the_models(shown: Any, model: STNeRP, t: float) -> None:
    go_to(shown, t, CROSS)
    image = model.image(t)
    for plane in PLANES:
        expected = as_seen(image, plane, CROSS)
        wrong = np.abs(pixels(shown, plane)[..., 0] - expected)
        # Half a grey level each for the reference's and the picture's rounding; and the deformation, up to
        # 0.1 mm off, along edges of some 100 levels a voxel. Half a voxel off, the mean is 3 levels and more.
        assert wrong.mean() < 0.7
        assert np.percentile(wrong, 90) < 1.5
        shifted = np.abs(pixels(shown, plane)[..., 0] - (expected + np.roll(expected, 1, axis=1)) / 2)
        assert shifted[:, 1:].mean() > 2


@pytest.mark.parametrize("plane", PLANES)
def test_every_pixel_comes_from_where_the_model_says(shown: Any, model: STNeRP, plane: str) -> None:
    go_to(shown, 5.0, CROSS)
    width, height, moved = shown.execute_script(
        "const { plane, moved } = panes[arguments[0]]; return [plane.width, plane.height, [...moved]]", plane
    )
    grid = Grid.of(sitk.DICOMOrient(GRID.image(np.zeros(GRID.shape)), "LPS"))
    came_from = grid.world_to_index(model.map_points(grid.points_world().reshape(-1, 3), 5.0))
    x, y, z = CROSS
    volume = came_from.reshape(*grid.shape, 3)
    expected = {"axial": volume[z], "coronal": volume[::-1, y], "sagittal": volume[::-1, :, x]}[plane]
    wrong_mm = (np.reshape(moved, (height, width, 3)) - expected) * grid.spacing_mm
    # Both lattices have the same points here; what is left is what the shapes leave out, and 0.02 mm of each.
    assert np.abs(wrong_mm).max() < html_report.TOLERANCE_MM + 0.05


def test_the_patients_left_front_and_head(shown: Any) -> None:
    nx, _, nz = (int(n) for n in shown.execute_script("return SIZE"))
    go_to(shown, 0.0, [nx - 3, 2, nz - 3])
    # In the slices through the bright corner: right and up in the axial one, right and up in the coronal one,
    # left and up in the sagittal one, where the patient looks to the left.
    for plane, right in {"axial": True, "coronal": True, "sagittal": False}.items():
        grey = pixels(shown, plane)[..., 0].astype(float)
        rows, columns = grey.shape[0] // 4, grey.shape[1] // 4
        corners = {
            (up, at_right): grey[:rows][:, -columns:].mean() if up and at_right
            else grey[:rows, :columns].mean() if up
            else grey[-rows:, -columns:].mean() if at_right
            else grey[-rows:, :columns].mean()
            for up in (True, False)
            for at_right in (True, False)
        }  # fmt: skip
        assert max(corners, key=lambda corner: corners[corner]) == (True, right), plane
        letters = shown.execute_script(
            "return ['.at-left', '.at-right', '.at-top', '.at-bottom'].map((at) =>"
            " document.querySelector(`[data-plane=${arguments[0]}] ${at}`).textContent)", plane,
        )  # fmt: skip
        assert letters == {"axial": list("RLAP"), "coronal": list("RLSI"), "sagittal": list("APSI")}[plane]


def test_millimetres_are_to_scale(shown: Any) -> None:
    sizes = shown.execute_script(
        "return Object.values(panes).flatMap(({ stage, plane }) => [stage.clientWidth / (SIZE[plane.across] *"
        " SPACING[plane.across]), stage.clientHeight / (SIZE[plane.down] * SPACING[plane.down])])"
    )
    assert sizes == pytest.approx([sizes[0]] * 6, rel=0.01)  # whole pixels of some hundred


def test_time_moves_by_slider_keys_and_play(shown: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    before = pixels(shown, "coronal")
    slider = shown.find_element("id", "time")
    shown.execute_script(
        "const slider = byId('time'); slider.value = 4.4; slider.dispatchEvent(new Event('input'))"
    )
    settled(shown)
    assert np.abs(pixels(shown, "coronal").astype(int) - before).max() > 20
    assert "t = 4.4 day" in shown.find_element("id", "now").text
    slider.send_keys(Keys.ARROW_RIGHT)
    settled(shown)
    assert shown.execute_script("return state.t") == pytest.approx(4.5)  # frames are 1/2 apart
    slider.send_keys(Keys.SHIFT, Keys.ARROW_LEFT, Keys.SHIFT)
    settled(shown)
    assert shown.execute_script("return state.t") == HELD_OUT
    assert "never saw" in shown.find_element("id", "now-kind").text
    click(shown, "#play")
    shown.execute_async_script("setTimeout(arguments[0], 150)")
    click(shown, "#play")
    assert shown.execute_script("return state.t") != HELD_OUT


def test_a_click_and_a_drag_move_the_cross_hair(shown: Any) -> None:
    from selenium.webdriver import ActionChains

    stage = shown.find_element("css selector", "[data-plane=coronal] .stage")
    before = pixels(shown, "axial")
    width, height = stage.size["width"], stage.size["height"]
    nx, _, nz = (int(n) for n in shown.execute_script("return SIZE"))
    at = ActionChains(shown).move_to_element_with_offset(stage, round(0.25 * width), round(-0.25 * height))
    at.click().perform()
    settled(shown)
    x, _, z = shown.execute_script("return state.cross")
    # Three quarters from the patient's right to the left, three quarters from feet to head.
    assert abs(x - 0.75 * nx + 0.5) <= 1
    assert abs(z - 0.75 * nz + 0.5) <= 1
    assert (pixels(shown, "axial") != before).any()
    ActionChains(shown).click_and_hold().move_by_offset(round(-0.5 * width), 0).release().perform()
    settled(shown)
    assert abs(shown.execute_script("return state.cross[0]") - 0.25 * nx + 0.5) <= 1
    assert shown.execute_script("return state.cross[2]") == z


def test_the_wipe_shows_the_scan(shown: Any, series: Series) -> None:
    from selenium.webdriver import ActionChains

    go_to(shown, HELD_OUT, CROSS)
    stage = shown.find_element("css selector", "[data-plane=axial] .stage")
    alone = stage.screenshot_as_png
    click(shown, "#compare-nearest")
    settled(shown)
    half = stage.screenshot_as_png
    assert half != alone
    for plane in PLANES:
        expected = as_seen(series.images[2], plane, CROSS)
        assert np.abs(pixels(shown, plane, "scan")[..., 0] - expected).max() <= 1
    handle = shown.find_element("css selector", "[data-plane=axial] .wipe")
    ActionChains(shown).drag_and_drop_by_offset(handle, round(0.25 * stage.size["width"]), 0).perform()
    settled(shown)
    assert float(shown.find_element("id", "wipe").get_property("value")) == pytest.approx(75, abs=2)
    assert stage.screenshot_as_png not in (alone, half)
    click(shown, "input[value=reference][name=compare]")
    settled(shown)
    expected = as_seen(series.images[0], "axial", CROSS)
    assert np.abs(pixels(shown, "axial", "scan")[..., 0] - expected).max() <= 1


def coloured(browser: Any, plane: str, colour: str) -> np.ndarray:
    """Places (x, y) in millimetres from the corner of a plane where the overlay has about this colour."""
    overlay = pixels(browser, plane, "overlay").astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero((np.abs(overlay[..., :3] - wanted).max(-1) < 30) & (overlay[..., 3] > 200))
    mm = browser.execute_script(
        "const { plane, overlay } = panes[arguments[0]]; return [SIZE[plane.across] * SPACING[plane.across] /"
        " overlay.width, SIZE[plane.down] * SPACING[plane.down] / overlay.height]", plane,
    )  # fmt: skip
    return np.stack([(columns + 0.5) * mm[0], (rows + 0.5) * mm[1]], axis=-1)


@pytest.mark.parametrize("t", [0.0, 5.0])
def test_contours_are_where_the_model_carries_them(
    shown: Any, model: STNeRP, structures: list[Structure], t: float
) -> None:
    go_to(shown, t, CROSS)
    colours = shown.execute_script("return structures.map(({ colour }) => colour)")
    grid = Grid.of(sitk.DICOMOrient(GRID.image(np.zeros(GRID.shape)), "LPS"))
    fine = grid.with_spacing(1.0)
    seen = 0
    for structure, colour in zip(structures, colours, strict=True):
        carried = sitk.GetArrayFromImage(model.propagate(structure.mask, t, fine)) != 0
        place = fine.world_to_index(grid.index_to_world(np.array(CROSS, float)))
        x, y, z = np.rint(place).astype(int)
        for plane, cut in {
            "axial": carried[z],
            "coronal": carried[::-1, y],
            "sagittal": carried[::-1, :, x],
        }.items():
            line = coloured(shown, plane, colour)
            if not cut.any():
                assert len(line) == 0
                continue
            seen += 1
            across, down = [(0, 1), (0, 2), (1, 2)][PLANES.index(plane)]
            # The page's planes begin half a voxel before the first voxel's centre.
            step = np.array([fine.spacing_mm[across], fine.spacing_mm[down]])
            start = np.array([grid.spacing_mm[across], grid.spacing_mm[down]]) / 2
            inside = np.argwhere(cut)[:, ::-1] * step + start
            # Both are symmetric but for the 1 mm of the voxels; half a voxel of the page is 1.25 mm and more.
            assert np.abs((line.min(0) + line.max(0)) / 2 - (inside.min(0) + inside.max(0)) / 2).max() < 1
            assert np.abs(np.ptp(line, axis=0) - np.ptp(inside, axis=0)).max() < 3.5
    assert seen >= 4


def test_contours_are_switched(shown: Any) -> None:
    go_to(shown, 0.0, CROSS)
    colour = shown.execute_script("return structures[0].colour")
    assert len(coloured(shown, "axial", colour)) > 100
    click(shown, "#structures input")
    settled(shown)
    assert len(coloured(shown, "axial", colour)) == 0
    click(shown, "#all-contours")  # none
    click(shown, "#all-contours")  # all
    settled(shown)
    assert len(coloured(shown, "axial", colour)) > 100


def test_deformation_is_drawn(shown: Any) -> None:
    go_to(shown, 5.0, CROSS)
    plain = pixels(shown, "coronal", "overlay")
    for kind in ("arrows", "mesh"):
        click(shown, f"input[value={kind}]")
        settled(shown)
        assert (pixels(shown, "coronal", "overlay") != plain).any(-1).mean() > 0.02
    go_to(shown, 0.0)
    click(shown, "input[value=arrows]")
    settled(shown)
    arrows = pixels(shown, "coronal", "overlay")
    click(shown, "input[value=nothing][name=deformation]")
    settled(shown)
    assert (pixels(shown, "coronal", "overlay") == arrows).all()  # at the reference nothing has moved


def test_an_arrow_points_to_where_tissue_went(shown: Any, model: STNeRP) -> None:
    go_to(shown, 5.0, CROSS)
    strokes = shown.execute_script(
        "const { plane, moved } = panes.coronal, n = 3 * (10 * plane.width + 12);"
        "const drawn = []; const context = { beginPath() {}, stroke() {}, moveTo(...p) { drawn.push(p) },"
        " lineTo(...p) { drawn.push(p) } };"
        "drawArrows(panes.coronal, context, (x) => x * SPACING[0], (y) => y * SPACING[2]); return drawn"
    )
    tail, head = np.array(strokes[0]), np.array(strokes[1])
    grid = Grid.of(sitk.DICOMOrient(GRID.image(np.zeros(GRID.shape)), "LPS"))
    # From pixels of the coronal plane to the patient: to the right of it is left, down is to the feet.
    index = np.array([head[0] / grid.spacing_mm[0], CROSS[1], grid.size[2] - 1 - head[1] / grid.spacing_mm[2]])
    came_from = model.map_points(grid.index_to_world(index)[None], 5.0)[0]
    moved_mm = grid.index_to_world(index) - came_from
    assert head - tail == pytest.approx([moved_mm[0], -moved_mm[2]], abs=0.3)
    assert np.abs(moved_mm[[0, 2]]).max() > 3


def test_readings_at_the_cross_hair(shown: Any, model: STNeRP) -> None:
    go_to(shown, 5.0, CROSS)
    grid = Grid.of(sitk.DICOMOrient(GRID.image(np.zeros(GRID.shape)), "LPS"))
    here = grid.index_to_world(np.array(CROSS, float))
    moved = here - model.map_points(here[None], 5.0)[0]

    def read(name: str) -> str:
        return str(shown.find_element("id", name).text).replace("−", "-")

    assert [float(value) for value in read("at-position").split(", ")] == pytest.approx(here, abs=0.051)
    assert float(read("at-motion").removesuffix(" mm")) == pytest.approx(np.linalg.norm(moved), abs=0.2)
    value = sitk.GetArrayFromImage(sitk.DICOMOrient(model.image(5.0), "LPS"))[CROSS[2], CROSS[1], CROSS[0]]
    assert float(read("at-model")) == pytest.approx(value, abs=2000 / 255 * 2)
    curves = shown.execute_script("return crossCurves().map(({ line }) => line.at(-1))")
    assert [t for t, _ in curves] == [5, 5, 5]
    assert [value for _, value in curves] == pytest.approx(moved, abs=0.2)


def test_an_oblique_scan_has_the_patients_axes_and_all_digits_of_its_days(
    browser: Any, page: Path, tmp_path: Path
) -> None:
    tilted = breathing(make_grid(DIRECTIONS["oblique, left-handed"], (20, 16, 11), (3.0, 4.0, 6.0)), JULIAN_DAYS)
    grid, last = html_report._upright(tilted.grid), JULIAN_DAYS[-1]
    other = write_html_report(tmp_path / "tilted.html", tilted)
    assert "2460000 to 2460007 day" in other.read_text(encoding="utf-8")
    go_to_page(browser, other)
    try:
        go_to(browser, last, [*CROSS[:2], 5])
        here = grid.index_to_world(np.array([*CROSS[:2], 5], float))
        moved = here - tilted.map_points(here[None], last)[0]
        curves = browser.execute_script("return crossCurves().map(({ line }) => line.at(-1)[1])")
        assert curves == pytest.approx(moved, abs=0.2)
        assert np.abs(moved - grid.vectors_from_world(moved)).max() > 2  # along the grid's axes it is another one
        assert browser.find_element("id", "now").text == "t = 2460007 day"
        labels = browser.execute_script("return [...byId('ticks').children].map((tick) => tick.textContent)")
        assert labels == ["2460000", "2460002", "2460007"]
        go_to(browser, 2460003.12345)  # 7 days, a thousandth or so of which is enough between scans
        assert browser.find_element("id", "now").text == "t = 2460003.12 day"
    finally:
        go_to_page(browser, page)


def test_curves_follow_time(shown: Any) -> None:
    for t in (0.0, 5.0):
        go_to(shown, t)
        x = float(shown.execute_script("return document.querySelector('#graph .present').getAttribute('x1')"))
        edges = shown.execute_script("const { left, right } = byId('graph').graph; return [left, right]")
        assert x == pytest.approx(edges[0 if t == 0 else 1])
    assert shown.execute_script("return document.querySelectorAll('#graph .curve').length") == 2
    assert shown.execute_script("return document.querySelectorAll('#graph circle').length") == 2 * 4
    assert shown.execute_script("return document.querySelectorAll('#graph path').length") == 1  # drawn at t = 5


def test_the_window_darkens_and_brightens(shown: Any) -> None:
    before = pixels(shown, "axial")[..., 0]
    shown.execute_script("byId('preset').value = 'lung'; byId('preset').dispatchEvent(new Event('change'))")
    settled(shown)
    after = pixels(shown, "axial")[..., 0]
    expected = np.clip((before / 255 * 2000) * 255 / 1150, 0, 255)  # -1000 to 150 HU
    assert np.abs(after - expected).max() < 2.2  # the first picture was rounded
    shown.execute_script("byId('preset').selectedIndex = 0; byId('preset').dispatchEvent(new Event('change'))")


def test_a_name_does_no_harm(shown: Any) -> None:
    assert shown.execute_script("return window.injected === undefined")
    assert shown.execute_script("return document.images.length") == 0
    for selector in (
        "h1",
        "#structures span",
        "#curves-legend span",
        ".text td:last-child",
        ".settings dd:last-child",
    ):
        texts = shown.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
        )
        assert EVIL in texts, selector


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 800), (1920, 1080), (1280, 1600)])
def test_fits_the_window(shown: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    shown.execute_script("layOut()")
    settled(shown)
    box = "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
    box += "return [b.left, b.right, b.bottom]"
    assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in (".axial .stage", ".coronal .stage", ".sagittal .stage", ".timebar", ".controls"):
        left, right, bottom = shown.execute_script(box, selector)
        assert 0 <= left < right <= width
        if width > 1000 and selector != ".controls":
            assert bottom <= height, selector
    # No part lies over another: every one's right end and the next one's left.
    for one, next_one in ((".axial .stage", ".graph"), (".coronal .stage", ".sagittal .stage")):
        if width > 1000:
            assert shown.execute_script(box, one)[1] <= shown.execute_script(box, next_one)[0], one
            assert shown.execute_script(box, next_one)[1] <= shown.execute_script(box, ".controls")[0], next_one
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": 1280, "height": 800})
    shown.execute_script("layOut()")


def test_nothing_went_wrong_meanwhile(browser: Any) -> None:
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


# -- the script


@pytest.fixture(scope="module")
def run_folder(series: Series, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as train_def.py leaves it, of files that name the patient."""
    folder = tmp_path_factory.mktemp("run")
    scans = folder / "MUSTERMANN_ERIKA"
    scans.mkdir()
    images = []
    for i, image in enumerate(series.images[:3]):
        images.append(str(scans / f"mustermann_{i}.nii.gz"))
        sitk.WriteImage(image, images[-1])
    sitk.WriteImage(ball(GRID, GRID.centre_mm, 12.0), str(scans / "mask_mustermann.nii.gz"))
    net = def_net_of(GRID, TimeBasis((0.0, 2.0, 3.0), 0.0), SETTINGS)
    STNeRP(
        def_net=net.eval(),
        ref_net=None,
        reference_voxels=smooth(GRID),
        settings=SETTINGS,
        alignments=np.stack([np.eye(4)] * 3),
        window=WINDOW,
    ).save(folder / "model.pt")
    (folder / "train_def.yaml").write_text(
        f"""
out: {folder}
init: {scans}/model.pt
prior: false
seed: 0
data:
  {{kind: files, images: [{", ".join(images)}], times: [0, 2, 3], reference: 0, period: null, masks: {{0:
  {scans}/mask_mustermann.nii.gz}}, landmarks: null, window: ct, label_names: {{1: heart}}, contours: null}}
preset: {{def_net: {{levels: [[8, 8, 60]], width: 128}}}}
""",
        encoding="utf-8",
    )
    (folder / "metrics.csv").write_text("time,image,psnr_db\n2,mustermann_1.nii.gz,31.234567\n", encoding="utf-8")
    return folder


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/report.py as from the command line."""
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("report")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        importlib.import_module("run_directory").launch(module.main)

    return run


def test_the_script_writes_a_page_without_the_patients_name(run_folder: Path, report: Any) -> None:
    report(f"out={run_folder}", "overwrite=true")
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "mustermann" not in text.lower()
    assert "Names of files and of the patient are left out." in text
    assert str(run_folder) not in text
    data = data_of(run_folder / "report.html")
    assert [structure["name"] for structure in data["structures"]] == ["heart"]
    assert [scan["image"] for scan in data["scans"]] == [1, 2, 3]
    for shown in ("31.23", "psnr (dB)", "preset.def_net.levels", "[[8, 8, 60]]", "data.times"):
        assert shown in text


def test_the_script_takes_other_contours_and_no_scans(run_folder: Path, report: Any, tmp_path: Path) -> None:
    sitk.WriteImage(ball(GRID, GRID.centre_mm, 8.0), str(tmp_path / "gtv.nii.gz"))
    report(f"out={run_folder}", "overwrite=true", "scans=false", f"roi={tmp_path / 'gtv.nii.gz'}", "title='A & B'")
    data, text = data_of(run_folder / "report.html"), (run_folder / "report.html").read_text(encoding="utf-8")
    assert [structure["name"] for structure in data["structures"]] == ["ROI 1"]
    assert "gtv" not in text
    assert {scan["image"] for scan in data["scans"]} == {None}
    assert "<title>A &amp; B</title>" in text
    report(f"out={run_folder}", "overwrite=true", "scans=false", f"roi={tmp_path / 'gtv.nii.gz'}", "names=true")
    assert [structure["name"] for structure in data_of(run_folder / "report.html")["structures"]] == ["gtv"]
    assert "are left out" not in (run_folder / "report.html").read_text(encoding="utf-8")


def test_the_script_refuses(
    run_folder: Path, report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            report(*arguments)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    (run_folder / "report.html").touch()
    assert "already exists" in refused(f"out={run_folder}")
    assert "run train_def.py" in refused(f"out={tmp_path / 'typo'}")
    again = [f"out={run_folder}", "overwrite=true"]
    assert "contours: no label liver; known: heart" in refused(*again, "contours=[liver]")
    for number in ("7", "[7]"):
        assert "contours: no label 7; known: heart" in refused(*again, f"contours={number}")
    assert "nowhere.nii.gz: no such file" in refused(*again, "roi=nowhere.nii.gz")
    assert "spacing_mm" in refused(*again, "spacing_mm=fine")
    assert "spacing_mm: True must be a number" in refused(*again, "spacing_mm=true")
    copy = tmp_path / "moved"
    copy.mkdir()
    shutil.copy(run_folder / "model.pt", copy)
    assert "pass scans=false" in refused(f"out={copy}")
    (copy / "config.yaml").write_text(
        "data: {kind: files, images: [a.nii.gz, b.nii.gz], times: null, reference: 0, period: null, masks: null, "
        "landmarks: null, window: ct, label_names: null, contours: null}"
    )
    line = refused(f"out={copy}")
    assert "a.nii.gz: no such file" in line
    assert "scans=false" in line

"""A ROI over time against motions whose volumes and centroids are known; directions where the wrong one fails."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional
from scipy.spatial.transform import Rotation

from stnerp import InputError, Series, fit_deformation, load_series, monitor
from stnerp.geometry import Grid, apply_affine
from stnerp.motion import Longitudinal
from stnerp.phantom import LABELS, TUMOUR_CENTRE_MM, Phantom

GRID = Grid((24, 20, 16), (1.5, 2.0, 2.5), (-18.0, 5.0, 40.0))


class Affine:
    """Reference points go to `matrix` of them at time 1; at time 0 everything rests."""

    def __init__(self, grid: Grid, matrix: np.ndarray) -> None:
        self.grid, self.matrix = grid, matrix

    def map_points(self, points_mm: np.ndarray, t: float, inverse: bool = False) -> np.ndarray:
        if t == 0:
            return points_mm
        return apply_affine(self.matrix if inverse else np.linalg.inv(self.matrix), points_mm)


def about(centre_mm: np.ndarray, linear: np.ndarray, shift_mm: tuple[float, float, float]) -> np.ndarray:
    """Linear about a centre, and a shift, as (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = centre_mm - linear @ centre_mm + shift_mm
    return matrix


def box(grid: Grid, label: int = 1) -> sitk.Image:
    """8 x 6 x 4 voxels (x, y, z) of a label."""
    array = np.zeros(grid.shape, np.uint8)
    array[6:10, 7:13, 8:16] = label
    return grid.image(array)


def at_one(moving: monitor.Moving, roi: sitk.Image, **arguments: object) -> dict[str, float]:
    return monitor.monitor(moving, roi, [1.0], **arguments)[0]  # type: ignore[arg-type]


def xyz(row: dict[str, float], name: str) -> list[float]:
    return [row[f"{name}_{axis}_mm"] for axis in "xyz"]


def test_a_shift_moves_and_changes_nothing_else() -> None:
    shift = (5.0, -3.0, 2.0)
    row = at_one(Affine(GRID, about(np.zeros(3), np.eye(3), shift)), box(GRID))
    volume_ml = 8 * 6 * 4 * 1.5 * 2 * 2.5 / 1000
    assert row["volume_ml"] == pytest.approx(volume_ml)
    assert row["volume_change_percent"] == pytest.approx(0, abs=1e-9)
    assert row["density_change_percent"] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(xyz(row, "shift"), shift)
    np.testing.assert_allclose(
        xyz(row, "centroid"), GRID.index_to_world(np.array([11.5, 9.5, 7.5])) + shift
    )  # of the faces, not of the first voxel: half a voxel would be 0.75 mm
    np.testing.assert_allclose(xyz(row, "extent"), [8 * 1.5, 6 * 2.0, 4 * 2.5])
    for name in ("shift_mm", "surface_mean_mm", "surface_p95_mm", "surface_max_mm"):
        assert row[name] == pytest.approx(np.linalg.norm(shift))


def test_the_reference_is_as_it_was_drawn() -> None:
    row = monitor.monitor(Affine(GRID, np.diag([2.0, 2.0, 2.0, 1.0])), box(GRID), [0])[0]
    assert row["volume_ml"] == pytest.approx(row["voxel_volume_ml"])
    assert [*xyz(row, "shift"), row["surface_max_mm"], row["density_change_percent"]] == pytest.approx([0] * 5)


def test_growth_has_the_volume_of_the_determinant_and_less_density() -> None:
    linear = np.diag([1.2, 1.1, 0.9]) @ Rotation.from_euler("z", 90, degrees=True).as_matrix()
    centre = GRID.index_to_world(np.array([11.5, 9.5, 7.5]))
    row = at_one(Affine(GRID, about(centre, linear, (0, 0, 0))), box(GRID))
    grown = 1.2 * 1.1 * 0.9
    # The other direction would shrink: 1 / 1.188.
    assert row["volume_change_percent"] == pytest.approx(100 * (grown - 1))
    assert row["density_change_percent"] == pytest.approx(100 * (1 / grown - 1))
    # The turn puts y's length on x and x's on y.
    np.testing.assert_allclose(xyz(row, "extent"), [12 * 1.2, 12 * 1.1, 10 * 0.9])
    np.testing.assert_allclose(xyz(row, "centroid"), centre)
    # A count jumps by whole layers; the box is 8 x 6 x 4 of them.
    assert row["voxel_volume_ml"] == pytest.approx(row["volume_ml"], rel=0.2)


def test_any_orientation(any_grid: Grid) -> None:
    array = np.zeros(any_grid.shape, np.uint8)
    array[1:3, 1:4, 2:5] = 3
    linear = np.array([[1.1, 0.05, 0.0], [-0.1, 0.95, 0.08], [0.02, 0.0, 1.2]])
    motion = Affine(any_grid, about(any_grid.centre_mm, linear, (1.0, 2.0, -3.0)))
    row = at_one(motion, any_grid.image(array))
    assert row["volume_ml"] == pytest.approx(18 * 1.5 * 0.8 * 3.0 / 1000 * np.linalg.det(linear))
    middle = any_grid.index_to_world(np.array([[3.0, 2.0, 1.5]]))
    np.testing.assert_allclose(xyz(row, "centroid"), motion.map_points(middle, 1, inverse=True)[0])


def test_surface_points_lie_on_the_faces() -> None:
    array = np.zeros(GRID.shape, np.uint8)
    array[0, 10, 5] = 2  # at the image's border: its outer face counts as well
    points = monitor.surface_points(GRID.image(array), 2)
    steps = (points - GRID.index_to_world(np.array([5.0, 10.0, 0.0]))) / GRID.spacing_mm
    assert {tuple(step) for step in steps.round(9)} == {
        (0.5, 0, 0), (-0.5, 0, 0), (0, 0.5, 0), (0, -0.5, 0), (0, 0, 0.5), (0, 0, -0.5)
    }  # fmt: skip


def test_a_fold_has_no_volume() -> None:
    row = at_one(Affine(GRID, about(GRID.centre_mm, np.diag([-1.0, 1.0, 1.0]), (0, 0, 0))), box(GRID))
    assert np.isnan([row["volume_ml"], row["density_change_percent"], *xyz(row, "centroid")]).all()
    assert np.isfinite(row["surface_mean_mm"])


def test_a_tumour_that_shrinks_to_a_third() -> None:
    """The contraction is uniform within the tumour: its volume is 0.7³ of what it was, whatever the voxels."""
    box_mm = ((0.0, 0.0, 0.0), (180.0, 140.0, 90.0))
    motion = Longitudinal(
        *box_mm, TUMOUR_CENTRE_MM, tumour_radius_mm=15, tumour_scale=0.7, shift_mm=0, duration=40
    )
    phantom = Phantom((36, 28, 18), 10.0, motion)
    grid = Grid((16, 16, 16), (2.0, 2.0, 2.0), tuple(float(c) - 15 for c in TUMOUR_CENTRE_MM))
    ball = np.linalg.norm(grid.points_world() - np.array(TUMOUR_CENTRE_MM), axis=-1) < 13
    row = monitor.monitor(phantom, grid.image(ball.astype(np.uint8)), [40.0])[0]
    assert row["volume_change_percent"] == pytest.approx(100 * (0.7**3 - 1), abs=1e-3)
    # Counted, it is 16 % too small: 2 mm voxels of a ball of 9 mm, whose corners the majority rounds off.
    assert row["voxel_volume_ml"] == pytest.approx(row["volume_ml"], rel=0.2)
    assert row["voxel_volume_ml"] != pytest.approx(row["volume_ml"], rel=0.1)


def test_large_labels_are_followed_by_some_of_their_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    motion = Longitudinal((0.0, 15.0, 60.0), (40.0, 40.0, 40.0), (0.0, 24.0, 60.0), tumour_radius_mm=8, duration=1)
    phantom = Phantom(grid=GRID, motion=motion)
    whole = monitor.monitor(phantom, box(GRID), [1])[0]
    monkeypatch.setattr(monitor, "MOST_POINTS", 70)
    some = monitor.monitor(phantom, box(GRID), [1])[0]
    assert some["volume_ml"] != whole["volume_ml"]
    # 64 of 192 points, whose growth differs by some ten percent.
    assert some["volume_ml"] == pytest.approx(whole["volume_ml"], rel=0.03)
    assert some["shift_mm"] == pytest.approx(whole["shift_mm"], abs=0.3)


# -- the scans' intensities


def scans(shift_mm: tuple[float, float, float], brighter: float) -> Series:
    """A ramp along z, and the same shifted and brighter."""
    ramp = GRID.points_world()[..., 2].astype(np.float32)
    second = GRID.image(ramp - shift_mm[2] + brighter)
    return load_series([GRID.image(ramp), second], [0, 1], window=(0, 100))


def test_intensity_changes_by_what_the_tissue_changed() -> None:
    shift = (2.0, -3.0, 5.0)
    motion = Affine(GRID, about(np.zeros(3), np.eye(3), shift))
    rows = monitor.monitor(motion, box(GRID), [0, 0.5, 1], series=scans(shift, 7.0), measured=(0, 1))
    # Tissue that is not followed would be 7 − 5 brighter; float32 near 80 leaves 1e-5.
    assert rows[2]["intensity_change"] == pytest.approx(7, abs=1e-4)
    assert rows[0]["intensity_change"] == pytest.approx(0, abs=1e-4)
    assert rows[2]["covered_percent"] == pytest.approx(100)
    assert rows[1]["intensity_change"] is None
    assert rows[1]["covered_percent"] is None
    assert [row["measured"] for row in rows] == [True, False, True]


def test_what_leaves_the_scan_is_told() -> None:
    depth_mm = GRID.index_to_world(np.array([0.0, 0.0, 15.5]))[2] - GRID.index_to_world(np.array([0, 0, 7.5]))[2]
    shift = (0.0, 0.0, float(depth_mm))  # half of the box's slices pass the last face of the last slice
    motion = Affine(GRID, about(np.zeros(3), np.eye(3), shift))
    row = at_one(motion, box(GRID), series=scans(shift, 0.0))
    assert row["covered_percent"] == pytest.approx(50)
    # What is left is compared with itself: the mean of the whole box would be 2.5 off.
    assert row["intensity_change"] == pytest.approx(0, abs=1e-4)
    motion = Affine(GRID, about(np.zeros(3), np.eye(3), (0.0, 0.0, 500.0)))
    gone = at_one(motion, box(GRID), series=scans(shift, 0.0))
    assert gone["covered_percent"] == 0
    assert np.isnan(gone["intensity_change"])


# -- rows, names, mistakes


def test_a_row_for_each_label_and_time() -> None:
    roi = box(GRID, 2)
    array = sitk.GetArrayFromImage(roi)
    array[12, 3:5, 2:4] = 9
    rows = monitor.monitor(Affine(GRID, np.eye(4)), GRID.image(array), [1, 0, 1.0], name="gtv")
    assert [(row["time"], row["roi"], row["label"]) for row in rows] == [
        (0, "gtv label 2", 2), (0, "gtv label 9", 9), (1, "gtv label 2", 2), (1, "gtv label 9", 9)
    ]  # fmt: skip
    assert rows[1]["volume_ml"] == pytest.approx(4 * 7.5 / 1000)
    assert "intensity_change" not in rows[0]


def test_a_phase_is_measured_in_every_cycle() -> None:
    moving = Affine(GRID, np.eye(4))
    rows = monitor.monitor(moving, box(GRID), [0.3, 1.3, 0.4], measured=(0.0, 3 * 0.1), period=1.0)
    assert {row["time"]: row["measured"] for row in rows} == {0.3: True, 0.4: False, 1.3: True}


def test_mistakes_are_named() -> None:
    still = Affine(GRID, np.eye(4))
    with pytest.raises(InputError, match="gtv: is empty"):
        monitor.monitor(still, GRID.image(np.zeros(GRID.shape, np.uint8)), [0], name="gtv")
    far = box(GRID)
    far.SetOrigin((5000.0, 0.0, 0.0))
    with pytest.raises(InputError, match="outside the reference image"):
        monitor.monitor(still, far, [0])
    with pytest.raises(InputError, match="whole numbers"):
        monitor.monitor(still, GRID.image(np.full(GRID.shape, 0.5, np.float32)), [0])
    with pytest.raises(InputError, match="times"):
        monitor.monitor(still, box(GRID), [])


# -- a fitted model, and the script


def test_a_model_agrees_with_fine_voxels(phantom: Phantom, phantom_series: Series) -> None:
    model = fit_deformation(phantom_series, progress=False, device="cpu", levels=[(20, 30, 15)])
    heart = sitk.Cast(phantom.labels(0.0) == LABELS["heart"], sitk.sitkUInt8)
    rest, exhale = model.monitor(heart, [0.0, 0.5], phantom_series, "heart")
    assert rest["measured"]
    assert rest["volume_ml"] == pytest.approx(rest["voxel_volume_ml"])
    assert exhale["shift_z_mm"] > 1  # up, as the phantom breathes; the fit is quick and finds a part of it
    fine = Grid.of(heart).with_spacing(2.3)  # few of them half-way between two of the mask's voxels
    counted = sitk.GetArrayFromImage(model.propagate(heart, 0.5, fine, "nearest"))
    # The mask's flat faces round by up to half a fine voxel, 1.2 mm; the other direction is 14 % and 22 mm off.
    assert exhale["volume_ml"] == pytest.approx(counted.sum() * np.prod(fine.spacing_mm) / 1000, rel=0.02)
    np.testing.assert_allclose(xyz(exhale, "centroid"), fine.points_world()[counted > 0].mean(0), atol=0.6)


@pytest.fixture
def run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phantom: Phantom, phantom_series: Series
) -> Path:
    """As train_def.py leaves it, with a ROI beside."""
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    fit_deformation(phantom_series, progress=False, device="cpu", levels=[(20, 30, 2)]).save(tmp_path / "model.pt")
    for i, image in enumerate(phantom_series.images):
        sitk.WriteImage(image, str(tmp_path / f"{i}.nii.gz"))
    files = ", ".join(f"{tmp_path}/{i}.nii.gz" for i in range(4))
    (tmp_path / "train_def.yaml").write_text(
        f"data: {{kind: files, images: [{files}], times: [0, 0.25, 0.5, 0.75], period: 1, reference: 0, "
        "window: ct, masks: null, landmarks: null, label_names: null, contours: null}\n"
    )
    heart = sitk.Cast(phantom.labels(0.0) == LABELS["heart"], sitk.sitkUInt8)
    sitk.WriteImage(heart, str(tmp_path / "heart.nii.gz"))
    return tmp_path


def script(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["monitor.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(importlib.import_module("monitor").main)
    finally:
        sys.argv = before


def test_the_script_writes_a_table_and_a_picture(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"out={run_directory}", f"roi={run_directory / 'heart.nii.gz'}", "times=[0.4]"]
    script(*common, "curve_points=3")
    with (run_directory / "monitor" / "heart.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["time"]) for row in rows] == [0, 0.25, 0.4, 0.5, 0.75, 1]
    assert [bool(row["intensity_change"]) for row in rows] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]  # at 1 a cycle is over
    assert (run_directory / "monitor" / "heart.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "volume_change_percent" in printed
    assert "covered_percent" in printed
    script(*common[:2], "times=[0.6]", "curve_points=3")  # joins them
    with (run_directory / "monitor" / "heart.csv").open() as file:
        more = list(csv.DictReader(file))
    assert [row for row in more if row["time"] != "0.6"] == rows
    assert len(more) == len(rows) + 1
    with pytest.raises(SystemExit):  # without the scans it has fewer columns
        script(*common, "scans=false", "curve_points=3")
    assert "heart.csv: already exists, of another ROI, another fit or with more columns" in capsys.readouterr().err
    (run_directory / "0.nii.gz").unlink()
    with pytest.raises(SystemExit):
        script(*common, "overwrite=true")
    assert "0.nii.gz" in capsys.readouterr().err
    script(*common, "overwrite=true", "scans=false", "curve_points=2")
    assert "intensity_change" not in (run_directory / "monitor" / "heart.csv").read_text()

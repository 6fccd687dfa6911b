"""scripts/export_series.py: the images at any time as 4D NIfTI, and a film of a slice with contours."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional
from PIL import Image

from stnerp import InputError, STNeRP, fit_deformation, load_series
from stnerp.film import COLOURS
from stnerp.geometry import Grid
from stnerp.io.dicom import dicom_series, write_dicom_series
from stnerp.io.rtstruct import Roi, read_rtstruct, write_rtstruct, write_structures
from stnerp.phantom import LABELS, Phantom
from stnerp.window import Window

SCRIPTS = Path(__file__).parents[1] / "scripts"
PHANTOM = Phantom((24, 19, 12), 15.0)


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(*arguments: str, script: str = "export_series") -> None:
    module = importlib.import_module(script)
    before, sys.argv = sys.argv, [f"{script}.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(module.main)
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a model of a breathing cycle, a heart as labels and the same as a structure set."""
    out = tmp_path_factory.mktemp("run")
    series = load_series([PHANTOM.image(t) for t in (0.0, 0.3, 0.6)], [0, 3, 6], period=10, window="ct")
    fit_deformation(series, None, levels=[(15, 30, 4)], progress=False, device="cpu").save(out / "model.pt")
    heart = sitk.Cast(PHANTOM.labels(0.0) == LABELS["heart"], sitk.sitkUInt8)
    sitk.WriteImage(heart, str(out / "heart.nii.gz"))
    scan = write_dicom_series(PHANTOM.image(0.0), out / "ct", patient_id="p")
    write_rtstruct(heart, {1: "heart"}, scan, out / "heart.dcm", colors={1: (10, 200, 30)})
    return out


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def film(path: Path) -> list[np.ndarray]:
    with Image.open(path) as opened:
        frames = []
        for k in range(opened.n_frames):
            opened.seek(k)
            frames.append(np.asarray(opened.convert("RGB")))
    return frames


def test_a_cycle(fitted: Path) -> None:
    run(f"out={fitted}", "frames=5", f"roi={fitted / 'heart.nii.gz'}", "pixels=120")
    model, folder = STNeRP.load(fitted / "model.pt"), fitted / "series"
    series = load_series(folder / "series.nii.gz")
    # One cycle of 10, whose end is its start.
    assert series.times == (0, 2, 4, 6, 8)
    for t, image in zip(series.times, series.images, strict=True):
        assert image.GetPixelID() == sitk.sitkInt16  # HU
        assert Grid.of(image).is_close(model.grid)
        np.testing.assert_array_equal(array(image), np.rint(array(model.image(t))))
    roi = sitk.ReadImage(str(fitted / "heart.nii.gz"))
    labels = load_series(folder / "roi.nii.gz").images
    for t, label in zip(series.times, labels, strict=True):
        np.testing.assert_array_equal(array(label), array(model.propagate(roi, t, model.grid)))
    frames = film(folder / "film.gif")
    assert len(frames) == 5
    assert frames[0].shape[1] == 120  # 360 x 180 mm: wider than high
    assert all((frame == COLOURS[0]).all(-1).any() for frame in frames)
    assert {path.name for path in folder.iterdir()} >= {"series.nii.gz", "roi.nii.gz", "film.gif"}


def test_a_roi_of_other_times_does_not_stay(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    run(f"out={tmp_path}", "frames=2", f"roi={fitted / 'heart.nii.gz'}", "pixels=40")
    assert (tmp_path / "series" / "roi.nii.gz").is_file()
    run(f"out={tmp_path}", "frames=3", "pixels=40", "overwrite=true")
    assert len(load_series(tmp_path / "series" / "series.nii.gz")) == 3
    assert not list((tmp_path / "series").glob("roi.*"))


def test_times_grid_and_a_structure_set(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    run(f"out={tmp_path}", "times=[0,1,5]", "grid=30", "dtype=float32", f"roi={fitted / 'heart.dcm'}", "pixels=60",
        "plane=sagittal", "through_mm=[20,0,0]", "window=lung")  # fmt: skip
    model, path = STNeRP.load(tmp_path / "model.pt"), tmp_path / "series" / "series.nii.gz"
    series = load_series(path)
    assert series.times == (0, 1, 5)
    for t, image in zip(series.times, series.images, strict=True):
        np.testing.assert_array_equal(array(image), array(model.image(t, model.grid.with_spacing(30.0))))
    frames = film(tmp_path / "series" / "film.gif")
    assert all((frame == (10, 200, 30)).all(-1).any() for frame in frames)  # its own colour
    assert not (tmp_path / "series" / "roi.nii.gz").exists()


def numbered_heart(fitted: Path, label: int, path: Path) -> Path:
    heart = sitk.ReadImage(str(fitted / "heart.nii.gz"), sitk.sitkInt64)
    sitk.WriteImage(heart * label, str(path))
    return path


@pytest.mark.parametrize(("label", "pixel"), [(65535, sitk.sitkUInt16), (70000, sitk.sitkInt32)])
def test_labels_keep_their_numbers(fitted: Path, tmp_path: Path, label: int, pixel: int) -> None:
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    roi = numbered_heart(fitted, label, tmp_path / "heart.nii.gz")
    run(f"out={tmp_path}", "frames=2", f"roi={roi}", "pixels=40")
    for image in load_series(tmp_path / "series" / "roi.nii.gz").images:
        assert np.unique(array(image)).tolist() == [0, label]
        assert image.GetPixelID() == pixel


def test_labels_that_no_file_holds_are_refused_at_once(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    roi = numbered_heart(fitted, 2**31, tmp_path / "heart.nii.gz")
    line = refused(capsys, f"out={tmp_path}", "frames=2", f"roi={roi}", "pixels=40")
    assert f"{roi}: labels from 0 to {2**31} don't fit into 32 bits" in line
    assert not (tmp_path / "series").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, script: str = "export_series") -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*arguments, script=script)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_drawn_elsewhere(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and contours that the reference doesn't show, all of them, some, or single points alone."""
    out, scan = tmp_path / "run", dicom_series(fitted / "ct")[0]
    out.mkdir()
    (out / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    heart = sitk.ReadImage(str(fitted / "heart.nii.gz"))
    (drawn,) = read_rtstruct(fitted / "heart.dcm").rois
    low, high = (Grid.of(heart).index_to_world(np.array(corner)) for corner in ([0.0] * 3, [23.0, 18.0, 11.0]))
    for name, way_mm in {
        "away": [3000.0, 0.0, 0.0],
        "edge": [0.0, low[1] - (drawn.contours[0][:, 1].mean()), 0],
    }.items():
        moved = tuple(contour + way_mm for contour in drawn.contours)
        write_structures([replace(drawn, contours=moved)], scan, tmp_path / f"{name}.dcm")
        image = sitk.Image(heart)
        image.SetOrigin((np.array(heart.GetOrigin()) + way_mm).tolist())
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    common = (f"out={out}", "pixels=40", "frames=2")
    for name in ("away.dcm", "away.nii.gz"):
        line = refused(capsys, *common, f"roi={tmp_path / name}")
        assert f"{name}: lies outside the reference image altogether" in line
    point = Roi(7, "isocentre", points=(low + high)[None] / 2)
    write_structures([point], scan, tmp_path / "point.dcm")
    assert "only single points are drawn" in refused(capsys, *common, f"roi={tmp_path / 'point.dcm'}")
    assert not (out / "series").exists()
    run(*common, f"roi={tmp_path / 'edge.dcm'}")
    log = capsys.readouterr().out
    (percent,) = re.findall(r"ROI 1: ([\d.]+) % of its points lie outside the reference image", log)
    points = np.concatenate(read_rtstruct(tmp_path / "edge.dcm").rois[0].contours)
    assert float(percent) == pytest.approx(100 * (points[:, 1] < low[1] - 7.5).mean(), abs=0.1)


def test_a_structure_set_is_known_by_what_is_in_it(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many systems call their files by UIDs."""
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    named = tmp_path / "RS.1.2.826.1"
    named.write_bytes((fitted / "heart.dcm").read_bytes())
    for path in (named, fitted / "heart.dcm"):
        line = refused(capsys, f"out={tmp_path}", f"roi={path}", "times=[3]", script="propagate_roi")
        assert f"{path}: is a DICOM RT structure set" in line
        assert "propagate_rtstruct.py" in line
    run(f"out={tmp_path}", "pixels=120", "frames=2", f"roi={named}")
    assert all((frame == (10, 200, 30)).all(-1).any() for frame in film(tmp_path / "series" / "film.gif"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plane=oblique"], "plane: unknown 'oblique'"),
        (["appearance=blend"], "appearance: this model knows no flow"),
        (["roi=nowhere.nii.gz"], "nowhere.nii.gz: no such file"),
    ],
)
def test_it_refuses(
    arguments: list[str], says: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    assert says in refused(capsys, f"out={tmp_path}", "pixels=40", "frames=3", *arguments)
    assert not list((tmp_path / "series").glob("*"))


def test_settings_that_are_no_use(fitted: Path) -> None:
    script, model = importlib.import_module("export_series"), STNeRP.load(fitted / "model.pt")
    for call, says in (
        (lambda: script.grid_of(model, -1), "grid: -1 mm"),
        (lambda: script.grid_of(model, "nowhere.nii.gz"), r"nowhere\.nii\.gz: no such file"),
        (lambda: script.voxel_type(model, "int8"), "dtype: 'int8'"),
        (lambda: script.point_of([1, 2]), "through_mm: "),
        (lambda: script.point_of("here"), "through_mm: "),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert script.grid_of(model, None) == model.grid
    assert script.voxel_type(model, "auto") == "int16"
    for low, high, name in ((-3.1, 3.0, "percentile"), (-1.0, 1.0, "custom"), (-40.0, 980.0, "percentile")):
        other = SimpleNamespace(window=Window(low, high, name))  # in whole numbers next to nothing would be left
        assert script.voxel_type(other, "auto") == "float32"

"""scripts/export_series.py: the images at any time as 4D NIfTI, and a film of a slice with contours."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional
from PIL import Image

from stnerp import InputError, STNeRP, fit_deformation, load_series
from stnerp.film import COLOURS
from stnerp.geometry import Grid
from stnerp.io.dicom import write_dicom_series
from stnerp.io.nifti_4d import nifti_times
from stnerp.io.rtstruct import write_rtstruct
from stnerp.phantom import LABELS, Phantom

SCRIPTS = Path(__file__).parents[1] / "scripts"
PHANTOM = Phantom((24, 19, 12), 15.0)


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(*arguments: str) -> None:
    module = importlib.import_module("export_series")
    before, sys.argv = sys.argv, ["export_series.py", *arguments]
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


def test_times_grid_and_a_structure_set(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes((fitted / "model.pt").read_bytes())
    run(f"out={tmp_path}", "times=[0,1,5]", "grid=30", "dtype=float32", f"roi={fitted / 'heart.dcm'}", "pixels=60",
        "plane=sagittal", "through_mm=[20,0,0]", "window=lung")  # fmt: skip
    model, path = STNeRP.load(tmp_path / "model.pt"), tmp_path / "series" / "series.nii.gz"
    assert nifti_times(path) == [0, 1, 5]
    series = load_series(path, times=nifti_times(path))
    for t, image in zip(series.times, series.images, strict=True):
        np.testing.assert_array_equal(array(image), array(model.image(t, model.grid.with_spacing(30.0))))
    frames = film(tmp_path / "series" / "film.gif")
    assert all((frame == (10, 200, 30)).all(-1).any() for frame in frames)  # its own colour
    assert not (tmp_path / "series" / "roi.nii.gz").exists()


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
    with pytest.raises(SystemExit) as exit_:
        run(f"out={tmp_path}", "pixels=40", "frames=3", *arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
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

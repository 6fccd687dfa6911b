"""A structure set is enough to look at a fit: monitor.py, trust.py and report.py take it as they take labels."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional
from test_scripts import run

from stnerp import InputError, STNeRP, fit_deformation, load_series
from stnerp.geometry import Grid
from stnerp.io.dicom import dicom_series, write_dicom_series
from stnerp.io.rtstruct import read_rtstruct, write_rtstruct, write_structures
from stnerp.phantom import LABELS, Phantom

SCRIPTS = Path(__file__).parents[1] / "scripts"
ORGANS = {3: "heart", 5: "liver"}


@pytest.fixture(scope="module")
def rois() -> Iterator[Any]:
    optional("hydra", "scripts")
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("rois")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as train_def.py leaves it; heart and liver in a file of labels each, and a structure set."""
    out, phantom = tmp_path_factory.mktemp("run"), Phantom((36, 28, 18), 10.0, noise_hu=0.0)
    for i, t in enumerate((0.0, 0.3)):
        sitk.WriteImage(phantom.image(t), str(out / f"{i}.nii.gz"))
    scans = [str(out / f"{i}.nii.gz") for i in range(2)]
    series = load_series(scans, [0, 3], window="ct")
    fit_deformation(series, None, levels=[(20, 30, 4)], align="none", progress=False, device="cpu").save(
        out / "model.pt"
    )
    (out / "train_def.yaml").write_text(
        f"align: none\ndata: {{kind: files, images: [{', '.join(scans)}], times: [0, 3], period: null, "
        "reference: 0, window: ct, masks: null, landmarks: null, label_names: null, contours: null}\n"
    )
    drawn = phantom.labels(0.0)
    labels = sum(
        (sitk.Cast(drawn == LABELS[name], sitk.sitkUInt8) * label for label, name in ORGANS.items()), drawn * 0
    )
    for label, name in ORGANS.items():
        sitk.WriteImage(labels == label, str(out / f"{name}.nii.gz"))
    write_rtstruct(
        labels, ORGANS, write_dicom_series(phantom.image(0.0), out / "ct", patient_id="p"), out / "rs.dcm"
    )
    return out


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def test_each_roi_has_its_voxels_and_a_number(folder: Path, rois: Any) -> None:
    grid = STNeRP.load(folder / "model.pt").grid
    found = rois.read_rois(folder / "rs.dcm", None, grid)
    assert list(found) == ["rs ROI 3", "rs ROI 5"]
    for image, name in zip(found.values(), ORGANS.values(), strict=True):
        np.testing.assert_array_equal(array(image), array(sitk.ReadImage(str(folder / f"{name}.nii.gz"))))
    both = array(rois.together(found))
    np.testing.assert_array_equal(both, np.maximum(*map(array, found.values())))
    assert list(rois.read_rois(folder / "rs.dcm", ["Liver"], grid, names=True)) == ["rs ROI 5 liver"]
    assert list(rois.read_rois(folder / "heart.nii.gz", None, grid)) == ["heart"]
    with pytest.raises(InputError, match="aren't drawn"):
        rois.read_rois(folder / "rs.dcm", ["spleen"], grid)


def test_what_the_reference_does_not_show(
    folder: Path, rois: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = STNeRP.load(folder / "model.pt").grid
    heart, liver = read_rtstruct(folder / "rs.dcm").rois
    away = replace(liver, contours=tuple(points + np.array([0.0, 0.0, 200.0]) for points in liver.contours))
    far = Grid(grid.size, grid.spacing_mm, tuple(np.add(grid.origin_mm, (0, 0, 200))), grid.direction)
    scan = write_dicom_series(far.image(np.zeros(far.shape, np.int16)), tmp_path / "far", patient_id="p")
    write_structures([away], scan, tmp_path / "away.dcm")
    with pytest.raises(InputError, match="outside the reference image altogether"):
        rois.read_rois(tmp_path / "away.dcm", None, grid)
    # Between the centres of the voxels: of a plan's ROIs that one is left out, asked for it is refused.
    corner = grid.index_to_world(np.array([10.2, 10.2, 9.0]))
    speck = replace(liver, contours=(corner + np.array([[0.0, 0, 0], [3, 0, 0], [3, 3, 0]]),))
    write_structures([heart, speck], dicom_series(folder / "ct")[0], tmp_path / "both.dcm")
    assert list(rois.read_rois(tmp_path / "both.dcm", None, grid)) == ["both ROI 3"]
    assert "ROI 5: isn't planar, or covers no voxel of the reference: left out" in caplog.text
    assert "liver" not in caplog.text
    with pytest.raises(InputError, match="covers no voxel"):
        rois.read_rois(tmp_path / "both.dcm", [3, 5], grid)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_monitor_says_of_a_structure_set_what_it_says_of_labels(folder: Path, rois: Any) -> None:
    common = [f"out={folder}", "curve_points=2"]
    run("monitor", *common, f"roi={folder / 'rs.dcm'}")
    run("monitor", *common, f"roi={folder / 'liver.nii.gz'}")
    rows, liver = (rows_of(folder / "monitor" / f"{name}.csv") for name in ("rs", "liver"))
    assert {row["roi"] for row in rows} == {"rs ROI 3", "rs ROI 5"}
    same = [row for row in rows if row["roi"] == "rs ROI 5"]
    assert [row["volume_ml"] for row in same] == [row["volume_ml"] for row in liver]


def test_trust_and_report_take_it_too(folder: Path, rois: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    trust, report = (importlib.import_module(name) for name in ("trust", "report"))
    verdicts, write = trust.verdicts, report.write_html_report

    def judged(*arguments: Any, **settings: Any) -> Any:
        seen["roi"] = settings["roi"]
        return verdicts(*arguments, **settings)

    def written(*arguments: Any, **settings: Any) -> Any:
        seen["structures"] = [structure.name for structure in settings["structures"]]
        return write(*arguments, **settings)

    monkeypatch.setattr(trust, "verdicts", judged)
    monkeypatch.setattr(report, "write_html_report", written)
    run("trust", f"out={folder}", f"roi={folder / 'rs.dcm'}", "rois=[heart]", "refits=0", "times=[3]")
    np.testing.assert_array_equal(array(seen["roi"]), array(sitk.ReadImage(str(folder / "heart.nii.gz"))))
    run(
        "report",
        f"out={folder}",
        f"roi=[{folder / 'rs.dcm'},{folder / 'liver.nii.gz'}]",
        "scans=false",
        "names=true",
    )
    assert seen["structures"] == ["rs ROI 3 heart", "rs ROI 5 liver", "liver"]
    run(
        "report",
        f"out={folder}",
        f"roi=[{folder / 'rs.dcm'},{folder / 'liver.nii.gz'}]",
        "scans=false",
        "overwrite=true",
    )
    assert seen["structures"] == ["ROI 1.3", "ROI 1.5", "ROI 2"]  # neither by name nor by file

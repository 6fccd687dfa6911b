"""scripts/propagate_rtstruct.py: contours of the plan, on the scan of another day, for a planning system."""

from __future__ import annotations

import csv
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import optional
from PIL import Image

from stnerp import InputError, STNeRP, fit_deformation, load_series
from stnerp.geometry import Grid
from stnerp.io.dicom import DicomSeries, dicom_series, series_grid, write_dicom_series
from stnerp.io.rtstruct import Roi, read_rtstruct, roi_mask, write_rtstruct, write_structures
from stnerp.metrics import dice
from stnerp.phantom import LABELS, Phantom

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHIFT_MM = np.array([7.0, -4.0, 10.0])  # of the patient, from the reference to time 1
PATIENT = "Secret^Name"
NAMES = {LABELS["heart"]: "Heart of Secret", LABELS["tumour"]: "GTV Secret"}


def run(*arguments: str) -> None:
    """The script as from the command line, in this process; SystemExit where it ends with an error."""
    module = importlib.import_module("propagate_rtstruct")
    before, sys.argv = sys.argv, ["propagate_rtstruct.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(module.main)
    finally:
        sys.argv = before


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planning scan with contours, the scan of time 1, on which the patient lies elsewhere, and a model that
    knows no more than that."""
    folder = tmp_path_factory.mktemp("patient")
    plan = Phantom((66, 50, 30), 5.5, noise_hu=0.0)
    scan = write_dicom_series(plan.image(0.0), folder / "plan", patient_id=PATIENT, date="20240102")
    write_rtstruct(sitk.ChangeLabel(plan.labels(0.0), {1: 0.0, 3: 0.0, 4: 0.0}), NAMES, scan, folder / "drawn.dcm")
    heart, tumour = (
        replace(roi, color=(10 * roi.number, 20, 30)) for roi in read_rtstruct(folder / "drawn.dcm").rois
    )
    couch = Roi(30, "Couch", (9, 9, 9), heart.contours, interpreted_type="SUPPORT")
    marker = Roi(40, "Marker", (1, 1, 1), points=np.array([[-70.0, 20.0, 0.0]]))
    rois = [replace(heart, interpreted_type="ORGAN"), replace(tumour, interpreted_type="GTV"), couch, marker]
    write_structures(rois, scan, folder / "plan.dcm")

    later = Phantom(grid=Grid((80, 64, 40), (4.5, 4.5, 4.0), tuple(np.array([-180.0, -140.0, -75.0]) + SHIFT_MM)))
    image = later.image(0.0)
    write_dicom_series(image, folder / "later", patient_id=PATIENT, description="CT of today", date="20240201")
    write_dicom_series(image, folder / "other", patient_id="Somebody^Else")

    small = Phantom((24, 19, 12), 15.0)
    model = fit_deformation(load_series([small.image(0.0)] * 2, [0, 1]), None, levels=[(15, 30, 1)], align="none",
                            progress=False, device="cpu")  # fmt: skip
    for weights in model.def_net.parameters():
        weights.data.zero_()  # no motion but the alignment's
    model.alignments = np.stack([np.eye(4), np.eye(4)])
    model.alignments[1, :3, 3] = SHIFT_MM
    (folder / "run").mkdir()
    model.save(folder / "run" / "model.pt")
    there = STNeRP.load(folder / "run" / "model.pt").map_points(np.zeros((1, 3)), 1)
    np.testing.assert_allclose(there, [-SHIFT_MM], atol=1e-3)
    return folder


def arguments(patient: Path, *others: str) -> list[str]:
    common = {"out": "run", "rtstruct": "plan.dcm", "target": "later"}
    return [*(f"{name}={patient / value}" for name, value in common.items()), "t=1", *others]


@pytest.fixture(scope="module")
def carried(patient: Path) -> Path:
    optional("hydra", "scripts")
    sys.path.insert(0, str(SCRIPTS))
    try:
        run(*arguments(patient, f"reference={patient / 'plan'}"))
    finally:
        sys.path.remove(str(SCRIPTS))
    return patient / "run" / "rtstruct"


def series_in(folder: Path) -> DicomSeries:
    (series,) = dicom_series(folder)
    return series


def test_the_contours_are_the_targets(patient: Path, carried: Path) -> None:
    target, file = series_in(patient / "later"), pydicom.dcmread(carried / "t1.dcm")
    structures, plan = read_rtstruct(carried / "t1.dcm"), read_rtstruct(patient / "plan.dcm")
    assert structures.frame_uid == target.frame_uid != plan.frame_uid
    assert structures.series_uids == (target.series_uid,)
    assert file.StudyInstanceUID == target.study_uid
    assert (file.PatientID, file.StudyDate, file.ApprovalStatus) == (PATIENT, "20240201", "UNAPPROVED")
    assert "computed" in file.SeriesDescription
    assert file.PredecessorStructureSetSequence[0].ReferencedSOPInstanceUID == plan.uid
    images = {image.ReferencedSOPInstanceUID for roi in file.ROIContourSequence for contour in roi.ContourSequence
              for image in contour.ContourImageSequence}  # fmt: skip
    assert images < set(target.image_uids)


def test_rois_are_kept_and_carried(patient: Path, carried: Path) -> None:
    after = {roi.number: roi for roi in read_rtstruct(carried / "t1.dcm").rois}
    before = {roi.number: roi for roi in read_rtstruct(patient / "plan.dcm").rois}
    assert sorted(after) == [2, 5, 40]  # without the couch, which doesn't move with the patient
    for number, roi in after.items():
        for name in ("name", "color", "interpreted_type"):
            assert getattr(roi, name) == getattr(before[number], name)
    grid = series_grid(series_in(patient / "later"))
    for number in (2, 5):
        moved = replace(before[number], contours=tuple(c + SHIFT_MM for c in before[number].contours))
        # Voxels of 4.5 mm: those on the border of the tumour, 14 mm in radius, are many.
        assert dice(roi_mask(after[number], grid), roi_mask(moved, grid)) > (0.98 if number == 2 else 0.95)
    np.testing.assert_allclose(after[40].points, before[40].points + SHIFT_MM, atol=0.1)


def test_table_and_picture(carried: Path) -> None:
    with (carried / "t1.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["roi"] for row in rows] == ["2", "5", "40"]
    assert [row["type"] for row in rows] == ["ORGAN", "GTV", ""]
    for row in rows:
        np.testing.assert_allclose([float(row[f"shift_{axis}_mm"]) for axis in "xyz"], SHIFT_MM, atol=0.3)
    for row in rows[:2]:
        # Whole slices, of 5.5 mm there and of 4 mm here.
        assert float(row["volume_ml"]) == pytest.approx(float(row["volume_reference_ml"]), rel=0.1)
    picture = np.asarray(Image.open(carried / "t1.png")).reshape(-1, 3).astype(int)
    for colour in ((20, 20, 30), (50, 20, 30)):
        assert (picture == colour).all(1).sum() > 20


def test_nothing_says_who_it_is(patient: Path, carried: Path) -> None:
    written = [carried / "t1.csv", carried / "t1.png", patient / "run" / "propagate_rtstruct.log"]
    for path in written:
        assert b"Secret" not in path.read_bytes()
        assert b"GTV S" not in path.read_bytes()
    assert sorted(path.name for path in carried.iterdir()) == ["t1.csv", "t1.dcm", "t1.png"]


def test_names_where_they_are_asked_for(patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt").write_bytes((patient / "run" / "model.pt").read_bytes())
    run(*arguments(patient, f"out={tmp_path}", "names=true", "rois=[gtvsecret,30]"))
    printed = capsys.readouterr().out
    assert "GTV Secret" in printed
    assert "Couch" in printed
    assert PATIENT not in printed
    assert [roi.number for roi in read_rtstruct(tmp_path / "rtstruct" / "t1.dcm").rois] == [5, 30]


def test_it_refuses(patient: Path, carried: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already exists" in refused(capsys, *arguments(patient))
    (tmp_path / "model.pt").write_bytes((patient / "run" / "model.pt").read_bytes())
    out = f"out={tmp_path}"
    for others, message in (
        ([f"target={patient / 'other'}"], "target: has another patient's ID"),
        ([f"reference={patient / 'other'}"], "another frame of reference"),
        (["rois=[6]"], "rois: [6] aren't drawn"),
    ):
        line = refused(capsys, *arguments(patient, out, *others))
        assert message in line
        assert "Secret" not in line.replace(str(patient), "")
    assert not (tmp_path / "rtstruct").exists()
    # The same contours for another person's scan, on demand.
    run(*arguments(patient, out, f"target={patient / 'other'}", "same_patient=false", "rois=5"))
    assert pydicom.dcmread(tmp_path / "rtstruct" / "t1.dcm").PatientID == "Somebody^Else"


def test_settings_that_are_no_use(patient: Path) -> None:
    script, OmegaConf = importlib.import_module("propagate_rtstruct"), optional("omegaconf", "scripts").OmegaConf
    plan, grid = read_rtstruct(patient / "plan.dcm"), Grid((9, 9, 9), (1, 1, 1), (500, 0, 0))
    for call, says in (
        (lambda: script.one_series(str(patient), "target"), "target: .* holds 3 DICOM series"),
        (lambda: script.one_series(str(patient / "run"), "target"), "no DICOM series"),
        (lambda: script.time_of(OmegaConf.create({"t": "soon"})), "t: 'soon' must be one number"),
        (lambda: script.check_inside(plan.rois, grid, plan.path), "outside the reference image altogether"),
        (
            lambda: script.wanted_rois(plan, "Heart"),
            r"rois: \['Heart'\] aren't drawn in .*; its ROIs are number 2, 5",
        ),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert [roi.number for roi in script.wanted_rois(plan, "heartofsecret")] == [2]

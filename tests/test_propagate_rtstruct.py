"""scripts/propagate_rtstruct.py: contours of the plan, on the scan of another day, for a planning system."""

from __future__ import annotations

import csv
import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import yaml
from conftest import optional
from PIL import Image

from stnerp import InputError, STNeRP, fit_deformation, load_series
from stnerp.geometry import Grid
from stnerp.io.dicom import DicomSeries, dicom_series, series_grid, write_dicom_series
from stnerp.io.rtstruct import Roi, read_rtstruct, roi_mask, write_rtstruct, write_structures
from stnerp.metrics import dice
from stnerp.phantom import LABELS, TUMOUR_CENTRE_MM, Phantom

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


# -- where the patient lies in the target


SMALL = Phantom((24, 19, 12), 15.0)
ALIKE = "in the same frame"  # of the contours, which are of a finer scan of the plan's frame


def fitted_to(folder: Path, patient: Path, images: object, data: dict[str, object] | None = None) -> Path:
    """A run directory of the model, whose config says that it was fitted to these images."""
    folder.mkdir()
    (folder / "model.pt").write_bytes((patient / "run" / "model.pt").read_bytes())
    nothing = dict.fromkeys(("period", "masks", "landmarks", "label_names", "contours"))
    section = {"kind": "files", "images": images, "times": [0, 1], "reference": 0, "window": "auto", **nothing}
    section |= data or {}
    (folder / "train_def.yaml").write_text(yaml.safe_dump({"data": section}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scans(patient: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scans of the fit, ct0 and ct1, in frames of their own; `beside` shares that of ct1, `unseen` has its own
    and another couch position."""
    folder, plan = tmp_path_factory.mktemp("scans"), series_in(patient / "plan")
    image, tail = SMALL.image(0.0), sitk.Image(SMALL.image(0.0))
    tail.SetOrigin((np.array(image.GetOrigin()) + SHIFT_MM).tolist())
    write_dicom_series(image, folder / "ct0", patient_id=PATIENT, frame_uid=plan.frame_uid)
    frame = write_dicom_series(tail, folder / "ct1", patient_id=PATIENT).frame_uid
    write_dicom_series(tail, folder / "beside", patient_id=PATIENT, frame_uid=frame)
    tail.SetOrigin((np.array(tail.GetOrigin()) + np.array([0.0, 60.0, 40.0])).tolist())
    write_dicom_series(tail, folder / "unseen", patient_id=PATIENT)
    return folder


def middle_of(out: Path, stem: str = "t1") -> np.ndarray:
    """Of the tumour's contours that were written."""
    (roi,) = read_rtstruct(out / "rtstruct" / f"{stem}.dcm").rois
    return np.concatenate(roi.contours).mean(0)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of the log but those of files and of the table."""
    return [line for line in capsys.readouterr().out.splitlines() if "can't check" in line or "frame" in line]


def test_scans_of_the_fit_are_known(
    patient: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted_to(tmp_path / "run", patient, [str(scans / "ct0"), str(scans / "ct1")])
    ours = arguments(patient, f"out={out}", "rois=5")
    # Not the scan of that time: another couch position.
    line = refused(capsys, *ours, f"target={scans / 'ct1'}", "t=0")
    assert re.search(r"t: .*ct1 is the fit's scan at t = 1, not 0; give t=1, or", line)
    line = refused(capsys, *ours, f"target={scans / 'unseen'}")
    assert "target: the fit hasn't seen the scan in" in line
    assert "data.images" in line
    assert "target_placed=true" in line
    assert not (out / "rtstruct").exists()

    truth = np.array(TUMOUR_CENTRE_MM) + SHIFT_MM
    for target, t, stem in (("ct1", "1", "t1"), ("beside", "1.0", "t1")):
        run(*ours, f"target={scans / target}", f"t={t}", "overwrite=true")
        (line,) = said(capsys)
        assert ALIKE in line
        assert np.linalg.norm(middle_of(out, stem) - truth) < 4  # voxels of 15 mm
    # Of the frame of ct1, where the patient lies as at t = 1, at another time.
    run(*ours, f"target={scans / 'beside'}", "t=0.5")
    first, second = said(capsys)
    assert "target: is in the frame of reference of the scan at t = 1;" in first
    assert ALIKE in second
    # Somebody knows better.
    run(*ours, f"target={scans / 'ct1'}", "t=0", "target_placed=true", "overwrite=true")
    run(*ours, f"target={scans / 'unseen'}", "target_placed=true", "overwrite=true")
    assert not [line for line in said(capsys) if ALIKE not in line]


def test_contours_must_be_of_the_fits_reference(
    patient: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fitted_to(tmp_path / "run", patient, [str(scans / "ct0"), str(scans / "ct1")])
    ours = arguments(patient, f"out={out}", "rois=5", f"target={scans / 'ct1'}")
    tumour = next(roi for roi in read_rtstruct(patient / "plan.dcm").rois if roi.number == 5)
    drawn, elsewhere = tmp_path / "ct0.dcm", tmp_path / "later.dcm"
    slices = [np.concatenate([c[:, :2], np.full((len(c), 1), SMALL.grid.origin_mm[2] + z)], axis=1)
              for c, z in zip(tumour.contours, (75, 90), strict=False)]  # fmt: skip
    on_it = replace(tumour, contours=tuple(slices))
    write_structures([on_it], series_in(scans / "ct0"), drawn)
    write_structures([on_it], series_in(scans / "ct0"), elsewhere)
    file = pydicom.dcmread(elsewhere)
    for item, keyword in (
        (file.ReferencedFrameOfReferenceSequence[0], "FrameOfReferenceUID"),
        (file.StructureSetROISequence[0], "ReferencedFrameOfReferenceUID"),
    ):
        setattr(item, keyword, series_in(patient / "later").frame_uid)
    file.save_as(elsewhere)
    line = refused(capsys, *ours, f"rtstruct={elsewhere}")
    assert re.search(r"later\.dcm: ROI 5: in another frame of reference than .*ct0; give", line)
    # What is named counts.
    run(*ours, f"rtstruct={elsewhere}", f"reference={patient / 'later'}")
    run(*ours, f"rtstruct={drawn}", "overwrite=true")
    lines = said(capsys)
    assert len(lines) == 1  # of the first: drawn on another series of that frame
    # No frame, but the series.
    del file.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID
    del file.StructureSetROISequence[0].ReferencedFrameOfReferenceUID
    file.save_as(elsewhere)
    run(*ours, f"rtstruct={elsewhere}", "overwrite=true")
    assert said(capsys) == []


def test_the_frame_of_each_roi_counts(
    patient: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that lists another frame first, and has an ROI in it."""
    file, other = pydicom.dcmread(patient / "plan.dcm"), pydicom.Dataset()
    other.FrameOfReferenceUID = "1.2.3.4"
    file.ReferencedFrameOfReferenceSequence.insert(0, other)
    (marker,) = (item for item in file.StructureSetROISequence if item.ROINumber == 40)
    marker.ReferencedFrameOfReferenceUID = "1.2.3.4"
    file.save_as(tmp_path / "two.dcm")
    known = fitted_to(tmp_path / "known", patient, [str(scans / "ct0"), str(scans / "ct1")])
    unknown = fitted_to(tmp_path / "unknown", patient, None)
    given = [f"rtstruct={tmp_path / 'two.dcm'}", f"target={scans / 'ct1'}"]
    for out, whose in ((known, r".*ct0"), (unknown, "ROI 2")):
        line = refused(capsys, *arguments(patient, f"out={out}", *given))
        assert re.search(rf"two\.dcm: ROI 40: in another frame of reference than {whose}; .* rois=", line)
        run(*arguments(patient, f"out={out}", *given, "rois=5"))
        assert [roi.number for roi in read_rtstruct(out / "rtstruct" / "t1.dcm").rois] == [5]
    assert "ROI 40: in another frame" in refused(capsys, *arguments(patient, f"out={known}", *given, "rois=40",
                                                                    "overwrite=true"))  # fmt: skip


@pytest.mark.parametrize(
    ("images", "data", "reason"),
    [
        (None, {}, "holds neither train_def.yaml nor config.yaml"),
        (["day0.nii.gz", "day1.nii.gz"], {}, "no DICOM folders"),
        (["{}/ct0", "{}/gone"], {}, "not where they were"),
        (["{}/ct0", "{}/ct1"], {"times": [0, 2]}, "other scans"),
        (["{}/ct1", "{}/ct0"], {}, "another reference"),
        ("{}/ct0", {"kind": "phantom"}, "names no files"),
    ],
)
def test_what_cannot_be_checked_is_said_once(
    images: list[str] | str | None,
    data: dict[str, object],
    reason: str,
    patient: Path,
    scans: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [name.format(scans) for name in images] if isinstance(images, list) else images
    out = fitted_to(tmp_path / "run", patient, named, data)
    if images is None:
        (out / "train_def.yaml").unlink()
    run(*arguments(patient, f"out={out}", "rois=5"))
    (line,) = said(capsys)
    assert f"can't check whether the patient lies in {patient / 'later'}" in line
    assert f"nor whether {patient / 'plan.dcm'} was drawn on the reference" in line
    assert reason in line
    switches = ["target_placed=true", f"reference={patient / 'plan'}", "overwrite=true"]
    run(*arguments(patient, f"out={out}", "rois=5", *switches))
    assert said(capsys) == []


@pytest.mark.parametrize("given", ["pattern", "folder", "manifest"])
def test_scans_are_found_however_they_are_named(given: str, patient: Path, scans: Path, tmp_path: Path) -> None:
    fitted_run = importlib.import_module("fitted_run")
    data: dict[str, object] = {}
    images: object = str(scans / "ct[01]")
    if given == "folder":
        images = str(tmp_path / "both")
        for name in ("ct0", "ct1"):
            shutil.copytree(scans / name, tmp_path / "both" / name)
        for k, name in enumerate(("ct0", "ct1")):  # which comes first is in the headers
            for path in (tmp_path / "both" / name).iterdir():
                file = pydicom.dcmread(path)
                file.AcquisitionDate = f"2024010{k + 1}"
                file.save_as(path)
    if given == "manifest":
        manifest = tmp_path / "series.yaml"
        manifest.write_text(f"images: [{scans / 'ct0'}, {scans / 'ct1'}]\ntimes: [0, 1]\n", encoding="utf-8")
        data, images = {"kind": "manifest", "manifest": str(manifest), "patient": None}, None
    out = fitted_to(tmp_path / "run", patient, images, data)
    found = fitted_run.fitted_scans(out, STNeRP.load(out / "model.pt"))
    uids = [series_in(scans / name).series_uid for name in ("ct0", "ct1")]
    assert [(scan.time, scan.series.series_uid) for scan in found] == [(0, uids[0]), (1, uids[1])]


def test_times_of_a_cycle_go_round(scans: Path) -> None:
    script, fitted_run = (importlib.import_module(name) for name in ("propagate_rtstruct", "fitted_run"))
    ct0, ct1 = (series_in(scans / name) for name in ("ct0", "ct1"))
    fit = [fitted_run.FittedScan(t, ct) for t, ct in ((0.0, ct0), (70.0, ct1))]
    for t in (0.0, 100.0, -100.0, 300.0):
        script.check_target(ct0, t, fit, 100.0)
    script.check_target(ct1, 170.0, fit, 100.0)
    with pytest.raises(InputError, match="give t=0,"):
        script.check_target(ct0, 70.0, fit, 100.0)
    with pytest.raises(InputError, match="give t=0,"):
        script.check_target(ct0, 100.0, fit, None)
    # Phases that share a series are told apart by their slices.
    halves = [replace(ct0, slices=ct0.slices[:6]), replace(ct0, slices=ct0.slices[6:])]
    fit = [fitted_run.FittedScan(t, half) for t, half in zip((0.0, 50.0), halves, strict=True)]
    script.check_target(halves[1], 50.0, fit, 100.0)
    with pytest.raises(InputError, match="give t=50,"):
        script.check_target(halves[1], 0.0, fit, 100.0)


# -- fields of view that cut


def test_contours_that_the_target_cuts(patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target ends within the tumour and holds none of the heart's lower half."""
    before = {roi.number: roi for roi in read_rtstruct(patient / "plan.dcm").rois}
    middle = np.concatenate(before[5].contours).mean(0) + SHIFT_MM
    grid = Grid((80, 64, 20), (4.5, 4.5, 4.0), (*(np.array([-180.0, -140.0]) + SHIFT_MM[:2]), middle[2]))
    write_dicom_series(Phantom(grid=grid).image(0.0), tmp_path / "half", patient_id=PATIENT)
    out = fitted_to(tmp_path / "run", patient, None)
    run(*arguments(patient, f"out={out}", f"target={tmp_path / 'half'}", "rois=[5,40]"))
    log = capsys.readouterr().out
    with (out / "rtstruct" / "t1.csv").open(encoding="utf-8") as file:
        tumour, marker = csv.DictReader(file)
    points = np.concatenate(before[5].contours) + SHIFT_MM
    percent = 100 * (points[:, 2] < middle[2] - 2).mean()
    assert 20 < percent < 60
    assert float(tumour["outside_percent"]) == pytest.approx(percent, abs=0.1)
    assert [tumour[f"shift_{axis}_mm"] for axis in "xyz"] == ["", "", ""]
    assert 0.3 < float(tumour["volume_ml"]) / float(tumour["volume_reference_ml"]) < 0.7
    assert f"ROI 5: {percent:.3g} % of its points lie outside the target" in log
    assert "ROI 40" not in log
    assert float(marker["outside_percent"]) == 0
    np.testing.assert_allclose([float(marker[f"shift_{axis}_mm"]) for axis in "xyz"], SHIFT_MM, atol=0.1)


def test_a_picture_of_points_alone(patient: Path, tmp_path: Path) -> None:
    """The tumour isn't in the target, the marker is."""
    grid = Grid((20, 20, 10), (2.0, 2.0, 2.0), tuple(np.array([-70.0, 20.0, 0.0]) + SHIFT_MM - (20, 20, 10)))
    plan = {roi.number: roi for roi in read_rtstruct(patient / "plan.dcm").rois}
    far = replace(plan[2], contours=tuple(c for c in plan[2].contours if not grid.contains(c + SHIFT_MM).any()))
    assert far.contours
    write_structures([far, plan[40]], series_in(patient / "plan"), tmp_path / "plan.dcm")
    write_dicom_series(Phantom(grid=grid).image(0.0), tmp_path / "little", patient_id=PATIENT)
    out = fitted_to(tmp_path / "run", patient, None)
    given = [f"out={out}", f"rtstruct={tmp_path / 'plan.dcm'}", f"target={tmp_path / 'little'}"]
    run(*arguments(patient, *given))  # where warnings are errors
    with (out / "rtstruct" / "t1.csv").open(encoding="utf-8") as file:
        heart, marker = csv.DictReader(file)
    assert (float(heart["outside_percent"]), float(heart["volume_ml"])) == (100, 0)
    assert float(marker["outside_percent"]) == 0
    script = importlib.import_module("propagate_rtstruct")
    outside, points = Roi(1, "a"), Roi(2, "b", points=np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    square = np.array([[0.0, 0, 5], [4, 0, 5], [4, 4, 5], [0, 4, 5]])
    small, large = (Roi(3, "c", contours=(k * square, k * square + [0, 0, 2])) for k in (1, 2))
    np.testing.assert_allclose(script.middle_mm([outside, points, large, small], grid), [2, 2, 6])
    np.testing.assert_allclose(script.middle_mm([outside, points], grid), [2, 2, 2])
    np.testing.assert_allclose(script.middle_mm([outside], grid), grid.centre_mm)


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

"""A download of 4D-Lung: files written here in its layout, indexed by what they say, and read as a series."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import date
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import composed, optional

import stnerp
from stnerp.errors import InputError, MissingContoursError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import DicomSeries, write_dicom_series
from stnerp.io.four_d_lung import FourDLung, breathing_series, index_4d_lung, longitudinal_series, roi_name
from stnerp.io.rtstruct import write_rtstruct
from stnerp.metrics import dice
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, LABELS, Phantom

ROOT = Path(__file__).parents[1]
GRID = Grid((7, 6, 5), (1.0, 1.5, 3.0), (-30.0, 20.0, 100.0))
DATES = ("19991126", "19991203", "19991224")  # a week, then three


def value_of(day: int, percent: float) -> int:
    """The HU of an image: another one for each."""
    return 100 * day + round(percent)


def tumour(day: int, percent: float) -> np.ndarray:
    """A mask that differs from day to day and from phase to phase: one voxel wide, off every axis of symmetry."""
    mask = np.zeros(GRID.shape, np.uint8)
    mask[1 : 2 + day, 2, 1 : 2 + round(percent / 20)] = 1
    return mask


def write_phase(
    folder: Path,
    day: int,
    percent: float,
    study_uid: str,
    *,
    description: str = "P4^P113^S{session}^I{number:05d}, Gated, {percent:.1f}%A",
    rois: tuple[str, ...] = ("Tumor_c{percent:02.0f}", "Carina_c{percent:02.0f}"),
    **settings: Any,
) -> DicomSeries:
    """A CT series in a folder of its own, and its RTSTRUCT in another one."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = len(list(folder.iterdir()))
    values = np.full(GRID.shape, value_of(day, percent), np.int16)
    values[0, 0, 0] = -1000
    number = 10349 + round(percent / 10)
    settings = {"patient_id": "113_HM10395", "date": DATES[day], "frame_uid": f"1.2.3.{day}", **settings}
    series = write_dicom_series(
        GRID.image(values),
        folder / f"{stamp}-{percent:.0f}",
        description=description.format(session=300 + day, number=number, percent=percent),
        study_uid=study_uid,
        **settings,
    )
    if rois:
        (folder / f"{stamp}-rts").mkdir()
        labels = tumour(day, percent)
        labels[3, 4, 5] = 2
        names = {label: name.format(percent=percent) for label, name in enumerate(rois, 1)}
        labels[labels > len(rois)] = 0
        write_rtstruct(GRID.image(labels), names, series, folder / f"{stamp}-rts" / "1-1.dcm")
    return series


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients; three days of the first, whose folders say nothing of it, and much that is of no use."""
    root = tmp_path_factory.mktemp("4D-Lung")
    for day in (2, 0, 1):  # folders' names contradict the dates
        for percent in (50, 0, 20):
            if (day, percent) != (1, 50):
                write_phase(root / "manifest-1" / f"x{3 - day}", day, percent, f"1.2.826.{day}", time="101500")
    write_phase(root / "other", 0, 0, "1.2.827.1", patient_id="114_HM10395", description="Gated, 0.0%")
    write_phase(root / "other", 0, 30, "1.2.827.1", patient_id="114_HM10395", description="Gated, 30.0%", rois=())
    useless: list[dict[str, Any]] = [
        {"description": "P4^P113^S100^I0, Gated, 0.0%", "model": "Trilogy Cone Beam CT"},
        {"description": "P4^P113^S101^I0, Gated, 20.0%"},
        {"description": "4DCBCT, Gated, 20.0%A"},
        {"description": "Average, 0.0%"},
        {"description": "MIP 50%"},
        {"description": "planning"},
    ]
    for settings in useless:
        write_phase(root / "useless", 0, 0, "1.2.826.0", rois=(), **settings)
    (root / "LICENSE").write_text("CC BY 3.0")
    (root / "useless" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 300)
    return root


@pytest.fixture(scope="module")
def collection(download: Path) -> FourDLung:
    return index_4d_lung(download)


def values(arguments: dict[str, Any]) -> list[int]:
    return [int(sitk.GetArrayFromImage(image).max()) for image in arguments["images"]]


def arrays(arguments: dict[str, Any]) -> list[np.ndarray]:
    return [sitk.GetArrayFromImage(mask) for mask in arguments["masks"]]


# -- the index


def test_patients_dates_and_phases(collection: FourDLung) -> None:
    assert collection.patients == ("113_HM10395", "114_HM10395")
    found = {(scan.patient, scan.name): [phase.percent for phase in scan.phases] for scan in collection.scans}
    assert found == {
        ("113_HM10395", "1999-11-26"): [0, 20, 50],
        ("113_HM10395", "1999-12-03"): [0, 20],
        ("113_HM10395", "1999-12-24"): [0, 20, 50],
        ("114_HM10395", "1999-11-26"): [0, 30],
    }
    assert all(len(phase.structures) == 1 for scan in collection.of("113_HM10395") for phase in scan.phases)


def test_what_is_left_out_is_told(collection: FourDLung) -> None:
    assert set(collection.left_out) == {
        "1 x CT series without a breathing phase",
        "2 x averages over the phases",
        "3 x cone beam CT series",
    }


def test_it_prints(collection: FourDLung) -> None:
    lines = str(collection).splitlines()
    assert lines[0].endswith("2 patients, 4 4D CT")
    assert lines[1] == "113_HM10395  1999-11-26  phases 0 20 50 %  contours: Tumor, Carina"
    assert len(repr(collection)) < 10_000  # without the headers of all slices
    with pytest.raises(FrozenInstanceError):
        collection.folder = "x"  # type: ignore[misc]


def test_one_pass_over_the_headers_and_no_pixel(download: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = pydicom.dcmread

    def counted(file: Any, **settings: Any) -> Any:
        assert settings["stop_before_pixels"]
        seen.append(str(getattr(file, "name", file)))
        return original(file, **settings)

    monkeypatch.setattr(pydicom, "dcmread", counted)
    monkeypatch.setattr(sitk.ImageSeriesReader, "Execute", None)
    found = index_4d_lung(download)
    # Each file once, and an RTSTRUCT once more for what it refers to.
    structures = sum(len(phase.structures) for scan in found.scans for phase in scan.phases)
    assert len(seen) == len(set(seen)) + structures
    before = len(seen)
    found.scan("113_HM10395", "1999-12-03")
    str(found)
    assert len(seen) == before


def test_copies_count_once(tmp_path: Path) -> None:
    series = write_phase(tmp_path / "a", 0, 0, "1.2.826.0")
    (tmp_path / "copy").mkdir()
    for file in (*series.files, next((tmp_path / "a").rglob("1-1.dcm"))):
        (tmp_path / "copy" / Path(file).name).write_bytes(Path(file).read_bytes())
    (phase,) = index_4d_lung(tmp_path).scans[0].phases
    assert len(phase.series.slices) == GRID.size[2]
    assert len(phase.structures) == 1


def test_contours_are_linked_by_what_they_refer_to(tmp_path: Path) -> None:
    # The RTSTRUCT of each phase lies in the other's folder.
    for percent in (0, 50):
        write_phase(tmp_path / str(percent), 0, percent, "1.2.826.0")
    first, second = sorted(tmp_path.rglob("1-1.dcm"))
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)
    arguments = breathing_series(index_4d_lung(tmp_path), "113_HM10395")
    np.testing.assert_array_equal(arrays(arguments)[0], tumour(0, 0))
    np.testing.assert_array_equal(arrays(arguments)[1], tumour(0, 50))


def test_contours_are_linked_by_slices_where_the_series_is_another(tmp_path: Path) -> None:
    write_phase(tmp_path, 0, 0, "1.2.826.0")
    write_phase(tmp_path, 0, 50, "1.2.826.0")
    for path in tmp_path.rglob("1-1.dcm"):
        file = pydicom.dcmread(path)
        study = file.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        study.RTReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
        file.save_as(path)
    arguments = breathing_series(index_4d_lung(tmp_path), "113_HM10395")
    np.testing.assert_array_equal(arrays(arguments)[1], tumour(0, 50))


def test_contours_of_other_series_are_told(tmp_path: Path) -> None:
    write_phase(tmp_path, 0, 0, "1.2.826.0")
    series = write_phase(tmp_path, 0, 50, "1.2.826.0")
    for file in series.files:
        Path(file).unlink()
    found = index_4d_lung(tmp_path)
    assert found.left_out == ("1 x RTSTRUCT of a series that isn't used or isn't here",)
    assert [phase.percent for phase in found.scans[0].phases] == [0]


def test_one_bad_series_leaves_the_others(tmp_path: Path) -> None:
    write_phase(tmp_path, 0, 0, "1.2.826.0")
    bad = write_phase(tmp_path, 0, 50, "1.2.826.0", rois=())
    for name in bad.files:
        file = pydicom.dcmread(name)
        file.ImagePositionPatient = [0, 0, 0]
        file.save_as(name)
    (tmp_path / "bad-rts.dcm").write_bytes((next(tmp_path.rglob("1-1.dcm"))).read_bytes()[:700])
    found = index_4d_lung(tmp_path)
    assert [phase.percent for phase in found.scans[0].phases] == [0]
    assert any("several slices at the same position" in note for note in found.left_out)


def test_no_4d_ct(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such folder"):
        index_4d_lung(tmp_path / "no")
    with pytest.raises(MissingFileError, match="no CT series with a breathing phase"):
        index_4d_lung(tmp_path)


# -- choosing a scan


@pytest.mark.parametrize("written", ["1999-12-03", "19991203", 19991203, "12-03-1999", date(1999, 12, 3)])
def test_dates_as_people_write_them(collection: FourDLung, written: Any) -> None:
    assert collection.scan("113_HM10395", written).date == "1999-12-03"


def test_no_such_patient_or_date(collection: FourDLung) -> None:
    with pytest.raises(InputError, match="no patient '113'; there are: 113_HM10395, 114_HM10395"):
        breathing_series(collection, "113")
    with pytest.raises(InputError, match="has no 4D CT on 2001-01-01; choose one of 1999-11-26, 1999-12-03"):
        breathing_series(collection, "113_HM10395", "2001-01-01")
    assert collection.scan("113_HM10395").name == "1999-11-26"


@pytest.mark.parametrize(
    "tell_apart",
    [
        lambda i: {"study_uid": f"1.2.826.{i}"},
        lambda i: {
            "study_uid": "1.2.826.0",
            "description": f"P4^P113^S300^I{{number:05d}}, Gated, {{percent}}%{'AB'[i]}",
        },
        lambda i: {
            "study_uid": "1.2.826.0",
            "description": f"P4^P113^S30{i}^I{{number:05d}}, Gated, {{percent}}%A",
        },
    ],
    ids=["study", "letter", "session"],
)
def test_two_scans_of_one_day(tmp_path: Path, tell_apart: Callable[[int], dict[str, Any]]) -> None:
    for i in (1, 0):
        for percent in (0, 50):
            settings = tell_apart(i)
            write_phase(tmp_path, 0, percent, settings.pop("study_uid"), time=f"1{i}3000", rois=(), **settings)
    found = index_4d_lung(tmp_path)
    assert [scan.name for scan in found.scans] == ["1999-11-26.1", "1999-11-26.2"]
    assert [[phase.percent for phase in scan.phases] for scan in found.scans] == [[0, 50], [0, 50]]
    with pytest.raises(InputError, match=r"2 4D CT on 1999-11-26; choose one of 1999-11-26\.1, 1999-11-26\.2"):
        found.scan("113_HM10395", "1999-11-26")
    assert found.scan("113_HM10395", "19991126.2").time == 11.5 * 3600
    # An hour is a 24th of a day.
    arguments = longitudinal_series(found, "113_HM10395", 50, ())
    assert arguments["times"] == pytest.approx([0, 1 / 24], abs=1e-6)


def test_scans_of_one_day_without_a_time(tmp_path: Path) -> None:
    for i in range(2):
        write_phase(tmp_path, 0, 0, f"1.2.826.{i}", rois=())
    with pytest.raises(InputError, match="without a time of day"):
        longitudinal_series(index_4d_lung(tmp_path), "113_HM10395", 0, ())


def test_one_phase_twice_is_an_error_that_names_both(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_phase(tmp_path / folder, 0, 0, "1.2.826.0")
    write_phase(tmp_path, 0, 50, "1.2.826.0")
    found = index_4d_lung(tmp_path)
    for ask in (breathing_series, longitudinal_series):
        with pytest.raises(InputError, match=r"1999-11-26: phase 0 % is there 2 times, .*a.0-0.*b.0-0.*keep one"):
            ask(found, "113_HM10395")
    # The other phase can be used all the same.
    assert longitudinal_series(found, "113_HM10395", 50)["times"] == [0]


def test_dates_stripped_from_the_study(tmp_path: Path) -> None:
    write_phase(tmp_path, 1, 0, "1.2.826.0", rois=())
    write_phase(tmp_path, 1, 50, "1.2.826.0", rois=())
    for path in tmp_path.rglob("*.dcm"):
        file = pydicom.dcmread(path)
        file.StudyDate = file.SeriesDate = file.AcquisitionDate = ""
        file.save_as(path)
    assert index_4d_lung(tmp_path).scans[0].date == "1999-12-03"  # of the content
    for path in tmp_path.rglob("*.dcm"):
        file = pydicom.dcmread(path)
        del file.ContentDate
        file.save_as(path)
    undated = index_4d_lung(tmp_path)
    assert "undated" in str(undated)
    assert breathing_series(undated, "113_HM10395", rois=())["times"] == [0, 50]
    with pytest.raises(InputError, match="without a date"):
        longitudinal_series(undated, "113_HM10395", 0, ())


# -- series


def test_breathing_series(collection: FourDLung) -> None:
    arguments = breathing_series(collection, "113_HM10395", "1999-12-24")
    assert arguments["times"] == [0, 20, 50]
    assert arguments["period"] == 100
    # Each phase with its own image and its own contours: a slip by one phase or day shows.
    assert values(arguments) == [value_of(2, percent) for percent in (0, 20, 50)]
    for mask, percent in zip(arrays(arguments), (0, 20, 50), strict=True):
        np.testing.assert_array_equal(mask, tumour(2, percent))
    assert all(Grid.of(image).is_close(GRID) for image in (*arguments["images"], *arguments["masks"]))
    series = stnerp.load_series(**arguments)
    assert (series.times, series.period) == ((0, 20, 50), 100)


def test_a_phase_that_a_breath_lacks(
    tmp_path: Path, collection: FourDLung, caplog: pytest.LogCaptureFixture
) -> None:
    for percent in (0, 20, 60, 80):
        write_phase(tmp_path, 0, percent, "1.2.826.0", rois=())
    breathing_series(collection, "113_HM10395", "1999-12-24", ())  # 0, 20 and 50 %: no even row
    assert caplog.text == ""
    assert breathing_series(index_4d_lung(tmp_path), "113_HM10395", rois=())["times"] == [0, 20, 60, 80]
    assert "113_HM10395 1999-11-26: no phase 40 %; scans are numbered without it" in caplog.text


def test_longitudinal_series(collection: FourDLung, caplog: pytest.LogCaptureFixture) -> None:
    arguments = longitudinal_series(collection, "113_HM10395", 20)
    assert arguments["times"] == [0, 7, 28]
    assert arguments["period"] is None
    assert values(arguments) == [value_of(day, 20) for day in (0, 1, 2)]
    for mask, day in zip(arrays(arguments), (0, 1, 2), strict=True):
        np.testing.assert_array_equal(mask, tumour(day, 20))
    assert stnerp.load_series(**arguments).times == (0, 7, 28)
    # Some of the dates, in any order: days count from the first of them.
    some = longitudinal_series(collection, "113_HM10395", 20, dates=["1999-12-24", "12-03-1999"])
    assert (some["times"], values(some)) == ([0, 21], [value_of(day, 20) for day in (1, 2)])
    assert caplog.text == ""


def test_a_phase_that_a_date_lacks(collection: FourDLung, caplog: pytest.LogCaptureFixture) -> None:
    arguments = longitudinal_series(collection, "113_HM10395", 50)
    assert arguments["times"] == [0, 28]
    assert values(arguments) == [value_of(day, 50) for day in (0, 2)]
    assert "113_HM10395: no phase 50 % on 1999-12-03: left out" in caplog.text
    with pytest.raises(InputError, match="no phase 50 % on 1999-12-03; choose other dates or another phase"):
        longitudinal_series(collection, "113_HM10395", 50, allow_missing=False)
    with pytest.raises(InputError, match="no phase 70 % on 1999-11-26, 1999-12-03, 1999-12-24"):
        longitudinal_series(collection, "113_HM10395", 70)


# -- contours


@pytest.mark.parametrize("name", ["Tumor_c40", "Tumor_ c00", "tumor_C10", "Tumor", " Tumor _c00"])
def test_names_without_their_phase(name: str) -> None:
    assert roi_name(name).casefold() == "tumor"
    assert roi_name("LN2_C10") == "LN2"
    assert roi_name("disc12") == "disc12"


def test_labels_are_in_the_order_asked_for(collection: FourDLung) -> None:
    (first, *_) = arrays(breathing_series(collection, "113_HM10395", "1999-12-24", ["carina", "Tumor_c40"]))
    expected = np.where(tumour(2, 0), 2, 0)
    expected[3, 4, 5] = 1
    np.testing.assert_array_equal(first, expected)
    assert breathing_series(collection, "113_HM10395", rois=[])["masks"] is None


def test_contours_that_are_missing(collection: FourDLung, caplog: pytest.LogCaptureFixture) -> None:
    arguments = breathing_series(collection, "114_HM10395")
    assert arguments["masks"][1] is None
    assert "Tumor is not drawn on 'Gated, 30.0%'" in caplog.text
    assert stnerp.load_series(**arguments).masks[1] is None
    with pytest.raises(MissingContoursError, match="Heart; there are: Tumor, Carina; choose rois among") as error:
        breathing_series(collection, "114_HM10395", rois=["Tumor", "Heart"])
    assert (error.value.absent, error.value.there) == (("Heart",), ("Tumor", "Carina"))


def test_an_roi_of_some_phases_keeps_its_label(tmp_path: Path) -> None:
    write_phase(tmp_path, 0, 0, "1.2.826.0")
    write_phase(tmp_path, 0, 50, "1.2.826.0", rois=("Tumor_ c50",))
    arguments = breathing_series(index_4d_lung(tmp_path), "113_HM10395", rois=["Carina", "tumor"])
    assert [np.unique(mask).tolist() for mask in arrays(arguments)] == [[0, 1, 2], [0, 2]]


def test_several_files_for_one_phase(tmp_path: Path) -> None:
    write_phase(tmp_path, 0, 0, "1.2.826.0")
    series = write_phase(tmp_path, 0, 50, "1.2.826.0")
    more = np.zeros(GRID.shape, np.uint8)
    more[2, 1:3, 1:3] = 1
    write_rtstruct(GRID.image(more), {1: "LN_c50"}, series, tmp_path / "nodes.dcm")
    found = index_4d_lung(tmp_path)
    masks = arrays(breathing_series(found, "113_HM10395", rois=["Tumor", "LN"]))
    assert [np.unique(mask).tolist() for mask in masks] == [[0, 1], [0, 1, 2]]
    write_rtstruct(GRID.image(more), {1: "Tumor_c50"}, series, tmp_path / "again.dcm")
    with pytest.raises(InputError, match=r"Tumor is drawn in several files .*again\.dcm"):
        breathing_series(index_4d_lung(tmp_path), "113_HM10395")


def test_contours_named_for_another_phase_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_phase(tmp_path, 0, 0, "1.2.826.0")
    write_phase(tmp_path, 0, 50, "1.2.826.0", rois=("Tumor_c60",))
    breathing_series(index_4d_lung(tmp_path), "113_HM10395")
    assert "ROI 'Tumor_c60' is drawn on phase 50 %: check its name" in caplog.text


# -- the stand-in, by the scripts' own loader

SMALL = ["data.size=[48,37,24]", "data.spacing_mm=7.5", "data.noise_hu=0"]


@pytest.fixture
def load_data(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    data = importlib.import_module("data")

    def load(*overrides: str) -> Any:
        return data.load_data(composed("train_def", "out=x", *overrides).data)

    return load


def test_the_stand_in_breathes(load_data: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["data=tcia_4d_lung_phantom", f"data.root={tmp_path / 'a'}", "data.phases=[0,50]", *SMALL]
    patient = load_data(*arguments)
    assert (patient.series.times, patient.series.period) == ((0, 50), 100)
    assert patient.label_names == {1: "Tumor"}
    # The same as the phantom itself, images to the rounding of HU and contours to the voxel.
    phantom = Phantom((48, 37, 24), 7.5, Breathing(*BOX_MM, amplitude_ap_mm=5.0), noise_hu=0)
    for i, t in enumerate((0.0, 0.5)):
        image, mask = (sitk.GetArrayFromImage(found[i]) for found in (patient.series.images, patient.series.masks))
        assert np.abs(image - sitk.GetArrayFromImage(phantom.image(t)).astype(int)).max() <= 1
        truth = sitk.GetArrayFromImage(phantom.labels(t)) == LABELS["tumour"]
        np.testing.assert_array_equal(mask == 1, truth)
    # Written once: what is there from the same settings is read.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    load_data(*arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    load_data(*arguments, "data.seed=1")
    assert {path.stat().st_mtime_ns for path in tmp_path.rglob("*.dcm")}.isdisjoint(written.values())


def test_a_stand_in_that_another_program_has_just_written_stays(
    load_data: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables are started at once: the later one must not take away what the earlier one reads."""
    import four_d_lung_data

    place, write = tmp_path / "a", four_d_lung_data.write_collection
    arguments = ["data=tcia_4d_lung_phantom", f"data.root={place}", "data.phases=[0,50]", *SMALL]
    others: set[int] = set()

    def overtaken(*asked: Any) -> None:
        monkeypatch.setattr(four_d_lung_data, "write_collection", write)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            load_data(*arguments)
        others.update(path.stat().st_ino for path in place.rglob("*.dcm"))
        write(*asked)

    monkeypatch.setattr(four_d_lung_data, "write_collection", overtaken)
    load_data(*arguments)
    assert others == {path.stat().st_ino for path in place.rglob("*.dcm")}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_stand_in_shrinks_over_weeks(load_data: Callable[..., Any], tmp_path: Path) -> None:
    patient = load_data(
        "data=tcia_4d_lung_phantom",
        "data.series=longitudinal",
        f"data.root={tmp_path / 'a'}",
        "data.rois=[Tumor,Heart]",
        "data.phase=50",
        *SMALL,
    )
    assert patient.series.times == (0, 7, 14, 21, 28)
    assert patient.series.period is None
    masks = [sitk.GetArrayFromImage(mask) for mask in patient.series.masks]
    volumes = [int((mask == 1).sum()) for mask in masks]
    # 0.7 in radius is a third in volume; there are some 20 voxels.
    assert volumes[0] > volumes[2] > volumes[4] > 0
    assert volumes[0] > 1.8 * volumes[4]
    assert dice(patient.series.masks[0], patient.series.masks[-1], label=2) > 0.8  # the heart


def test_landmarks_of_the_stand_in_are_of_the_days_that_are_used(
    load_data: Callable[..., Any], tmp_path: Path
) -> None:
    tiny = ["data.size=[12,10,6]", "data.spacing_mm=30", "data.rois=[]", "data.shift_mm=12", "data.days=[0,7,14]"]
    common = ["data=tcia_4d_lung_phantom", f"data.root={tmp_path / 'a'}", *tiny, "data.phases=[0,50]"]
    weeks = load_data(*common, "data.series=longitudinal").series
    later = load_data(*common, "data.series=longitudinal", "data.dates=[01-17-2000,2000-01-10]")
    assert later.series.times == (0, 7)
    for own, there in zip(later.series.landmarks, weeks.landmarks[1:], strict=True):
        np.testing.assert_array_equal(own, there)
    first, second = later.series.landmarks
    np.testing.assert_allclose(later.known_motion(first, 0.0, 7.0), second, atol=1e-3)
    for written in ("2000-01-17", "20000117", "01-17-2000"):
        breath = load_data(*common, f"data.date={written}").series
        np.testing.assert_array_equal(breath.landmarks[0], weeks.landmarks[2])


def test_the_stand_in_keeps_off_other_folders(load_data: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "patient.dcm").write_text("precious")
    with pytest.raises(InputError, match="holds other files"):
        load_data("data=tcia_4d_lung_phantom", f"data.root={tmp_path}", *SMALL)
    for wrong in ("data.days=[7,0]", "data.days=[1,2]", "data.phases=[0,100]"):
        with pytest.raises(InputError, match=wrong.partition("=")[0].replace(".", r"\.")):
            load_data("data=tcia_4d_lung_phantom", f"data.root={tmp_path / 'new'}", wrong, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["patient.dcm"]


def test_a_config_names_patient_and_date(load_data: Callable[..., Any], download: Path) -> None:
    common = ["data=tcia_4d_lung", f"data.root={download}", "data.patient=113_HM10395"]
    patient = load_data(*common, "data.date=1999-12-24", "data.rois=[Tumor,Carina]", "data.contours=[Tumor]")
    assert patient.series.times == (0, 20, 50)
    assert patient.label_names == {1: "Tumor", 2: "Carina"}
    assert patient.contours == [1]
    patient = load_data(*common, "data.series=longitudinal", "data.phase=20", "data.dates=[1999-11-26,1999-12-24]")
    assert patient.series.times == (0, 28)
    with pytest.raises(InputError, match="no phase 50 % on 1999-12-03"):
        load_data(*common, "data.series=longitudinal", "data.phase=50", "data.allow_missing=false")
    with pytest.raises(InputError, match=r"data\.series: 'weekly' must be breathing or longitudinal"):
        load_data(*common, "data.series=weekly")


def test_a_collection_is_indexed_once(
    load_data: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, indexed = importlib.import_module("data"), []

    def slow(root: str) -> FourDLung:
        indexed.append(root)
        return index_4d_lung(root)

    # By this clock an index takes a thousand seconds.
    clock = SimpleNamespace(perf_counter=lambda: perf_counter() + 1000 * len(indexed))
    monkeypatch.setattr(data, "time", clock)
    monkeypatch.setattr(data, "index_4d_lung", slow)
    for name, days in (("a", (0, 1)), ("b", (0,))):
        for day in days:
            for percent in (0, 50):
                write_phase(tmp_path / name, day, percent, f"1.2.826.{day}", time="101500")
    common = ["data=tcia_4d_lung", "data.patient=113_HM10395", "data.rois=[Tumor]"]
    for root, day_of_scan, count in (
        ("a", "1999-11-26", 1),
        ("a", "1999-12-03", 1),
        ("b", "1999-11-26", 2),
        ("a", "1999-11-26", 2),
    ):
        patient = load_data(*common, f"data.root={tmp_path / root}", f"data.date={day_of_scan}")
        assert patient.series.times == (0, 50)
        assert len(indexed) == count
        assert 0 < patient.seconds < 1000  # of this patient's images
    # A phase more, at another place or in place of another file: the index notices.
    write_phase(tmp_path / "a", 0, 20, "1.2.826.0", time="101500")
    patient = load_data(*common, f"data.root={tmp_path / 'a'}", "data.date=1999-11-26")
    assert patient.series.times == (0, 20, 50)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file() and b"20.0%" in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(b"20.0%", b"30.0%"))
    patient = load_data(*common, f"data.root={tmp_path / 'a'}", "data.date=1999-11-26")
    assert patient.series.times == (0, 30, 50)

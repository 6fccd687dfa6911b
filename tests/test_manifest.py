"""YAML manifests: what they say reaches load_series, and what they say wrongly is named by file and key."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import composed, optional

import stnerp
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import write_dicom_series
from stnerp.io.landmarks import write_landmarks
from stnerp.io.manifest import manifest_entries, read_manifest

ROOT = Path(__file__).parents[1]
GRID = Grid((6, 5, 4), (1.0, 2.0, 3.0), (10.0, 20.0, 30.0))

FULL = """\
patient: p1
images: [a.nii.gz, scans/b, c.nii.gz]
times: [0, 12, 30.5]
period: null
reference: 1
masks: [null, gtv.nii.gz, null]
landmarks: {0: a.csv, 2: c.csv}
label_names: {1: tumour}
window: [-1000, 500]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three scans, one of them a folder of DICOM files, a mask and landmarks, below a folder of their own."""
    folder = tmp_path / "data"
    (folder / "scans").mkdir(parents=True)
    ramp = np.arange(GRID.voxels, dtype=np.int16).reshape(GRID.shape)
    for name, offset in (("a", 0), ("c", 20)):
        sitk.WriteImage(GRID.image(ramp + np.int16(offset)), str(folder / f"{name}.nii.gz"))
        write_landmarks(
            GRID.index_to_world(np.array([[1.0, 2, 3], [3, 1, 0]])) + offset / 100, folder / f"{name}.csv"
        )
    write_dicom_series(GRID.image(ramp + np.int16(10)), folder / "scans" / "b", patient_id="p")
    sitk.WriteImage(GRID.image((ramp > 60).astype(np.uint8)), str(folder / "gtv.nii.gz"))
    return folder


def manifest(folder: Path, text: str, name: str = "m.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_everything_reaches_load_series(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = manifest(folder, FULL)
    monkeypatch.chdir(tmp_path)  # paths count from the manifest's folder, not from here
    (patient,) = read_manifest(path.relative_to(tmp_path))
    assert patient.patient == "p1"
    assert patient.label_names == {1: "tumour"}
    series = stnerp.load_series(**patient.arguments)
    assert [int(sitk.GetArrayFromImage(image)[0, 0, 0]) for image in series.images] == [0, 10, 20]
    assert (series.times, series.period, series.reference) == ((0, 12, 30.5), None, 1)
    assert [mask is not None for mask in series.masks] == [False, True, False]
    assert [points is not None for points in series.landmarks] == [True, False, True]
    assert (series.window.low, series.window.high) == (-1000, 500)


def test_only_images_are_needed(folder: Path) -> None:
    (patient,) = read_manifest(manifest(folder, "images: [a.nii.gz, c.nii.gz]", "Patient 7.yaml"))
    assert patient.patient == "Patient 7"
    assert set(patient.arguments) == {"images"}
    assert stnerp.load_series(**patient.arguments).times == (0, 1)


def test_patterns_folders_and_absolute_paths(folder: Path) -> None:
    (patient,) = read_manifest(manifest(folder, "images: '[ac].nii.gz'"))
    assert len(stnerp.load_series(**patient.arguments)) == 2
    (patient,) = read_manifest(manifest(folder, f"images: ['{folder / 'a.nii.gz'}', scans/b]\nmasks: gtv.nii.gz"))
    assert stnerp.load_series(**patient.arguments).masks[0] is not None


def test_a_cohort(folder: Path) -> None:
    patients = read_manifest(
        manifest(
            folder,
            "patients:\n"
            "  - {patient: b, images: [a.nii.gz, c.nii.gz], times: [0, 5]}\n"
            "  - patient: 12\n    images: [a.nii.gz, scans/b]\n    label_names: {3: heart}\n",
        )
    )
    assert [patient.patient for patient in patients] == ["b", "12"]
    assert patients[0].arguments["times"] == [0, 5]
    assert patients[1].label_names == {3: "heart"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images: [a.nii.gz]\nimgaes: [b]", r"m\.yaml: imgaes: unknown key; known are patient, images, times"),
        ("patients: [{patient: a, images: [a.nii.gz], time: 3}]", r"m\.yaml: patients\[0\]\.time: unknown key"),
        ("patients: []", "patients: must be a list of patients"),
        ("patients: [{images: [a.nii.gz]}]", r"patients\[0\]\.patient: is missing"),
        (
            "patients: [{patient: a, images: [a.nii.gz]}, {patient: a, images: [c.nii.gz]}]",
            "patients: a is named twice",
        ),
        ("patients: [{patient: a, images: [a.nii.gz]}]\nwindow: lung", "window: unknown key; known are patients"),
        ("times: [0, 1]", "images: is missing"),
        ("images: []", r"images: \[\] must be a list of files"),
        ("images: 7", "images: 7 must be a list of files"),
        ("images: [a.nii.gz, 7]", r"images\[1\]: 7 must be a file's name"),
        ('images: ["a\\0b"]', r"images\[0\]: .* must be a file's name"),
        ("images: [a.nii.gz]\nmasks: {x: gtv.nii.gz}", "masks: .* must be a file, or files in a list or by index"),
        ("images: [a.nii.gz]\ntimes: 3", "times: 3 must be a list of numbers"),
        ("images: [a.nii.gz]\ntimes: [0, yes]", r"times: \[0, True\] must be a list of numbers"),
        ("images: [a.nii.gz]\ntimes: [2020-01-01]", "times: .* must be a list of numbers"),
        ("images: [a.nii.gz]\nperiod: ten", "period: 'ten' must be a number or null"),
        ("images: [a.nii.gz]\nreference: 1.5", "reference: 1.5 must be the index of an image"),
        ("images: [a.nii.gz]\nreference: true", "reference: True must be the index of an image"),
        ("images: [a.nii.gz]\nwindow: [1, 2, 3]", r"window: \[1, 2, 3\] must be a name or \[low, high\]"),
        ("images: [a.nii.gz]\nlabel_names: [tumour]", r"label_names: \['tumour'\] must be names of labels"),
        ("images: [a.nii.gz]\nlabel_names: {one: tumour}", "label_names: .* must be names of labels"),
        ("images: [a.nii.gz]\npatient: [p]", r"patient: \['p'\] must be a name"),
        ("- a.nii.gz", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("images: [a.nii.gz", r"m\.yaml, line 1: is no plain YAML"),
        ("images: [a.nii.gz]\nimages: [c.nii.gz]", r"m\.yaml, line 1: is no plain YAML: 'images' is there twice"),
        # Safe: a tag that would run something is refused.
        ("images: !!python/object/apply:os.system ['touch evil']", "is no plain YAML: could not determine"),
        ("a: &a [*a]\nimages: *a", "a reference"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(folder)
    path = manifest(folder, text)
    with pytest.raises(InputError, match=message) as error:
        read_manifest(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not (folder / "evil").exists()


def test_missing_files_are_named_by_key(folder: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no\.yaml: no such manifest"):
        read_manifest(folder / "no.yaml")
    for text, key in (
        ("images: [a.nii.gz, b.nii.gz]", r"images\[1\]: no such file or folder, .*b\.nii\.gz"),
        ("images: 'x*.nii.gz'", "images: no such file"),
        ("images: [a.nii.gz]\nmasks: {0: b.nii.gz}", r"masks\[0\]: no such file"),
        ("images: [a.nii.gz]\nlandmarks: b.csv", "landmarks: no such file"),
        ("patients: [{patient: p, images: [b.nii.gz]}]", r"patients\[0\]\.images\[0\]: no such file"),
    ):
        with pytest.raises(MissingFileError, match=rf"m\.yaml: {key}"):
            read_manifest(manifest(folder, text))


def test_the_form_of_every_patient_is_checked_before_any_file_is_missed(folder: Path) -> None:
    cohort = "patients: [{patient: p1, images: [gone.nii.gz]}, {patient: p2, images: [c.nii.gz]}]"
    entries = manifest_entries(manifest(folder, cohort))
    assert entries["p1"] == {"patient": "p1", "images": ["gone.nii.gz"]}
    assert list(entries) == ["p1", "p2"]
    alone = manifest_entries(manifest(folder, "images: [gone.nii.gz]\nperiod: null", "p3.yaml"))
    assert alone == {"p3": {"patient": "p3", "images": ["gone.nii.gz"], "period": None}}
    for last, message in (
        ("oops", r"patients\[1\]\.patient: is missing"),
        ("{patient: p2, images: 7}", r"patients\[1\]\.images: 7 must be a list of files"),
        ("{patient: p2, images: [c.nii.gz], images: [d.nii.gz]}", "'images' is there twice"),
        ("{patient: p1, images: [c.nii.gz]}", "patients: p1 is named twice"),
    ):
        path = manifest(folder, f"patients: [{{patient: p1, images: [gone.nii.gz]}}, {last}]")
        for reader in (manifest_entries, read_manifest):
            with pytest.raises(InputError, match=message) as error:
                reader(path)
            assert not isinstance(error.value, MissingFileError)


def test_a_binary_file_is_no_manifest(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a\.nii\.gz.*is no plain YAML"):
        read_manifest(folder / "a.nii.gz")


# -- by the scripts' loader


@pytest.fixture
def load_data(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    data = importlib.import_module("data")

    def load(*overrides: str) -> Any:
        return data.load_data(composed("train_def", "out=x", "data=manifest", *overrides).data)

    return load


def test_a_config_names_a_manifest(folder: Path, load_data: Callable[..., Any]) -> None:
    patient = load_data(f"data.manifest={manifest(folder, FULL)}", "data.contours=[tumour]")
    assert patient.series.times == (0, 12, 30.5)
    assert (patient.label_names, patient.contours) == ({1: "tumour"}, [1])


def test_a_config_chooses_from_a_cohort(folder: Path, load_data: Callable[..., Any]) -> None:
    cohort = "patients: [{patient: a, images: [a.nii.gz, c.nii.gz]}, {patient: 7, images: [c.nii.gz, scans/b]}]"
    path = manifest(folder, cohort)
    assert load_data(f"data.manifest={path}", "data.patient=7").series.names == ("c.nii.gz", "b")
    with pytest.raises(InputError, match=r"data\.patient: choose one of .*m\.yaml: a, 7"):
        load_data(f"data.manifest={path}")
    with pytest.raises(InputError, match=r"data\.patient: no 'b' in .*m\.yaml; there are: a, 7"):
        load_data(f"data.manifest={path}", "data.patient=b")


def test_what_one_patient_lacks_is_no_matter_to_another(folder: Path, load_data: Callable[..., Any]) -> None:
    cohort = "patients: [{patient: a, images: [a.nii.gz, c.nii.gz]}, {patient: b, images: [gone.nii.gz]}]"
    path = manifest(folder, cohort)
    assert load_data(f"data.manifest={path}", "data.patient=a").series.names == ("a.nii.gz", "c.nii.gz")
    with pytest.raises(MissingFileError, match=r"patients\[1\]\.images\[0\]: no such file"):
        load_data(f"data.manifest={path}", "data.patient=b")

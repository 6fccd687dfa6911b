"""The load run: its patients' motion and files are what they are said to be, and its checks can fail."""

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

from stnerp import Grid, STNeRP, load_series

optional("hydra", "scripts")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
    module = importlib.import_module("load")
    module.SHORT = tuple(replace(level, iterations=1) for level in module.SHORT)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def small(load: Any) -> list[Any]:
    """The smallest patients of a seed, all of whose fits are short."""
    some = [load.drawn(1, number) for number in range(40)]
    return sorted((replace(one, full=False, blend=False) for one in some), key=lambda one: one.voxels)


def sound(small: list[Any], **asked: Any) -> Any:
    """The smallest patient without a defect, changed as asked."""
    return replace(next(one for one in small if not one.defect and one.voxels > 2000), **asked)


def test_a_patient_is_its_seed_and_number(load: Any) -> None:
    one, again, other = load.drawn(0, 3), load.drawn(0, 3), load.drawn(0, 4)
    assert one.grids == again.grids
    assert np.array_equal(one.texture, again.texture)
    assert one.grids != other.grids
    assert np.array_equal(*(sitk.GetArrayFromImage(patient.image(0)) for patient in (one, again)))


def test_what_is_drawn_is_what_the_library_takes(small: list[Any], load: Any) -> None:
    for patient in small:
        assert min(patient.grid.size) >= load.FEWEST or patient.defect == "fewer than 4 slices"
        assert patient.voxels <= 1.2 * load.MOST_VOXELS
        assert patient.amounts[patient.reference] == 0
        assert np.array_equal(patient.poses[patient.reference], np.eye(4))
        assert list(patient.times) == sorted(set(patient.times))
    assert len({patient.modality for patient in small}) == len(load.MODALITIES)
    assert {np.sign(np.linalg.det(np.reshape(p.grid.direction, (3, 3)))) for p in small} == {-1, 1}


def test_motion_is_undone_exactly(small: list[Any]) -> None:
    for patient in small[:20]:
        for i in range(len(patient.grids)):
            points = patient.points_mm(patient.reference)
            there = patient.reference_to_target(points, i)
            # Sixty repetitions of a contraction by 0.7 leave 1e-9 of some mm.
            assert np.abs(patient.target_to_reference(there, i) - points).max() < 1e-6
        assert np.array_equal(patient.points_mm(patient.reference), points)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd", "mixed", "4D", "dicom"])
def test_files_hold_the_patient(small: list[Any], load: Any, suffix: str, tmp_path: Path) -> None:
    patient = sound(small, suffix=suffix, modality="ct")
    if suffix in ("4D", "dicom"):
        patient = replace(patient, grids=(patient.grid,) * len(patient.grids))
    series = load_series(**load.write(patient, tmp_path))
    load._check_read(patient, series)
    moved = [sitk.Image(image) for image in series.images]
    moved[-1].SetOrigin(np.add(moved[-1].GetOrigin(), 0.5 * min(patient.grid.spacing_mm)).tolist())
    with pytest.raises(load.WrongAnswerError, match="elsewhere"):
        load._check_read(patient, replace(series, images=tuple(moved)))


def test_every_defect_is_refused(small: list[Any], load: Any, tmp_path: Path) -> None:
    for defect in load.DEFECTS:
        patient = sound(small, defect=defect)
        if defect == "fewer than 4 slices":
            x, y, _ = patient.grid.size
            patient = replace(patient, grids=tuple(replace(grid, size=(x, y, 3)) for grid in patient.grids))
        row = load.one(patient, str(tmp_path))
        assert row["outcome"] == "refused", row["reason"]
    assert not list(tmp_path.iterdir())
    accepted = load.one(sound(small, defect="no defect at all", align="none", prior=False), str(tmp_path))
    assert (accepted["outcome"], accepted["reason"]) == ("failed", "accepted no defect at all")


def test_a_wrong_answer_is_a_failure(
    small: list[Any], load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = sound(small, align="none")
    right = STNeRP.displacement

    def broken(model: STNeRP, t: float, grid: Grid | sitk.Image | None = None) -> sitk.Image:
        field = right(model, t, grid)
        return Grid.of(field).image(sitk.GetArrayFromImage(field) * np.nan)

    monkeypatch.setattr(STNeRP, "displacement", broken)
    row = load.one(patient, str(tmp_path))
    assert (row["outcome"], row["reason"]) == (
        "failed",
        "WrongAnswerError: displacement: is not finite everywhere",
    )


def test_the_run_and_its_tables(
    small: list[Any], load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [replace(one, align="none", prior=False) for one in small if not one.defect][:7]
    monkeypatch.setattr(load, "drawn", lambda seed, number: replace(chosen[number], number=number))
    load.main(["series=7", "again=1", f"out={tmp_path}"])
    with (tmp_path / "load.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows] == ["fitted"] * 7 + ["again: fitted"]
    assert rows[0]["digest"] == rows[7]["digest"] != rows[1]["digest"]
    text = (tmp_path / "load.md").read_text(encoding="utf-8")
    for part in (
        "| fitted | 7 |",
        "| failed | 0 |",
        "µs a voxel",
        "once more at the end: 1 fits",
        "Folded voxels",
    ):
        assert part in text


def test_a_slope_is_found(load: Any) -> None:
    assert load.slope_of(500 + 0.25 * np.arange(40)) == pytest.approx((0.25, 0))
    rows = [
        {"fit_seconds": 2 + 3e-6 * n, "images": 1, "aligned": False, "voxels": n, "lattice": 0, "functions": 0}
        for n in (10, 1000, 10**5, 10**6)
    ]
    assert load.line_of(rows) == pytest.approx([2, 0, 0, 3, 0])
    assert load.over_line(rows, load.line_of(rows)) == pytest.approx(1)

"""What a run directory keeps: results go on only with the data that they are of."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from conftest import optional
from test_scripts import run as run_script

from stnerp.phantom import Phantom

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(manifest: Path, out: Path, *arguments: str) -> None:
    common = ["align=none", "device=cpu", "progress=false", "data=manifest", f"data.manifest={manifest}"]
    run_script("eval_longitudinal_interpolation", f"out={out}", *common, "methods=[no_motion]", *arguments)


def weeks(folder: Path, **changes: Any) -> Path:
    """Three scans, with landmarks, and their manifest."""
    folder.mkdir(exist_ok=True)
    phantom = Phantom((24, 19, 12), 15.0, n_landmarks=10)
    for i, t in enumerate((0.0, 0.2, 0.4)):
        sitk.WriteImage(phantom.image(t), str(folder / f"{i}.nii.gz"))
        np.savetxt(folder / f"l{i}.csv", phantom.landmarks(t), delimiter=",")
    told = {"images": [f"{i}.nii.gz" for i in range(3)], "landmarks": [f"l{i}.csv" for i in range(3)]}
    manifest = folder / "weeks.yaml"
    manifest.write_text(yaml.safe_dump({**told, "times": [0, 7, 14], **changes}), encoding="utf-8")
    return manifest


def kept(out: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (out / "results").iterdir()}


@pytest.mark.parametrize("changed", ["times", "an image", "a landmark"])
def test_results_of_other_scans_are_not_gone_on_with(
    changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, out = weeks(tmp_path / "data"), tmp_path / "out"
    run(manifest, out, "held_out=[2]")
    before = kept(out)
    for path in manifest.parent.iterdir():  # copied or touched, they are the same
        path.touch()
    run(manifest, out, "held_out=[2]")
    assert kept(out) == before
    if changed == "times":
        weeks(manifest.parent, times=[0, 3, 14])
    elif changed == "an image":
        shutil.copy(manifest.parent / "2.nii.gz", manifest.parent / "1.nii.gz")
    else:
        shutil.copy(manifest.parent / "l2.csv", manifest.parent / "l1.csv")
    for more in ("held_out=[2]", "held_out=[3]"):  # also where the table would mix them
        with pytest.raises(SystemExit):
            run(manifest, out, more)
        assert "case 1 had other scans, times, contours or landmarks" in capsys.readouterr().err
        assert kept(out) == before
    run(manifest, out, "held_out=[2]", "overwrite=true")
    assert kept(out).keys() == before.keys()
    assert kept(out) != before


def test_results_of_before_fingerprints_go_on(tmp_path: Path) -> None:
    manifest, out = weeks(tmp_path / "data"), tmp_path / "out"
    run(manifest, out, "held_out=[2]")
    (path,) = (out / "results").iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["arguments"]["scans"]
    path.write_text(json.dumps(record), encoding="utf-8")
    run(manifest, out, "held_out=[2]")
    assert json.loads(path.read_text(encoding="utf-8")) == record


def test_results_stay_until_there_is_something_in_their_place(tmp_path: Path) -> None:
    manifest, out = weeks(tmp_path / "data"), tmp_path / "out"
    run(manifest, out, "held_out=[2]")
    before = kept(out)
    with pytest.raises(SystemExit):
        run(tmp_path / "slip.yaml", out, "held_out=[2]", "overwrite=true")
    assert kept(out) == before


def test_a_damaged_result_is_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, out = weeks(tmp_path / "data"), tmp_path / "out"
    run(manifest, out, "held_out=[2]")
    (path,) = (out / "results").iterdir()
    before = path.read_text(encoding="utf-8")
    path.write_text(before[: len(before) // 2], encoding="utf-8")
    run(manifest, out, "held_out=[2]")
    told = capsys.readouterr()
    assert f"{path}: is damaged" in told.out + told.err
    again, first = (json.loads(text) for text in (path.read_text(encoding="utf-8"), before))
    assert again["result"]["images"] == first["result"]["images"]
    # What it held stays beside it, and is no result.
    assert kept(out).keys() == {path.name, f"{path.name}.damaged"}
    assert kept(out)[f"{path.name}.damaged"] == before[: len(before) // 2]


@pytest.fixture
def results(tmp_path: Path) -> Any:
    """The module, and a.json and b.json, two records, in the folder."""
    module = importlib.import_module("results")
    for name in ("a", "b"):
        module.recorded(tmp_path / f"{name}.json", {"name": name}, lambda: {"seconds": 1.0})
    return module


def names_of(records: Any) -> list[str]:
    return [record["arguments"]["name"] for record in records]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"arguments": {}}', '{"arguments": {}, "result": []}', b"\xff".decode("latin-1")]
)
def test_what_is_no_record_is_set_aside(text: str, results: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    assert names_of(results.read_records(tmp_path)) == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json.damaged", "b.json"]
    record, new = results.recorded(tmp_path / "a.json", {"name": "a"}, lambda: {"seconds": 2.0})
    assert new
    assert record["result"] == {"seconds": 2.0}
    assert names_of(results.read_records(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_cannot_be_read_just_now_costs_no_result(
    number: int, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, *arguments: Any, **more: Any) -> str:
        raise OSError(number, "passing", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", broken)
        for read in (
            lambda: results.read_records(tmp_path),
            lambda: results.recorded(tmp_path / "a.json", {"name": "a"}, lambda: {"seconds": 2.0}),
            lambda: results.check_same(tmp_path, {}, {}, {}),
        ):
            with pytest.raises(OSError, match="passing"):
                read()
    assert names_of(results.read_records(tmp_path)) == ["a", "b"]


def test_two_programs_may_set_a_damaged_result_aside_at_once(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    read, replaced = results.record_of, []

    def slow(path: Path) -> Any:
        try:
            return read(path)
        except ValueError:
            replaced.append(path.rename(path.with_name(f"{path.name}.damaged")))  # the other one was faster
            raise

    monkeypatch.setattr(results, "record_of", slow)
    assert names_of(results.read_records(tmp_path)) == ["b"]
    assert replaced == [tmp_path / "a.json.damaged"]


def test_a_case_of_other_scans_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the table tells that its results are of before."""
    first, second, out = weeks(tmp_path / "first"), weeks(tmp_path / "second"), tmp_path / "out"
    cases = f"cases=[{{}}, {{manifest: {second}}}]"
    run(first, out, "held_out=[2]", cases)
    before = kept(out)
    shutil.copy(second.parent / "2.nii.gz", second.parent / "1.nii.gz")
    run(first, out, "held_out=[2,3]", cases)
    assert kept(out).keys() - before.keys() == {"case01-without3-no_motion.json"}
    told = "case02-without2-no_motion.json: case 2 had other scans, times, contours or landmarks"
    printed = capsys.readouterr()
    assert f"case 2: left out: {told}" in printed.out + printed.err
    table = (out / "table_2.md").read_text(encoding="utf-8")
    assert f"- case 2: left out now, its results are of before: {told}" in table


def test_dirlab_s_landmarks_are_part_of_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    data = ["data=dirlab_phantom", f"data.folder={folder}", "data.scale=0.12", "cases=[1]", "methods=[no_motion]"]
    asked = [f"out={tmp_path / 'out'}", *data, "device=cpu", "progress=false"]
    run_script("eval_dirlab", *asked)
    before = kept(tmp_path / "out")
    run_script("eval_dirlab", *asked)
    assert kept(tmp_path / "out") == before
    exhaled, inhaled = (next(folder.rglob(f"*300_T{phase}_xyz.txt")) for phase in ("50", "00"))
    shutil.copy(inhaled, exhaled)
    with pytest.raises(SystemExit):
        run_script("eval_dirlab", *asked)
    assert "case 1 had other scans" in capsys.readouterr().err
    # Beside others it is left out, and told.
    run_script("eval_dirlab", *asked, "cases=[1,2]")
    assert kept(tmp_path / "out").keys() == {*before, "case02-no_motion.json"}
    table = (tmp_path / "out" / "table_4.md").read_text(encoding="utf-8")
    assert "- case 1: left out now, its results are of before: case01-no_motion.json: case 1 had other" in table
    assert not (tmp_path / "out" / "missing.json").exists()

"""Table IV end to end on tiny stand-ins: its direction, what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import composed, optional
from test_scripts import run as run_script

import stnerp
from stnerp import InputError
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.fit import REVISION
from stnerp.geometry import Grid
from stnerp.io.dirlab import GRIDS, WEBSITE, dirlab_case, dirlab_grid, write_case
from stnerp.presets import FAST
from stnerp.window import Window

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCALE = 0.1  # 10 mm voxels, a handful of steps: what comes out is no good, but it comes out in a second
QUICK = "options={stnerp_fast: {levels: [[20,30,3]]}}"
PAPER = "levels: [[20,20,2]], width: 16, fourier_width: 8"
PAPER_REF = "{iterations: 2, width: 16, fourier_width: 8}"
CNN = "spacings_mm: [32], iterations: [2]"
FEW_STEPS = (
    "{stnerp_fast: {levels: [[20,30,2]]}, stnerp_fast_prior: {levels: [[20,30,2]], ref_net: {iterations: 2}}, "
    f"stnerp_paper: {{{PAPER}, ref_net: {PAPER_REF}}}, stnerp_paper_without_prior: {{{PAPER}}}, "
    f"dlir: {{{CNN}}}, anatomy_cnn: {{{CNN}}}, idir: {{iterations: 2, points_per_step: 100}}, "
    "cycle_idir: {iterations: 2, points_per_step: 100}, convexadam: {spacing_mm: 10, iterations: 2}, "
    "elastix_bspline: {iterations: 5, linear_iterations: 5, samples: 500, grid_spacing_mm: 40}}"
)


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where stand-ins are written once."""
    return tmp_path_factory.mktemp("stand_ins")


def run(out: Path, *arguments: str) -> None:
    """The script as from the command line, in this process; SystemExit where it ends with an error."""
    common = [f"out={out}", "device=cpu", "progress=false"]
    if not any(argument.startswith("options=") for argument in arguments):
        common.append(QUICK)
    run_script("eval_dirlab", *common, *arguments)


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(out, *arguments)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def on_stand_ins(folder: Path) -> list[str]:
    return ["data=dirlab_phantom", f"data.folder={folder}", f"data.scale={SCALE}"]


def section_of(folder: Path) -> Any:
    """The same as a section of the config."""
    config = composed("eval_dirlab", "out=unused", *on_stand_ins(folder))
    return importlib.import_module("dirlab_data").section_of(config.data)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, method: Callable[..., PairRegistration]) -> None:
    monkeypatch.setitem(importlib.import_module("pair_methods").METHODS, name, method)


def test_a_method_may_have_a_window_of_its_own(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = importlib.import_module("pair_methods").no_motion
    given = []

    def looks(*images: sitk.Image, window: Window, **settings: Any) -> PairRegistration:
        given.append(window)
        return still(*images)

    for name in ("idir", "dlir"):
        replaced(monkeypatch, name, looks)
    options = "options={idir: {window: [-944, -124]}}"
    run(tmp_path, *on_stand_ins(stand_ins), "cases=[1]", "methods=[idir,dlir]", options)
    assert [(w.low, w.high) for w in given] == [(-944, -124), (-1000, 1000)]


def test_a_run_resumes_survives_and_grows(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "picsl_greedy", None)
    data = on_stand_ins(stand_ins)
    run(tmp_path, *data, "cases=[1,6]", "methods=[no_motion,stnerp_fast,greedy]")
    rows = rows_of(tmp_path / "metrics.csv")
    named = [(row["method"], row["case"]) for row in rows]
    assert named == [(m, c) for m in ("no_motion", "stnerp_fast", "greedy") for c in "16"]
    for row in rows[:4]:
        for name in (
            "tre_mean_mm",
            "tre_snapped_p95_mm",
            "tre_std_over_landmarks_mm",
            "sd_log_jacobian",
            "seconds",
        ):
            assert np.isfinite(float(row[name])), name
        assert row["folded_voxels"] == "0"
        assert row["failure"] == ""
    assert all("pip install 'stnerp[peers]'" in row["failure"] for row in rows[4:])
    errors = rows_of(tmp_path / "landmarks.csv")
    assert len(errors) == 4 * 300
    own = [float(row["error_mm"]) for row in errors if (row["case"], row["method"]) == ("6", "stnerp_fast")]
    assert np.mean(own) == pytest.approx(float(rows[3]["tre_mean_mm"]), rel=1e-5)  # six digits are written

    table = (tmp_path / "table_4.md").read_text(encoding="utf-8")
    both = [float(row["error_snapped_mm"]) for row in errors if row["method"] == "stnerp_fast"]
    means = np.mean(np.reshape(both, (2, 300)), axis=1)
    expected = f"| 2 of 2 | {np.mean(both):.2f} ± {np.std(both):.2f}; {np.std(means):.2f} |"
    line = next(line for line in table.splitlines() if line.startswith("| stnerp fast, w/o prior |"))
    assert expected in line
    assert line.endswith("|  |")  # the paper's is with Ref-Net
    assert "| ST-NeRP, published only |" in table
    assert "| 1.06 ± 1.23 |" in table
    assert "**Stand-ins**" in table
    assert "| DLIR, published only |" in table
    assert "| IDIR | 1.10 |" in table  # as printed, not 1.1
    assert "greedy, case 1, 6: picsl-greedy is needed" in table
    assert "stnerp fast, w/o prior ran with" in table

    def broken(*images: Any, **settings: Any) -> PairRegistration:
        raise ValueError("no\nluck")

    # The same command again: what is there is not measured again, what failed is.
    replaced(monkeypatch, "stnerp_fast", broken)
    replaced(monkeypatch, "greedy", importlib.import_module("pair_methods").no_motion)
    capsys.readouterr()
    run(tmp_path, *data, "cases=[1,6]", "methods=[stnerp_fast,greedy]")
    assert "case06-stnerp_fast: TRE" in (printed := capsys.readouterr().out)
    assert printed.count("(before)") == 2
    again = rows_of(tmp_path / "metrics.csv")
    assert again[:4] == rows[:4]
    assert [row["failure"] for row in again] == [""] * 6

    # Other settings are not mixed in; a failure is one line, and the rest goes on.
    before = (tmp_path / "metrics.csv").read_bytes()
    assert "other settings" in refused(capsys, tmp_path, *data, "cases=[1]", "seed=1")
    assert "other settings" in refused(capsys, tmp_path, *data, "cases=[1]", "data.noise_hu=10")
    assert "other options" in refused(capsys, tmp_path, *data, "cases=[1]", "options=null")
    # Nor of another case: a row of the table is of one set of options.
    assert "other options" in refused(capsys, tmp_path, *data, "cases=[8]", "options=null")
    assert (tmp_path / "metrics.csv").read_bytes() == before
    run(tmp_path, *data, "cases=[1]", "methods=[stnerp_fast,no_motion]", "seed=1", "overwrite=true")
    assert [row["failure"] for row in rows_of(tmp_path / "metrics.csv")] == ["", "ValueError: no luck"]


def test_every_method_finishes(tmp_path: Path, stand_ins: Path) -> None:
    """Or its package isn't installed, and the record says which and how to get it."""
    run(tmp_path, *on_stand_ins(stand_ins), "cases=[6]", "methods=all", f"options={FEW_STEPS}")
    methods = importlib.import_module("pair_methods").NAMES
    for row in rows_of(tmp_path / "metrics.csv"):
        if row["failure"]:
            assert "pip install 'stnerp[peers]'" in row["failure"], row["method"]
            assert row["method"] in ("ants_syn", "elastix_bspline", "greedy", "convexadam")
        else:
            assert np.isfinite(float(row["tre_mean_mm"])), row["method"]
            assert row["folded_voxels"].isdecimal()
    assert {row["method"] for row in rows_of(tmp_path / "metrics.csv")} == set(methods)


def test_the_known_motion_scores_its_rounding_and_the_inverse_does_not(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """φ takes T50 to T00: a phantom's own motion, in this direction, is right but for whole voxels."""
    data = importlib.import_module("dirlab_data")
    number = 8
    made = data.made_from(section_of(stand_ins), number)
    phantom, shrunk = data.breathing_phantom(number, made)
    origin = np.asarray(phantom.grid.origin_mm)

    def motion(inverse: bool) -> Callable[..., PairRegistration]:
        def register(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
            def φ(points_mm: np.ndarray) -> np.ndarray:
                return (phantom.map_points(points_mm * shrunk + origin, 0.5, inverse) - origin) / shrunk

            return registration_of(Grid.of(target), φ)

        return register

    replaced(monkeypatch, "idir", motion(inverse=False))
    replaced(monkeypatch, "cycle_idir", motion(inverse=True))
    # At 10 mm a lung is a handful of voxels: its opening would leave half of them.
    thresholds = importlib.import_module("eval_dirlab")
    monkeypatch.setattr(thresholds, "lungs_of", lambda image, body: (image < -500) & body)
    arguments = on_stand_ins(stand_ins)
    run(tmp_path, *arguments, f"cases=[{number}]", "methods=[no_motion,known_motion,idir,cycle_idir]")
    (known,) = (row for row in rows_of(tmp_path / "metrics.csv") if row["method"] == "known_motion")
    shutil.move(tmp_path / "results" / f"case{number:02d}-known_motion.json", tmp_path / "known.json")
    run(tmp_path, *arguments, f"cases=[{number}]", "methods=[no_motion,idir,cycle_idir]")
    still, right, wrong = (float(row["tre_mean_mm"]) for row in rows_of(tmp_path / "metrics.csv"))
    floor, snapped = data.known_motion_errors_mm(section_of(stand_ins), number)
    # Linear between voxels, against the motion itself.
    assert right == pytest.approx(floor.mean(), abs=0.2)
    assert snapped.mean() < floor.mean()
    to_motion = [float(row["motion_error_mean_mm"]) for row in rows_of(tmp_path / "metrics.csv")]
    assert to_motion[1] < 0.2 < 6 < to_motion[0] < to_motion[2]  # the same, without the rounding of landmarks
    # A voxel of 10 mm: rounding is a good half of it, the motion is up to 25 mm.
    assert right < 6 < still < wrong
    # Lungs, found by thresholds in each image: the motion brings them together.
    still, right, wrong = (float(row["dice_lungs"]) for row in rows_of(tmp_path / "metrics.csv"))
    assert wrong < still < 0.85 < right
    still, right, wrong = (float(row["hd95_lungs_mm"]) for row in rows_of(tmp_path / "metrics.csv"))
    assert right <= 10 < still <= wrong
    still, right, wrong = (float(row["motion_dice_lungs"]) for row in rows_of(tmp_path / "metrics.csv"))
    assert wrong < still < 0.9 < 0.99 < right
    right_row = rows_of(tmp_path / "metrics.csv")[1]
    for name in ("tre_mean_mm", "motion_error_mean_mm", "dice_lungs", "motion_dice_lungs"):
        assert float(known[name]) == pytest.approx(float(right_row[name]), abs=1e-3), name  # the same by two ways


def test_stand_ins_have_the_owners_grids_and_their_own_motion(stand_ins: Path, tmp_path: Path) -> None:
    data = importlib.import_module("dirlab_data")
    for number, full in GRIDS.items():
        grid, around, shrunk = data.phantom_grids(number, 1.0)
        assert grid.is_close(full)
        assert around.size == full.size
        assert np.array(around.spacing_mm) == pytest.approx(shrunk * np.array(full.spacing_mm))
        assert around.centre_mm == pytest.approx(np.zeros(3), abs=1e-9)
    run(tmp_path, *on_stand_ins(stand_ins), "cases=[1,8]", "methods=[no_motion]")
    case = dirlab_case(stand_ins, 8, data.phantom_grids(8, SCALE)[0])
    assert case.phases == [0, 50]
    up_mm = (case.landmarks(50) - case.landmarks(0))[:, 2]
    assert up_mm.mean() > 3  # the diaphragm rises when the patient exhales
    before = {p: p.stat().st_mtime_ns for p in stand_ins.rglob("*.img")}
    data.case_of(section_of(stand_ins), 8)
    assert {p: p.stat().st_mtime_ns for p in stand_ins.rglob("*.img")} == before


def test_the_owners_files_with_nothing_edited(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """data=dirlab on a folder as it is unpacked, where one of two cases is missing."""
    small = dirlab_grid((26, 24, 22), (10.0, 10.0, 10.0))
    monkeypatch.setitem(GRIDS, 1, small)
    rng = np.random.default_rng(0)
    voxels = rng.integers(2, 20, (300, 3))
    points = {0: small.index_to_world(voxels - 1.0)}
    points[50] = points[0] + np.array([0.0, 0.0, 10.0])  # one voxel up
    images = {p: small.image(rng.normal(-400, 300, small.shape).astype(np.int16)) for p in (0, 50)}
    folder = tmp_path / "unpacked"
    folder.mkdir()
    write_case(folder, 1, images, points)
    monkeypatch.setenv("STNERP_DIRLAB", str(folder))
    out = tmp_path / "table4"
    run(out, "data=dirlab", "cases=[1,2]", "methods=[no_motion]")
    printed = capsys.readouterr().out
    assert "case 2: left out" in printed
    assert "10.00 mm apart on average, by the owners 4.01" in printed
    row = rows_of(out / "metrics.csv")[0]
    assert [float(row[f"tre_{name}_mm"]) for name in ("mean", "median", "max")] == pytest.approx([10.0] * 3)
    table = (out / "table_4.md").read_text(encoding="utf-8")
    assert "no folder Case2Pack" in table
    assert "- data: kind dirlab, folder unpacked" in table
    assert "- cases: 1; left out: 2" in table
    assert "| no motion | 1 of 2 |" in table  # two were asked for
    assert "tand-in" not in table
    assert "motion_error_mean_mm" not in row
    shutil.rmtree(folder)
    assert WEBSITE in refused(capsys, tmp_path / "other", "data=dirlab", "cases=[1]", "methods=[no_motion]")
    # What was measured stays, whether or not the data does; and so does what was asked for.
    run(out, "data=dirlab", "cases=[1,3]", "methods=[no_motion]")
    assert len(rows_of(out / "metrics.csv")) == 1
    told = (out / "table_4.md").read_text(encoding="utf-8")
    assert "- case 1: left out now, its results are of before: unpacked: " in told
    assert "- case 3: unpacked: " in told
    assert json.loads((out / "missing.json").read_text(encoding="utf-8")).keys() == {"2", "3"}
    assert str(tmp_path) not in told + (out / "missing.json").read_text(encoding="utf-8")
    run(out, "data=dirlab", "cases=[3]", "methods=[no_motion]")
    assert "case 1:" not in (out / "table_4.md").read_text(encoding="utf-8")
    assert "| no motion | 1 of 3 |" in (out / "table_4.md").read_text(encoding="utf-8")
    # Unless half of it is lost.
    (out / "missing.json").write_text('{"2": "no', encoding="utf-8")
    capsys.readouterr()
    run(out, "data=dirlab", "cases=[3]", "methods=[no_motion]")
    assert "missing.json: is damaged and ignored" in capsys.readouterr().out
    assert "| no motion | 1 of 2 |" in (out / "table_4.md").read_text(encoding="utf-8")
    assert json.loads((out / "missing.json").read_text(encoding="utf-8")).keys() == {"3"}
    # Until it is there.
    folder.mkdir()
    for number in (2, 3):
        monkeypatch.setitem(GRIDS, number, small)
        write_case(folder, number, images, points)
    run(out, "data=dirlab", "cases=[2,3]", "methods=[no_motion]")
    table = (out / "table_4.md").read_text(encoding="utf-8")
    assert "| no motion | 3 of 3 |" in table
    assert "no folder" not in table
    assert not (out / "missing.json").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("methods=[stnerp]", "methods: unknown stnerp; known: no_motion"),
        ("methods=stnerp_fast", "must be a list"),
        ("cases=[]", "cases: [] must be a list"),
        ("options={elastx: {iterations: 3}}", "options: unknown elastx"),
        ("options={idir: 3}", "must be settings by method"),
        ("align=similar", "none, rigid or affine"),
        ("device=gpu", "device: 'gpu' is not a device"),
        ("window=lungs", "window: unknown name 'lungs'"),
        ("data.kind=files", "data.kind: 'files'"),
        ("cases=[11]", "cases: 11 must be"),
    ],
)
def test_a_wrong_argument_says_so(
    argument: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, tmp_path, argument)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("data.scale=2", "data.scale: 2"),
        ("data.phases=[0,10]", "data.phases: must name 0 and 50"),
        ("data.amplitudes_si_mm=[10]", "give 10 numbers"),
        ("data.amplitudes_si_mm=[99,1,1,1,1,1,1,1,1,1]", "would fold space"),
    ],
)
def test_a_wrong_stand_in_says_so(
    argument: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = on_stand_ins(tmp_path / "stand_ins")
    assert says in refused(capsys, tmp_path, *data, argument, "cases=[1]", "methods=[no_motion]")


def test_every_method_has_a_label_and_a_record_is_json(tmp_path: Path) -> None:
    methods, results = importlib.import_module("pair_methods"), importlib.import_module("results")
    assert set(methods.NAMES) == methods.LABELS.keys() == methods.METHODS.keys() | {"known_motion"}
    path = tmp_path / "results" / "a.json"
    record, new = results.recorded(path, {"pair": (1, 2)}, lambda: {"x": 1.5})
    assert new
    assert json.loads(path.read_text(encoding="utf-8")) == record
    assert results.recorded(path, {"pair": (1, 2)}, lambda: {"x": 2.5}) == (record, False)


def test_records_of_another_patient_or_other_options(tmp_path: Path) -> None:
    results = importlib.import_module("results")
    one: dict[str, Any] = {"case": 1, "method": "idir", "options": {}, "common": {}, "data": {"names": {1: "a"}}}
    results.recorded(tmp_path / "a.json", one, lambda: {"seconds": 1.0})
    results.recorded(tmp_path / "b.json", one | {"data": {}}, lambda: 1 / 0)
    for options, data in ({"idir": {}}, {1: one["data"]}), ({"greedy": {"a": 1}}, {2: {}}):
        results.check_same(tmp_path, {}, options, data)
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]  # the failure is forgotten
    for common, options, data, says in (
        ({}, {"idir": {"a": 1}}, {}, "other options; choose another out="),
        ({}, {}, {1: {"names": {1: "b"}}}, "other data; choose another out="),
        ({"seed": 1}, {}, {1: {}}, "other settings and data; choose another out="),
    ):
        with pytest.raises(InputError, match=rf"a\.json: was measured with {says}"):
            results.check_same(tmp_path, common, options, data)


def test_rows_that_other_versions_measured_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = importlib.import_module("results")

    def made(case: int, **about: Any) -> Any:
        arguments = {"case": case, "method": "idir", "options": {}}
        record, _ = results.recorded(tmp_path / f"{case}.json", arguments, lambda: {"seconds": 1.0})
        return record | about

    first, label = made(1), {"idir": "IDIR"}
    assert first["library"].startswith(f"stnerp {stnerp.__version__}, fit {REVISION}, presets ")
    assert results.notes([first, made(2)], {}, label) == []
    monkeypatch.setattr(results, "FAST", replace(FAST, def_net=replace(FAST.def_net, diffusion=9.0)))
    other = made(3)
    assert other["library"] != first["library"]
    old = {name: value for name, value in made(4).items() if name != "library"}  # as written before
    assert results.notes([first, made(2), other, old], {}, label) == [
        f"- by {first['library']}: IDIR (case 1), IDIR (case 2)",
        f"- by {other['library']}: IDIR (case 3)",
        "- by a version that isn't known: IDIR (case 4)",
    ]


def test_nothing_measured_ends_with_1() -> None:
    results = importlib.import_module("results")
    results.end_without_result([{"result": {"x": 1}}, {"result": {}}])
    with pytest.raises(SystemExit) as exit_:
        results.end_without_result([{"result": {}}])
    assert exit_.value.code == 1

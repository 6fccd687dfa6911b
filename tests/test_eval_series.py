"""The tables of series end to end on tiny stand-ins: directions, what is written, going on, what is refused."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from conftest import composed, optional
from test_eval_dirlab import FEW_STEPS
from test_scripts import run as run_script

from stnerp import fit_deformation, load_series
from stnerp.appearance import fit_flow
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.geometry import Grid
from stnerp.phantom import Phantom
from stnerp.presets import FLOW, Level

SCRIPTS = Path(__file__).parents[1] / "scripts"
# A handful of steps: what comes out is no good, but it comes out in a second.
FEW = "{levels: [[20,30,3]]}"
FEW_PRIOR = "{levels: [[20,30,3]], ref_net: {iterations: 5}}"
QUICK = f"options={{stnerp_fast: {FEW}, stnerp_fast_prior: {FEW_PRIOR}, stnerp_fast_without_t: {FEW_PRIOR}}}"
WEEKS = ["data.series=longitudinal", "data.days=[0,7,14,21,28]", "data.shift_mm=12"]
BREATH = ["data.series=breathing", "data.phases=[0,20,40,60,80]"]
TINY = ["data=tcia_4d_lung_phantom", "data.size=[36,28,18]", "data.spacing_mm=10"]
COMMON = [*TINY, "align=none", "device=cpu", "progress=false"]


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stand_ins")


def run(script: str, out: Path, *arguments: str) -> None:
    """A script as from the command line, in this process; SystemExit where it ends with an error."""
    run_script(script, f"out={out}", *arguments)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def truth(root: Path, direction: int = 1) -> Any:
    """A pair method that knows the motion of a stand-in, or has it the wrong way round."""
    four_d_lung_data = importlib.import_module("four_d_lung_data")
    values = json.loads((root / "phantom.json").read_text(encoding="utf-8"))
    assert values["days"] == [0, 7, 14, 21, 28]
    phantom = four_d_lung_data.phantom_of(values)
    moments = [four_d_lung_data.Therapy.moment(day, 0.0) for day in values["days"]]
    images = {phantom.image(t).GetPixel(10, 10, 5): t for t in moments}
    images = {float(np.rint(value)): t for value, t in images.items()}
    assert len(images) == len(moments)  # noise tells them apart

    def register(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
        t = images[float(target.GetPixel(10, 10, 5))]
        start = images[float(reference.GetPixel(10, 10, 5))]

        def target_to_reference(points_mm: np.ndarray) -> np.ndarray:
            flat = points_mm.reshape(-1, 3)
            at_rest = phantom.map_points(flat, t)
            moved = phantom.map_points(at_rest, start, inverse=True)
            return (flat + direction * (moved - flat)).reshape(points_mm.shape)

        return registration_of(Grid.of(target), target_to_reference)

    return register


# -- interpolation

SERIES_METHODS = ["no_motion", "nearest_image", "linear_blend", "stnerp_fast", "stnerp_fast_prior"]


@pytest.fixture(scope="module")
def ablation(stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", QUICK]
        # Written first: the method that knows the motion reads how it was made.
        run("eval_longitudinal_ablation", out, *arguments, "held_out=[3]", "methods=[no_motion]")
        known = truth(stand_ins / "weeks")
        patch.setitem(importlib.import_module("pair_methods").METHODS, "greedy", known)
        methods = [*SERIES_METHODS, "stnerp_fast_without_t", "greedy"]
        run("eval_longitudinal_ablation", out, *arguments, "held_out=[3,4]", f"methods=[{','.join(methods)}]")
    return out


def test_every_method_has_its_rows(ablation: Path) -> None:
    rows = rows_of(ablation / "metrics.csv")
    for method in (*SERIES_METHODS, "stnerp_fast_without_t", "greedy"):
        for scan in ("3", "4"):
            own = [row for row in rows if (row["method"], row["held_out"]) == (method, scan)]
            copies = method in ("nearest_image", "linear_blend")
            assert [row["scan"] for row in own] == ([scan] if copies else ["2", "3", "4", "5"])
            assert [row["scan"] for row in own if row["unseen"] == "True"] == [scan]
            assert all(row["psnr_db"] for row in own)
            assert all(bool(row["dice_Tumor"]) is (method != "linear_blend") for row in own)
            assert all(bool(row["tre_mean_mm"]) is (method != "linear_blend") for row in own)
            assert all(bool(row["sd_log_jacobian"]) is not copies for row in own)


def test_every_method_finishes(stand_ins: Path, tmp_path: Path) -> None:
    """Or its package isn't installed, and the record says which and how to get it."""
    arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", "held_out=[3]", "methods=all"]
    few = yaml.safe_load(FEW_STEPS)
    few |= {
        "stnerp_fast_blend": few["stnerp_fast"],
        "stnerp_fast_without_t": few["stnerp_fast_prior"],
        "stnerp_paper_without_t": few["stnerp_paper"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stnerp.fit.fit_flow", partial(fit_flow, settings=replace(FLOW, levels=(Level(20, 30, 2),))))
        run("eval_longitudinal_ablation", tmp_path, *arguments, f"options={few}".replace("'", ""))
    results = importlib.import_module("results")
    records = {r["arguments"]["method"]: r for r in results.read_records(tmp_path / "results")}
    assert records.keys() == importlib.import_module("series_methods").METHODS.keys()
    for method, record in records.items():
        if record["failure"]:
            assert "pip install 'stnerp[peers]'" in record["failure"], method
            assert method in ("ants_syn", "elastix_bspline", "greedy", "convexadam")
        else:
            assert any(row["unseen"] and np.isfinite(row["psnr_db"]) for row in record["result"]["images"]), method


def test_the_known_motion_scores_best(ablation: Path) -> None:
    rows = rows_of(ablation / "metrics.csv")

    def mean(method: str, unseen: str, name: str) -> float:
        own = [float(r[name]) for r in rows if (r["method"], r["unseen"]) == (method, unseen)]
        return float(np.mean(own))

    # Between voxels a displacement is linear: some tenths of a mm on voxels of 10 mm.
    assert mean("greedy", "False", "tre_mean_mm") < 0.3
    assert mean("no_motion", "False", "tre_mean_mm") > 3
    assert mean("greedy", "False", "dice_Tumor") > mean("no_motion", "False", "dice_Tumor")
    # The scan left out: its neighbours' displacements, mixed. The change is no straight line in time.
    assert mean("greedy", "True", "tre_mean_mm") < 0.25 * mean("no_motion", "True", "tre_mean_mm")
    assert mean("nearest_image", "True", "tre_mean_mm") < 0.6 * mean("no_motion", "True", "tre_mean_mm")


def test_the_wrong_direction_is_seen(ablation: Path, stand_ins: Path, tmp_path: Path) -> None:
    pair_methods = importlib.import_module("pair_methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pair_methods.METHODS, "greedy", truth(stand_ins / "weeks", direction=-1))
        arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", "held_out=[3]", "methods=[greedy]"]
        run("eval_longitudinal_ablation", tmp_path, *arguments)
    before = [r for r in rows_of(ablation / "metrics.csv") if (r["method"], r["held_out"]) == ("no_motion", "3")]
    wrong = rows_of(tmp_path / "metrics.csv")
    assert all(float(w["tre_mean_mm"]) > 1.5 * float(b["tre_mean_mm"]) for w, b in zip(wrong, before, strict=True))


def test_tables_say_what_was_measured_and_published(ablation: Path) -> None:
    table = (ablation / "table_3.md").read_text(encoding="utf-8")
    prior = next(line for line in table.splitlines() if "| interpolation | 3 | stnerp fast, with prior |" in line)
    assert prior.rstrip("| ").endswith("30.06 | 0.937 | 0.700")
    assert "| interpolation | 3 | stnerp fast, with prior | 1 |" in table
    assert "| registration | 3 | stnerp fast, with prior | 3 |" in table
    assert "stand-in, don't compare" in table
    assert "stnerp fast, with prior, w/o t" in table
    assert "| interpolation | 4 | ST-NeRP, published only |" not in table
    table = (ablation / "table_6.md").read_text(encoding="utf-8")
    interpolated, followed = (
        next(line for line in table.splitlines() if line.startswith(f"| {task} | stnerp fast, w/o prior |"))
        for task in ("interpolation", "registration")
    )
    assert interpolated.rstrip("| ").endswith("30.25 | 0.943 | 0.679")
    assert interpolated.startswith("| interpolation | stnerp fast, w/o prior | 2 |")  # images: one of each fit
    assert followed.startswith("| registration | stnerp fast, w/o prior | 6 |")
    assert followed.endswith("|  |  |  |")  # the paper's are of pairs, its Table V
    only = [line.rstrip("| ") for line in table.splitlines() if "published only |" in line]
    assert [line.split(" | ")[0] for line in only] == ["| registration"] * 2
    assert [line[-21:] for line in only] == ["38.52 | 0.987 | 0.797", "40.35 | 0.992 | 0.793"]


def test_the_same_command_goes_on(ablation: Path, stand_ins: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(ablation, out)
    (out / "results" / "case01-without3-stnerp_fast.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (out / "results").glob("*.json")}
    arguments = [
        *COMMON,
        *WEEKS,
        f"data.root={stand_ins / 'weeks'}",
        QUICK,
        "methods=[no_motion,stnerp_fast]",
        "held_out=[3]",
    ]
    run("eval_longitudinal_ablation", out, *arguments)
    assert (out / "results" / "case01-without3-stnerp_fast.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(SystemExit):  # another seed is another table
        run("eval_longitudinal_ablation", out, *arguments, "seed=1")


@pytest.mark.parametrize(
    ("script", "more", "table"),
    [
        ("eval_4dct_interpolation", [*BREATH, "held_out=[4]"], "table_1.md"),
        ("eval_longitudinal_interpolation", [*WEEKS, "held_out=[3]"], "table_2.md"),
    ],
)
def test_interpolation(script: str, more: list[str], table: str, stand_ins: Path, tmp_path: Path) -> None:
    root = stand_ins / ("weeks" if "longitudinal" in script else "breath")
    methods = "methods=[no_motion,nearest_image,linear_blend,stnerp_fast_prior]"
    quick = f"options={{stnerp_fast_prior: {FEW_PRIOR}}}"
    run(script, tmp_path, *COMMON, f"data.root={root}", *more, methods, quick)
    text = (tmp_path / table).read_text(encoding="utf-8")
    assert "What is changed or missing" in text  # the options
    assert ": failed" not in (tmp_path / f"{script}.log").read_text(encoding="utf-8")
    assert "The reference as Ref-Net draws it" in text
    assert "Published" in text
    assert {"table_1.md": "| 34.10 | 36.81 |", "table_2.md": "| 30.11 | 35.70 |"}[table] in text  # as printed
    assert {"table_1.md": "| 1 | 4 | 60 | no motion |", "table_2.md": "| 1 | 3 | 14 | no motion |"}[table] in text
    for label in ("nearest image", "linear blend", "stnerp fast"):
        assert label in text
    run("figures", tmp_path)
    found = {path.name.partition("-")[0] for path in (tmp_path / "figures").glob("*.png")}
    assert found == {"along_series", "slices", "contours"}
    with pytest.raises(SystemExit):
        run("figures", tmp_path)  # they are there


def test_several_cases_and_one_that_is_missing(stand_ins: Path, tmp_path: Path) -> None:
    cases = f"cases=[{{root: {stand_ins / 'weeks'}}}, {{root: {tmp_path / 'b'}, seed: 1}}, {{days: [3,1]}}]"
    run(
        "eval_longitudinal_interpolation",
        tmp_path / "run",
        *COMMON,
        *WEEKS,
        f"data.root={tmp_path / 'c'}",
        cases,
        "held_out=[3]",
        "methods=[no_motion]",
    )
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    assert {row["case"] for row in rows} == {"1", "2"}
    assert rows[0]["psnr_db"] != rows[4]["psnr_db"]
    assert "- case 3: data.days: [3, 1]" in (tmp_path / "run" / "table_2.md").read_text(encoding="utf-8")


def test_a_first_case_that_cannot_be_read_leaves_the_others(stand_ins: Path, tmp_path: Path) -> None:
    more = ["data.dates=[2001-01-01]", "cases=[{}, {dates: null}]", "held_out=[3]", "methods=[no_motion]"]
    root = f"data.root={stand_ins / 'weeks'}"
    run("eval_longitudinal_interpolation", tmp_path, *COMMON, *WEEKS, root, *more)
    assert {row["case"] for row in rows_of(tmp_path / "metrics.csv")} == {"2"}


def test_one_table_has_one_patient_for_a_case(
    stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever method and scan are asked for. What is mistyped leaves no record that blocks the right command."""
    arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", "held_out=[3]"]
    run("eval_longitudinal_interpolation", tmp_path, *arguments, "methods=[no_motion,stnerp_fast]", QUICK)
    for more, says in (
        (["data.window=lung", "methods=[nearest_image]"], "with other data"),
        (["cases=[{}, {seed: 1}]", "data.seed=2", "methods=[nearest_image]"], "with other data"),
        (["held_out=[4]", "methods=[stnerp_fast]", "options={stnerp_fast: {seed: 1}}"], "with other options"),
    ):
        with pytest.raises(SystemExit):
            run("eval_longitudinal_interpolation", tmp_path, *arguments, *more)
        assert says in capsys.readouterr().err
    for script in ("eval_longitudinal_interpolation", "eval_longitudinal_registration"):
        for mistyped, says in (("align=afine", "align: unknown 'afine'"), ("device=gpu", "device: 'gpu' is not")):
            with pytest.raises(SystemExit):
                run(script, tmp_path / "new", *arguments[:-1], mistyped, "methods=[no_motion]")
            assert says in capsys.readouterr().err
    assert not (tmp_path / "new" / "results").exists()


def test_nothing_measured_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not the paper's figures, which are the only ones then."""
    small = ["data=phantom", "data.size=[36,28,18]", "data.spacing_mm=10", "data.phases=4", "data.contours=[lung]"]
    with pytest.raises(SystemExit) as exit_:
        run("eval_4dct_interpolation", tmp_path, *small, "held_out=[3]", "methods=[known_motion]", *COMMON[-3:])
    assert exit_.value.code == 1
    printed = capsys.readouterr().out
    assert "is known of data=tcia_4d_lung_phantom alone" in printed
    assert "Nothing was measured." in printed
    assert "45.26" not in printed
    assert "45.26" in (tmp_path / "table_1.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("held_out=[1]", "other than the reference's, 1"),
        ("held_out=[6]", "from 1 to 5"),
        ("held_out=[x]", "held_out: ['x'] must be a list of whole numbers"),
        ("held_out=4", "held_out: 4 must be a list of whole numbers"),
        ("held_out=[]", "held_out: [] must be a list"),
        ("methods=[[no_motion]]", "methods: [['no_motion']] must be a list of names"),
        ("methods=[elastik]", "methods: unknown elastik"),
        ("options={idirr: {}}", "options: unknown idirr"),
        ("cases=[a]", "cases: ['a'] must be settings of data"),
        ("cases=[{patients: a}]", "data has no setting patients"),
    ],
)
def test_what_is_refused(
    argument: str, says: str, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", "held_out=[3]", "methods=[no_motion]"]
    with pytest.raises(SystemExit):
        run("eval_longitudinal_interpolation", tmp_path, *arguments, argument)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


# -- pairs


def test_registration(stand_ins: Path, tmp_path: Path) -> None:
    arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", f"options={{stnerp_fast: {FEW}}}"]
    run("eval_longitudinal_registration", tmp_path, *arguments, "methods=[no_motion]", "schemes=[long]")
    with pytest.MonkeyPatch.context() as patch:
        methods = importlib.import_module("pair_methods").METHODS
        patch.setitem(methods, "greedy", truth(stand_ins / "weeks"))
        patch.setitem(methods, "idir", truth(stand_ins / "weeks", direction=-1))
        names = "methods=[no_motion,known_motion,stnerp_fast,greedy,idir]"
        run("eval_longitudinal_registration", tmp_path, *arguments, names)
    rows = rows_of(tmp_path / "metrics.csv")
    assert len(rows) == 5 * 8
    pairs = {(r["scheme"], r["earlier"], r["later"]) for r in rows}
    assert len(pairs) == 8
    for pair in pairs:
        own = {r["method"]: r for r in rows if (r["scheme"], r["earlier"], r["later"]) == pair}
        error = {method: float(row["tre_mean_mm"]) for method, row in own.items()}
        assert error["greedy"] < 0.3
        assert error["idir"] > 1.5 * error["no_motion"] > 0.6
        assert own["greedy"]["folded_voxels"] == "0"
        for name in ("dice_Tumor", "tre_mean_mm", "psnr_db"):  # the same motion, by two ways
            assert float(own["known_motion"][name]) == pytest.approx(float(own["greedy"][name]), abs=0.02), name
        # The same contours by the same motion, but for votes that tie; the scan's own are cut into voxels anew.
        dice = {method: float(row["motion_dice_Tumor"]) for method, row in own.items()}
        assert dice["greedy"] > 0.99
        assert dice["idir"] <= dice["no_motion"] <= dice["greedy"]
    names = ("idir", "no_motion")
    wrong, still = ([float(r["motion_dice_Tumor"]) for r in rows if r["method"] == name] for name in names)
    assert np.mean(wrong) + 0.05 < np.mean(still) < 0.8
    text = (tmp_path / "table_5.md").read_text(encoding="utf-8")
    assert "| long | IDIR |" in text
    assert "38.73 | 0.988 | 0.780 | 0 |" in text
    assert "| short | 1 | scan 2 to 3 |" in text
    run("figures", tmp_path, "methods=[greedy,no_motion]")
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert "dice.png" in names
    assert len(names) == 1 + 8


def pair_record(case: int, later: int, data: dict[str, Any], **scores: float) -> dict[str, Any]:
    asked = {"scheme": "long", "case": case, "pair": [1, later], "method": "greedy", "data": data}
    return {"arguments": asked, "result": {"images": [scores]}}


def test_pairs_are_sorted_by_their_numbers() -> None:
    script = importlib.import_module("eval_longitudinal_registration")
    records = [pair_record(case, later, {}, dice_Tumor=0.5) for case in (10, 2) for later in (10, 2)]
    rows = script.rows_of_pairs(records)
    assert [(row["case"], row["pair"]) for row in rows] == [
        (case, f"scan 1 to {later}") for case in ("2", "10") for later in (2, 10)
    ]
    assert {row["greedy"] for row in rows} == {"0.500"}


def test_a_mean_is_over_the_contours_that_are_asked_for(tmp_path: Path) -> None:
    """In the tables and in a figure's title alike; what is nowhere near has no Dice."""
    scores = {"dice_a": 0.9, "dice_my_heart": 0.5, "dice_c": float("nan")}
    scores |= {"hd95_a_mm": 2.0, "hd95_my_heart_mm": 6.0, "motion_dice_a": 0.8, "motion_dice_my_heart": 0.4}
    for contours, expected in ((None, (0.7, 4.0, 0.6)), (["my heart", "c"], (0.5, 6.0, 0.4))):
        record = pair_record(1, 2, {"contours": contours}, **scores)
        (tmp_path / "a.json").write_text(json.dumps(record), encoding="utf-8")
        (row,) = importlib.import_module("figures").scores_of(tmp_path).values()
        assert [row[name] for name in ("dice", "hd95_mm", "motion_dice")] == pytest.approx(expected)


def test_a_few_folded_voxels_are_not_none() -> None:
    means = importlib.import_module("series_tables").means
    for folded, cell in (([0, 0], "0"), ([1, 0, 0, 0, 0, 0, 0, 0], "0.12"), ([3], "3"), ([1000, 2000], "1500")):
        assert means([{"folded_voxels": voxels} for voxels in folded]) == {"folded": cell}


def test_a_method_that_fails_leaves_the_others(stand_ins: Path, tmp_path: Path) -> None:
    def fail(*arguments: Any, **settings: Any) -> PairRegistration:
        raise RuntimeError("no such\nthing")

    arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}", "schemes=[short]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("pair_methods").METHODS, "greedy", fail)
        run("eval_longitudinal_registration", tmp_path, *arguments, "methods=[greedy,no_motion]")
    text = (tmp_path / "table_5.md").read_text(encoding="utf-8")
    assert "- greedy, case 1: RuntimeError: no such thing" in text
    assert "| short | no motion | 4 |" in text


def published_rows(text: str) -> list[str]:
    """Scheme or task, and name, of the rows that are the paper's alone."""
    lines = [line for line in text.splitlines() if ", published only |" in line]
    return [line.strip("| ").partition(", published only")[0] for line in lines]


def test_what_was_published_of_methods_without_a_row_is_shown(stand_ins: Path, tmp_path: Path) -> None:
    """Of those that weren't asked for, and of those that failed."""

    def fail(*arguments: Any, **settings: Any) -> PairRegistration:
        raise RuntimeError("no such thing")

    arguments = [*COMMON, *WEEKS, f"data.root={stand_ins / 'weeks'}"]
    with pytest.MonkeyPatch.context() as patch:
        methods = importlib.import_module("pair_methods").METHODS
        patch.setitem(methods, "ants_syn", fail)
        patch.setitem(methods, "idir", importlib.import_module("pair_methods").no_motion)
        asked = ["schemes=[short]", "methods=[idir,ants_syn]"]
        run("eval_longitudinal_registration", tmp_path / "5", *arguments, *asked)
        patch.setitem(importlib.import_module("series_methods").METHODS, "stnerp_fast", fail)
        asked = ["held_out=[3]", "methods=[no_motion,stnerp_fast]"]
        run("eval_longitudinal_ablation", tmp_path / "3", *arguments, *asked)
    text = (tmp_path / "5" / "table_5.md").read_text(encoding="utf-8")
    names = ["ANTs", "IDIR", "ST-NeRP", "ST-NeRP (w/o prior)"]
    pairs = [f"{scheme} | {name}" for scheme in ("long", "short") for name in names]
    pairs.remove("short | IDIR")
    assert published_rows(text) == pairs
    ants = next(line for line in text.splitlines() if line.startswith("| short | ANTs, published only |"))
    assert ants.endswith(" 33.10 | 0.975 | 0.789 | 6911 |")
    text = (tmp_path / "3" / "table_3.md").read_text(encoding="utf-8")
    assert len(published_rows(text)) == 10
    assert "| registration | 3 | ST-NeRP (w/o t), published only |" in text
    assert len(published_rows((tmp_path / "3" / "table_6.md").read_text(encoding="utf-8"))) == 4
    # Where nothing was measured, they are no result.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module("pair_methods").METHODS, "greedy", fail)
        with pytest.raises(SystemExit):
            run("eval_longitudinal_registration", tmp_path / "none", *arguments, "methods=[greedy]")
    assert "Nothing was measured." in (tmp_path / "none" / "table_5.md").read_text(encoding="utf-8")
    log = (tmp_path / "none" / "eval_longitudinal_registration.log").read_text(encoding="utf-8")
    assert "Nothing was measured." in log
    assert "33.10" not in log


def test_schemes_are_a_list_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, says in (
        ("long", "must be a list of names"),
        ("[[long]]", "a list of names"),
        ("[mid]", "some of long"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run("eval_longitudinal_registration", tmp_path, *COMMON, *WEEKS, f"schemes={given}")
        assert exit_.value.code == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "more"),
    [("eval_longitudinal_ablation", "held_out=[3]"), ("eval_longitudinal_registration", "schemes=[short]")],
)
def test_progress_reaches_the_methods_that_show_it(
    script: str, more: str, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def method_called(name: str) -> Any:
        def register(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
            asked[name] = settings.get("progress", "not asked")
            return registration_of(Grid.of(target), lambda points_mm: points_mm)

        return register

    def series_method(patient: Any, known: Any, kept: Any, **settings: Any) -> Any:
        asked["stnerp_fast"] = settings["progress"]
        return importlib.import_module("series_methods").no_motion(patient, known, kept)

    with pytest.MonkeyPatch.context() as patch:
        pairs = importlib.import_module("pair_methods").METHODS
        for name in ("stnerp_fast", "idir", "greedy"):
            patch.setitem(pairs, name, method_called(name))
        patch.setitem(importlib.import_module("series_methods").METHODS, "stnerp_fast", series_method)
        run(script, tmp_path, *COMMON[:-1], "progress=true", *WEEKS, f"data.root={stand_ins / 'weeks'}", more,
            "methods=[stnerp_fast,idir,greedy]")  # fmt: skip
    assert asked == {"stnerp_fast": True, "idir": True, "greedy": "not asked"}
    lines = capsys.readouterr().out.splitlines()
    starts = [line for line in lines if line.startswith("case01-") and line.endswith("-greedy ...")]
    assert starts
    assert lines[lines.index(starts[0]) + 1].startswith(starts[0].replace(" ...", ": PSNR"))


# -- stand-ins


def test_each_stand_in_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_stand_in = importlib.import_module("four_d_lung_data").write_stand_in
    weeks = ["data.series=longitudinal", "data.size=[12,10,6]", "data.spacing_mm=30"]

    def folder(*more: str) -> Path:
        data = composed("train_def", "out=x", TINY[0], *weeks, *more).data
        return write_stand_in(importlib.import_module("omegaconf").OmegaConf.to_container(data, resolve=True))

    two = folder("data.days=[0,7]")
    assert two.name.startswith("days0-7_phases0_seed0_")
    stamps = {path: path.stat().st_mtime_ns for path in two.rglob("*.dcm")}
    others = {
        folder("data.days=[0,14]"),
        folder("data.days=[0,7]", "data.seed=1"),
        folder("data.days=[0,7]", "data.shift_mm=3"),
    }
    assert len(others - {two}) == 3
    assert folder("data.days=[0,7]") == two
    assert {path: path.stat().st_mtime_ns for path in two.rglob("*.dcm")} == stamps
    assert folder("data.days=[0,7]", "data.root=own") == Path("own")


# -- figures of what isn't there


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        ("case,method,tre_mean_mm\n1,greedy,1.0", "", "isn't of eval_4dct_interpolation.py, eval_longitudinal_"),
        ("method,time,image\nstnerp,1,b.nii.gz", "", "or eval_longitudinal_registration.py, whose output"),
        ("", "", "whose output is drawn here"),
        ("case,method,scheme,earlier,later\n1,greedy,long,1,2", "", "nothing to draw"),
        ("case,method,scheme,earlier,later\n1,greedy,long,1,2", "methods=[idir]", "has none of ['idir']"),
        (
            "case,method,scheme\n1,greedy,long",
            "methods=stnerp_fast",
            "methods: 'stnerp_fast' must be a list of names",
        ),
        ("case,method,scheme\n1,greedy,long", "methods=[gredy]", "methods: unknown gredy"),
    ],
)
def test_figures_of_other_scripts(
    rows: str, more: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval_dirlab.py leaves a record for each case, without images; eval_interpolation.py pictures of its own."""
    (tmp_path / "metrics.csv").write_text(rows + "\n", encoding="utf-8")
    (tmp_path / "results").mkdir()
    record = {"arguments": {}, "result": {"tre_mean_mm": 1.0}, "failure": None}
    (tmp_path / "results" / "case01-greedy.json").write_text(json.dumps(record), encoding="utf-8")
    if "nothing" in says:
        (tmp_path / "results" / "case01-greedy.json").unlink()
    with pytest.raises(SystemExit) as exit_:
        run("figures", tmp_path, *([more] if more else []))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not list(tmp_path.glob("figures/*"))


# -- landmarks of the stand-in


@pytest.mark.parametrize("kind", [WEEKS, BREATH])
def test_landmarks_follow_the_images(kind: list[str], stand_ins: Path) -> None:
    root = stand_ins / ("weeks" if kind is WEEKS else "breath")
    config = composed("train_def", "out=x", *TINY, f"data.root={root}", *kind)
    patient = importlib.import_module("data").load_data(config.data)
    series, masks, landmarks = patient.series, patient.series.masks, patient.series.landmarks
    assert len(landmarks) == len(series) == 5
    moved = [np.linalg.norm(own - landmarks[0], axis=1).mean() for own in landmarks]
    assert moved[0] == 0
    assert max(moved) > 3
    assert all(mask is not None for mask in masks)
    for t, own in zip(series.times, landmarks, strict=True):
        for other, there in zip(series.times, landmarks, strict=True):
            # The way back from time t is found to 1e-4 mm at worst.
            np.testing.assert_allclose(patient.known_motion(own, t, other), there, atol=1e-3)


# -- fields of view that differ


def seen_in_part() -> tuple[Any, Any]:
    """A still patient at three times, and the second scan's upper half alone; landmarks all over; no label there.

    What any method shows is right, where it shows anything.
    """
    phantom = Phantom((24, 19, 12), 15.0, n_landmarks=60)
    whole, labels, points_mm = phantom.image(0.0), phantom.labels(0.0), phantom.landmarks(0.0)
    part = whole[:, :, 6:]
    masks = [labels, labels[:, :, 6:], labels]
    series = load_series(
        [whole, part, whole], [0.0, 1.0, 3.0], masks=masks, landmarks=[points_mm] * 3, window=(-1000.0, 1000.0)
    )
    data = importlib.import_module("data")
    return data.PatientData(series, {2: "heart"}, [2], 0.0), phantom


def test_what_an_image_does_not_reach_is_not_scored() -> None:
    """The half that is left out is whole; of images in its place, or of the reference, it is what they reach."""
    answers, methods = importlib.import_module("answers"), importlib.import_module("series_methods").METHODS
    patient, _ = seen_in_part()
    for left_out, known, percent in ((1, [0, 2], 100.0), (2, [0, 1], 50.0)):
        for name in ("nearest_image", "linear_blend"):
            said, _ = methods[name](patient, known, {})
            row = answers.all_scores(patient, answers.answer(patient, said, left_out), left_out)
            assert row["covered_percent"] == percent, name
            assert row["psnr_db"] > 100  # rounding of a linear blend


def test_a_copy_of_the_reference_is_a_copy() -> None:
    answers, methods = importlib.import_module("answers"), importlib.import_module("series_methods").METHODS
    patient, _ = seen_in_part()
    said, _ = methods["nearest_image"](patient, [0, 2], {})
    row = answers.all_scores(patient, answers.answer(patient, said, 1), 1)
    assert row["tre_mean_mm"] == 0
    assert row["dice_heart"] == 1


def test_interpolation_scores_what_all_have_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that moves nothing is as good as the copies, which are exact, over half of the reference."""
    script = importlib.import_module("eval_interpolation")
    patient, phantom = seen_in_part()
    known = patient.series.subset([0, 2])
    still = fit_deformation(known, levels=[(30, 60, 1, None, 1e-12)], detail_mm=None, progress=False, device="cpu")
    arrays = [script.on_reference(known, i) for i in range(2)]
    rows = {row["method"]: row for row in script.evaluate(still, patient, known, arrays, 1)}
    inside = np.count_nonzero(Grid.of(patient.series.images[1]).contains(phantom.landmarks(0.0)))
    assert 0 < inside < 60
    for name in (script.NO_MOTION, script.NEAREST, script.BLEND, script.STNERP):
        assert rows[name]["covered_percent"] == pytest.approx(50, abs=1), name
        assert rows[name]["psnr_db"] > 60  # of all the reference 20; points of float32 lie off by 1e-5 mm
    for name in (script.NO_MOTION, script.NEAREST, script.STNERP):
        assert rows[name]["landmarks"] == inside
        assert rows[name]["landmarks_outside"] == 60 - inside


def test_a_lost_contour_is_told_beside_the_mean_of_the_others() -> None:
    tables = importlib.import_module("series_tables")
    found = {"dice_a": 0.9, "hd95_a_mm": 2.0, "dice_b": float("nan"), "hd95_b_mm": float("nan")}  # b: in neither
    lost = {"dice_a": 0.0, "hd95_a_mm": float("nan"), "dice_b": 0.8, "hd95_b_mm": 3.0}
    rows = [tables.with_contour_means(row) for row in (found, lost)]
    assert (rows[0]["dice"], rows[0]["hd95_mm"]) == (0.9, 2.0)
    assert rows[1]["dice"] == 0.4
    assert np.isnan(rows[1]["hd95_mm"])
    cells = tables.means(rows)
    assert cells == {"Dice": "0.650 ± 0.250", "HD95 mm": "2.00 (1 of 2)"}


def test_before_the_fit_is_no_contour() -> None:
    tables = importlib.import_module("series_tables")
    before = {"dice_a_before": 0.1, "hd95_a_before_mm": 30.0}
    row = tables.with_contour_means({**before, "dice_a": 0.9, "hd95_a_mm": 2.0})
    assert (row["dice"], row["hd95_mm"]) == (0.9, 2.0)
    unseen = tables.with_contour_means({**before, "dice_a": float("nan"), "hd95_a_mm": float("nan")})
    assert not {"dice", "hd95_mm"} & unseen.keys()
    assert tables.with_contour_means({"dice_scan_before": 0.8})["dice"] == 0.8  # a label of that name


def test_what_is_not_drawn_on_a_scan_is_not_scored() -> None:
    """A lost contour is, with a Dice of 0."""
    scores, script, tables = map(importlib.import_module, ("scores", "eval_interpolation", "series_tables"))
    patient, phantom = seen_in_part()
    both = phantom.labels(0.0)
    without_lung, without_heart = (sitk.ChangeLabel(both, {label: 0.0}) for label in (1, 2))
    patient = replace(patient, label_names={1: "lung", 2: "heart"})
    patient = replace(patient, series=replace(patient.series, masks=(both, without_heart, both)))
    rows = [
        {"method": script.STNERP, "time": float(i)} | scores.contour_scores(patient, i, carried)
        for i, carried in ((1, both), (2, without_lung))
    ]
    assert rows[0].keys() & {"dice_heart", "hd95_heart_mm", "mean_surface_distance_heart_mm"} == set()
    assert rows[0]["dice_lung"] == rows[1]["dice_heart"] == 1
    assert rows[1]["dice_lung"] == 0
    assert np.isnan(rows[1]["hd95_lung_mm"])
    (mean,) = script.summarise(rows)
    assert (mean["dice_lung"], mean["dice_heart"], mean["hd95_heart_mm"]) == (0.5, 1, 0)
    assert [tables.with_contour_means(row)["dice"] for row in rows] == [1, 0.5]
    # Nor what isn't on the image that contours come from: no method could carry it.
    assert scores.contour_scores(patient, 2, without_heart, source=without_heart).keys() == {
        *scores.contour_columns("lung")
    }

"""The benchmark, end to end on a tiny phantom: what it writes, that it goes on, and that its scores can tell."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional

from stnerp import Grid, InputError
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.errors import MissingDependencyError

ROOT = Path(__file__).parents[1]
TINY = ["data.phantom.size=[24,19,12]", "data.phantom.spacing_mm=15"]
QUICK = ["options.stnerp_fast.levels=[[15,30,4]]", "device=cpu"]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_importable() -> Iterator[None]:
    optional("hydra", "scripts")
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
    importlib.import_module("cases").POINTS = 300  # of each region: less to write and read
    yield
    sys.path[:] = before


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Functions are called in this process, which starts in no time; their names, in order."""
    fresh = importlib.import_module("fresh")
    called: list[str] = []

    def call(path: Path, function: str, arguments: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], str]:
        called.append(path.stem)
        return fresh.answered(function, arguments)

    monkeypatch.setattr(fresh, "_call", call)
    return called


@pytest.fixture(scope="module")
def phantom_case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny phantom in files."""
    cases = importlib.import_module("cases")
    folder = tmp_path_factory.mktemp("cases")
    return cases.Case.load(cases.prepare("phantom", folder, {"size": [24, 19, 12], "spacing_mm": 15}))


def scene_of(case: Any) -> Any:
    return importlib.import_module("data").moving_scene(case.made_from["data"])


# -- the command


def test_runs_resumes_and_survives_a_failure(
    tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = importlib.import_module("run")
    broken = "options.nearest_phase.nonsense=1"
    command = [f"out={tmp_path}", "cases=phantom", "methods=nearest_phase,linear_blend,stnerp_fast", *TINY, *QUICK]
    run.main([*command, broken, "seeds=[0,1]"])
    names = [f"phantom-{name}" for name in ("nearest_phase-0", "linear_blend-0", "stnerp_fast-0", "stnerp_fast-1")]
    assert here == names  # what doesn't depend on a seed runs once

    with (tmp_path / "benchmark.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["nearest_phase", "linear_blend", "stnerp_fast", "stnerp_fast"]
    assert "nonsense" in rows[0]["failure"]
    for row in rows[2:]:
        for name in ("seen_tre_mean_mm", "unseen_tre_body_mean_mm", "unseen_psnr_db", "seen_dice_lung", "seconds"):
            assert np.isfinite(float(row[name])), name
        assert row["seen_images"] == "3"
        assert float(row["peak_memory_mib"]) >= float(row["start_memory_mib"]) > 0
        assert row["cpu"]
        assert "torch" in row["versions"]
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "nearest phase failed: TypeError" in text
    assert "changed on the command line" in text
    assert (tmp_path / "accuracy_time.png").stat().st_size > 10_000

    # The same command again: nothing is left to do. `rerun=failed`: what failed.
    monkeypatch.setattr(run, "write_tables", lambda out: [])
    here.clear()
    run.main([*command, broken, "seeds=[0,1]"])
    assert here == []
    with pytest.raises(InputError, match="other settings"):
        run.main([*command, "seeds=[0]"])
    run.main([*command, "seeds=[0]", "rerun=failed"])
    assert here == names[:1]
    assert json.loads((tmp_path / "results" / f"{names[0]}.json").read_text(encoding="utf-8"))["failure"] == ""
    here.clear()
    run.main([*command, "seeds=1", "methods=stnerp_fast", "rerun=true"])
    assert here == names[3:]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("cases=phantome", "cases: unknown phantome; known: phantom"),
        ("methods=[stnerp]", "methods: unknown stnerp"),
        ("seeds=one", "seeds: 'one'"),
        ("rerun=maybe", "rerun: 'maybe'"),
        ("options.elastx.iterations=3", "options: unknown elastx"),
        ("phantom", "give name=value"),
    ],
)
def test_a_wrong_argument_says_so(argument: str, says: str, tmp_path: Path, here: list[str]) -> None:
    run = importlib.import_module("run")
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        run.main([f"out={tmp_path}", "cases=phantom", "methods=no_motion", *TINY, argument])
    assert here == []


def test_a_process_of_its_own_and_how_it_can_end(tmp_path: Path) -> None:
    fresh = importlib.import_module("fresh")

    def call(name: str, function: str, timeout_s: float = 60, **arguments: Any) -> tuple[Any, str]:
        record = fresh.recorded(tmp_path / f"{name}.json", function, arguments, timeout_s)
        return record["result"], record["failure"]

    assert call("good", "json:loads", s='{"a": 1}') == ({"a": 1}, "")
    ended = "the process ended without an answer (exit code 3); see crash.log"
    assert call("crash", "os:_exit", status=3) == ({}, ended)
    assert call("slow", "subprocess:run", timeout_s=0.2, args=["sleep", "60"]) == ({}, "stopped after 0.2 s")
    with pytest.raises(InputError, match=r"good\.json: was measured with other settings"):
        call("good", "json:loads", s="2")


# -- the table


def test_table_has_medians_over_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = importlib.import_module("table")
    machine = {
        "cpu": "a",
        "cores": 2,
        "gpu": "",
        "system": "b",
        "versions": "c",
        "commit": "d",
        "date": "2020-01-01",
    }
    values = {0: (1.0, 10, 0), 1: (5.0, 30, 7), 2: (2.0, 20, 0), 3: None}
    (tmp_path / "results").mkdir()
    for seed, value in values.items():
        arguments = {
            "case": "x/phantom/case.json",
            "made_from": {"plan": {"about": "A case."}},
            "method": "stnerp_fast",
            "seed": seed,
            "device": "cpu",
            "options": {},
        }
        result: dict[str, Any] = {}
        if value is not None:
            names = ("seen_tre_mean_mm", "seconds", "seen_folded_voxels")
            result = {**dict(zip(names, value, strict=True)), "note": "n", "regions": "lungs"}
            result |= {"peak_memory_mib": 2.0, "start_memory_mib": 1.0, "fitted_pairs": 8}
        failure = "" if value else "no luck"
        record = {"arguments": arguments, "result": result, "failure": failure, "machine": machine}
        (tmp_path / "results" / f"{seed}.json").write_text(json.dumps(record), encoding="utf-8")
    rows = table.read_rows(tmp_path / "results")
    (median,) = table.medians(rows)
    assert (median["seen_tre_mean_mm"], median["seconds"], median["seeds"], median["failures"]) == (
        2.0,
        20.0,
        3,
        1,
    )
    assert median["seen_folded_voxels"] == 7  # the worst: it must not be hidden
    table.write_tables(tmp_path)
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "| stnerp fast, w/o prior | 2.00 / – / – | 7 | 20.0 | 8 | 2 (+1) | 3 | 1 |" in text
    assert "stnerp fast, w/o prior failed: no luck" in text
    capsys.readouterr()


# -- cases


def test_a_prepared_case_is_files_and_their_truth(phantom_case: Any) -> None:
    case, scene = phantom_case, scene_of(phantom_case)
    assert (case.pairs, case.held_out, case.align, case.period) == ([2, 4, 6], [3], "none", 10.0)
    assert len(case.known_series()) == 9
    assert case.weights(3) == {2: 0.5, 4: 0.5}
    assert case.weights(2) == {2: 1.0}
    truth = case.truth()
    reference_mm, target_mm = truth.series.landmarks[0], truth.series.landmarks[4]
    assert np.allclose(scene.map_points(target_mm, 4.0), reference_mm, atol=1e-6)
    assert truth.label_names[1] == "lung"
    # Points of the lungs first: each within a voxel that is lung, or next to one (vessels are closed in).
    lungs_mm = next(points for name, points in case.regions_of(reference_mm) if name == "lungs")
    labels = truth.series.masks[0]
    distance = sitk.SignedMaurerDistanceMap(labels == 1, squaredDistance=False, useImageSpacing=True)
    index = np.rint(Grid.of(labels).world_to_index(lungs_mm)).astype(int)
    away_mm = sitk.GetArrayFromImage(distance)[index[:, 2], index[:, 1], index[:, 0]]
    assert (away_mm <= 15).mean() > 0.95  # one voxel of this phantom


def test_a_chest_wall_that_stands_still_stands_still(tmp_path: Path) -> None:
    cases = importlib.import_module("cases")
    case = cases.Case.load(
        cases.prepare("sliding", tmp_path, {"size": [36, 28, 18], "spacing_mm": 10, "phases": 7})
    )
    assert list(case.regions) == ["lungs", "chest wall", "body"]
    reference_mm, exhaled_mm = (case.truth().series.landmarks[i] for i in (0, 4))
    moved_mm = np.linalg.norm(exhaled_mm - reference_mm, axis=1)
    lungs_mm, wall_mm, body_mm = (own for _, own in case.regions_of(moved_mm))
    assert len(lungs_mm) == len(wall_mm) == len(body_mm) == cases.POINTS
    assert wall_mm.max() < 1e-9
    assert np.median(lungs_mm) > 3


def test_every_plan_names_data_that_compose() -> None:
    cases = importlib.import_module("cases")
    for plan in cases.PLANS.values():
        values = cases._data_section(plan.data, plan.changes or {})
        assert values["kind"] in ("files", "phantom", "simulated")


# -- scores


def test_scores_tell_the_right_direction_from_the_wrong_one(phantom_case: Any) -> None:
    scoring, methods = importlib.import_module("scoring"), importlib.import_module("methods")
    case, scene = phantom_case, scene_of(phantom_case)
    truth = case.truth()

    def tre_and_dice(inverse: bool) -> tuple[float, float]:
        def registration(index: int, grid: Grid) -> PairRegistration:
            return registration_of(grid, lambda points_mm: scene.map_points(points_mm, case.times[index], inverse))

        answers = methods.Answers(registration=registration)
        row = scoring.summary([scoring.score(case, truth, answers, i) for i in case.pairs])
        return row["tre_mean_mm"], row["dice_lung"]

    still = methods.no_motion(case, seed=0, device="cpu")
    before = scoring.summary([scoring.score(case, truth, still, i) for i in case.pairs])
    right, wrong = tre_and_dice(inverse=False), tre_and_dice(inverse=True)
    # What is left is the displacement read linearly between voxels 15 mm apart.
    assert right[0] < 0.05 * before["tre_mean_mm"]
    assert right[1] > before["dice_lung"]
    assert wrong[0] > 1.5 * before["tre_mean_mm"]
    assert wrong[1] < before["dice_lung"]

    known = methods.known_motion(case, seed=0, device="cpu")
    row = scoring.summary([scoring.score(case, truth, known, i) for i in case.pairs])
    assert (row["tre_mean_mm"], row["dice_lung"]) == right


def test_the_known_motion_is_offered_where_it_is_known(phantom_case: Any) -> None:
    known = importlib.import_module("methods").METHODS["known_motion"]
    assert known.answers(phantom_case)
    assert known.answers(replace(phantom_case, made_from={"data": {"kind": "simulated"}}))
    assert not known.answers(replace(phantom_case, made_from={"data": {"kind": "files"}}))


def test_an_organ_that_the_border_cuts_is_scored_where_the_reference_shows_it(phantom_case: Any) -> None:
    answering = importlib.import_module("answers")
    truth = phantom_case.truth()
    series = truth.series
    z, _, _ = series.grid.shape
    cut = np.zeros(series.grid.shape, np.uint8)
    cut[: z // 2] = 1  # an organ that goes on below the image
    lowered = cut.copy()
    lowered[z // 2] = 1  # its upper face, one voxel on
    masks = (series.grid.image(cut), *[series.grid.image(lowered)] * (len(series) - 1))
    patient = replace(truth, series=replace(series, masks=masks), label_names={1: "organ"})
    down_mm = np.array([0.0, 0.0, -series.grid.spacing_mm[2]])

    def score(way_mm: np.ndarray) -> dict[str, float]:
        registration = registration_of(series.grid, lambda points_mm: points_mm + way_mm)
        answers = answering.Answers(registration=lambda index, grid: registration)
        return dict(answering.score(patient, answering.answer(patient, answers, 2), 2))

    # What comes in from below is not known: all of what is known is right.
    known = score(down_mm)
    assert known["dice_organ"] == 1.0
    assert known["hd95_organ_mm"] == 0.0
    # A motion that leaves nothing unknown is scored everywhere, and too little of it is seen.
    assert score(0 * down_mm)["dice_organ"] == pytest.approx(2 * (z // 2) / (2 * (z // 2) + 1))
    assert score(2 * down_mm)["dice_organ"] < 1.0


def test_summary_pools_landmarks_and_adds_folded_voxels() -> None:
    scoring = importlib.import_module("scoring")
    rows = [
        ({"psnr_db": 30.0, "folded_voxels": 2.0}, {"lungs": np.array([1.0, 2.0, 9.0]), "body": np.array([5.0])}),
        ({"psnr_db": 34.0, "folded_voxels": 3.0}, {"lungs": np.array([4.0]), "body": np.array([7.0])}),
    ]
    summary = scoring.summary(rows)
    assert summary["images"] == 2
    assert (summary["tre_mean_mm"], summary["tre_median_mm"], summary["tre_points"]) == (4.0, 3.0, 4)
    assert summary["tre_body_mean_mm"] == 6.0
    assert (summary["psnr_db"], summary["folded_voxels"]) == (32.0, 5.0)


# -- methods


def test_pairs_answer_unseen_times_only_between_what_they_fitted(
    phantom_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = importlib.import_module("methods")
    seen: list[dict[str, Any]] = []

    def shift(reference: sitk.Image, target: sitk.Image, **arguments: Any) -> PairRegistration:
        """Moves by as many mm as calls before."""
        seen.append(arguments)
        return registration_of(Grid.of(target), lambda points_mm: points_mm + len(seen))

    module = types.ModuleType("stnerp.baselines.shift")
    module.shift = shift  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stnerp.baselines.shift", module)
    answers = methods.pairwise(phantom_case, seed=5, device="cpu", function="shift", takes=("mask",), gain=2)
    assert answers.fitted == len(seen) == 3
    assert [(a["seed"], a["align"], a["gain"], "device" in a) for a in seen] == [(5, "none", 2, False)] * 3
    assert sitk.GetArrayViewFromImage(seen[0]["mask"]).any()
    assert (seen[0]["window"].low, seen[0]["window"].high) == (-1000, 1000)

    grid = phantom_case.known_series().grid

    def moved_mm(index: int) -> float | None:
        found = answers.registration(index, grid)
        return None if found is None else float(sitk.GetArrayViewFromImage(found.displacement).mean())

    # 2 and 4 moved by 1 and 2; 3 lies between them; 1 between the reference and 2, had it not been seen
    # by others; 8 was not fitted.
    assert moved_mm(4) == pytest.approx(2)
    assert moved_mm(3) == pytest.approx(1.5)
    assert moved_mm(8) is None


def test_a_method_may_take_the_lungs_of_both_images(phantom_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = importlib.import_module("methods")
    seen: list[dict[str, Any]] = []

    def still(reference: sitk.Image, target: sitk.Image, **arguments: Any) -> PairRegistration:
        seen.append({"reference": reference, "target": target, **arguments})
        return registration_of(Grid.of(target), lambda points_mm: points_mm)

    module = types.ModuleType("stnerp.baselines.still")
    module.still = still  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stnerp.baselines.still", module)
    answers = methods.pairwise(phantom_case, seed=0, device="cpu", function="still", takes=("masks",))
    assert answers.note == "trained on both images' lungs as well"
    labels = phantom_case.truth().series.masks
    lung = next(int(label) for label, name in phantom_case.label_names.items() if name == "lung")
    for call, index in zip(seen, phantom_case.pairs, strict=True):
        assert "mask" not in call
        for name, i in {"reference_mask": phantom_case.reference, "target_mask": index}.items():
            drawn = sitk.GetArrayViewFromImage(call[name])
            assert np.array_equal(drawn > 0, sitk.GetArrayViewFromImage(labels[i]) == lung)
            assert drawn.any()


def test_a_missing_package_is_named_with_its_extra(phantom_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, pair = importlib.import_module("fresh"), importlib.import_module("stnerp.baselines.pair")
    monkeypatch.setitem(sys.modules, "stnerp.baselines.absent", module := types.ModuleType("absent"))
    module.absent = lambda *_, **__: pair.peer("no_such_package", "no-such-package")  # type: ignore[attr-defined]
    methods = importlib.import_module("methods")
    with pytest.raises(MissingDependencyError):
        methods.pairwise(phantom_case, seed=0, device="cpu", function="absent")
    monkeypatch.setitem(methods.METHODS, "absent", methods._pair("absent", "no_such_package"))
    monkeypatch.setattr(importlib.import_module("cases").Case, "load", staticmethod(lambda path: phantom_case))
    arguments = {"case": "", "made_from": {}, "method": "absent", "seed": 0, "device": "cpu", "options": {}}
    assert "pip install 'stnerp[peers]'" in fresh.answered("measure:measure", arguments)[1]


def test_blend_and_nearest_are_what_they_say(phantom_case: Any) -> None:
    methods = importlib.import_module("methods")
    truth = phantom_case.truth().series
    grid, window = truth.grid, truth.window
    blend = methods.linear_blend(phantom_case, seed=0, device="cpu").image(3, grid)
    two, four = (window.normalise(sitk.GetArrayFromImage(truth.images[i])) for i in (2, 4))
    assert np.allclose(window.normalise(sitk.GetArrayFromImage(blend)), (two + four) / 2, atol=1e-5)
    nearest = methods.nearest_phase(phantom_case, seed=0, device="cpu")
    assert nearest.copy_of(3) == 2
    assert nearest.image(2, grid) is None  # it would show the truth


# -- scale


def test_scale_measures_and_draws(tmp_path: Path, here: list[str]) -> None:
    scale = importlib.import_module("scale")
    sweeps = ["sizes=[[12,10,8],[16,12,8]]", "phases=[2,3]", "at_size=[12,10,8]"]
    settings = ["prior=true", "options.levels=[[30,60,2]]", "options.ref_net.iterations=2", "device=cpu"]
    scale.main([f"out={tmp_path}", *sweeps, *settings])
    assert here == ["12x10x8-2", "12x10x8-3", "16x12x8-2"]  # small ones first, none twice
    with (tmp_path / "scale.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["failure"] for row in rows} == {""}
    stages = ("load", "ref_net", "fit", "render")
    assert all(float(row[f"{stage}_seconds"]) > 0 for row in rows for stage in stages)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


# -- Ref-Net, and the floors


def test_ref_net_is_measured_from_a_file(tmp_path: Path, here: list[str]) -> None:
    ref_net = importlib.import_module("ref_net")
    voxels = np.random.default_rng(0).uniform(0, 100, (6, 8, 10)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / "noise.mha"))
    few = ["options.fast.iterations=2", "options.fast_alone.iterations=2", "options.paper.iterations=2"]
    ref_net.main(
        [f"image={tmp_path / 'noise.mha'}", f"out={tmp_path}", "fits=fast,fast_alone,paper", "device=cpu", *few]
    )
    assert here == ["fast", "fast_alone", "paper"]
    with (tmp_path / "ref_net.csv").open(encoding="utf-8") as file:
        rows = {row["fit"]: row for row in csv.DictReader(file)}
    # The remainder brings the voxels back; two steps on noise don't. Noise evenly spread over the window has a
    # variance of 1/12: 10.8 dB for a network that has learnt its mean and nothing else.
    assert float(rows["fast"]["psnr_db"]) > 80
    assert float(rows["fast_alone"]["psnr_db"]) < 12
    assert "| paper's network and rate | 2 | 480 |" in (tmp_path / "ref_net.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is not a file"):
        ref_net.main(["image=absent.nii.gz", f"out={tmp_path}"])


def test_floors_of_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = importlib.import_module("floors")
    monkeypatch.setattr(floors, "product_rate", lambda device: 1e9)
    monkeypatch.setattr(floors, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(floors, "STEPS", {"cpu": (1, 2)})
    coarse = replace(floors.FAST.def_net, levels=(floors.Level(60, 60, 1), floors.Level(40, 40, 1)))
    monkeypatch.setattr(floors, "FAST", replace(floors.FAST, def_net=coarse))
    floors.main([f"out={tmp_path}", "size=[24,20,16]", "phases=2", "points=1024", "repeats=1", "device=cpu"])
    with (tmp_path / "floors.csv").open(encoding="utf-8") as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5
    # 8 layers of 256 after 512 features: forward, the gradient of the weights, and the gradient of what goes into
    # each layer, which the first one doesn't need.
    first, others = 512 * 256, 6 * 256**2 + 256
    expected = 2 * 1024 * (3 * 256 + 3 * (first + others) - first)
    paper = rows["Ref-Net paper, 1024 points"]
    assert float(paper["GFLOP"]) == pytest.approx(expected / 1e9, rel=0.01)
    assert all(float(row["measured ms"]) > 0 for row in rows.values())


def test_an_image_of_ones_own_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The motion itself has no error, the still image that of the motion; what is there is not made again."""
    moved, pair_methods = importlib.import_module("moved"), importlib.import_module("pair_methods")
    phantom = importlib.import_module("stnerp.phantom").Phantom((36, 28, 20), 10.0, noise_hu=20.0)
    sitk.WriteImage(phantom.image(0.0), str(tmp_path / "ct.mha"))
    motion = moved.Breathing.of_grid(phantom.grid, amplitude_si_mm=20.0)
    given = []

    def knows(reference: sitk.Image, target: sitk.Image, **settings: Any) -> PairRegistration:
        given.append([sitk.GetArrayFromImage(image) for image in (reference, target)])
        return registration_of(
            Grid.of(target), lambda points_mm: motion.target_to_reference(points_mm, moved.TARGET)
        )

    monkeypatch.setitem(pair_methods.METHODS, "greedy", knows)
    asked = [f"image={tmp_path / 'ct.mha'}", f"out={tmp_path}", "motion.amplitude_si_mm=20", "noise=0.01"]
    for _ in range(2):
        moved.main([*asked, "methods=no_motion,greedy"])
    assert len(given) == 1
    with (tmp_path / "moved.csv").open(encoding="utf-8") as file:
        still, known = csv.DictReader(file)
    assert float(known["landmarks_mean_mm"]) < 0.3 < 4 < float(still["landmarks_mean_mm"])  # linear between 10 mm
    assert float(known["body_mean_mm"]) < 1e-6 < 3 < float(still["body_mean_mm"])
    reference, target = given[0]
    air = (reference < -900) & (target < -900)
    # Noise of 20 HU, another on each: together by the root of two. Denoised air is flat to some HU.
    assert np.std((reference - target)[air]) == pytest.approx(20 * np.sqrt(2), rel=0.1)
    with pytest.raises(InputError, match="image: give a file"):
        moved.main(["methods=greedy"])
    with pytest.raises(InputError, match=r"motion: .*amplitude_mm"):
        moved.main([f"image={tmp_path / 'ct.mha'}", "methods=greedy", "motion.amplitude_mm=20"])

"""The scripts, end to end on a tiny phantom: what they write, what they refuse, and how they say so."""

from __future__ import annotations

import csv
import hashlib
import importlib
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import optional
from test_agreement import GRID, blobs, known

from stnerp import STNeRP, load_series
from stnerp.geometry import Grid
from stnerp.io.landmarks import read_landmarks, write_landmarks
from stnerp.metrics import ncc, psnr_db, ssim
from stnerp.phantom import LABELS, Phantom

SCRIPTS = Path(__file__).parents[1] / "scripts"
# 15 mm voxels and a handful of steps: what comes out is no good, but it comes out in a second.
QUICK = [
    "progress=false",
    "device=cpu",
    "preset.ref_net.iterations=20",
    "preset.ref_net.fraction_per_step=0.05",
    "preset.def_net.levels=[[15,30,4]]",
]
TINY_PHANTOM = ["data=phantom", "data.size=[24,19,12]", "data.spacing_mm=15", "data.phases=4"]


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(script: str, *arguments: str) -> None:
    """A script as from the command line, in this process; SystemExit where it ends with an error."""
    optional("hydra", "scripts")
    module = importlib.import_module(script)
    before, sys.argv = sys.argv, [f"{script}.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(module.main)
    finally:
        sys.argv = before


def refused(capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> str:
    """The one line on stderr of a script that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(script, *arguments)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, str]:
    """Fingerprint of every file but the logs, which are appended to."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans, masks and landmarks in files, as a patient's."""
    folder = tmp_path_factory.mktemp("patient")
    phantom = Phantom((24, 19, 12), 15.0, n_landmarks=20)
    for i, t in enumerate((0.0, 0.3, 0.5)):
        sitk.WriteImage(phantom.image(t), str(folder / f"{i}.nii.gz"))
        sitk.WriteImage(phantom.labels(t), str(folder / f"labels_{i}.nii.gz"))
        write_landmarks(phantom.landmarks(t), folder / f"points_{i}.csv")
    heart = sitk.Cast(phantom.labels(0.0) == LABELS["heart"], sitk.sitkUInt8)
    sitk.WriteImage(heart, str(folder / "heart.nii.gz"))
    heart.SetOrigin((5000.0, 0.0, 0.0))
    sitk.WriteImage(heart, str(folder / "far.nii.gz"))
    return folder


def data_of(patient: Path) -> list[str]:
    def listed(pattern: str) -> str:
        return "[" + ",".join(str(patient / pattern.format(i)) for i in range(3)) + "]"

    return [
        f"data.images={listed('{}.nii.gz')}",
        "data.times=[0,12,30]",
        f"data.masks={listed('labels_{}.nii.gz')}",
        f"data.landmarks={listed('points_{}.csv')}",
        "data.label_names={2: heart}",
    ]


@pytest.fixture(scope="module")
def fitted(patient: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after train_ref.py and train_def.py."""
    out = tmp_path_factory.mktemp("run") / "p1"
    sys.path.insert(0, str(SCRIPTS))
    try:
        run("train_ref", f"out={out}", *data_of(patient), *QUICK)
        run("train_def", f"out={out}", "progress=false")
    finally:
        sys.path.remove(str(SCRIPTS))
    return out


def test_train_ref_then_train_def_write_the_run(fitted: Path) -> None:
    by_train_ref = ["config.yaml", "ref_net.pt", "ref_net.csv", "ref_net_history.csv", "train_ref.log"]
    by_train_def = ["train_def.yaml", "model.pt", "def_net_history.csv", "metrics.csv", "train_def.log"]
    pictures = [f"pictures/{name}.png" for name in ("ref_net", "loss", "t12", "t30")]
    for name in [*by_train_ref, *by_train_def, *pictures]:
        assert (fitted / name).stat().st_size > 0, name
    score = rows_of(fitted / "ref_net.csv")[0]
    assert {"psnr_db", "ssim", "fit_seconds"} <= set(score)
    # train_def.py took data and preset from train_ref.py: the times, and the four steps of QUICK.
    model = STNeRP.load(fitted / "model.pt")
    assert model.times == (0, 12, 30)
    assert model.ref_net is not None
    assert len(rows_of(fitted / "def_net_history.csv")) == 4
    rows = rows_of(fitted / "metrics.csv")
    assert [float(row["time"]) for row in rows] == [12, 30]
    measured = "psnr_db_before psnr_db ncc folded_voxels tre_mean_before_mm tre_snapped_mean_mm dice_heart"
    for row in rows:
        assert all(np.isfinite(float(row[name])) for name in [*measured.split(), "hd95_heart_mm", "jacobian_min"])
        assert int(row["landmarks"]) == 20


def test_tre_before_is_the_distance_of_the_landmarks(fitted: Path) -> None:
    phantom = Phantom((24, 19, 12), 15.0, n_landmarks=20)
    apart = np.linalg.norm(phantom.landmarks(0.5) - phantom.landmarks(0.0), axis=1).mean()
    # Six digits are written.
    assert float(rows_of(fitted / "metrics.csv")[1]["tre_mean_before_mm"]) == pytest.approx(apart, rel=1e-5)


def test_nothing_is_overwritten_unasked(fitted: Path, patient: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(fitted)
    assert "ref_net.pt" in before
    line = refused(capsys, "train_ref", f"out={fitted}", *data_of(patient), *QUICK)
    assert "already exists" in line
    assert "overwrite=true" in line
    assert "already exists" in refused(capsys, "train_def", f"out={fitted}")
    assert "'ture' must be true or false" in refused(capsys, "train_def", f"out={fitted}", "overwrite=ture")
    assert contents(fitted) == before


def test_train_def_command_line_wins_and_overwrites_on_demand(fitted: Path, tmp_path: Path, patient: Path) -> None:
    out = tmp_path / "p1"
    out.mkdir()
    for name in ("config.yaml", "ref_net.pt"):
        (out / name).write_bytes((fitted / name).read_bytes())
    common = [f"out={out}", "progress=false", "overwrite=true"]
    run("train_def", *common)
    run("train_def", *common, "preset.def_net.levels=[[15,30,2],[15,15,1]]", "data.times=[0,1,2]")
    assert len(rows_of(out / "def_net_history.csv")) == 3
    assert STNeRP.load(out / "model.pt").times == (0, 1, 2)
    assert (out / "ref_net.pt").read_bytes() == (fitted / "ref_net.pt").read_bytes()


def test_next_weeks_scan_with_the_same_ref_net(patient: Path, tmp_path: Path) -> None:
    """A scan more is no other reference, and shifts no window that was found from the scans."""
    images = [str(patient / f"{i}.nii.gz") for i in range(3)]
    common = [f"out={tmp_path}", *QUICK]
    run(
        "train_ref",
        *common,
        f"data.images=[{','.join(images[:2])}]",
        "data.times=[0,12]",
        "data.window=percentile",
    )
    run("train_def", f"out={tmp_path}", "progress=false")
    before, ref_net = STNeRP.load(tmp_path / "model.pt"), (tmp_path / "ref_net.pt").read_bytes()
    longer = [f"data.images=[{','.join(images)}]", "data.times=[0,12,30]", f"init={tmp_path / 'model.pt'}"]
    run("train_def", f"out={tmp_path}", "progress=false", "overwrite=true", *longer)
    model = STNeRP.load(tmp_path / "model.pt")
    assert model.times == (0, 12, 30)
    assert model.window == before.window
    assert (tmp_path / "ref_net.pt").read_bytes() == ref_net
    fitted_series = importlib.import_module("fitted_run").fitted_series(tmp_path, model)
    assert (fitted_series.window.low, fitted_series.window.high) == (model.window.low, model.window.high)


def test_a_refit_takes_its_pictures_away_and_says_what_is_older(
    fitted: Path, patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, made = tmp_path / "p1", importlib.import_module("run_directory").MADE
    shutil.copytree(fitted, out)
    shutil.rmtree(out / "roi", ignore_errors=True)
    capsys.readouterr()
    run("train_def", f"out={out}", "progress=false", "overwrite=true", "data.times=[0,12,31]")
    assert "made with the model before" not in capsys.readouterr().out
    assert {path.stem for path in (out / "pictures").iterdir()} == {"loss", "ref_net", "t12", "t31"}
    for name in made.values():
        path = out / name if "." in name else out / name / "t30.dcm"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    run("train_def", f"out={out}", "progress=false", "overwrite=true")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "made with the model before" in line)
    made = "roi, points, rtstruct, monitor, trust, transforms, series, report.html"
    assert line.startswith(f"warning: {made} in {out}: ")
    assert "propagate_rtstruct.py" in line
    assert (out / "rtstruct" / "t30.dcm").is_file()  # a user's to delete


def test_what_is_made_of_a_model_has_one_place() -> None:
    made = importlib.import_module("run_directory").MADE
    for script, name in made.items():
        text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
        assert f'MADE["{script}"]' in text or f'out / "{name}"' in text, script
    for path in SCRIPTS.glob("*.py"):  # a script more that needs a model has its place, too
        text = path.read_text(encoding="utf-8")
        if "import NEEDS" in text or '"model.pt": "run' in text:
            assert path.stem in made or path.stem == "fitted_run", path.stem


def test_train_def_without_prior_needs_no_train_ref(patient: Path, tmp_path: Path) -> None:
    paper = ["preset=paper", "preset.def_net.levels=[[null,null,1]]", "preset.def_net.width=16"]
    run("train_def", f"out={tmp_path}", "prior=false", "progress=false", *data_of(patient), *paper)
    model = STNeRP.load(tmp_path / "model.pt")
    assert model.ref_net is None
    assert (model.settings.form, model.settings.squarings) == ("space_time", 7)


def test_propagate_roi_on_its_own_grid(fitted: Path, patient: Path) -> None:
    run("propagate_roi", f"out={fitted}", f"roi={patient / 'heart.nii.gz'}", "times=[0,5.5]", "curve_points=5")
    roi = sitk.ReadImage(str(patient / "heart.nii.gz"))
    carried = {t: sitk.ReadImage(str(fitted / "roi" / f"heart_t{t}.nii.gz")) for t in ("0", "5.5")}
    assert all(Grid.of(image).is_close(Grid.of(roi)) for image in carried.values())
    # At the reference's time nothing moves.
    assert np.array_equal(sitk.GetArrayViewFromImage(carried["0"]), sitk.GetArrayViewFromImage(roi))
    rows = rows_of(fitted / "roi" / "heart_curve.csv")
    # 5 points over 0 to 30, the three measured times, and the one asked for: 0 and 30 are in common.
    assert [float(row["time"]) for row in rows] == [0, 5.5, 7.5, 12, 15, 22.5, 30]
    assert [row["measured"] for row in rows] == ["True", "False", "False", "True", "False", "False", "True"]
    # The curve is measured in a part of the grid, and says the same as the whole file.
    millilitres = np.count_nonzero(sitk.GetArrayViewFromImage(carried["5.5"])) * 15**3 / 1000
    assert float(rows[1]["voxel_volume_ml"]) == pytest.approx(millilitres, rel=1e-5)
    # Following the tissue says about the same as counting 15 mm voxels.
    assert float(rows[1]["volume_ml"]) == pytest.approx(millilitres, rel=0.1)
    assert (fitted / "roi" / "heart_t5.5.png").is_file()
    assert (fitted / "roi" / "heart_curve.png").is_file()


def test_further_times_join_those_that_are_there(
    fitted: Path, patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, roi = tmp_path / "p1", tmp_path / "organ.nii.gz"
    out.mkdir()
    for source, name in ((fitted / "model.pt", out / "model.pt"), (patient / "heart.nii.gz", roi)):
        name.write_bytes(source.read_bytes())
    common = ["propagate_roi", f"out={out}", f"roi={roi}", "curve_points=7"]
    run(*common, "times=[5,21]")
    before, carried = rows_of(out / "roi" / "organ_curve.csv"), (out / "roi" / "organ_t5.nii.gz").read_bytes()
    run(*common, "times=[22]")
    rows = rows_of(out / "roi" / "organ_curve.csv")
    assert [row for row in rows if row["time"] != "22"] == before
    assert len(rows) == len(before) + 1
    assert (out / "roi" / "organ_t5.nii.gz").read_bytes() == carried
    line = refused(capsys, *common, "times=[21,23]")  # one that is there isn't replaced
    assert "organ_t21.nii.gz: already exists" in line
    assert "pass overwrite=true" in line
    assert "out=" not in line.replace(str(out), "")  # another directory has no model
    labels = sitk.ReadImage(str(roi))
    sitk.WriteImage(sitk.BinaryDilate(labels), str(roi))
    assert "organ_curve.csv: already exists, of another ROI" in refused(capsys, *common, "times=[23]")
    assert rows_of(out / "roi" / "organ_curve.csv") == rows
    assert not (out / "roi" / "organ_t23.nii.gz").exists()
    run(*common, "times=[23]", "overwrite=true")
    # As spreadsheets save it: decimal commas, or semicolons.
    table = out / "roi" / "organ_curve.csv"
    head, first, *others = table.read_text().splitlines()
    volume = rows_of(table)[0]["volume_ml"]
    decimal = first.replace(f",{volume},", f',"{volume.replace(".", ",")}",')
    table.write_text("\n".join([head, decimal, *others]))
    assert "organ_curve.csv: already exists, of another ROI" in refused(capsys, *common, "times=[24]")
    table.write_text("\n".join([head, first, *others]).replace(",", ";"))
    line = refused(capsys, *common, "times=[24]")
    assert "organ_curve.csv: isn't as it was written" in line
    assert "overwrite=true" in line
    negative = ["curve_points=-1", "times=[24]", "overwrite=true"]
    assert "curve_points: -1 must not be negative" in refused(capsys, *common[:3], *negative)


def test_times_of_many_digits_get_a_file_each(fitted: Path, patient: Path) -> None:
    run("propagate_roi", f"out={fitted}", f"roi={patient / 'heart.nii.gz'}", "times=[20.0000001,20.0000002]",
        "curve_points=2", "overwrite=true")  # fmt: skip
    assert len(list((fitted / "roi").glob("heart_t20.000000*.nii.gz"))) == 2


def test_propagate_roi_refuses(fitted: Path, patient: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = refused(capsys, "propagate_roi", f"out={fitted}", f"roi={patient / 'far.nii.gz'}", "times=[5]")
    assert "far.nii.gz" in far
    assert "outside the reference" in far
    missing = refused(capsys, "propagate_roi", f"out={fitted}", "roi=nowhere.nii.gz", "times=[5]")
    assert "nowhere.nii.gz: no such file" in missing
    assert "times" in refused(capsys, "propagate_roi", f"out={fitted}", "roi=nowhere.nii.gz", "times=[soon]")
    assert not list((fitted / "roi").glob("far*"))


def test_points_go_where_the_model_sends_them(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = STNeRP.load(fitted / "model.pt")
    marked_mm = model.grid.centre_mm + np.array([[0.0, 0, 0], [20, -10, 5]])
    write_landmarks(marked_mm, tmp_path / "gold.csv")
    common = ["propagate_points", f"out={fitted}", f"points={tmp_path / 'gold.csv'}"]
    run(*common, "times=[0,5.5]")
    there_mm = read_landmarks(fitted / "points" / "gold_t5.5.csv")
    assert np.abs(model.map_points(there_mm, 5.5) - marked_mm).max() < 1e-3
    assert np.abs(there_mm - marked_mm).max() > 1e-2  # and not where they were
    assert np.allclose(read_landmarks(fitted / "points" / "gold_t0.csv"), marked_mm)
    # Marked at another time they come back by the same way.
    write_landmarks(there_mm, tmp_path / "back.csv")
    run("propagate_points", f"out={fitted}", f"points={tmp_path / 'back.csv'}", "from_time=5.5", "times=[0,30]")
    assert np.abs(read_landmarks(fitted / "points" / "back_t0.csv") - marked_mm).max() < 1e-3
    at_30 = model.map_points(marked_mm, 30, inverse=True)
    assert np.abs(read_landmarks(fitted / "points" / "back_t30.csv") - at_30).max() < 1e-3
    assert "gold_t5.5.csv: already exists" in refused(capsys, *common, "times=[5.5]")
    assert "from_time" in refused(capsys, *common, "times=[7]", "from_time=soon")
    assert "no such landmark file" in refused(capsys, *common[:2], "points=nowhere.csv", "times=[7]")


def test_a_name_with_brackets_is_not_replaced_either(
    fitted: Path, patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roi = tmp_path / "gtv[1].nii.gz"  # as a pattern, this would be gtv1
    roi.write_bytes((patient / "heart.nii.gz").read_bytes())
    arguments = [f"out={fitted}", f"roi='{roi}'", "times=[5]", "curve_points=2"]
    run("propagate_roi", *arguments)
    assert "gtv[1]_" in refused(capsys, "propagate_roi", *arguments)


def test_eval_interpolation_holds_images_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("eval_interpolation", f"out={tmp_path}", "experiment=demo", *TINY_PHANTOM[1:], "held_out=[2]", *QUICK)
    printed = capsys.readouterr().out
    assert "nearest phase" in printed
    assert "at most 0.5" in printed  # the demo's targets
    assert STNeRP.load(tmp_path / "model.pt").times == (0, 1, 3)
    rows = rows_of(tmp_path / "metrics.csv")
    methods = [row["method"] for row in rows if float(row["time"]) == 2]
    assert methods == ["reference, no motion", "nearest phase", "linear blend", "stnerp"]
    assert {row["method"] for row in rows if float(row["time"]) != 2} == {"stnerp, seen images"}
    phantom = Phantom((24, 19, 12), 15.0, n_landmarks=300)
    apart = np.linalg.norm(phantom.landmarks(0.5) - phantom.landmarks(0.0), axis=1).mean()
    assert float(rows[1]["tre_mean_mm"]) == pytest.approx(apart, rel=1e-5)
    summary = {row["method"]: row for row in rows_of(tmp_path / "summary.csv")}
    assert summary["stnerp"]["tre_mean_before_mm"] == rows[1]["tre_mean_mm"]
    assert summary["stnerp, seen images"]["images"] == "2"
    assert (tmp_path / "pictures" / "t2.png").is_file()
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("| method |")


def test_a_run_directory_holds_one_fit(tmp_path: Path) -> None:
    """Where model.pt is replaced, what names the scans or means of the other fit must not stay."""
    common = [f"out={tmp_path}", *TINY_PHANTOM, *QUICK, "prior=false"]
    run("eval_interpolation", *common, "held_out=[2]")
    run("train_def", *common, "overwrite=true", "data.seed=7")
    assert not (tmp_path / "summary.csv").exists()
    assert not (tmp_path / "summary.md").exists()
    run("eval_interpolation", *common, "held_out=[2]", "overwrite=true", "data.seed=3")
    assert not (tmp_path / "train_def.yaml").exists()


def test_eval_interpolation_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval_interpolation", f"out={tmp_path}", *TINY_PHANTOM, *QUICK]
    assert "give either held_out" in refused(capsys, *common)
    assert "from 0 to 3" in refused(capsys, *common, "held_out=[4]")
    assert "leave out the reference" in refused(capsys, *common, "held_out=[0]")
    assert "known_every" in refused(capsys, *common, "known_every=9")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.images=[a.nii.gz,b.nii.gz]"], "a.nii.gz: no such file"),
        ([], "data.images: is missing"),
        (["data.imges=[a.nii.gz]"], "Could not override 'data.imges'"),
        (["data=phantome"], "Could not find 'data/phantome'"),
        ([*TINY_PHANTOM, "data.motion=swimming"], "data.motion: 'swimming'"),
        ([*TINY_PHANTOM, "data.motion_settings={speed: 1}"], "data.motion_settings: "),
        ([*TINY_PHANTOM, "data.reference=4"], "data.reference: 4"),
        ([*TINY_PHANTOM, "data.phases=1"], "data.phases: 1"),
        ([*TINY_PHANTOM, "seed=one"], "seed: 'one' must be a whole number"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "train_ref", f"out={tmp_path / 'p'}", "progress=false", *arguments)
    assert contents(tmp_path) == {}


def test_missing_runs_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train_def", f"out={tmp_path / 'typo'}")
    assert "run train_ref.py" in line
    assert "prior=false" in line
    assert "run train_def.py" in refused(
        capsys, "propagate_roi", f"out={tmp_path / 'typo'}", "roi=a.nii.gz", "times=[1]"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_ref_net_of_other_data_is_refused(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train_def", f"out={fitted}", "overwrite=true", "data.reference=1")
    assert "reference changed since ref_net.pt was fitted" in line


def test_another_ref_net_than_the_fitted_one_is_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(fitted)
    common = ["train_def", f"out={fitted}", "overwrite=true"]
    line = refused(capsys, *common, "preset.ref_net.backbone=siren")
    assert "preset.ref_net: backbone changed since ref_net.pt was fitted" in line
    assert "train_ref.py anew" in line
    assert "preset.ref_net: backbone, remainder, iterations, " in refused(capsys, *common, "preset=paper")
    assert "must be" in refused(capsys, *common, "preset.ref_net=null")
    assert contents(fitted) == before
    out = tmp_path / "p1"
    out.mkdir()
    for name in ("config.yaml", "ref_net.pt"):
        (out / name).write_bytes((fitted / name).read_bytes())
    # The same settings once more, as cohort.py gives them to both scripts; and without a Ref-Net none matters.
    common = ["train_def", f"out={out}", "overwrite=true"]
    run(*common, *QUICK)
    run(*common, *QUICK, "prior=false", "preset.ref_net.backbone=siren")


def test_images_are_scored_where_the_reference_shows_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patient 24 mm higher, whom the fit finds: before it, the upper slices would be compared with nothing."""
    optional("hydra", "scripts")
    scores, data = (importlib.import_module(name) for name in ("scores", "data"))
    scan = blobs()
    scan.SetOrigin((*GRID.origin_mm[:2], GRID.origin_mm[2] + 24))
    patient = data.PatientData(load_series([blobs(), scan], [0, 1], window=(0, 1)), {}, [], 0.0)
    model = known(shift_mm=(0, 0, -24))
    prediction = scores.predict(model, patient, 1)
    row = scores.score(model, patient, prediction)
    assert prediction.covered.all()
    reached = GRID.contains(Grid.of(scan).points_world())
    assert reached.mean() == pytest.approx(18 / 24)
    for name, measure in (("psnr_db", psnr_db), ("ssim", ssim)):
        assert row[f"{name}_before"] == measure(prediction.before, prediction.target, mask=reached)
        assert row[name] == measure(prediction.image, prediction.target)
    assert row["ncc_before"] == ncc(prediction.before, prediction.target, reached)
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(scores, "overview", lambda path, **settings: drawn.update(settings))
    scores.draw(tmp_path / "t1.png", patient, prediction, "t = 1")
    assert drawn["mask"] is prediction.covered  # its PSNR is the table's


def test_labels_with_the_same_columns_are_refused(
    patient: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in ("{1: lung, 2: lung}", "{1: lung left, 2: lung_left}", "{1: lung before, 2: lung}"):
        data = [*data_of(patient)[:-1], f"data.label_names={names}"]
        line = refused(capsys, "train_ref", f"out={tmp_path}", *data, *QUICK)
        assert "data.label_names: 'lung" in line
        assert "rename one" in line


def test_contours_in_the_terminal_are_each_ones_own() -> None:
    names = {1: "lung", 2: "lung left"}
    patient = importlib.import_module("data").PatientData(None, names, [], 0.0)
    row = {"time": 1.0}
    for value, name in ((0.25, "lung"), (0.75, "lung_left")):
        for when in (f"{name}_before", name):
            row |= {f"dice_{when}": value, f"hd95_{when}_mm": value, f"mean_surface_distance_{when}_mm": value}
    (table,) = importlib.import_module("train_def").tables([row], patient)
    heads, _, *lines = (line.split() for line in table.splitlines())
    assert heads[:4] == ["time", "contour", "dice_before", "hd95_before_mm"]
    assert len(heads) == 2 + 6
    assert [set(line[-6:]) for line in lines] == [{"0.25"}, {"0.75"}]


def test_a_mean_over_some_images_says_so() -> None:
    script = importlib.import_module("eval_interpolation")
    with_contour = {"method": script.STNERP, "psnr_db": 30.0, "dice_tumour": 0.9, "folded_voxels": 1}
    without = {"method": script.STNERP, "psnr_db": 32.0, "folded_voxels": 2}
    (row,) = script.summarise([with_contour, without])
    assert (row["images"], row["psnr_db"], row["folded_voxels"]) == (2, 31.0, 3)
    assert (row["dice_tumour"], row["dice_tumour_images"]) == (0.9, 1)
    assert "psnr_db_images" not in row
    (note,) = script.of_some([row], ["method", "psnr_db", "dice_tumour"])
    assert note == "stnerp: dice_tumour over 1 of 2 images, the others have none"
    # A contour that is lost has a Dice of 0 and no HD95.
    with_contour |= {"hd95_tumour_mm": 4.0}
    lost = without | {"dice_tumour": 0.0, "hd95_tumour_mm": np.nan}
    (row,) = script.summarise([with_contour, lost, without])
    assert (row["dice_tumour"], row["dice_tumour_images"]) == (0.45, 2)
    assert (row["hd95_tumour_mm"], row["hd95_tumour_mm_images"]) == (4.0, 1)
    (note,) = script.of_some([row], ["hd95_tumour_mm"])
    assert note == "stnerp: hd95_tumour_mm over 1 of 3 images, the others have none"
    (row,) = script.summarise([lost, without])
    assert "hd95_tumour_mm" not in row


def test_a_warning_says_that_it_is_one_and_only_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = importlib.import_module("run_directory")
    config = importlib.import_module("configuration").OmegaConf.create(
        {"out": str(tmp_path), "overwrite": False, "progress": False, "seed": 0}
    )
    with directory.run_directory(config, "some", ()):
        for text in ("beyond the last scan", "beyond the last scan", "before the first scan"):
            logging.getLogger("stnerp.model").warning("t = 5: %s", text)
            directory.logger.info("wrote it")
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "warning: t = 5: beyond the last scan", "wrote it", "wrote it",
        "warning: t = 5: before the first scan", "wrote it",
    ]  # fmt: skip
    log = (tmp_path / "some.log").read_text(encoding="utf-8")
    assert log.count("WARNING t = 5: beyond") == 1
    assert log.count("INFO wrote it") == 3


@pytest.mark.parametrize("script", ["train_def", "monitor", "cohort"])
def test_help_says_what_it_does_and_what_settings_mean(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(script)
    run(script, "--help")
    text = capsys.readouterr().out
    assert text.startswith(module.__doc__.strip())
    assert "out: ???  # the run directory" in text or script == "cohort"
    shown = {
        "train_def": "images: ???  # '[a.nii.gz",
        "monitor": "scans: true  # compare",
        "cohort": "jobs: null  # ",
    }
    assert shown[script] in text
    assert "hydra:" not in text


def test_as_a_user_starts_it(tmp_path: Path) -> None:
    """From another folder, which stays as it was: no outputs/, no log; and no traceback."""
    optional("hydra", "scripts")
    command = [sys.executable, str(SCRIPTS / "train_ref.py"), "out=p1", "data.images=[a.mha,b.mha]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: a.mha: no such file or folder; check the path\n")
    assert [path.name for path in tmp_path.iterdir()] == ["p1"]

"""Cohorts: one patient's failure is only its own, and the same command does what is missing.

Most tests put stubs in place of the patients' scripts: they say what they were started with, and fail as they are
told to. Two tests fit phantoms.
"""

from __future__ import annotations

import csv
import fcntl
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from conftest import optional

from stnerp import STNeRP
from stnerp.io.landmarks import write_landmarks
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, Phantom

optional("joblib", "cohort")
optional("submitit", "cohort")

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = [f"p{i}" for i in range(1, 9)]

STUB = '''\
"""In place of a patient's script: tells what it was started with, and fails as told/<patient> says."""
import json, os, pathlib, signal, sys, time

step, here = pathlib.Path(__file__).stem, pathlib.Path(__file__).parent
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
out = pathlib.Path(given["out"].strip("'"))
told = here / "told" / out.name
start = time.time()
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
wanted = told.read_text() if told.is_file() and step == "train_def" else ""
names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
about = {"patient": out.name, "step": step, "given": sys.argv[1:], "start": start, "end": time.time()}
with (here / "started").open("a") as file:
    file.write(json.dumps({**about, **{name: os.environ.get(name) for name in names}}) + "\\n")
print("it says this")
if wanted == "refuse":
    sys.exit("error: 1.nii.gz: no such file; check the path")
if wanted == "raise":
    raise RuntimeError("out of luck")
if wanted == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if wanted == "kill the job":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
out.mkdir(parents=True, exist_ok=True)
psnr_db = 20 + int(out.name[1:])
rows = ["time,image,psnr_db,dice_a,dice_b", f"1,5,{psnr_db - 1},1,0.5", f"2,6,{psnr_db + 1},1,"]
(out / "metrics.csv").write_text("\\n".join(rows))
(out / "def_net_history.csv").write_text("step,loss\\n1,3\\n2,1.5\\n")
'''


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def cohort(*arguments: str) -> int:
    """scripts/cohort.py as from the command line, in this process: its exit code."""
    module = importlib.import_module("cohort")
    before, sys.argv = sys.argv, ["cohort.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(module.main)
        return 0
    except SystemExit as exit_:
        return int(str(exit_.code))
    finally:
        sys.argv = before


class Stubs:
    """A manifest of eight patients, and stubs in place of the scripts that they go through."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "cohort.yaml"
        (folder / "told").mkdir()
        shutil.copy(SCRIPTS / "cohort_job.py", folder)
        for step in ("train_ref", "train_def", "eval_interpolation"):
            (folder / f"{step}.py").write_text(STUB)
        for name in "ab":
            (folder / f"{name}.nii.gz").touch()
        self.write(NAMES)

    def write(self, names: list[str], **more: Any) -> None:
        entries = [{"patient": name, "images": ["a.nii.gz", "b.nii.gz"], **more} for name in names]
        self.manifest.write_text(yaml.safe_dump({"patients": entries}))

    def tell(self, name: str, wanted: str) -> None:
        (self.folder / "told" / name).write_text(wanted)

    def started(self) -> list[dict[str, Any]]:
        """What the stubs tell of themselves since this was last asked."""
        path = self.folder / "started"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def run(self, *arguments: str) -> int:
        out = self.folder / "out"
        return cohort(f"data.manifest={self.manifest}", f"out={out}", "device=cpu", *arguments)

    def summary(self) -> dict[str, dict[str, str]]:
        with (self.folder / "out" / "summary.csv").open() as file:
            return {row["patient"]: row for row in csv.DictReader(file)}


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    stubs = Stubs(tmp_path)
    monkeypatch.setattr(importlib.import_module("cohort"), "JOB", tmp_path / "cohort_job.py")
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return stubs


# -- failures


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_who_fails_stops_no_other_and_the_same_command_does_the_rest(
    stubs: Stubs, launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, wanted in {"p2": "refuse", "p4": "raise", "p5": "kill", "p7": "kill the job"}.items():
        stubs.tell(name, wanted)
    command = [f"launcher={launcher}", "jobs=4", "prior=false"]
    assert stubs.run(*command) == 1
    rows = stubs.summary()
    assert list(rows) == NAMES
    assert [name for name, row in rows.items() if row["status"] == "done"] == ["p1", "p3", "p6", "p8"]
    assert rows["p2"]["error"] == "train_def: 1.nii.gz: no such file; check the path"
    assert rows["p4"]["error"] == "train_def: RuntimeError: out of luck"
    assert rows["p5"]["error"] == "train_def: killed by SIGKILL, out of memory perhaps"
    assert rows["p7"]["status"] == "not done"
    assert rows["p7"]["error"].startswith("ended without a word")
    assert (rows["p2"]["psnr_db"], rows["p2"]["seconds"]) == ("", "")
    assert "it says this" in (stubs.folder / "out" / "jobs" / "p4.log").read_text()
    table = (stubs.folder / "out" / "summary.md").read_text()
    # 21, 23, 26, 28: their mean, and the square root of 7.25, the mean square distance from it.
    assert "| mean | 4 done | 24.50 ± 2.69 |" in table
    assert "- p5: failed: train_def: killed by SIGKILL" in table
    printed = capsys.readouterr().out
    assert "4 of 8 patients aren't done" in printed
    assert sorted(start["patient"] for start in stubs.started()) == NAMES

    shutil.rmtree(stubs.folder / "told")
    assert stubs.run(*command) == 0
    assert sorted(start["patient"] for start in stubs.started()) == ["p2", "p4", "p5", "p7"]
    assert {row["status"] for row in stubs.summary().values()} == {"done"}
    assert stubs.run(*command) == 0
    assert stubs.started() == []


def test_scores_are_means_over_images_and_contours(stubs: Stubs) -> None:
    assert stubs.run("patients=[p3]") == 0
    row = stubs.summary()["p3"]
    # p3's images have 22 and 24 dB; contours a and b: the first image's Dice are 1 and 0.5, the second's just 1.
    assert (row["images"], row["psnr_db"], row["dice_a"], row["dice_b"]) == ("2", "23", "1", "0.5")
    assert row["dice"] == "0.875"
    assert float(row["seconds"]) > 0


def test_a_step_that_is_done_is_not_done_again(stubs: Stubs) -> None:
    stubs.tell("p1", "kill")
    assert stubs.run("patients=[p1]") == 1
    assert [start["step"] for start in stubs.started()] == ["train_ref", "train_def"]
    (stubs.folder / "told" / "p1").unlink()
    assert stubs.run("patients=[p1]") == 0
    assert [start["step"] for start in stubs.started()] == ["train_def"]
    checkpoint = stubs.folder / "out" / "p1" / ".def_net.ckpt"
    checkpoint.touch()
    assert stubs.run("patients=[p1]", "overwrite=true") == 0
    assert not checkpoint.exists()
    assert [start["step"] for start in stubs.started()] == ["train_ref", "train_def"]


def test_what_was_deleted_is_done_again_and_stops_no_other(stubs: Stubs) -> None:
    assert stubs.run("patients=[p1,p2,p3]") == 0
    stubs.started()
    out = stubs.folder / "out"
    shutil.rmtree(out / "p1")
    (out / "p2" / "metrics.csv").unlink()
    assert importlib.import_module("cohort_table").row_of(out, "p1")["status"] == "not done"
    assert stubs.run("patients=[p1,p2,p3]") == 0
    assert [(start["patient"], start["step"]) for start in stubs.started()] == [
        (name, step) for name in ("p1", "p2") for step in ("train_ref", "train_def")
    ]
    assert {row["status"] for row in stubs.summary().values()} == {"done"}


def test_a_patient_that_another_command_works_on_is_left_alone(stubs: Stubs) -> None:
    stubs.tell("p1", "refuse")
    assert stubs.run("patients=[p1,p2]") == 1
    stubs.started()
    with (stubs.folder / "out" / "jobs" / "p1.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert stubs.run("patients=[p1,p2]", "overwrite=true") == 1
        assert {start["patient"] for start in stubs.started()} == {"p2"}
        assert stubs.summary()["p1"]["status"] == "running"
        # What a job does that a cluster starts late:
        assert importlib.import_module("cohort_job").main(stubs.folder / "out" / "jobs" / "p1.json", "1") == 1
    assert stubs.started() == []
    assert stubs.summary()["p2"]["status"] == "done"


def test_interrupted_it_ends_its_jobs_and_starts_no_more(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUB_SECONDS", "60")

    def interrupt() -> None:
        jobs = stubs.folder / "out" / "jobs"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not all((jobs / f"p{i}.log").is_file() for i in (1, 2)):
            time.sleep(0.05)
        time.sleep(0.5)  # until the stubs themselves run
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    assert stubs.run("jobs=2", "prior=false") == 130
    assert time.monotonic() - start < 45  # not the 60 s of a stub
    assert "error: interrupted" in capsys.readouterr().err
    rows = stubs.summary()
    assert [rows[name]["error"] for name in ("p1", "p2")] == ["train_def: killed by SIGTERM"] * 2
    assert not (stubs.folder / "out" / "jobs" / "p3.log").exists()


# -- GPUs, threads, clusters


def test_each_job_has_a_gpu_and_its_share_of_the_threads(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-6")
    monkeypatch.setenv("STUB_SECONDS", "0.2")
    monkeypatch.setattr(importlib.import_module("joblib"), "cpu_count", lambda: 13)
    assert stubs.run("device=auto", "prior=false") == 0  # without jobs=: one for each GPU
    started = sorted(stubs.started(), key=lambda start: start["start"])
    assert {start["OMP_NUM_THREADS"] for start in started} == {"6"}
    for gpu in ("4", "MIG-6"):
        own = [start for start in started if start["CUDA_VISIBLE_DEVICES"] == gpu]
        assert len(own) > 1
        assert all(a["end"] < b["start"] for a, b in pairwise(own))
    assert {start["CUDA_VISIBLE_DEVICES"] for start in started} == {"4", "MIG-6"}


def test_submitit_here_gives_a_gpu_to_the_next_job_once_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job outlasts all the others."""
    running: dict[Job, str] = {}
    busy = []

    class Job:
        def __init__(self) -> None:
            self.looks = 1 if running else 9

        def done(self) -> bool:
            self.looks -= 1
            return self.looks < 0 and bool(running.pop(self))

    def submit(call: Any, command: list[str]) -> Job:
        busy.append((command[-1], [*running.values()]))
        job = Job()
        running[job] = command[-1]
        return job

    executor = SimpleNamespace(submit=submit, update_parameters=lambda **settings: None)
    monkeypatch.setattr("submitit.AutoExecutor", lambda *arguments, **settings: executor)
    paths = {name: tmp_path / f"{name}.json" for name in NAMES[:4]}
    module = importlib.import_module("cohort")
    assert list(module.with_submitit(paths, "submitit_local", 2, ["a", "b"], {})) == ["p2", "p3", "p4", "p1"]
    assert busy == [("a", []), ("b", ["a"]), ("b", ["a"]), ("b", ["a"])]


def test_without_gpus_and_with_threads_of_the_user(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert stubs.run("patients=[p1]", "prior=false") == 0
    assert [start["OMP_NUM_THREADS"] for start in stubs.started()] == ["3"]
    module = importlib.import_module("cohort")
    assert module.visible_gpus("cpu") == []
    assert module.visible_gpus("auto") == ["4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert module.visible_gpus("auto") == []


# Like SLURM it says the job's number first, and then starts the array.
SBATCH = """\
#!{python}
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1]).read_text()
pathlib.Path({folder!r}, "sbatch").write_text(script)
if "partition=typo" in script:
    sys.exit("sbatch: error: invalid partition specified: typo\\n")
about = dict(SLURM_ARRAY_JOB_ID="7", SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0",
             SLURM_LOCALID="0")
tasks = re.search(r"--array=0-(\\d+)", script)
for i in range(int(tasks[1]) + 1):
    one = dict(SLURM_JOB_ID=str(70 + i), SLURM_ARRAY_TASK_ID=str(i))
    subprocess.Popen(["bash", sys.argv[-1]], env={{**os.environ, **about, **one}}, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do case $1 in --output|--error) shift;; esac; shift; done\nexec "$@"\n'
SACCT = "#!/bin/bash\necho 'JobID|State'\n"


def test_slurm_is_asked_for_one_gpu_per_job_in_one_array(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = stubs.folder / "bin"
    programs.mkdir()
    texts = {
        "sbatch": SBATCH.format(python=sys.executable, folder=str(stubs.folder)),
        "srun": SRUN,
        "sacct": SACCT,
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    stubs.tell("p2", "refuse")
    more = ["jobs=2", "slurm.slurm_partition=gpu", "slurm.mem_gb=24", "+slurm.slurm_constraint=a100"]
    assert stubs.run("launcher=slurm", "patients=[p1,p2,p3]", "prior=false", *more) == 1
    script = (stubs.folder / "sbatch").read_text()
    asked = ["gpus-per-node=1", "cpus-per-task=4", "mem=24GB", "time=240", "partition=gpu", "constraint=a100"]
    for option in [*asked, "array=0-2%2"]:
        assert f"#SBATCH --{option}\n" in script
    assert {start["OMP_NUM_THREADS"] for start in stubs.started()} == {"4"}
    assert [row["status"] for row in stubs.summary().values()] == ["done", "failed", "done"]
    capsys.readouterr()
    assert stubs.run("launcher=slurm", "patients=[p4,p5]", "slurm.slurm_partition=typo") == 2
    assert "invalid partition specified: typo; see `slurm` in" in capsys.readouterr().err.splitlines()[-1]


def test_no_cluster_is_an_error_of_one_line(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(stubs.folder))
    assert stubs.run("launcher=slurm") == 2
    assert "srun" in only_line(capsys)


# -- what a patient's scripts are given


def test_settings_go_to_the_scripts_that_know_them(stubs: Stubs) -> None:
    settings = ["preset=paper", "preset.def_net.diffusion=0.1", "seed=3", "align=rigid"]
    assert stubs.run("patients=[p1]", *settings, "jobs=1") == 0
    ref_net, def_net = (start["given"] for start in stubs.started())
    manifest = f"data.manifest='{stubs.folder / 'out' / 'jobs' / 'p1.yaml'}'"
    own = [f"out='{stubs.folder / 'out' / 'p1'}'", "overwrite=true", "progress=false", manifest]
    assert ref_net == ["data=manifest", "device=cpu", *settings[:3], *own]
    assert def_net == ["data=manifest", "device=cpu", *settings, *own]


def test_patients_of_4d_lung(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cohort")
    monkeypatch.setattr(module, "index_4d_lung", lambda root: SimpleNamespace(patients=("p1", "p2")))
    out = stubs.folder / "out"
    assert cohort("data=tcia_4d_lung", "data.root=far", "data.phase=50", f"out={out}", "prior=false") == 0
    given = {start["patient"]: start["given"] for start in stubs.started()}
    settings = ["data=tcia_4d_lung", "data.root=far", "data.phase=50", "prior=false"]
    assert given["p2"] == [
        *settings,
        f"out='{out / 'p2'}'",
        "overwrite=true",
        "progress=false",
        "data.patient='p2'",
    ]
    assert set(given) == {"p1", "p2"}


def test_evaluation_of_each(stubs: Stubs) -> None:
    assert stubs.run("script=eval_interpolation", "held_out=[1]", "patients=[p1]") == 0
    (start,) = stubs.started()
    assert start["step"] == "eval_interpolation"
    assert "held_out=[1]" in start["given"]


def test_of_an_evaluation_only_stnerp_on_unseen_images_counts(tmp_path: Path) -> None:
    rows = ["method,time,image,psnr_db", "linear blend,1,a,50", "stnerp,1,a,30", '"stnerp, seen images",2,b,40']
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    table = importlib.import_module("cohort_table")
    assert table.scores_of(tmp_path / "metrics.csv") == {"images": 1, "psnr_db": 30}


def test_contours_before_the_fit_and_lost_ones(tmp_path: Path) -> None:
    """As train_def.py writes them: b is lost in the second image, and c isn't seen in the first."""
    names = [f"{what}_{name}{unit}" for name in "abc" for what, unit in (("dice", ""), ("hd95", "_mm"))]
    before = [name.removesuffix("_mm") + "_before" + "_mm" * name.endswith("_mm") for name in names]
    first = "1,5,30,0.5,8,0.4,9,0.3,7,0.9,2,0.8,3,nan,nan"
    second = "2,6,32,0.5,8,0.4,9,0.3,7,0.7,4,0,nan,0.8,5"
    lines = [",".join(["time,image,psnr_db", *before, *names]), first, second]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    table = importlib.import_module("cohort_table")
    scores = table.scores_of(tmp_path / "metrics.csv")
    assert scores["dice"] == pytest.approx((0.85 + 0.5) / 2)  # 0.9 and 0.8; 0.7, 0 and 0.8
    assert (scores["dice_a_before"], scores["dice_b"], scores["dice_c"]) == (0.5, 0.4, 0.8)
    assert (scores["hd95_a_mm"], scores["hd95_c_mm"], scores["hd95_b_before_mm"]) == (3, 5, 9)
    assert all(np.isnan(scores[name]) for name in ("hd95_mm", "hd95_b_mm"))
    (tmp_path / "metrics.csv").write_text("\n".join(lines[:2]) + "\n")
    assert table.scores_of(tmp_path / "metrics.csv")["hd95_mm"] == 2.5
    rows = [{"patient": "p", "status": "done", "seconds": 1, "hd95_mm": value} for value in (np.nan, 2.5)]
    assert [row.get("HD95 mm") for row in table.cells(rows)] == [None, "2.50", "2.50 (1 of 2)"]


@pytest.mark.parametrize("text", ["runs/a b", "it's", "a,b=c", "\\", "Müller", "x\\'"])
def test_quoted_text_is_read_as_it_is(text: str) -> None:
    parser = importlib.import_module("cohort").OverridesParser.create()
    assert parser.parse_override(f"out={importlib.import_module('cohort').quoted(text)}").value() == text


def test_files_of_a_manifest_are_found_from_anywhere(stubs: Stubs) -> None:
    stubs.write(["p1"], masks=[None, "m.nii.gz"], landmarks={1: "/far/b.csv"})
    entry = importlib.import_module("cohort").entries_of(stubs.manifest)["p1"]
    assert entry["images"] == [str(stubs.folder / "a.nii.gz"), str(stubs.folder / "b.nii.gz")]
    assert entry["masks"] == [None, str(stubs.folder / "m.nii.gz")]
    assert entry["landmarks"] == {1: "/far/b.csv"}
    assert stubs.run() == 0
    stubs.started()
    assert stubs.run() == 0  # a number as a key is no other data
    assert stubs.started() == []


def test_losses_for_tensorboard(stubs: Stubs) -> None:
    optional("tensorboard", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stubs.tell("p2", "refuse")
    for _ in range(2):
        assert stubs.run("patients=[p1,p2]", "tensorboard=true") == 1
        assert [path.name for path in (stubs.folder / "out" / "tensorboard").iterdir()] == ["p1"]
    events = EventAccumulator(str(stubs.folder / "out" / "tensorboard" / "p1")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("def_net_history")] == [(1, 3), (2, 1.5)]


# -- mistakes


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_other_settings_or_data_of_a_patient_that_is_done_are_refused(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.tell("p2", "refuse")
    command = ["patients=[p1,p2]", "prior=false"]
    assert stubs.run(*command) == 1
    stubs.started()
    capsys.readouterr()
    assert stubs.run(*command, "align=rigid") == 2
    assert "p1: was done with other settings or data" in only_line(capsys)
    stubs.write(["p1", "p2"], period=4)
    assert stubs.run(*command) == 2
    assert "overwrite=true" in only_line(capsys)
    assert stubs.started() == []
    # As the message says: without the record, only this patient is done again, and p2, which failed.
    (stubs.folder / "out" / "jobs" / "p1.json").unlink()
    shutil.rmtree(stubs.folder / "told")
    assert stubs.run(*command) == 0
    assert {start["patient"] for start in stubs.started()} == {"p1", "p2"}
    assert yaml.safe_load((stubs.folder / "out" / "jobs" / "p2.yaml").read_text())["period"] == 4


def test_a_run_of_somebody_else_is_not_replaced(stubs: Stubs, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = stubs.folder / "out" / "p2" / "model.pt"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    for _ in range(2):
        assert stubs.run() == 2
        assert "p2: isn't of this cohort" in only_line(capsys)
    assert stubs.started() == []
    assert stubs.run("overwrite=true", "prior=false", "patients=[p2]") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["patients=[p1,p9]"], "no 'p9'; there are: p1, p2"),
        (["patients=p1"], "must be a list of names"),
        (["jobs=0"], "jobs: 0 must be"),
        (["launcher=magic"], "launcher: 'magic' must be one of joblib"),
        (["held_out=[3]"], "held_out"),
        (["script=eval"], "script/eval"),
        (["data.manifest=nowhere.yaml"], "nowhere.yaml: no such manifest"),
        (["tensorboard=perhaps"], "tensorboard: 'perhaps' must be true or false"),
        (["launcher=submitit_local", "+slurm.speed=9"], "speed"),
    ],
)
def test_mistakes_are_told_before_any_job(
    stubs: Stubs, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run(*arguments) == 2
    assert says in only_line(capsys)
    assert stubs.started() == []


def test_one_patient_is_no_cohort(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cohort("data=phantom", f"out={tmp_path}") == 2
    assert "data: phantom is one patient" in only_line(capsys)
    assert cohort(f"out={tmp_path}") == 2
    assert "data.manifest: is missing" in only_line(capsys)


@pytest.mark.parametrize(
    ("names", "says"), [(["a/b"], "a/b"), (["jobs"], "jobs"), ([".x"], ".x"), (["p1", "p1"], "p1")]
)
def test_names_are_names_of_folders_and_unique(
    stubs: Stubs, names: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stubs.write(names)
    (stubs.folder / "a.nii.gz").unlink()  # which alone would be no reason to refuse
    assert stubs.run() == 2
    line = only_line(capsys)
    assert says in line
    assert "rename" in line


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("oops", "patients[1].patient: is missing"),
        ("{patient: p2, images: [a.nii.gz], time: 3}", "patients[1].time: unknown key"),
        ("{patient: p2, images: [a.nii.gz], images: [b.nii.gz]}", "'images' is there twice"),
    ],
)
def test_a_patient_of_another_form_is_told_whatever_files_are_missing(
    stubs: Stubs, second: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "{patient: p1, images: [missing.nii.gz, m2.nii.gz]}"
    stubs.manifest.write_text(f"patients: [{first}, {second}]")
    assert stubs.run() == 2
    assert says in only_line(capsys)
    assert stubs.started() == []


# -- phantoms


def write_phantoms(folder: Path, names: list[str]) -> Path:
    """Three phases of a breathing phantom for each, and their manifest."""
    entries = []
    for i, name in enumerate(names):
        motion = Breathing(*BOX_MM, amplitude_si_mm=10.0 + i)
        phantom = Phantom((24, 19, 12), 15.0, motion, seed=i, n_landmarks=20)
        (folder / name).mkdir(parents=True)
        for t in (0.0, 0.25, 0.5):
            sitk.WriteImage(phantom.image(t), str(folder / name / f"{t}.nii.gz"))
            write_landmarks(phantom.landmarks(t), folder / name / f"{t}.csv")
        images, landmarks = ([f"{name}/{t}.{end}" for t in (0.0, 0.25, 0.5)] for end in ("nii.gz", "csv"))
        times = {"times": [0, 0.25, 0.5], "period": 1}
        entries.append({"patient": name, "images": images, "landmarks": landmarks, **times})
    (folder / "cohort.yaml").write_text(yaml.safe_dump({"patients": entries}))
    return folder / "cohort.yaml"


QUICK = ["device=cpu", "prior=false", "preset.def_net.levels=[[15,30,4]]"]


def test_a_phantom_is_fitted_and_one_without_an_image_is_not(tmp_path: Path) -> None:
    manifest = write_phantoms(tmp_path / "patients", ["p1", "p2"])
    (tmp_path / "patients" / "p2" / "0.25.nii.gz").unlink()
    assert cohort(f"data.manifest={manifest}", f"out={tmp_path / 'out'}", *QUICK) == 1
    with (tmp_path / "out" / "summary.csv").open() as file:
        fitted, broken = csv.DictReader(file)
    assert STNeRP.load(tmp_path / "out" / "p1" / "model.pt").times == (0, 0.25, 0.5)
    assert (fitted["status"], fitted["images"]) == ("done", "2")
    assert 0 < float(fitted["tre_mean_mm"]) < float(fitted["tre_mean_before_mm"])
    assert broken["status"] == "failed"
    assert "0.25.nii.gz" in broken["error"]
    assert "no such file" in broken["error"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_eight_phantoms_of_which_one_is_broken(tmp_path: Path, launcher: str) -> None:
    manifest = write_phantoms(tmp_path / "patients", NAMES)
    missing, aside = tmp_path / "patients" / "p3" / "0.25.nii.gz", tmp_path / "aside"
    missing.rename(aside)
    command = [f"data.manifest={manifest}", f"out={tmp_path / 'out'}", f"launcher={launcher}", "jobs=2", *QUICK]
    assert cohort(*command) == 1
    models = {name: tmp_path / "out" / name / "model.pt" for name in NAMES}
    assert [name for name, path in models.items() if not path.is_file()] == ["p3"]
    made = {name: path.stat().st_mtime_ns for name, path in models.items() if name != "p3"}
    aside.rename(missing)
    assert cohort(*command) == 0
    assert models["p3"].is_file()
    assert made == {name: models[name].stat().st_mtime_ns for name in made}
    assert "| mean | 8 done |" in (tmp_path / "out" / "summary.md").read_text()

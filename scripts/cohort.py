"""python scripts/cohort.py data.manifest=cohort.yaml out=runs/cohort jobs=4

Many patients, one command: those of a manifest (its form: stnerp/io/manifest.py) or of 4D-Lung. Each is fitted as
train_ref.py and train_def.py do it or, with script=eval_interpolation, evaluated as that script does it; their
settings are given as usual. On this machine `jobs` patients at a time, each on a GPU of its own where there are
any; with launcher=slurm a job for each patient on a cluster.

Writes into `out`: cohort.yaml; a run directory per patient, as those scripts write it; jobs/, with each patient's
log and what is done; summary.csv and summary.md with each patient's state, scores, seconds, error, and the mean;
cohort.log. A patient that fails stops no other; the exit code is then 1. The same command does what is missing or
failed; overwrite=true starts anew.

Hydra's launchers (joblib 1.2.0, submitit 1.2.0) lose patients: with the first, one that exits or is killed ends
all that wait; the second hides the others' results. So joblib and submitit are called here, without Hydra, and
start processes that can end only themselves.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from cohort_job import write
from cohort_table import (
    DONE,
    RUNNING,
    UNFINISHED,
    cells,
    read_job,
    row_of,
    status_of,
    write_summary,
    write_tensorboard,
)
from configuration import DictConfig, hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from run_directory import CONFIGS, launch, logger, plain, run_directory, value_of, write_config, wrote

from stnerp import InputError, MissingDependencyError
from stnerp.io.four_d_lung import index_4d_lung
from stnerp.io.manifest import manifest_entries
from stnerp.report import text_table

JOB = Path(__file__).resolve().with_name("cohort_job.py")
LAUNCHERS = ("joblib", "slurm", "submitit_local")
# Of the settings that the patients' scripts know too, those that differ from what the command line says.
GIVEN = ("out", "overwrite", "progress", "data", "data.manifest", "data.patient")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="cohort")
def main(config: DictConfig) -> None:
    with run_directory(config, "cohort", ()) as out:
        value_of(config, "tensorboard", bool)
        if config.launcher not in LAUNCHERS:
            raise InputError(f"launcher: {config.launcher!r} must be one of {', '.join(LAUNCHERS)}")
        gpus = visible_gpus(config.device)
        jobs = jobs_of(config, gpus)
        patients = patients_of(config)
        waiting = prepare(config, out, patients)
        wrote(write_config(config, out / "cohort.yaml"))
        logger.info("%d of %d patients to do", len(waiting), len(patients))
        try:
            with closing(start(config, {name: job_of(out, name) for name in waiting}, jobs, gpus)) as ended:
                for name in ended:
                    row = row_of(out, name)
                    logger.info("%s: %s", name, f"{row['status']}: {row['error']}" if row["error"] else DONE)
                    write_summary(out, patients)
        finally:
            rows = write_summary(out, patients)
            wrote(out / "summary.csv", out / "summary.md", out / "cohort.log")
        if config.tensorboard:
            wrote(*write_tensorboard(out, [row["patient"] for row in rows if row["status"] == DONE]))
        logger.info("\n%s\n", text_table(cells(rows)))
        missing = [row for row in rows if row["status"] != DONE]
        for row in missing:
            logger.error("%s: %s: %s", row["patient"], row["status"], row["error"])
        if missing:
            logger.error("%d of %d patients aren't done: the same command tries again", len(missing), len(rows))
            sys.exit(1)


def job_of(out: Path, name: str) -> Path:
    """Where stands what is to be done for a patient, and what is done."""
    return out / "jobs" / f"{name}.json"


# -- which patients, and what is done with each


def patients_of(config: DictConfig) -> dict[str, Any]:
    """What is known of each patient, by name: its part of the manifest, or nothing.

    Raises:
        InputError: another kind of data, a manifest of another form, names that can't be those of folders. That
        files are missing which a manifest names is the error of their patient alone.
    """
    kind = config.data.kind
    if kind == "manifest":
        known = entries_of(Path(str(config.data.manifest)))
    elif kind == "tcia_4d_lung":
        known = dict.fromkeys(index_4d_lung(config.data.root).patients)
    else:
        raise InputError(f"data: {kind} is one patient; a cohort takes data=manifest or data=tcia_4d_lung")
    wanted = list(known) if config.patients is None else plain(config.patients)
    if not (isinstance(wanted, list) and wanted):
        raise InputError(f"patients: {wanted!r} must be a list of names, '[p1,p7]'")
    names = list(dict.fromkeys(map(str, wanted)))
    for name in names:
        if name not in known:
            raise InputError(f"patients: no {name!r}; there are: {', '.join(known)}")
        if name in ("jobs", "tensorboard") or name.startswith(".") or set(name) & set('/\\:*?"<>|\n'):
            raise InputError(f"patients: {name!r} can't be the name of a run directory; rename this patient")
    return {name: known[name] for name in names}


def entries_of(manifest: Path) -> dict[str, Any]:
    """Each patient's part of a manifest, with files as they are found from here.

    A manifest of its own for each, so that files which one of them lacks are no concern of the others.
    """
    known: dict[str, Any] = {}
    for name, entry in manifest_entries(manifest).items():
        files = {
            key: located(entry[key], manifest.parent) for key in ("images", "masks", "landmarks") if key in entry
        }
        known[name] = {**entry, **files}
    return known


def located(value: Any, folder: Path) -> Any:
    """Files that are named relative to a folder: one, in a list, or by index."""
    if isinstance(value, list):
        return [located(one, folder) for one in value]
    if isinstance(value, dict):
        return {key: located(one, folder) for key, one in value.items()}
    return str((folder / value).resolve()) if isinstance(value, str) else value


def settings_of_steps(config: DictConfig) -> dict[str, list[str]]:
    """The scripts that each patient goes through, and what the command line says about their settings."""
    given = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    steps = {}
    for step in config.steps:
        if step == "train_ref" and config.prior is False:
            continue
        known = {*hydra.compose(step), "experiment"}
        steps[str(step)] = [f"data={HydraConfig.get().runtime.choices['data']}"] + [
            str(override.input_line)
            for override in given
            if override.key_or_group not in GIVEN and override.key_or_group.split(".")[0] in known
        ]
    return steps


def settings_of_patient(config: DictConfig, out: Path, name: str) -> list[str]:
    """What every script is told of a patient."""
    manifest = job_of(out, name).with_suffix(".yaml")
    return [
        f"out={quoted(out / name)}",
        "overwrite=true",  # of what an earlier try has left; `prepare` has seen to it that there is nothing else
        "progress=false",
        f"data.manifest={quoted(manifest)}" if config.data.kind == "manifest" else f"data.patient={quoted(name)}",
    ]


def quoted(value: object) -> str:
    """A text that Hydra takes as it is, whatever is in it."""
    return QuotedString(str(value), Quote.single).with_quotes()


def prepare(config: DictConfig, out: Path, patients: Mapping[str, Any]) -> list[str]:
    """Write down what is to be done for each patient that is neither done nor being worked on; their names.

    Raises:
        InputError: one is done, but with other settings or data; or a folder is there that isn't this cohort's.
    """
    steps = settings_of_steps(config)
    waiting = []
    for name, data in patients.items():
        path, folder = job_of(out, name), out / name
        own = settings_of_patient(config, out, name)
        wanted = {"steps": {step: settings + own for step, settings in steps.items()}, "data": data}
        wanted = json.loads(json.dumps(wanted))  # as it will be read again: no numbers as keys
        ours = path.is_file() or path.with_suffix(".log").is_file()
        if not (ours or config.overwrite) and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: isn't of this cohort; choose another out= or pass overwrite=true")
        job = read_job(path) if path.is_file() else {}
        status = status_of(job, path) if job else ""
        if status == RUNNING:
            continue
        same = {key: job.get(key) for key in wanted} == wanted
        if status == DONE and not config.overwrite:
            if not same:
                raise InputError(
                    f"{folder}: was done with other settings or data; choose another out=, pass overwrite=true, "
                    f"or remove {path} to do it again"
                )
            continue
        waiting.append(name)
        # Steps that are done are left out: not where what they wrote is gone.
        gone = not folder.is_dir() or (status == UNFINISHED and set(job["seconds"]) == set(job["steps"]))
        if config.overwrite or not same or gone:
            path.parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
                path.with_suffix(".yaml").write_text(text, encoding="utf-8")
            for checkpoint in folder.glob(".*.ckpt"):  # of a fit that is not to go on
                checkpoint.unlink()
            write(path, {**wanted, "seconds": {}, "failure": ""})
    return waiting


# -- where and when


def visible_gpus(device: object) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


def jobs_of(config: DictConfig, gpus: Sequence[str]) -> int | None:
    """How many at the same time; None: as many as the cluster lets run."""
    if config.jobs is None:
        return None if config.launcher == "slurm" else max(len(gpus), 1)
    if not (type(config.jobs) is int and config.jobs > 0):
        raise InputError(f"jobs: {config.jobs!r} must be a whole number, 1 or more")
    return config.jobs


def start(
    config: DictConfig, paths: Mapping[str, Path], jobs: int | None, gpus: Sequence[str]
) -> Generator[str, None, None]:
    """Start a process for each patient, and give its name when that has ended."""
    if not paths:
        return
    if config.launcher == "joblib":
        yield from with_joblib(paths, jobs or 1, gpus)
    else:
        settings = {key: value for key, value in plain(config.slurm).items() if value is not None}
        yield from with_submitit(paths, config.launcher, jobs, gpus, settings)


def command(path: Path, threads: int, gpu: str | None) -> list[str]:
    return [sys.executable, str(JOB), str(path), str(threads), *([] if gpu is None else [gpu])]


def with_joblib(paths: Mapping[str, Path], jobs: int, gpus: Sequence[str]) -> Generator[str, None, None]:
    """On this machine: its threads divided among the jobs, its GPUs handed from one job to the next."""
    try:
        import joblib
    except ImportError:
        raise MissingDependencyError("launcher=joblib: pip install 'stnerp[cohort]'") from None
    threads = max(joblib.cpu_count() // jobs, 1)
    free: queue.Queue[str | None] = queue.Queue()
    for i in range(jobs):
        free.put(gpus[i % len(gpus)] if gpus else None)
    running: dict[str, subprocess.Popen[bytes]] = {}
    stopped = False

    def work(name: str) -> str:
        gpu = free.get()
        if not stopped:
            # A session of its own: Ctrl-C reaches this script alone, which passes it on, once.
            running[name] = subprocess.Popen(command(paths[name], threads, gpu), start_new_session=True)
            running[name].wait()
        free.put(gpu)
        return name

    try:
        # Threads, which only wait: a worker process of joblib's that is killed would end the others too.
        parallel = joblib.Parallel(n_jobs=jobs, backend="threading", return_as="generator_unordered")
        yield from parallel(joblib.delayed(work)(name) for name in paths)
    finally:
        stopped = True
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        for process in running.values():
            process.wait()


def with_submitit(
    paths: Mapping[str, Path], launcher: str, jobs: int | None, gpus: Sequence[str], settings: Mapping[str, Any]
) -> Generator[str, None, None]:
    """By submitit: an array of jobs on SLURM, which goes on when this script ends; else here, `jobs` at a time."""
    try:
        import submitit
    except ImportError:
        raise MissingDependencyError(f"launcher={launcher}: pip install 'stnerp[cohort]'") from None
    slurm = launcher == "slurm"
    parallelism = {"slurm_array_parallelism": jobs} if slurm and jobs is not None else {}
    at_once = len(paths) if slurm else jobs or 1
    waiting = list(paths)
    free = [gpus[i % len(gpus)] if gpus and not slurm else None for i in range(at_once)]
    running: dict[Any, tuple[str, str | None]] = {}  # of submitit's jobs, the patient and the GPU
    try:
        threads = int(settings.get("cpus_per_task", 1)) if slurm else max((os.cpu_count() or 1) // at_once, 1)
        folder = next(iter(paths.values())).parent / "submitit"
        executor = submitit.AutoExecutor(folder, cluster=launcher.removeprefix("submitit_"))
        executor.update_parameters(**settings, **parallelism)
        while waiting or running:
            with executor.batch() if slurm and waiting else nullcontext():  # an array
                while waiting and len(running) < at_once:
                    name, gpu = waiting.pop(0), free.pop(0)
                    # A function of Python's own: nothing of these scripts has to be found again over there.
                    running[executor.submit(subprocess.call, command(paths[name], threads, gpu))] = name, gpu
            for job in [job for job in running if job.done()]:
                name, gpu = running.pop(job)
                free.append(gpu)
                yield name
            time.sleep(0.1)
    except (RuntimeError, ValueError, TypeError, NameError, submitit.core.utils.FailedJobError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"launcher: submitit says: {said}; see `slurm` in configs/cohort.yaml") from None


if __name__ == "__main__":
    launch(main)

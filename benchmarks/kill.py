"""python benchmarks/kill.py moments=50 out=runs/kill

train_ref.py and train_def.py on a small phantom, killed (SIGKILL) at random moments, killed at every write of a
network or checkpoint, and stopped (SIGTERM, SIGINT) at random moments; then the same command again, until it is
done. What comes out is compared with a run that nobody disturbed: networks, history and scores to the bit, and no
other file. Writes into `out`: a folder per run, with what it printed in log.txt; kill.md.

Every command runs in a process of its own, forked from this one, which has imported everything: so 100 runs take
minutes. On Linux.
"""

from __future__ import annotations

import csv
import gc
import io
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import numpy as np
import torch
import torch._dynamo
import train_def
import train_ref
from machine import machine
from run import settings_of, start
from run_directory import launch

from stnerp import InputError, resume
from stnerp.report import markdown_table

logger = logging.getLogger("stnerp.benchmarks")

PHANTOM = ["size=[15,12,8]", "spacing_mm=24", "phases=2", "motion=longitudinal"]
REF_NET = ["iterations=40", "fraction_per_step=0.05", "grid_levels=2"]
# Free velocities, with an optimiser of their own, come in on the second level.
DEF_NET = ["layers=3", "width=16", "network_mm=30", "detail_mm=40", "levels=[[24,48,8],[24,25,8]]"]
COMMON = ["progress=false", "device=cpu"]
COMMANDS: list[tuple[ModuleType, list[str]]] = [
    (
        train_ref,
        [
            *COMMON,
            "data=phantom",
            *(f"data.{setting}" for setting in PHANTOM),
            *(f"preset.ref_net.{setting}" for setting in REF_NET),
        ],
    ),
    (train_def, [*COMMON, *(f"preset.def_net.{setting}" for setting in DEF_NET)]),
]
MOST_STARTS = 20  # of one command
#: Columns that say how long something took.
OWN_TIME = ("load_seconds", "fit_seconds", "seconds")


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where everything is written; what is there is replaced.
        moments: how many runs are killed at a random moment.
        stops: how many are stopped by SIGTERM, and how many by SIGINT.
        writes: how many of the points at a write are tried, evenly spread; null: all.
        seed: of the moments.
    """

    out: str = "runs/kill"
    moments: int = 50
    stops: int = 10
    writes: Any = None
    seed: int = 0


@dataclass
class Run:
    """How a disturbed run went.

    Attributes:
        disturbed: whether it was, before it was done.
        exits: exit codes of all commands, in order; −9: killed.
        went_on: whether a command took up a checkpoint.
        lines: on stderr.
    """

    disturbed: bool
    exits: list[int]
    went_on: bool
    lines: list[str]


def main(arguments: list[str]) -> None:
    """All runs, then the table."""
    settings = settings_of(Settings(), arguments)
    if not (isinstance(settings.moments, int) and isinstance(settings.stops, int)):
        raise InputError("moments, stops: must be whole numbers")
    gc.freeze()  # a collection in a forked process would copy all that was imported
    torch.set_num_threads(1)  # a forked process can't use the threads of this one
    out = Path(settings.out)
    shutil.rmtree(out, ignore_errors=True)
    go(out / "undisturbed")
    duration = seconds_of_children()
    expected = contents(out / "undisturbed")
    points = points_of(go(out / "counted", ticking=True, kill_at=-1), out / "counted")
    chosen = [points[k] for k in evenly(len(points), settings.writes)]
    draw = random.Random(settings.seed)
    logger.info("undisturbed: %.1f s of computing; %d points at writes", duration, len(points))

    rows = [
        row_of("killed at a random moment", out, "moment", expected, settings.moments,
               lambda path: anywhere(path, signal.SIGKILL, duration, draw)),
        *(
            row_of(f"killed {where}", out, f"write-{slug(where)}", expected, sum(w == where for _, w in chosen),
                   partial(next_point, iter([n for n, w in chosen if w == where])))
            for where in dict.fromkeys(where for _, where in chosen)
        ),
        row_of("SIGTERM at a random moment", out, "sigterm", expected, settings.stops,
               lambda path: anywhere(path, signal.SIGTERM, duration, draw)),
        row_of("SIGINT at a random moment", out, "sigint", expected, settings.stops,
               lambda path: anywhere(path, signal.SIGINT, duration, draw)),
    ]  # fmt: skip
    table = markdown_table(rows)
    text = f"# Killed and taken up again\n\n{about(duration)}\n\n{table}\n"
    (out / "kill.md").write_text(text, encoding="utf-8")
    logger.info("%s\nwrote %s", table, out / "kill.md")


def row_of(
    what: str, out: Path, name: str, expected: dict[str, Any], runs: int, disturbed: Callable[[Path], Run]
) -> dict[str, Any]:
    """So many disturbed runs, and how many came out right."""
    done = []
    for k in range(runs):
        path = out / f"{name}-{k + 1:02d}"
        run = disturbed(path)
        same, found = run.exits[-1] == 0, contents(path)
        wrong = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        logger.info("%s %d: exits %s%s", name, k + 1, run.exits, f", other: {', '.join(wrong)}" if wrong else "")
        done.append((run, same and not wrong))
        if same and not wrong:
            shutil.rmtree(path)
    return {
        "what": what,
        "runs": len(done),
        "went on from a checkpoint": sum(run.went_on for run, _ in done),
        "done, same result": sum(same for _, same in done),
        "exit codes of what was disturbed": ", ".join(sorted({str(c) for run, _ in done for c in run.exits if c})),
    }


# -- one run


def anywhere(path: Path, number: int, duration: float, draw: random.Random) -> Run:
    """A run that gets a signal at a random moment of its duration."""
    while True:
        run = go(path, after=(draw.uniform(0, duration), number))
        if run.disturbed:  # else it was done before
            return run
        shutil.rmtree(path)


def next_point(points: Any, path: Path) -> Run:
    """A run that is killed at the next one of these points at a write."""
    return go(path, ticking=True, kill_at=next(points))


def go(
    path: Path, *, after: tuple[float, int] | None = None, ticking: bool = False, kill_at: int | None = None
) -> Run:
    """Both commands, each again and again until it is done; disturbed once.

    Args:
        path: the run directory.
        after: seconds of computing from the start, which are not a clock's on a busy machine, and the signal that
            is sent then.
        ticking: a step takes a second by the clock of the checkpoints, so that every run writes at the same steps.
        kill_at: at which point at a write it is killed, from 0; −1: nowhere, but the points are told.
    """
    path.mkdir(parents=True)
    log = path / "log.txt"
    exits: list[int] = []
    started, waits = seconds_of_children(), after is not None
    told = path / "points.txt"
    for module, arguments in COMMANDS:
        for _ in range(MOST_STARTS):
            process = os.fork()
            if process == 0:
                command(module, [f"out={path}", *arguments], log, ticking, kill_at, told)
            code = None
            while code is None:
                ended, status = os.waitpid(process, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
                if code is None and after is not None and waits:
                    waits = seconds_of_children() - started + seconds_of(process) < after[0]
                    if not waits:
                        os.kill(process, after[1])
                time.sleep(0.002)
            exits.append(code)
            if code == 0:
                break
            kill_at, waits = None, False
            if code not in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM):
                break
    if kill_at is None:
        told.unlink(missing_ok=True)
    printed = log.read_text(encoding="utf-8")
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    return Run(any(exits), exits, "going on with this fit" in printed, lines)


def seconds_of_children() -> float:
    """Of computing, of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of(process: int) -> float:
    """Of computing, so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def command(
    module: ModuleType, arguments: list[str], log: Path, ticking: bool, kill_at: int | None, told: Path
) -> None:
    """In the forked process: a script as from the command line. Doesn't return."""
    code: Any = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.root.handlers.clear()
        stream = log.open("a", encoding="utf-8", buffering=1)
        sys.stdout = sys.stderr = stream
        seconds = 0.05
        if ticking:
            seconds = 12.0
            vars(resume)["time"] = SimpleNamespace(monotonic=count().__next__)
        name = "fit_reference" if module is train_ref else "fit_deformation"
        setattr(module, name, partial(getattr(module, name), checkpoint_seconds=seconds))
        for picture in ("overview", "draw", "loss_curve"):  # they take longer than the fits, and are not the point
            setattr(module, picture, drawn)
        if kill_at is not None:
            watch_writes(kill_at, told)
        sys.argv = [f"{module.__name__}.py", *arguments]
        launch(module.main)
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException as error:
        print(f"error: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def drawn(path: Path, *_: object, **__: object) -> Path:
    """In place of a picture."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("a picture", encoding="utf-8")
    return path


def watch_writes(kill_at: int, told: Path) -> None:
    """Count the points at writes of networks and checkpoints, over all processes of a run; end this one at one."""
    save, fsync, replace = torch.save, os.fsync, os.replace

    def point(where: str) -> bool:
        passed = len(told.read_text(encoding="utf-8").splitlines()) if told.exists() else 0
        with told.open("a", encoding="utf-8") as file:
            file.write(where + "\n")
        return passed == kill_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_save(content: Any, path: Path) -> None:
        if point("before a file is written"):
            die()
        if point("within the file"):
            whole = io.BytesIO()
            save(content, whole)
            path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
            die()
        save(content, path)

    def around(call: Any, name: str) -> Any:
        def killing(*arguments: Any) -> None:
            if point(f"before {name}"):
                die()
            call(*arguments)
            if point(f"after {name}"):
                die()

        return killing

    torch.save = killing_save  # type: ignore[assignment]
    os.fsync, os.replace = around(fsync, "it is on the disk"), around(replace, "it takes its place")


# -- what came out


def contents(path: Path) -> dict[str, Any]:
    """Every file of a run directory, as something to compare: tensors and rows to the bit, pictures by name."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if not file.is_file() or name in ("log.txt", "points.txt") or file.suffix == ".log":
            continue
        if file.suffix == ".pt":
            found[name] = plain(torch.load(file, weights_only=True))
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8") as rows:
                kept = [{k: v for k, v in row.items() if k not in OWN_TIME} for row in csv.DictReader(rows)]
            found[name] = kept
        else:
            found[name] = file.stat().st_size > 0
    return found


def plain(value: Any) -> Any:
    """Tensors as bytes, all through lists and dicts."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return np.asarray(value).tobytes() if isinstance(value, torch.Tensor) else value


def points_of(run: Run, path: Path) -> list[tuple[int, str]]:
    """Number and name of each point at a write."""
    if any(run.exits):
        raise InputError(f"{path}: the run that counts the writes failed; see its log.txt")
    return list(enumerate((path / "points.txt").read_text(encoding="utf-8").splitlines()))


def evenly(number: int, most: int | None) -> list[int]:
    chosen = number if most is None else min(most, number)
    return sorted({round(k) for k in np.linspace(0, number - 1, chosen)}) if chosen else []


def slug(text: str) -> str:
    return text.replace(" ", "-")


def about(duration: float) -> str:
    facts = machine()
    return (
        "`python benchmarks/kill.py`: train_ref.py and train_def.py on a phantom of 15 x 12 x 8 voxels,\n"
        "disturbed once, and the same command again until it is done. *Same result*: `ref_net.pt`, `model.pt`,\n"
        "the histories and scores are those of an undisturbed run to the bit, and there is no other file.\n"
        "What is stopped before the first checkpoint starts anew.\n\n"
        f"An undisturbed run computes for {duration:.1f} s; {facts['cpu']}, 1 thread; {facts['versions']};\n"
        f"{facts['date']}"
    )


if __name__ == "__main__":
    assert torch._dynamo  # Adam imports it, which takes seconds: once, before the forks
    start(main)

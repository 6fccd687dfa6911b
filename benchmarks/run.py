"""python benchmarks/run.py cases=phantom,lung_followup methods=stnerp_fast,elastix_bspline seeds='[0,1,2]'

Every method in turn on every case, each run in a process of its own, on this machine. Without arguments: all
of them. Writes into `out`: cases/ (simulated patients), results/ (a .json and a .log per run), and what
table.py makes of them: benchmark.csv, benchmark.md, accuracy_time.png.

A run whose result is there is not made again, so that the same command goes on where it was stopped;
`rerun=failed` makes those again that failed, `rerun=true` all of them.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from cases import PLANS, Case, prepare
from fresh import Rerun, recorded
from methods import METHODS
from omegaconf import OmegaConf
from run_directory import launch
from table import write_tables

from stnerp import InputError

logger = logging.getLogger("stnerp.benchmarks")
T = TypeVar("T")


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        out: where everything is written.
        cases, methods: names, or all.
        seeds: of methods that differ by chance; the others run once, with the first one.
        device: of the methods that can choose: auto, cpu, cuda.
        timeout_s: of each run.
        rerun: false, failed, true.
        data: changes to cases, `data.phantom.spacing_mm=5`.
        options: of methods, `options.elastix_bspline.grid_spacing_mm=15`.
    """

    out: str = "runs/benchmark"
    cases: Any = "all"
    methods: Any = "all"
    seeds: Any = field(default_factory=lambda: [0, 1, 2])
    device: str = "auto"
    timeout_s: float = 7200.0
    rerun: Any = False
    data: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def main(arguments: list[str]) -> None:
    """Run what the command line asks for, then write the tables, also when it is stopped."""
    settings = settings_of(Settings(), arguments)
    out = Path(settings.out)
    cases = chosen(settings.cases, list(PLANS), "cases")
    methods = chosen(settings.methods, list(METHODS), "methods")
    seeds, rerun = whole_numbers(settings.seeds, "seeds"), rerun_of(settings.rerun)
    for name, known in (("data", PLANS), ("options", METHODS)):
        chosen(list(getattr(settings, name)), list(known), name)
    try:
        for case in cases:
            try:
                path = prepare(case, out / "cases", settings.data.get(case))
            except InputError as error:  # its data isn't here, say
                logger.error("%s: left out: %s", case, error)
                continue
            for method, seed in runs(Case.load(path), methods, seeds):
                run_one(settings, out, path, method, seed, rerun)
    finally:
        write_tables(out)


def runs(case: Case, methods: list[str], seeds: list[int]) -> Iterator[tuple[str, int]]:
    """Methods that have something to say about a case, once or for every seed."""
    for name in methods:
        if METHODS[name].answers(case):
            for seed in seeds if METHODS[name].seeded else seeds[:1]:
                yield name, seed


def run_one(settings: Settings, out: Path, case: Path, method: str, seed: int, rerun: Rerun) -> None:
    """One run, unless its result is there, and a line about it."""
    name = f"{case.parent.name}-{method}-{seed}"
    path = out / "results" / f"{name}.json"
    arguments = {
        "case": str(case.resolve()),
        "made_from": Case.load(case).made_from,
        "method": method,
        "seed": seed,
        "device": settings.device,
        "options": settings.options.get(method, {}),
    }
    there = path.is_file()
    record = recorded(path, "measure:measure", arguments, settings.timeout_s, rerun)
    result = record["result"]
    said = f"failed: {record['failure']}" if record["failure"] else f"{result['seconds']:.1f} s"
    if "seen_tre_mean_mm" in result:
        said += f", TRE {result['seen_tre_mean_mm']:.2f} mm"
    logger.info("%s: %s%s", name, said, " (before)" if there and rerun == "none" else "")


# -- the command line, of scale.py too


def settings_of(defaults: T, arguments: list[str]) -> T:
    """Settings of a dataclass, changed by `name=value`.

    Raises:
        InputError: an argument of another form; OmegaConf's errors for unknown names and wrong types.
    """
    for argument in arguments:
        if "=" not in argument:
            raise InputError(f"{argument}: give name=value, as at the top of {Path(sys.argv[0]).name}")
    merged = OmegaConf.merge(OmegaConf.structured(defaults), OmegaConf.from_cli(arguments))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def chosen(names: object, known: list[str], argument: str) -> list[str]:
    """The names in a list, or in words with commas between; all of them for "all".

    Raises:
        InputError: a name that isn't known.
    """
    if names == "all":
        return known
    listed = names if isinstance(names, list) else str(names).split(",")
    unknown = [name for name in listed if name not in known]
    if unknown or not (listed or argument in ("data", "options")):
        raise InputError(f"{argument}: unknown {', '.join(map(str, unknown))}; known: {', '.join(known)}")
    return listed


def whole_numbers(value: object, argument: str) -> list[int]:
    """One whole number or a list of them, at least one.

    Raises:
        InputError: anything else.
    """
    given = value if isinstance(value, list) else [value]
    numbers = [number for number in given if type(number) is int]
    if not numbers or len(numbers) < len(given):
        raise InputError(f"{argument}: {value!r} must be whole numbers, [0,1,2]")
    return numbers


def rerun_of(value: object) -> Rerun:
    """What `rerun` means.

    Raises:
        InputError: neither true, false nor failed.
    """
    known: dict[object, Rerun] = {False: "none", True: "all", "failed": "failed"}
    if value not in known:
        raise InputError(f"rerun: {value!r} must be false, failed or true")
    return known[value]


def start(main: Callable[[list[str]], None]) -> None:
    """A script's main: messages on the terminal, a mistake in one line; ended by SIGTERM as by Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    launch(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    start(main)

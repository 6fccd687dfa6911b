"""One directory per patient: what a script writes there, its log, and its errors in one line.

Messages go to the terminal and into the directory's log. Nothing that is there already is replaced
unless `overwrite=true`, or the run that wrote it was interrupted: then the same command goes on.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from configuration import DictConfig, OmegaConf
from hydra.errors import HydraException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stnerp import InputError, MissingFileError, StnerpError
from stnerp.resume import Interrupted, remove
from stnerp.time_basis import time_text

REF_NET_CHECKPOINT, DEF_NET_CHECKPOINT = ".ref_net.ckpt", ".def_net.ckpt"  # while a fit is unfinished
OWN_START = ".start.pt"  # the model.pt that an unfinished Def-Net began with, if it is the run's own
CONFIGS = str(Path(__file__).parents[1] / "configs")
# Where scripts write, in the run directory, what they make of its model.pt.
MADE = {
    "propagate_roi": "roi",
    "propagate_points": "points",
    "propagate_rtstruct": "rtstruct",
    "monitor": "monitor",
    "trust": "trust",
    "export_transforms": "transforms",
    "export_series": "series",
    "report": "report.html",
}
REPLACE = "pass overwrite=true to replace it"

logger = logging.getLogger("stnerp.scripts")


def launch(main: Callable[[], None]) -> None:
    """Run a script's Hydra main; a mistake of the user becomes one line on stderr and exit code 2, an interruption
    one line and exit code 130 (Ctrl-C) or 143 (SIGTERM)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of printing them
    with _one_line_errors():
        config = Path(inspect.getfile(inspect.unwrap(main))).stem
        if {"--help", "-h"} & set(sys.argv[1:]) and Path(CONFIGS, f"{config}.yaml").is_file():
            print(help_of(sys.modules[main.__module__].__doc__ or "", config))
            return
        check_numbers(sys.argv[1:])
        main()


def help_of(about: str, config: str) -> str:
    """What a script does, and its settings with the comments on them, which Hydra's own --help leaves out."""
    parts = [about.strip(), "Settings, name=value; --cfg job prints what those of a command add up to."]
    for item in [config, *OmegaConf.load(Path(CONFIGS, f"{config}.yaml")).defaults]:
        group, chosen = ("", item) if isinstance(item, str) else next(iter(item.items()))
        group = group.removeprefix("override ")
        file = Path(CONFIGS, group, f"{chosen}.yaml")
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if group:
            options = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
            own = "name" if "@package _global_" in text else f"{group}.name"
            parts.append(f"{group}={chosen or 'null'}, of {options}" + (f"; {own}=value:" if text else ""))
        if text:
            parts.append(re.sub(r"(?m)^(defaults|hydra|# @package.*)(:\n|\n)(( .*)?\n)*", "", text).strip())
    return "\n\n".join(filter(None, parts))


def check_numbers(arguments: Sequence[str]) -> None:
    """Raises InputError for a number that Python doesn't read: Hydra's parser would end with a traceback."""
    for argument in arguments:
        if number := re.search(r"\d{1000,}", argument):
            raise InputError(f"{argument[:30]!a}: a number of {len(number[0])} digits; give fewer than 1000")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        with _terminable():
            yield
    except (StnerpError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + getattr(error, "signal", signal.SIGINT))


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which batch systems send, ends the program as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, "interrupted")

    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def run_directory(
    config: DictConfig,
    script: str,
    writes: Sequence[str],
    needs: Mapping[str, str] | None = None,
    checkpoints: Sequence[str] = (),
) -> Iterator[Path]:
    """The directory `out`, made where needed; what is logged in this context is also written to its log.

    Args:
        config: with `out`, `overwrite`, `seed`, `progress`.
        script: name of the script, which names the log.
        writes: patterns of the files that the script is going to write.
        needs: files that must be there already, and what to do where they aren't.
        checkpoints: names of the files that keep how far fits have come. Where one is, the run before was not
            finished, and what it wrote is replaced. At the end of the context they are removed; `OWN_START` goes
            whenever there is none of Def-Net's.

    A mistake of the user (any StnerpError within the context included) ends the program: one line on
    stderr, exit code 2.
    """
    with _one_line_errors():  # here, before Hydra adds lines of its own
        for name, kind in {"overwrite": bool, "progress": bool, "seed": int}.items():
            value_of(config, name, kind)
        out = Path(str(config.out))
        for name, remedy in (needs or {}).items():
            if not (out / name).is_file():
                raise MissingFileError(f"{out / name}: no such file; {remedy}")
        unfinished = any((out / name).is_file() for name in checkpoints)
        remedy = REPLACE if needs else f"choose another out= or {REPLACE}"
        check_free(out, writes, config.overwrite or unfinished, remedy)
        with _logging_to(out / f"{script}.log", "w" if config.overwrite and not unfinished else "a"):
            try:
                yield out
                for name in checkpoints:
                    remove(out / name)
            finally:
                if not (out / DEF_NET_CHECKPOINT).is_file():
                    remove(out / OWN_START)


def time_name(t: float) -> str:
    """A time as part of a file name: every digit, so that two times never share a file."""
    return time_text(t)


@contextmanager
def _logging_to(path: Path, mode: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(path, mode, encoding="utf-8")
    except OSError as error:
        raise InputError(f"out: {path} can't be written ({error.strerror}); choose another folder") from None
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setLevel(logging.INFO)
    to_terminal.setFormatter(_WithWarnings())
    for handler in (to_file, to_terminal):
        handler.addFilter(_Once())
    library = logging.getLogger("stnerp")
    handlers, level = library.handlers, library.level
    library.handlers = [to_terminal, to_file]
    library.setLevel(logging.DEBUG)
    try:
        yield
    except Exception as error:
        known = isinstance(error, StnerpError | OmegaConfBaseException)
        logger.debug("error: %s", one_line(error), exc_info=not known)  # to the file only
        raise
    finally:
        library.handlers = handlers
        library.setLevel(level)
        to_file.close()


class _WithWarnings(logging.Formatter):
    """A message as it is, but that a warning says that it is one. "error: " begins the line that ends a script."""

    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno >= logging.WARNING else "") + super().format(record)


class _Once(logging.Filter):
    """Each warning once: the same model may be asked several times, and say it each time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        told = record.levelno >= logging.WARNING and text in self.seen
        self.seen.add(text)
        return not told


def replaced_fit(out: Path, of_another_fit: Sequence[str]) -> None:
    """Once model.pt is another: remove what the fit before left (patterns), and warn of what was made with it."""
    for pattern in of_another_fit:
        for old in out.glob(pattern):
            old.unlink()
    older = {name: f"{script}.py" for script, name in MADE.items() if _holds_files(out / name)}
    if older:
        logger.warning(
            "%s in %s: made with the model before; run %s again with overwrite=true, or delete",
            *(", ".join(older), out, ", ".join(older.values())),
        )


def _holds_files(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def check_free(out: Path, writes: Sequence[str], overwrite: bool, remedy: str = REPLACE) -> None:
    """Refuse to replace files.

    Args:
        remedy: what to do instead; without another out= where that names what the script reads.

    Raises:
        InputError: a file that matches one of the patterns exists and `overwrite` is false.
    """
    there = [path for pattern in writes for path in sorted(out.glob(pattern))]
    if there and not overwrite:
        others = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise InputError(f"{there[0]}: already exists{others}; {remedy}")


def value_of(config: DictConfig, name: str, kind: type) -> object:
    """One setting, of the type it must have: `overwrite=ture` is no yes.

    Raises:
        InputError: another type.
    """
    value = config[name]
    if type(value) is not kind:
        wanted = {bool: "true or false", int: "a whole number"}[kind]
        raise InputError(f"{name}: {value!r} must be {wanted}")
    return value


def plain(value: Any) -> Any:
    """A list or section of the config as a Python list or dict; anything else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def settings_of(config: DictConfig) -> dict[str, Any]:
    """A section of the config as keyword arguments.

    Raises:
        InputError: a value stands in its place.
    """
    if not OmegaConf.is_dict(config):
        raise InputError(f"{config!r} stands where a section of settings must be; see configs/")
    return {str(name): value for name, value in OmegaConf.to_container(config, resolve=True).items()}  # type: ignore[union-attr]


def write_config(config: DictConfig, path: Path) -> Path:
    """All settings of a run, interpolations resolved."""
    OmegaConf.save(config, path, resolve=True)
    return path


def wrote(*paths: Path) -> None:
    """Say where something was written."""
    for path in paths:
        logger.info("wrote %s", path)


def one_line(error: BaseException) -> str:
    """The message of an error without the listings that Hydra and OmegaConf add below it."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: is missing; give {error.full_key}=..."
    kept: list[str] = []
    for line in map(str.strip, str(error).splitlines()):
        if line.startswith(("full_key:", "object_type=", "Config search path")):
            break
        if line.startswith("To append to your config"):
            line = "This script has no such setting; see configs/"
        if line:
            kept.append(line)
    return " ".join(kept) or type(error).__name__

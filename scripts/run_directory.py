"""One directory per patient: what a script writes there, its log, and its errors in one line.

Messages go to the terminal and into the directory's log. Nothing that is there already is replaced
unless `overwrite=true`, or the run that wrote it was interrupted: then the same command goes on.
"""

from __future__ import annotations

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

REF_NET_CHECKPOINT, DEF_NET_CHECKPOINT = ".ref_net.ckpt", ".def_net.ckpt"  # while a fit is unfinished
CONFIGS = str(Path(__file__).parents[1] / "configs")

logger = logging.getLogger("stnerp.scripts")


def launch(main: Callable[[], None]) -> None:
    """Run a script's Hydra main; a mistake of the user becomes one line on stderr and exit code 2, an interruption
    one line and exit code 130 (Ctrl-C) or 143 (SIGTERM)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of printing them
    with _one_line_errors():
        check_numbers(sys.argv[1:])
        main()


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
            finished, and what it wrote is replaced. At the end of the context they are removed.

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
        check_free(out, writes, config.overwrite or unfinished)
        with _logging_to(out / f"{script}.log", "w" if config.overwrite and not unfinished else "a"):
            yield out
            for name in checkpoints:
                remove(out / name)


def time_name(t: float) -> str:
    """A time as part of a file name: every digit, so that two times never share a file."""
    return f"{t:.15g}"


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


def check_free(out: Path, writes: Sequence[str], overwrite: bool) -> None:
    """Refuse to replace files.

    Raises:
        InputError: a file that matches one of the patterns exists and `overwrite` is false.
    """
    there = [path for pattern in writes for path in sorted(out.glob(pattern))]
    if there and not overwrite:
        others = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise InputError(f"{there[0]}: already exists{others}; choose another out= or pass overwrite=true")


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

"""A fit that was interrupted goes on: all that its next step depends on, in one file, now and then.

The same call with the same file goes on where the file was written, and ends with the same result to the bit as
a call that was never interrupted (on a CPU, with as many threads). The file says whose it is: data, settings and
seed; a fit of others refuses it. It is replaced by whole new ones only (`atomic`), and stays when the fit is done,
until its result is saved: remove it then. Where an error ends the fit, it goes by itself: the corrected call is
another fit.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from stnerp.atomic import remove_partial
from stnerp.checkpoint import read_checkpoint, write_checkpoint
from stnerp.errors import FitError, InputError, StnerpError

logger = logging.getLogger(__name__)

KIND = "stnerp unfinished fit"
SECONDS = 60.0  # between two writings, which take less than one


class Interrupted(KeyboardInterrupt):
    """The program was asked to stop (SIGINT, SIGTERM), and what the fit had done is written.

    Attributes:
        signal: the number; a program that stops says so by the exit code 128 + signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class Part(Protocol):
    """A network, an optimiser, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class State:
    """All that the next step of a loop depends on.

    Attributes:
        parts: what is trained and what trains it, by name.
        history: one row for each recorded step; numbers, or tensors of one.
        draw: random numbers besides torch's own.
        check: raises FitError where the state is not worth keeping.
        step: how many steps are done.
    """

    parts: dict[str, Part]
    history: list[dict[str, Any]]
    draw: np.random.Generator | None = None
    check: Callable[[], None] = lambda: None
    step: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a file."""
        return {
            "step": self.step,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "history": [{name: float(value) for name, value in row.items()} for row in self.history],
            "draw": None if self.draw is None else dict(self.draw.bit_generator.state),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def take(self, saved: Mapping[str, Any]) -> None:
        """Become what `to_dict` described."""
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        self.history[:] = saved["history"]
        if self.draw is not None:
            self.draw.bit_generator.state = saved["draw"]
        torch.set_rng_state(saved["random"])
        if torch.cuda.is_available() and len(saved["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["random_cuda"])
        self.step = saved["step"]


@dataclass
class Progress:
    """How far a fit has come, in a file; a context in which SIGINT and SIGTERM end the fit tidily.

    A signal lets the step finish, writes the file and raises `Interrupted`; a second one doesn't wait. A
    `StnerpError` removes the file that this call made, a `FitError` also one that it found: to go on from there
    is to fail again, and the corrected call would be refused as another fit's.

    Args:
        path: of the file; None: nothing is written, and signals do what they did.
        identity: whose fit it is; a file of another one is refused.
        seconds: between two writings; 0: after every step.

    Raises:
        InputError: the file is damaged, or of another fit.
    """

    path: Path | None
    identity: Mapping[str, object]
    seconds: float = SECONDS
    _stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    _current: tuple[str, State] | None = None
    _asked: int | None = None
    _handlers: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._written = time.monotonic()
        self._found = self.path is not None and self.path.is_file()
        if self.path is None or not self._found:
            return
        try:
            saved = read_checkpoint(self.path, KIND)
        except InputError as error:
            raise InputError(f"{error}. Remove this file to start anew") from None
        ours = _plain(self.identity)
        others = [name for name in {**ours, **saved["identity"]} if ours.get(name) != saved["identity"].get(name)]
        if others:
            raise InputError(
                f"{self.path}: is of an unfinished fit with other {', '.join(others)}; go on with that one, or "
                "remove the file to start anew"
            )
        self._stages = saved["stages"]
        logger.info("%s: going on with this fit, %s done", self.path, self._told())

    def __enter__(self) -> Progress:
        if self.path is not None and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in the background
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        refused = isinstance(error, StnerpError) and not self._found
        if self.path is not None and self.path.is_file() and (refused or isinstance(error, FitError)):
            remove(self.path)

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result of its own (plain values and tensors): from the file, or made now and written."""
        if name not in self._stages:
            if self._current is not None:
                self._current[1].check()  # it is written, too
            self._stages[name] = make()
            self._write()
        return self._stages[name]

    def saved(self, name: str) -> dict[str, Any] | None:
        """The state that the file has of a stage, as `State.to_dict` described it."""
        return self._stages.get(name)

    @contextmanager
    def stage(self, name: str, state: State) -> Iterator[None]:
        """One loop of the fit: `state` becomes what the file knows of it, and is written at the end."""
        if (saved := self.saved(name)) is not None:
            state.take(saved)
        self._current = name, state
        try:
            yield
            state.check()
            if saved is None or saved["step"] != state.step:
                self._write()
            self._stop_if_asked()
        finally:
            self._current = None

    def steps(self, until: int) -> Iterator[int]:
        """Numbers of the steps still to do, up to `until`; between two of them, now and then, it writes."""
        assert self._current is not None
        state = self._current[1]
        while state.step < until:
            yield state.step + 1
            state.step += 1
            if self._asked or (self.path is not None and time.monotonic() - self._written >= self.seconds):
                state.check()
                self._write()
                self._stop_if_asked()

    def _write(self) -> None:
        if self.path is None:
            return
        if self._current is not None:
            name, state = self._current
            self._stages[name] = state.to_dict()
        try:
            content = {"identity": _plain(self.identity), "stages": self._stages}
            write_checkpoint(self.path, KIND, content, overwrite=True)
        except InputError as error:  # a full disk is no reason to lose the fit; the older file is still there
            logger.warning("%s. The fit goes on; what it does until the next writing could be lost", error)
        self._written = time.monotonic()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._current is None or self._asked:
            raise Interrupted(number, self._interrupted())
        self._asked = number

    def _stop_if_asked(self) -> None:
        if self._asked:
            raise Interrupted(self._asked, self._interrupted())

    def _interrupted(self) -> str:
        assert self.path is not None
        goes_on = f"goes on from {self.path}" if self.path.is_file() else "starts anew"
        return f"interrupted: the same command {goes_on}"

    def _told(self) -> str:
        steps = [f"{name} {saved['step']} steps" for name, saved in self._stages.items() if "step" in saved]
        return ", ".join(steps) or "pre-alignment"


def remove(path: Path) -> None:
    """Remove the file of a fit whose result is saved; none is fine."""
    path.unlink(missing_ok=True)
    remove_partial(path)


def fingerprint(net: nn.Module) -> str:
    """A checksum of a network's parameters and buffers, by their names."""
    check = 0
    for name, values in net.state_dict().items():
        check = zlib.crc32(name.encode(), check)
        check = zlib.crc32(values.detach().cpu().contiguous().numpy().tobytes(), check)
    return f"{check:08x}"


def _plain(identity: Mapping[str, object]) -> dict[str, str]:
    return {name: repr(value) for name, value in identity.items()}

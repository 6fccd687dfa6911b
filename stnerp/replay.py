"""What a GPU does again and again: recorded once as a CUDA graph, then replayed.

A step of a fit is hundreds of kernels of some microseconds each, and Python takes longer to launch one: a GPU
would wait for most of a fit. A replay launches them all at once, on the memory that the recording used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")
LOCK = threading.RLock()


class Replay(Generic[Result]):
    """Work on tensors that stay where they are, with no other effect than on such tensors.

    The first call does it: what is made once is made then, libraries are loaded, matrices copied. The second
    records it, and from then on it is replayed: each call returns the same tensors, with new values. Random
    numbers are new ones each time. On a CPU, and outside of `recording`, every call does it.

    Args:
        pool: of the memory that recordings work in, shared by those that don't run at once (`memory_pool`).
    """

    def __init__(self, pool: Any = None) -> None:
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done_once = False
        self.result: Result

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Do it, record it or replay it.

        Args:
            work: the same for every call. It reads no number back from the GPU, and copies none to it that isn't
                there after the first call.
        """
        if not (self.done_once and on_recording_stream()):
            self.done_once = True
            return work()
        if self.graph is None:
            self.graph, self.result = self._recorded(work)
        self.graph.replay()
        return self.result

    def _recorded(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        # Not `with torch.cuda.graph(...)`: it may collect garbage first, each time.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self.pool)
        try:
            result = work()
        finally:
            graph.capture_end()
        return graph, result


def memory_pool(device: torch.device) -> Any:
    """A new pool for `Replay`; on a CPU nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # a recording can't take back what is cached
    return torch.cuda.graph_pool_handle()


@contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """Work within may be recorded: that takes a stream other than the GPU's default one. On a CPU, nothing new.

    One at a time: what other threads do on the GPU would end a recording.
    """
    if device.type != "cuda":
        yield
        return
    with LOCK:
        stream, outer = _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            outer.wait_stream(stream)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all fits: memory that PyTorch keeps belongs to a stream."""
    return torch.cuda.Stream(device)


def on_recording_stream() -> bool:
    """Whether this is within `recording`, on a GPU."""
    return torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream()

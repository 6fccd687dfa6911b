"""Recorded work does what it does unrecorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fit import GPU_ROUNDING, ROUNDING, assert_alike

from stnerp import Series, fit_deformation, fit_reference, load_series, replay
from stnerp.phantom import Phantom
from stnerp.replay import Replay, memory_pool, recording

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU = torch.device("cpu")


def test_on_a_cpu_every_call_does_the_work() -> None:
    calls: list[int] = []
    again: Replay[int] = Replay(memory_pool(CPU))
    with recording(CPU):
        for k in range(4):
            calls.append(k)
            assert again(lambda: len(calls)) == k + 1
    assert again.graph is None


class Recorded:
    """A CPU's stand-in for a CUDA graph: its results stay where they are, and every replay overwrites them."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.result, self.replays = work, work(), 0

    def replay(self) -> None:
        self.replays += 1
        self._overwrite(self.result, self.work())

    def _overwrite(self, old: Any, new: Any) -> None:
        if isinstance(old, torch.Tensor):
            old.copy_(new)
        else:
            assert old.keys() == new.keys()
            for name in old:
                self._overwrite(old[name], new[name])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """All recordings of the test, made without a GPU."""
    made: list[Recorded] = []

    def record(self: Replay[Any], work: Callable[[], Any]) -> tuple[Recorded, Any]:
        # What a recording launches is only done when it is replayed: its numbers are overwritten then.
        made.append(Recorded(work))
        return made[-1], made[-1].result

    monkeypatch.setattr(Replay, "_recorded", record)
    return made


def test_a_fit_of_replays_is_the_fit(
    phantom_series: Series, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slabs, each recorded on its own: thinner than the windows, so that two of them begin with the first slice.
    # Pre-alignment, so that the penalties see a stretch.
    levels = [(20, 20, 3), (15, 20, 15)]
    settings = {**ROUNDING, "voxels_per_step": 600, "window_mm": 150.0, "levels": levels, "align": "affine"}
    plain = fit_deformation(phantom_series, None, **settings)
    assert not recorded
    monkeypatch.setattr(replay, "on_recording_stream", lambda: True)
    replayed = fit_deformation(phantom_series, None, **settings)
    assert len(recorded) > len(phantom_series)
    assert sum(one.replays for one in recorded) > len(recorded)
    assert [row["loss"] for row in replayed.history] == [row["loss"] for row in plain.history]
    assert_alike(replayed, plain)


def test_a_fit_that_reads_ref_net_itself_is_not_recorded(
    phantom_series: Series, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is evaluated, and again for its gradient, piece by piece.
    net = fit_reference(phantom_series, iterations=1, grid_levels=2, device="cpu", progress=False)
    monkeypatch.setattr(replay, "on_recording_stream", lambda: True)
    fit_deformation(phantom_series, net, **{**ROUNDING, "reference": "network"})
    assert not recorded


def test_a_guided_fit_is_not_recorded(
    phantom: Phantom, phantom_series: Series, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a guide does in a step is its own affair, and need not be work that a graph can hold.
    images, times = list(phantom_series.images), phantom_series.times
    known = {i: phantom.landmarks(times[i]) for i in (0, 1)}
    series = load_series(images, times, period=1.0, window="ct", landmarks=known)
    monkeypatch.setattr(replay, "on_recording_stream", lambda: True)
    fit_deformation(series, None, **{**ROUNDING, "landmarks": 0.1})
    assert not recorded
    fit_deformation(series, None, **ROUNDING)
    assert recorded


@GPU
def test_a_gpu_replays_with_new_values_and_new_random_numbers() -> None:
    device = torch.device("cuda")
    here = torch.zeros(3, device=device)
    again: Replay[dict[str, torch.Tensor]] = Replay(memory_pool(device))
    with recording(device):
        drawn = []
        for k in range(5):
            here.fill_(float(k))
            found = again(lambda: {"twice": 2 * here, "drawn": torch.rand(2, device=device)})
            assert found["twice"].tolist() == [2.0 * k] * 3
            drawn.append(found["drawn"].tolist())
    assert again.graph is not None
    assert len({tuple(pair) for pair in drawn}) == 5


@GPU
def test_a_gpus_replayed_fit_is_the_fit(phantom_series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**ROUNDING, "device": "cuda", "voxels_per_step": 600}
    replayed = fit_deformation(phantom_series, None, **settings)
    monkeypatch.setattr(replay, "on_recording_stream", lambda: False)
    assert_alike(replayed, fit_deformation(phantom_series, None, **settings), GPU_ROUNDING)

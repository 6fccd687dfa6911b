"""A fit that is interrupted anywhere goes on, to the same bits; and a checkpoint is taken by its own fit alone."""

from __future__ import annotations

import copy
import errno
import importlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import optional

from stnerp import (
    FitError,
    InputError,
    RefNet,
    Series,
    STNeRP,
    fit_deformation,
    fit_reference,
    load_series,
    resume,
)
from stnerp.appearance import fit_flow
from stnerp.atomic import replacing
from stnerp.checkpoint import read_checkpoint
from stnerp.phantom import Phantom
from stnerp.presets import FLOW, Level
from stnerp.resume import KIND, Interrupted, Progress, State, remove

ROOT = Path(__file__).parents[1]
COMMON: dict[str, Any] = {"progress": False, "device": "cpu"}
REF_NET: dict[str, Any] = {**COMMON, "iterations": 25, "grid_levels": 2, "fraction_per_step": 0.05}
NETWORK: dict[str, Any] = {"layers": 3, "width": 16, "fourier_width": 8}
# From the second level on the lattice is as fine as the free velocities': they get an optimiser of their own.
DEF_NET: dict[str, Any] = {
    **COMMON,
    **NETWORK,
    "network_mm": 30.0,
    "detail_mm": 30.0,
    "levels": [(30, 40, 4), (20, 25, 4), (20, 25, 3, None, 1e-4)],
}
KINDS: dict[str, dict[str, Any]] = {
    "fast": DEF_NET,
    "drawn times and slabs": {
        **DEF_NET,
        "levels": [(30, 40, 4, 1), (20, 25, 6, 2)],
        "voxels_per_step": 800,
        "landmarks": 0.02,
    },
    "paper": {**COMMON, **NETWORK, "preset": "paper", "levels": [(None, None, 4)]},
}


class Killed(BaseException):
    """In place of SIGKILL: nothing in the library stops it."""


@pytest.fixture(scope="module")
def series() -> Series:
    """Four scans in voxels of 18 mm, not periodic, so that they are aligned first."""
    phantom = Phantom((20, 16, 12), 18.0, noise_hu=0.0, n_landmarks=20)
    times = [0.0, 0.2, 0.35, 0.5]
    return load_series(
        [phantom.image(t) for t in times], times, window="ct", landmarks=[phantom.landmarks(t) for t in times]
    )


@pytest.fixture(scope="module")
def ref_net(series: Series) -> RefNet:
    return fit_reference(series, **REF_NET)


def bits(saved: Any) -> Any:
    """Plain values with tensors as bytes."""
    if isinstance(saved, dict):
        return {name: bits(value) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return [bits(value) for value in saved]
    return saved.numpy().tobytes() if isinstance(saved, torch.Tensor) else saved


def model_bits(model: STNeRP, folder: Path) -> Any:
    return bits(torch.load(model.save(folder / "model.pt", overwrite=True), weights_only=True))


@contextmanager
def killed_at(step: int, stage: str = "") -> Iterator[None]:
    """A fit within is killed once it has done so many steps (of that stage)."""
    steps = Progress.steps

    def killing(self: Progress, until: int) -> Iterator[int]:
        for number in steps(self, until):
            assert self._current is not None
            if number > step and self._current[0].startswith(stage):
                raise Killed
            yield number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "steps", killing)
        with pytest.raises(Killed):
            yield


@contextmanager
def signalled_at(step: int, number: int, times: int = 1) -> Iterator[None]:
    """Within a step of a fit, this process gets a signal."""
    steps = Progress.steps

    def sending(self: Progress, until: int) -> Iterator[int]:
        for n in steps(self, until):
            for _ in range(times if n == step else 0):
                os.kill(os.getpid(), number)
            yield n

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "steps", sending)
        yield


# -- the same bits


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_ref_net_goes_on_to_the_same_bits(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    settings = REF_NET if preset == "fast" else {**COMMON, **NETWORK, "preset": "paper", "iterations": 25}
    path = tmp_path / "fit.ckpt"
    expected = bits(fit_reference(series, **settings).to_dict())
    for step in (7, 20):
        with killed_at(step):
            fit_reference(series, checkpoint=path, checkpoint_seconds=0, **settings)
        assert read_checkpoint(path, KIND)["stages"]["ref_net"]["step"] == step
    assert bits(fit_reference(series, checkpoint=path, **settings).to_dict()) == expected
    # Finished, it is there at once, until its file is removed.
    monkeypatch.setattr(importlib.import_module("stnerp.ref_net"), "mse", lambda *_: pytest.fail("fitted again"))
    assert bits(fit_reference(series, checkpoint=path, **settings).to_dict()) == expected
    remove(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_def_net_goes_on_to_the_same_bits(
    series: Series, ref_net: RefNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    settings, path = KINDS[kind], tmp_path / "fit.ckpt"
    prior = (
        fit_reference(series, **NETWORK, preset="paper", iterations=2, **COMMON) if kind == "paper" else ref_net
    )
    expected = model_bits(fit_deformation(series, prior, **settings), tmp_path)
    steps = sum(level[2] for level in settings["levels"])
    # Within levels, at their ends, before and after the free velocities come in.
    for step in (1, 4, 6, steps - 1):
        if step < steps:
            with killed_at(step):
                fit_deformation(series, prior, checkpoint=path, checkpoint_seconds=0, **settings)
    again = fit_deformation(series, prior, checkpoint=path, checkpoint_seconds=0, **settings)
    assert model_bits(again, tmp_path) == expected


def test_what_was_done_since_the_last_writing_is_done_again(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model_bits(fit_deformation(series, **DEF_NET), tmp_path)
    path = tmp_path / "fit.ckpt"
    clock = iter(range(10_000))
    with monkeypatch.context() as patch, killed_at(9):
        patch.setattr(resume.time, "monotonic", lambda: next(clock))  # a second a step
        fit_deformation(series, checkpoint=path, checkpoint_seconds=4, **DEF_NET)
    assert 0 < read_checkpoint(path, KIND)["stages"]["def_net"]["step"] < 9
    assert model_bits(fit_deformation(series, checkpoint=path, **DEF_NET), tmp_path) == expected


def test_a_start_and_a_flow_go_on_too(series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**DEF_NET, "init": fit_deformation(series, **DEF_NET)}
    expected = model_bits(fit_deformation(series, **settings), tmp_path)
    path = tmp_path / "fit.ckpt"
    with killed_at(5):
        fit_deformation(series, checkpoint=path, checkpoint_seconds=0, **settings)
    assert model_bits(fit_deformation(series, checkpoint=path, **settings), tmp_path) == expected

    # Killed in the flow, Def-Net isn't fitted again.
    fit = importlib.import_module("stnerp.fit")
    remove(path)
    flow: list[int] = []

    def killed_once(*arguments: Any, **more: Any) -> None:
        flow.append(1)
        if len(flow) == 1:
            raise Killed

    monkeypatch.setattr(fit, "fit_flow", killed_once)
    with pytest.raises(Killed):
        fit_deformation(series, appearance="blend", checkpoint=path, **DEF_NET)
    monkeypatch.setattr(fit, "_Level", lambda *_: pytest.fail("fitted again"))
    fit_deformation(series, appearance="blend", checkpoint=path, **DEF_NET)
    assert len(flow) == 2


def test_a_flow_goes_on_to_the_same_bits(series: Series, tmp_path: Path) -> None:
    settings = replace(FLOW, **NETWORK, levels=(Level(30, 40, 3), Level(20, 25, 3)))
    at_rest = np.stack([np.eye(4)] * len(series))
    path = tmp_path / "fit.ckpt"

    def flow(fit: Progress | None = None) -> Any:
        return bits(fit_flow(series, at_rest, settings=settings, fit=fit, **COMMON).net.state_dict())

    expected = flow()
    for step in (2, 3, 5):  # within levels and between them
        with killed_at(step, "flow"), Progress(path, {}, 0) as fit:
            flow(fit)
        assert read_checkpoint(path, KIND)["stages"]["flow"]["step"] == step
    with Progress(path, {}) as fit:
        assert flow(fit) == expected


def test_pre_alignment_is_not_made_twice(series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fit = tmp_path / "fit.ckpt", importlib.import_module("stnerp.fit")
    with killed_at(0):
        fit_deformation(series, checkpoint=path, **DEF_NET)
    aligned = read_checkpoint(path, KIND)["stages"]["alignments"]["matrices"].numpy()
    monkeypatch.setattr(fit, "affine_between", lambda *_: pytest.fail("aligned again"))
    assert np.array_equal(fit_deformation(series, checkpoint=path, **DEF_NET).alignments, aligned)
    assert not np.array_equal(aligned[1], np.eye(4))


def test_without_a_checkpoint_nothing_is_written_and_signals_are_left_alone(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was set"))
    fit_reference(series, **{**REF_NET, "iterations": 1})
    assert list(tmp_path.iterdir()) == []


# -- whose it is


def test_a_checkpoint_of_another_fit_is_refused_and_kept(series: Series, ref_net: RefNet, tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    brief: dict[str, Any] = {**DEF_NET, "levels": [(30, 40, 1)], "align": "none", "checkpoint": path}
    fit_deformation(series, ref_net, **brief)
    before = path.read_bytes()
    other_net = fit_reference(series, seed=5, **REF_NET)
    fewer, points = series.subset([0, 1, 2]), list(series.landmarks)
    assert points[1] is not None
    points[1] = points[1] + 1.0
    others: dict[str, Callable[[], object]] = {
        "seed": lambda: fit_deformation(series, ref_net, **brief, seed=1),
        "levels": lambda: fit_deformation(series, ref_net, **{**brief, "levels": [(30, 40, 2)]}),
        "align": lambda: fit_deformation(series, ref_net, **{**brief, "align": "rigid"}),
        "ref_net": lambda: fit_deformation(series, other_net, **brief),
        "init": lambda: fit_deformation(series, ref_net, **brief, init=tmp_path / "other.pt"),
        "images, masks, points, times": lambda: fit_deformation(fewer, ref_net, **brief),
        "points": lambda: fit_deformation(replace(series, landmarks=tuple(points)), ref_net, **brief),
        "times": lambda: fit_deformation(replace(series, times=(0.0, 0.2, 0.3, 0.5)), ref_net, **brief),
    }
    half = copy.deepcopy(ref_net)  # the same parameters: what it adds to its network is a buffer
    assert half.remainder is not None
    half.remainder = half.remainder + 0.5
    others |= {"ref_net ": lambda: fit_deformation(series, half, **brief)}
    for names, fit in others.items():
        with pytest.raises(
            InputError, match=rf"fit\.ckpt: is of an unfinished fit with other {names.strip()};.*remove"
        ):
            fit()
    with pytest.raises(InputError, match="with other network"):
        fit_reference(series, checkpoint=path, **REF_NET)
    assert path.read_bytes() == before
    # Another image as the reference, the same for all else.
    path.unlink()
    fit_deformation(series, None, **brief)
    with pytest.raises(InputError, match="with other reference_index;"):
        fit_deformation(replace(series, reference=1), None, **brief)
    path.unlink()
    fit_deformation(series, ref_net, **brief)
    # One voxel of one image.
    image = sitk.Image(series.images[2])
    image[3, 3, 3] = image[3, 3, 3] + 1
    changed = replace(series, images=(*series.images[:2], image, *series.images[3:]))
    with pytest.raises(InputError, match="with other images;"):
        fit_deformation(changed, ref_net, **brief)


@pytest.mark.parametrize(
    ("error", "found", "stays"),
    [
        (InputError, False, False),
        (InputError, True, True),
        (FitError, False, False),
        (FitError, True, False),
        (Interrupted, False, True),
        (RuntimeError, False, True),
    ],
)
def test_an_error_leaves_no_checkpoint_that_it_would_meet_again(
    tmp_path: Path, error: type[BaseException], found: bool, stays: bool
) -> None:
    path = tmp_path / "fit.ckpt"

    def begin(fit: Progress) -> None:
        fit.kept("alignments", lambda: {"matrices": torch.eye(4)})

    if found:
        with Progress(path, {}) as fit:
            begin(fit)
    with pytest.raises(error), Progress(path, {}) as fit:  # noqa: PT012
        begin(fit)
        assert path.is_file()
        raise error(*((signal.SIGINT, "told") if error is Interrupted else ("told",)))
    assert path.is_file() == stays


def test_the_corrected_call_is_a_new_fit(series: Series, tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    brief: dict[str, Any] = {**DEF_NET, "levels": [(30, 40, 1)], "align": "none", "checkpoint": path}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"contours": 0.1}, "contours: none are known"),
        ({"init": 5}, "int is no start"),
        ({"init": [5]}, "int is no start"),
    ]
    for wrong, says in refused:
        with pytest.raises(InputError, match=says):
            fit_deformation(series, None, **brief, **wrong)
        assert not path.exists()
    fit_deformation(series, None, **brief)


def test_a_damaged_checkpoint_is_refused(series: Series, tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    fit_reference(series, checkpoint=path, **{**REF_NET, "iterations": 1})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"fit\.ckpt: can't be read.*Remove this file to start anew"):
        fit_reference(series, checkpoint=path, **{**REF_NET, "iterations": 1})


def test_a_checkpoint_holds_plain_values_and_tensors(series: Series, tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    fit_deformation(series, checkpoint=path, **DEF_NET)
    # weights_only: anything else would be refused.
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"format", "kind", "identity", "stages"}
    assert all(isinstance(value, str) for value in saved["identity"].values())


# -- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_fit_after_the_step(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, before = tmp_path / "fit.ckpt", signal.getsignal(number)
    expected = bits(fit_reference(series, **REF_NET).to_dict())
    told = r"interrupted: the same command goes on from .*fit\.ckpt"
    with signalled_at(9, number), pytest.raises(Interrupted, match=told) as end:
        fit_reference(series, checkpoint=path, **REF_NET)
    assert end.value.signal == number
    assert isinstance(end.value, KeyboardInterrupt)  # `except Exception` doesn't keep it from ending a program
    assert signal.getsignal(number) == before
    assert read_checkpoint(path, KIND)["stages"]["ref_net"]["step"] == 9
    assert bits(fit_reference(series, checkpoint=path, **REF_NET).to_dict()) == expected


def test_a_second_signal_does_not_wait(series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.ckpt"
    with signalled_at(3, signal.SIGINT, times=2), pytest.raises(Interrupted, match="starts anew"):
        fit_reference(series, checkpoint=path, **REF_NET)
    assert not path.exists()


def test_an_ignored_signal_stays_ignored(series: Series, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, say
    with signalled_at(3, signal.SIGINT):
        assert len(fit_reference(series, checkpoint=tmp_path / "fit.ckpt", **REF_NET).history) == 2
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# -- a disk that is full


@contextmanager
def full_disk() -> Iterator[None]:
    """Files can't grow beyond 4 kB, as if the disk were full. No fixture: pytest may write to a file itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_the_fit_goes_on(
    series: Series, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "stnerp")
    with full_disk():
        net = fit_reference(series, checkpoint=tmp_path / "fit.ckpt", checkpoint_seconds=0, **REF_NET)
    assert bits(net.to_dict()) == bits(fit_reference(series, **REF_NET).to_dict())
    assert "fit.ckpt: can't be written" in caplog.text
    assert "The fit goes on" in caplog.text
    assert list(tmp_path.iterdir()) == []  # no half of one
    with full_disk(), pytest.raises(InputError, match=r"net\.pt: can't be written \(.*full"):
        net.save(tmp_path / "net.pt")


def test_a_full_disk_leaves_the_older_checkpoint(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fit.ckpt"
    with killed_at(5):
        fit_reference(series, checkpoint=path, checkpoint_seconds=0, **REF_NET)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    fit_reference(series, checkpoint=path, **REF_NET)
    assert read_checkpoint(path, KIND)["stages"]["ref_net"]["step"] == 5


# -- whole files or none


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_text("old")
    done: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append("fsync"), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), rename(a, b)))
    with replacing(path) as partial:
        assert partial.name.endswith(".a.nii.gz")  # writers go by the ending
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert done == ["fsync", "replace", "fsync"]  # contents, name, folder
    with pytest.raises(UnicodeEncodeError), replacing(path) as partial:
        partial.write_text("half \ud800", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.nii\.gz: can't be written \(No space left"), replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    assert path.read_text() == "new"


def test_what_the_killed_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    os.waitpid(gone, 0)
    path, other = tmp_path / "a.pt", tmp_path / f".{gone}.b.a.pt"
    left, running = tmp_path / f".{gone}.a.pt", tmp_path / f".{os.getppid()}.a.pt"
    for file in (left, running, other):
        file.write_text("half")
    with replacing(path) as partial:
        partial.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, running.name, other.name}


# -- the scripts


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return


TINY = [
    "progress=false",
    "device=cpu",
    "data=phantom",
    "data.size=[20,16,12]",
    "data.spacing_mm=18",
    "data.phases=2",
]
BRIEF = [
    "prior=false",
    "preset.def_net.levels=[[30,40,12]]",
    "preset.def_net.width=16",
    "preset.def_net.detail_mm=30",
]


BRIEF_REF_NET = ["preset.ref_net.iterations=10", "preset.ref_net.grid_levels=2"]


def run(script: str, *arguments: str) -> int:
    """A script as from the command line, in this process; its exit code."""
    module = importlib.import_module(script)
    before, sys.argv = sys.argv, [f"{script}.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(module.main)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.mark.usefixtures("scripts")
def test_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train_def", *TINY, *BRIEF]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, f"out={whole}") == 0
    with signalled_at(7, signal.SIGTERM):
        capsys.readouterr()
        assert run(*command, f"out={out}") == 143
    line = capsys.readouterr().err.splitlines()
    assert len(line) == 1
    assert line[0] == f"error: interrupted: the same command goes on from {out / '.def_net.ckpt'}"

    # Killed again when the model is written, and most is not.
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("train_def"), "loss_curve", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(*command, f"out={out}")
    assert (out / "model.pt").is_file()
    assert not (out / "metrics.csv").exists()
    # Other settings: refused, nothing lost.
    assert run(*command, "seed=3", f"out={out}") == 2
    assert "with other seed; go on with that one" in capsys.readouterr().err
    assert run(*command, f"out={out}") == 0
    assert "going on with this fit, pre-alignment done" not in (out / "train_def.log").read_text(encoding="utf-8")
    assert "going on with this fit, def_net 12 steps done" in (out / "train_def.log").read_text(encoding="utf-8")
    saved, expected = (bits(torch.load(f / "model.pt", weights_only=True)) for f in (out, whole))
    assert saved == expected
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (out, whole)]
    assert names[0] == names[1]
    # Done, it is refused.
    capsys.readouterr()
    assert run(*command, f"out={out}") == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.usefixtures("scripts")
def test_a_fit_from_the_run_s_own_model_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train_def", *TINY, *BRIEF]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, f"out={whole}") == 0
    shutil.copytree(whole, out)

    def weekly(folder: Path, *more: str) -> int:
        return run(*command, f"out={folder}", f"init={folder}/model.pt", "overwrite=true", *more)

    assert weekly(whole) == 0
    before = (out / "model.pt").read_bytes()
    # Refused: nothing is left that would make the run an unfinished one.
    names = sorted(path.name for path in out.iterdir())
    assert weekly(out, "preset.def_net.contours=0.1", "guided_times=[7]") == 2
    assert sorted(path.name for path in out.iterdir()) == names
    assert run(*command, "data.phases=3", f"out={out}") == 2
    assert "already exists" in capsys.readouterr().err
    with killed_at(7):
        weekly(out)
    assert (out / "model.pt").read_bytes() == before
    # Killed once its start has been replaced.
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("train_def"), "loss_curve", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            weekly(out)
    assert (out / "model.pt").read_bytes() != before
    assert weekly(out) == 0
    saved, expected = (bits(torch.load(f / "model.pt", weights_only=True)) for f in (out, whole))
    assert saved == expected
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.usefixtures("scripts")
def test_eval_interpolation_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["eval_interpolation", *TINY, *BRIEF[1:], *BRIEF_REF_NET, "data.phases=4", "held_out=[1]"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, f"out={whole}") == 0
    for stage in ("ref_net", "def_net"):
        with killed_at(4, stage):
            run(*command, f"out={out}")
    # Killed among the pictures, when both networks are there.
    with monkeypatch.context() as patch:
        script = importlib.import_module("eval_interpolation")
        patch.setattr(script, "draw", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(*command, f"out={out}")
        patch.undo()
        patch.setattr(importlib.import_module("stnerp.fit"), "_Level", lambda *_: pytest.fail("fitted again"))
        assert run(*command, f"out={out}") == 0
    for name in ("model.pt", "ref_net.pt"):
        saved, expected = (bits(torch.load(f / name, weights_only=True)) for f in (out, whole))
        assert saved == expected
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (out, whole)]
    assert names[0] == names[1]


@pytest.mark.usefixtures("scripts")
def test_ctrl_c_outside_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.import_module("train_def"), "load_data", lambda _, n=number: os.kill(os.getpid(), n)
            )
            assert run("train_def", *TINY, *BRIEF, f"out={tmp_path}") == code
        assert capsys.readouterr().err.splitlines() == ["error: interrupted"]


def test_a_state_is_all_of_it() -> None:
    net = torch.nn.Linear(3, 1)
    adam = torch.optim.Adam(net.parameters())
    draw, history = np.random.default_rng(1), [{"step": 1, "loss": 0.5}]
    state = State({"net": net, "adam": adam}, history, draw, step=1)

    def step() -> list[float]:
        adam.zero_grad()
        net(torch.rand(4, 3)).sum().backward()
        adam.step()
        return [*(float(p.detach().sum()) for p in net.parameters()), float(draw.random()), float(torch.rand(()))]

    step()
    saved = torch.utils._pytree.tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state.to_dict()
    )
    first = [step() for _ in range(3)]
    history.append({"step": 2, "loss": 0.4})
    state.take(saved)
    assert [step() for _ in range(3)] == first
    assert (state.step, history) == (1, [{"step": 1, "loss": 0.5}])


@pytest.mark.slow
def test_killed_for_real(tmp_path: Path) -> None:
    # A small version of what benchmarks/kill.md shows, by processes that are killed.
    settings = ["moments=2", "stops=1", "writes=4", f"out={tmp_path / 'kill'}"]
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kill.py"), *settings], check=True, capture_output=True
    )
    table = (tmp_path / "kill" / "kill.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")
    ]
    counts = [(int(runs), int(same)) for _, runs, _, same, _ in rows[2:] if int(runs)]
    assert sum(runs for runs, _ in counts) == 2 + 4 + 2
    assert all(runs == same for runs, same in counts), table


def test_a_result_within_a_stage_is_written_with_a_checked_state_only(tmp_path: Path) -> None:
    def check() -> None:
        raise FitError("weights are not finite")

    path = tmp_path / "fit.ckpt"
    with Progress(path, {}) as fit:
        with pytest.raises(FitError, match="not finite"), fit.stage("net", State({}, [], check=check)):
            fit.kept("pull", lambda: {"pull": torch.zeros(1)})
        assert not path.exists()

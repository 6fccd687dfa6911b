"""Memory is predicted before it is taken; what there is, is read where the system tells it."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stnerp import Grid, InputError, Series, fit_deformation, fit_reference, memory
from stnerp.memory import GIB, available_bytes, def_net_bytes, ref_net_bytes, require_memory
from stnerp.presets import FAST, PAPER, Level

CPU = torch.device("cpu")
CT = Grid((512, 512, 136), (0.97, 0.97, 2.5))
SMALL = Grid((144, 112, 72), (2.5, 2.5, 2.5))


@pytest.mark.parametrize("preset", [FAST, PAPER], ids=["fast", "paper"])
def test_more_voxels_images_and_times_need_more(preset: object) -> None:
    settings = preset.def_net  # type: ignore[attr-defined]
    needed = def_net_bytes(SMALL, [SMALL] * 3, 2, settings)
    assert def_net_bytes(CT, [CT] * 3, 2, settings) > needed
    assert def_net_bytes(SMALL, [SMALL] * 9, 2, settings) > needed
    assert def_net_bytes(SMALL, [SMALL] * 3, 6, settings) >= needed
    assert def_net_bytes(SMALL, [SMALL] * 3, 2, settings, ref_net=False) < needed
    ref_net = preset.ref_net  # type: ignore[attr-defined]
    assert ref_net_bytes(CT, ref_net) > ref_net_bytes(SMALL, ref_net)


def test_the_dearest_level_counts_and_slabs_bound_it() -> None:
    coarse = replace(FAST.def_net, levels=FAST.def_net.levels[:1])
    assert def_net_bytes(CT, [CT] * 9, 6, coarse) < def_net_bytes(CT, [CT] * 9, 6, FAST.def_net)
    # The network on few points, so that what a step looks at is the dearest.
    everywhere = replace(FAST.def_net, levels=(Level(1.0, 4.0, 1),), network_mm=12.0, voxels_per_step=None)
    some = replace(everywhere, voxels_per_step=2**20)
    fewer = replace(everywhere, voxels_per_step=2**19)
    needed = [def_net_bytes(CT, [CT] * 9, 6, settings) for settings in (fewer, some, everywhere)]
    assert needed == sorted(needed)
    # A step of so many voxels takes the same of any image.
    voxels = CT.with_spacing((1.0, 1.0, 2.5)).voxels
    share = (needed[2] - needed[1]) / (voxels - 1.2 * 2**20)
    assert share == pytest.approx((needed[1] - needed[0]) / (1.2 * 2**19), rel=0.05)


def test_a_fit_that_does_not_fit_is_refused_before_it_starts(
    phantom_series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1e5)
    path = tmp_path / "fit.ckpt"
    for fit, name in ((fit_reference, "Ref-Net"), (fit_deformation, "Def-Net")):
        with pytest.raises(
            InputError, match=rf"{name}: needs about 0\.\d GiB of memory, 0\.0 GiB are avail"
        ) as error:
            fit(phantom_series, checkpoint=path, progress=False, device="cpu")  # type: ignore[operator]
        assert "coarser voxels" in str(error.value)
        assert "\n" not in str(error.value)
    assert not path.exists()
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1e9)
    monkeypatch.setattr("stnerp.fit.flow_bytes", lambda *_: 1e10)
    with pytest.raises(InputError, match="the flow between neighbours: needs about 9"):
        fit_deformation(phantom_series, appearance="blend", progress=False, device="cpu")


def test_what_may_fit_is_told_and_what_fits_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "stnerp")
    monkeypatch.setattr(memory, "available_bytes", lambda _: 8.0 * GIB)
    require_memory(7.9 * GIB, CPU, "Def-Net")
    assert caplog.text == ""
    require_memory(9 * GIB, CPU, "Def-Net")  # a prediction may be 30 % too high
    assert "Def-Net: needs about 9.0 GiB of memory, 8.0 GiB are available" in caplog.text
    with pytest.raises(InputError, match=r"12\.0 GiB"):
        require_memory(12 * GIB, CPU, "Def-Net")
    monkeypatch.setattr(memory, "available_bytes", lambda _: None)  # no one knows
    require_memory(1e6 * GIB, CPU, "Def-Net")


def test_the_smallest_limit_counts(tmp_path: Path) -> None:
    files = {
        "meminfo": "MemTotal:       24683656 kB\nMemFree:        16876960 kB\nMemAvailable:   2048 kB\n",
        "v2": "0::/user.slice/run.scope\n",
        "v1": "9:name=systemd:/\n4:cpu,memory:/job/7\n0::/\n",
        "user.slice/run.scope/memory.max": "max\n",
        "user.slice/run.scope/memory.current": "500\n",
        "user.slice/memory.max": "1000\n",
        "user.slice/memory.current": "900\n",
        "user.slice/memory.stat": "anon 700\nfile 200\ninactive_file 150\n",
        "memory/memory.limit_in_bytes": "5000\n",
        "memory/memory.usage_in_bytes": "4000\n",
        "memory/memory.stat": "cache 900\ntotal_inactive_file 800\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert list(memory._of_the_machine(tmp_path / "meminfo")) == [2048 * 1024]
    # What the system may take back (files that were read) is there.
    assert list(memory._of_the_containers(tmp_path / "v2", tmp_path)) == [1000 - 900 + 150]
    # In a container, /job/7 is not there, and the container's own limit is at the top.
    assert list(memory._of_the_containers(tmp_path / "v1", tmp_path)) == [5000 - 4000 + 800]
    assert list(memory._of_the_containers(tmp_path / "nowhere", tmp_path)) == []


def test_this_machine_has_some() -> None:
    available = available_bytes(CPU)
    assert available is None or 2**20 < available < 2**50


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("size", [(96, 80, 56), (144, 112, 72)])
def test_prediction_and_measurement(size: tuple[int, int, int]) -> None:
    # A process of its own, one step a level: memory doesn't grow with steps.
    program = f"""
    import re, torch, torch._dynamo
    import numpy as np
    from stnerp import fit_deformation, load_series
    from stnerp.geometry import Grid
    from stnerp.presets import FAST
    from stnerp.memory import def_net_bytes
    grid = Grid({size}, tuple(360 / n for n in {size}))
    noise = np.random.default_rng(0).normal(0, 300, grid.shape).astype(np.int16)
    series = load_series([grid.image(noise)] * 4, [0, 1, 2, 3], period=4, window="ct")
    def held(name):
        return 1024 * int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
    open("/proc/self/clear_refs", "w").write("5")
    before = held("VmRSS")
    levels = [(level.spacing_mm, level.lattice_mm, 1) for level in FAST.def_net.levels]
    fit_deformation(series, None, levels=levels, progress=False, device="cpu")
    print(def_net_bytes(grid, [grid] * 3, 2, FAST.def_net, ref_net=False) / (held("VmHWM") - before))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert 0.7 < float(done.stdout) < 1.3

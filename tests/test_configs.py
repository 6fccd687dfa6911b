"""Every config composes, and the presets' YAML says what stnerp/presets.py says."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import composed as from_hydra
from conftest import optional

from stnerp import MissingFileError
from stnerp.presets import PAPER, Preset, preset_of, with_changes

if TYPE_CHECKING:
    from omegaconf import DictConfig

OmegaConf = optional("omegaconf", "scripts").OmegaConf

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = ("files", "manifest", "tcia_4d_lung", "tcia_4d_lung_phantom", "phantom", "simulated")  # of scripts/data.py

LONGITUDINAL = ("interpolation", "ablation", "registration")


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(script: str, *overrides: str) -> DictConfig:
    config = from_hydra(script, "out=runs/x", *overrides)
    OmegaConf.resolve(config)
    return config


@pytest.mark.parametrize("preset", names("preset"))
@pytest.mark.parametrize("data", names("data"))
@pytest.mark.parametrize("script", ["train_ref", "train_def", "eval_interpolation"])
def test_every_data_and_preset_composes(script: str, data: str, preset: str) -> None:
    config = composed(script, f"data={data}", f"preset={preset}")
    if not data.startswith("dirlab"):  # for scripts/eval_dirlab.py
        assert config.data.kind in KINDS
    assert config.overwrite is False


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes(experiment: str) -> None:
    for script in ("train_ref", "train_def", "eval_interpolation"):
        config = composed(script, f"experiment={experiment}")
        assert set(OmegaConf.missing_keys(config)) == set()
        assert config.data != composed(script).data  # the experiment chose its data


@pytest.mark.parametrize("data", ["dirlab", "dirlab_phantom"])
def test_eval_dirlab_composes(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STNERP_DIRLAB", "/elsewhere")
    config = composed("eval_dirlab", f"data={data}")
    assert config.data.kind == data
    assert config.cases == list(range(1, 11))
    assert config.data.folder == {"dirlab": "/elsewhere", "dirlab_phantom": "runs/dirlab_phantom"}[data]
    assert composed("eval_dirlab", f"data={data}", "cases=[2,3]").cases == [2, 3]


SERIES_SCRIPTS = [f"eval_{name}" for name in ("4dct_interpolation", *(f"longitudinal_{n}" for n in LONGITUDINAL))]


@pytest.mark.parametrize("script", SERIES_SCRIPTS)
@pytest.mark.parametrize("data", [name for name in names("data") if not name.startswith("dirlab")])
def test_tables_of_series_compose(script: str, data: str) -> None:
    config = composed(script, f"data={data}", *([] if "4d_lung" not in data else ["data.patient=a"]))
    assert config.data.kind in KINDS
    if "4d_lung" in data:
        assert config.data.series == ("breathing" if script == "eval_4dct_interpolation" else "longitudinal")
        other = composed(script, f"data={data}", "data.patient=a", "data.series=other")
        assert other.data.series == "other"  # the command line has the last word


def test_propagate_points_composes() -> None:
    config = composed("propagate_points", "points=a.csv", "times=[1,2.5]")
    assert (config.times, config.from_time) == ([1, 2.5], None)


def test_propagate_roi_composes() -> None:
    assert composed("propagate_roi", "roi=a.nii.gz", "times=[1,2.5]").times == [1, 2.5]


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_preset_yaml_equals_the_library(name: str) -> None:
    config, preset = composed("train_ref", f"preset={name}").preset, preset_of(name)
    for section, settings in (("ref_net", preset.ref_net), ("def_net", preset.def_net)):
        values = OmegaConf.to_container(config[section])
        # Every setting is spelled out: a default that changes in the library can't slip through.
        assert set(values) == set(asdict(settings)), f"{section}: run `make presets`"
        assert with_changes(type(settings)(), values) == settings, f"{section}: run `make presets`"
    assert set(config) == {"ref_net", "def_net"} == set(asdict(Preset()))


def test_settings_can_be_overridden() -> None:
    config = composed(
        "train_def", "preset=paper", "preset.def_net.diffusion=0.1", "preset.def_net.levels=[[8,8,60],[4,8,60]]"
    )
    settings = with_changes(PAPER.def_net, OmegaConf.to_container(config.preset.def_net))
    assert settings.diffusion == 0.1
    assert [(level.spacing_mm, level.lattice_mm, level.iterations) for level in settings.levels] == [
        (8, 8, 60),
        (4, 8, 60),
    ]
    assert settings.layers == PAPER.def_net.layers


def test_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STNERP_DATA", raising=False)
    assert composed("train_ref", "data=cine_mr").data.images == "../shared/data/cine_mr/cine.nii.gz"
    monkeypatch.setenv("STNERP_DATA", "/elsewhere")
    assert composed("train_ref", "data=cine_mr").data.images == "/elsewhere/cine_mr/cine.nii.gz"


@pytest.mark.parametrize("data", ["cine_mr", "lung_followup", "chest_breathing", "thorax_4dct"])
def test_missing_data_name_the_variable(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "scripts"))
    load_data = importlib.import_module("data").load_data
    monkeypatch.setenv("STNERP_DATA", str(tmp_path))
    with pytest.raises(MissingFileError, match=r"no such file.*, or set STNERP_DATA to a folder in place of"):
        load_data(from_hydra("train_ref", "out=x", f"data={data}").data)
    with pytest.raises(MissingFileError) as caught:  # the user's own path
        load_data(from_hydra("train_ref", "out=x", f"data={data}", f"data.root={tmp_path / 'a'}").data)
    assert "STNERP_DATA" not in str(caught.value)

"""The README holds: its code runs, its commands compose, and what it names exists."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import yaml
from hydra import compose, initialize_config_dir

import stnerp
from stnerp.geometry import Grid
from stnerp.phantom import LABELS, Phantom

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced code of a language; "" for the shell's, which has none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if name == language]


def commands() -> list[list[str]]:
    """Every `python scripts/...`, in blocks and between backticks, in words."""
    text = "\n".join(blocks("")).replace("\\\n", " ") + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", README))
    lines = [line for line in text.splitlines() if line.startswith("python scripts/")]
    return [shlex.split(line, comments=True) for line in lines]


def test_first_come_what_it_is_and_the_two_commands() -> None:
    lines = README.splitlines()
    assert lines[0] == "# stnerp"
    top = "\n".join(lines[:10])
    assert "make demo" in top
    assert "make test" in top


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"@@\w*@@|@@", README) == []


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_compiles(number: int) -> None:
    compile(blocks("python")[number], f"README block {number}", "exec")


def test_own_data_takes_five_lines() -> None:
    assert sum(bool(line.strip()) for line in blocks("python")[0].splitlines()) == 5


def test_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phantom = Phantom((24, 19, 12), 15.0)
    for name, t in {"day0": 0.0, "day12": 0.3, "day30": 0.5}.items():
        sitk.WriteImage(phantom.image(t), str(tmp_path / f"{name}.nii.gz"))
    heart = sitk.Cast(phantom.labels(0.0) == LABELS["heart"], sitk.sitkUInt8)
    sitk.WriteImage(heart, str(tmp_path / "gtv.nii.gz"))
    monkeypatch.chdir(tmp_path)
    # The same calls with a handful of steps: what comes out is no good, but it comes out in a second.
    quick = {"progress": False, "device": "cpu"}
    monkeypatch.setattr(stnerp, "fit_reference", partial(stnerp.fit_reference, iterations=20, **quick))
    monkeypatch.setattr(stnerp, "fit_deformation", partial(stnerp.fit_deformation, levels=[(15, 30, 4)], **quick))

    own: dict[str, Any] = {}
    exec(blocks("python")[0], own)
    assert (tmp_path / "patient.pt").is_file()
    assert own["model"].times == (0, 12, 30)
    assert own["image"].GetNumberOfComponentsPerPixel() == 1
    assert own["displacement_mm"].GetNumberOfComponentsPerPixel() == 3
    sitk.DisplacementFieldTransform(own["displacement_mm"])

    more: dict[str, Any] = {"stnerp": stnerp}
    exec(blocks("python")[1], more)
    assert Grid.of(more["gtv"]).is_close(Grid.of(more["day12"]))
    assert sitk.GetArrayViewFromImage(more["gtv"]).any()
    assert more["there_mm"].shape == (1, 3)
    assert more["jacobian"].GetSize() == phantom.image(0.0).GetSize()


def test_there_are_commands() -> None:
    scripts = {Path(words[1]).name for words in commands()}
    scripts_here = {path.name for path in (ROOT / "scripts").glob("*.py") if "launch(main)" in path.read_text()}
    assert scripts == scripts_here


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_compose(words: list[str]) -> None:
    assert (ROOT / words[1]).is_file()
    overrides = [re.sub(r"@@\w+@@", "1", word) for word in words[2:]]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert compose(Path(words[1]).stem, overrides).out


@pytest.mark.parametrize("group", ["experiment", "data", "preset"])
def test_configs_that_are_named_exist(group: str) -> None:
    named = set(re.findall(rf"\b{group}=(\w+)", README))
    existing = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")}
    assert named <= existing
    if group != "data":
        assert named == existing  # none is left untold


def test_files_that_are_named_exist() -> None:
    for text in (README, CONTRIBUTING):
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        paths = re.findall(r"\b(?:stnerp|scripts|configs|docs|tests|benchmarks)/[\w./]*\w", text)
        missing = [path for path in {*links, *paths} if not (ROOT / path).exists()]
        assert missing == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"^(?:make|.*`make) ([\w-]+)", README + CONTRIBUTING, re.MULTILINE))
    assert {"demo", "test", "lint"} <= named <= targets


def test_functions_beside_equations_exist() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\|.*`stnerp/\w+\.py`", line)]
    assert len(rows) >= 9
    for row in rows:
        code = re.findall(r"`([^`]+)`", row.split("|")[3])
        sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in code if "/" in name)
        for name in (name.rpartition(".")[2] for name in code if "/" not in name):
            assert re.search(rf"^\s*(?:(?:def|class) )?{name}\b\s*[(:=]", sources, re.MULTILINE), f"{name}: {row}"


def test_citation_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == stnerp.__version__
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("ST-NeRP: Spatial-Temporal Neural Representation Learning")
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Qiu", "Shen", "Liu", "Liu", "Chen", "Xing"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_changelog_has_this_version() -> None:
    assert f"## [{stnerp.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

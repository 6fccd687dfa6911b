"""The README holds: what it names exists. That its code runs: tests/test_docs.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import stnerp

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


def test_own_data_takes_five_lines() -> None:
    assert sum(bool(line.strip()) for line in blocks("python")[0].splitlines()) == 5


def test_there_are_commands() -> None:
    scripts = {Path(words[1]).name for words in commands()}
    scripts_here = {path.name for path in (ROOT / "scripts").glob("*.py") if "launch(main)" in path.read_text()}
    assert scripts == scripts_here


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

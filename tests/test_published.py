"""The paper's tables as they were typed: their means are the means of their rows, to the last digit printed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
PAPER = Path(__file__).parents[2] / "shared" / "paper" / "st-nerp.txt"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("published")


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([float(row[name]) for row in rows]))


def half_a_digit(name: str) -> float:
    """Half of the last digit printed; where a mean lies right between two, either is right."""
    return 0.00501 if name.endswith("psnr_db") else 0.000501


@pytest.mark.parametrize("table", ["TABLE_1", "TABLE_2"])
def test_means_of_the_interpolation_tables(published: Any, table: str) -> None:
    rows = getattr(published, table)
    for printed in (row for row in rows if row["scan"] == "mean"):
        own = [row for row in rows if row["case"] == printed["case"] or printed["case"] == "all"]
        own = [row for row in own if row["scan"] in ("3", "4", "6", "8")]
        for name in ("target_psnr_db", "rest_psnr_db", "target_ssim", "rest_ssim"):
            assert float(printed[name]) == pytest.approx(mean(own, name), abs=half_a_digit(name))


def test_table_6_is_the_mean_of_tables_3_and_5(published: Any) -> None:
    for printed in published.TABLE_6:
        table = published.TABLE_3 if printed["task"] == "interpolation" else published.TABLE_5
        own = [row for row in table if row["method"] == printed["method"]]
        own = [row for row in own if row.get("task", "registration") == printed["task"]]
        assert len(own) == 2
        for name in ("psnr_db", "ssim", "dice"):
            assert float(printed[name]) == pytest.approx(mean(own, name), abs=half_a_digit(name))


def test_table_4(published: Any) -> None:
    figures = {r["method"]: (float(r["tre_mean_mm"]), float(r["tre_std_mm"])) for r in published.TABLE_4}
    assert len(figures) == 7
    assert figures["ST-NeRP"] == (1.06, 1.23)
    assert min(figures.values()) == figures["Cycle-consistent INR"]
    assert list(published.DIRLAB_DISPLACEMENT_MM) == list(range(1, 11))
    for row in published.DIRLAB:  # snapping is worth about 0.1 mm
        snapped, free = row["tre_snapped_mean_mm"], row["tre_mean_mm"]
        assert free is None or 0.1 < float(free) - float(snapped) < 0.15


@pytest.mark.skipif(not PAPER.is_file(), reason="needs ../shared/paper")
@pytest.mark.parametrize(
    ("table", "head", "as_printed"),
    [
        ("TABLE_1", "Case/S\t", None),
        ("TABLE_2", "Case/Scan", None),
        ("TABLE_3", "Tasks\tMethod\tFraction", lambda row: (row["task"] == "interpolation", row["method"])),
        ("TABLE_4", "Method\tmean", None),
        ("TABLE_5", "Scheme\t", None),
        ("TABLE_6", "\nTABLE VI", lambda row: row["method"]),
    ],
)
def test_every_figure_is_the_papers(
    published: Any, table: str, head: str, as_printed: Callable[[dict[str, Any]], Any] | None
) -> None:
    """To the last digit, in the order of its lines."""
    rows = getattr(published, table)
    rows = rows if as_printed is None else sorted(rows, key=as_printed)
    text = PAPER.read_text(encoding="utf-8")
    lines = re.sub(r"\([^)\n]*\)", "", text[text.index(head) :])  # brackets hold changes in percent
    figures = re.findall(r"\d+\.\d+|(?<=\t)(?:0|\d{4})(?=[\t\n])", lines)  # and numbers of folded voxels
    typed = [str(value) for row in rows for name, value in row.items() if figure(name) and value is not None]
    assert figures[: len(typed)] == typed


def figure(name: str) -> bool:
    return name.endswith(("_db", "ssim", "dice", "_mm", "voxels"))

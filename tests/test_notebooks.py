"""The notebooks run from top to bottom, and are committed without what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import optional

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def test_there_are_four() -> None:
    names = ["comparing_methods", "first_fit", "monitoring_a_tumour", "your_own_series"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_was_printed_is_kept(path: Path) -> None:
    assert cells(path)[0]["source"][0].startswith("# ")
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = optional("nbformat", "notebooks"), optional("nbclient", "notebooks")
    optional("ipykernel", "notebooks")
    # Tensors are so small that a second thread costs more than it brings.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    # CellExecutionError names the cell and shows its traceback.
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert all(output["output_type"] != "error" for cell in notebook.cells for output in cell.get("outputs", []))

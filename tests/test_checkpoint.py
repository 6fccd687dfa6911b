"""Files: complete or absent, plain values only, and a clear word about anything else."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stnerp import STNeRP, checkpoint, fit_deformation, load_series
from stnerp.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from stnerp.errors import InputError, MissingFileError, StnerpError

CONTENT = {"weights": {"a": torch.arange(6.0).reshape(2, 3)}, "times": [0.0, 1.5], "name": "x", "period": None}


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_round_trip(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "new" / "folder" / "a.pt", "thing", CONTENT)
    read = read_checkpoint(path, "thing")
    assert torch.equal(read["weights"]["a"], CONTENT["weights"]["a"])  # type: ignore[index]
    assert (read["times"], read["name"], read["period"]) == ([0.0, 1.5], "x", None)
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", "thing", CONTENT)
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, "thing", {"bad": lambda: None}, overwrite=True)
    assert read_checkpoint(path, "thing")["name"] == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", "thing", CONTENT)
    with pytest.raises(InputError, match=r"a\.pt.*overwrite"):
        write_checkpoint(path, "thing", {**CONTENT, "name": "y"})
    assert read_checkpoint(path, "thing")["name"] == "x"
    write_checkpoint(path, "thing", {**CONTENT, "name": "y"}, overwrite=True)
    assert read_checkpoint(path, "thing")["name"] == "y"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="folder"):
        write_checkpoint(tmp_path / "file" / "a.pt", "thing", CONTENT)


@pytest.mark.parametrize("wrap", [True, False], ids=["in a checkpoint", "a bare pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, wrap: bool) -> None:
    path, target = tmp_path / "evil.pt", tmp_path / "made by the payload"
    if wrap:
        torch.save({"format": FORMAT, "kind": "thing", "weights": Payload(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"format": FORMAT, "kind": "thing", "weights": Payload(target)}, protocol=2))
    with pytest.raises(InputError, match=r"evil\.pt"):
        read_checkpoint(path, "thing")
    assert not target.exists()
    # The payload works where nobody takes care.
    if not wrap:
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(MissingFileError, match=path.name):
            read_checkpoint(path, "thing")


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 700, -1, -30])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = write_checkpoint(tmp_path / "a.pt", "thing", CONTENT)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.pt"):
        read_checkpoint(path, "thing")


@pytest.mark.parametrize(
    "content", [b"not a model", b"\x80\x02}q\x00.", bytes(range(256)) * 8, b"\n\n", b"I99\n."]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pt"):
        read_checkpoint(path, "thing")


def test_zip_archive_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"a\.pt"):
        read_checkpoint(path, "thing")


def test_another_kind_and_a_newer_format(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", "thing", CONTENT)
    with pytest.raises(InputError, match="not a model"):
        read_checkpoint(path, "model")
    torch.save({"format": FORMAT + 1, "kind": "thing"}, path)
    with pytest.raises(InputError, match="newer"):
        read_checkpoint(path, "thing")
    torch.save([1, 2, 3], path)
    with pytest.raises(StnerpError, match="not a thing"):
        read_checkpoint(path, "thing")


def test_tensors_come_to_the_cpu(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", "thing", {"half": torch.ones(3, dtype=torch.float16)})
    half = read_checkpoint(path, "thing")["half"]
    assert half.device.type == "cpu"
    assert half.dtype == torch.float16


def test_an_older_format_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "a.pt", "thing", {"width_cm": 2.0})
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(InputError, match=r"a\.pt: format 1 is unknown; write it again"):
        read_checkpoint(path, "thing")

    def to_2(content: dict[str, object]) -> dict[str, object]:
        return {"width_mm": 10 * float(content["width_cm"])}  # type: ignore[arg-type]

    def to_3(content: dict[str, object]) -> dict[str, object]:
        return {"size_mm": [content["width_mm"]]}

    monkeypatch.setattr(checkpoint, "MIGRATIONS", {1: to_2, 2: to_3})
    assert read_checkpoint(path, "thing") == {"format": 3, "kind": "thing", "size_mm": [20.0]}
    write_checkpoint(path, "thing", {"size_mm": [1.0]}, overwrite=True)
    assert read_checkpoint(path, "thing")["size_mm"] == [1.0]


@pytest.mark.parametrize("number", [0, -1, None, "1", 1.0, True])
def test_a_format_that_never_was_is_refused(tmp_path: Path, number: object) -> None:
    path = tmp_path / "a.pt"
    torch.save({"format": number, "kind": "thing"}, path)
    with pytest.raises(InputError, match=r"a\.pt.*format"):
        read_checkpoint(path, "thing")
    torch.save({"kind": "thing"}, path)
    with pytest.raises(InputError, match=r"a\.pt.*format"):
        read_checkpoint(path, "thing")


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    """Wherever it is among the values: torch alone reads on with other numbers."""
    path = write_checkpoint(tmp_path / "a.pt", "thing", CONTENT)
    whole = path.read_bytes()
    at = whole.index(torch.arange(6.0).numpy().tobytes()) + 9
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["weights"]["a"], CONTENT["weights"]["a"])  # type: ignore[index]
    with pytest.raises(InputError, match="damaged"):
        read_checkpoint(path, "thing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a small model's file holds."""
    images = [np.random.default_rng(i).random((4, 5, 6)) for i in range(2)]
    series = load_series(images, spacing_mm=(4.0, 4.0, 4.0))
    small: dict[str, Any] = {"levels": [(8, 16, 1)], "width": 4, "layers": 2, "fourier_width": 4}
    fitted = fit_deformation(series, align="none", progress=False, **small)
    return torch.load(fitted.save(tmp_path_factory.mktemp("model") / "model.pt"), weights_only=True)


def test_a_model_without_a_part_is_refused(model: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "made_up.pt"
    torch.save(model, path)
    assert STNeRP.load(path).image(0.5).GetSize() == (6, 5, 4)
    for name in set(model) - {"flow", "region"}:  # models of 0.1.0 have neither
        torch.save({key: value for key, value in model.items() if key != name}, path)
        with pytest.raises(InputError, match=r"made_up\.pt: .*; give the file that stnerp saved"):
            STNeRP.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"times": [0.0, float("inf")]},
        {"times": 3},
        {"alignments": torch.full((2, 4, 4), torch.nan, dtype=torch.float64)},
        {"grid": {"size": [6, 5, 4]}},
        {"grid": {"size": [0, 5, 4], "spacing_mm": [1, 1, 1], "origin_mm": [0, 0, 0], "direction": [1.0] * 9}},
        {"window": {"low": "a", "high": 1, "name": "x"}},
        {"def_net": {"settings": {"width": -4}, "weights": {}}},
        {"def_net": {"settings": {"unknown": 1}, "weights": {}}},
        {"def_net": None},
        {"flow": True},
        {"ref_net": {}},
    ],
    ids=str,
)
def test_a_model_of_other_values_is_refused(model: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "made_up.pt"
    torch.save(model | change, path)
    with pytest.raises(InputError, match=r"made_up\.pt: is not a (whole )?[^\n]*$"):
        STNeRP.load(path)

"""Broken files of every kind are refused with an error of the library, or read; benchmarks/fuzz.py tries more.

tests/regressions/<reader>/<what went wrong>/ holds files that once ended otherwise, by their place among the
reader's valid ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import optional

optional("hydra", "scripts")
hypothesis = optional("hypothesis", "dev")
st = optional("hypothesis.strategies", "dev")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
REGRESSIONS = Path(__file__).parent / "regressions"
sys.path.insert(0, str(BENCHMARKS))
try:
    import fuzz
finally:
    sys.path.remove(str(BENCHMARKS))

# Some hundred cases in a second or two, of each.
EXAMPLES = {
    "landmarks": 300,
    "manifest": 150,
    "dirlab": 150,
    "config": 60,
    "four_d_lung": 20,
    "dicom": 60,
    "model": 30,
}
Valid = Callable[[str], tuple[Path, dict[str, bytes]]]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    """The folder of a reader's valid files, written once, and the files that are changed."""
    known: dict[str, tuple[Path, dict[str, bytes]]] = {}

    def of(name: str) -> tuple[Path, dict[str, bytes]]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name) / "files"
            known[name] = folder, fuzz.seeds_of(fuzz.READERS[name], folder)
        return known[name]

    return of


EDITS = st.lists(
    st.builds(
        fuzz.Edit,
        st.sampled_from(sorted(set(fuzz.KINDS))),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**24 - 1),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_valid_files_are_accepted(name: str, valid: Valid) -> None:
    folder, files = valid(name)
    assert files
    for file, content in files.items():
        assert fuzz.outcome(fuzz.READERS[name], folder, file, content, content), file


@pytest.mark.parametrize("name", fuzz.READERS)
def test_broken_files_are_refused_or_read(name: str, valid: Valid, capfd: pytest.CaptureFixture[str]) -> None:
    folder, files = valid(name)

    @hypothesis.settings(
        max_examples=EXAMPLES.get(name, 60),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(sorted(files)), EDITS)
    def check(file: str, edits: list[fuzz.Edit]) -> None:
        fuzz.outcome(fuzz.READERS[name], folder, file, fuzz.broken(file, files[file], edits), files[file])

    check()
    capfd.readouterr()  # what native readers print


KEPT = sorted(path for path in REGRESSIONS.glob("*/*") if path.is_dir())


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_went_wrong(kept: Path, valid: Valid, capfd: pytest.CaptureFixture[str]) -> None:
    name = kept.parent.name
    folder, files = valid(name)
    found = [path for path in kept.rglob("*") if path.is_file()]
    assert found
    for path in found:
        file = path.relative_to(kept).as_posix()
        fuzz.outcome(fuzz.READERS[name], folder, file, path.read_bytes(), files[file])
    capfd.readouterr()


def test_the_same_case_every_time(valid: Valid, tmp_path: Path) -> None:
    """The seed and the number of a case are enough to have it again."""
    _, files = valid("dicom")
    again = fuzz.seeds_of(fuzz.READERS["dicom"], tmp_path / "again")
    assert again == files
    draws = [fuzz.drawn(seeds, fuzz._draw("dicom", 3, 17)) for seeds in (files, again)]
    assert draws[0] == draws[1]
    assert draws[0] != fuzz.drawn(files, fuzz._draw("dicom", 3, 18))


def test_a_finding_is_found(valid: Valid) -> None:
    """The net has no hole: an error of another kind is none of the library's."""

    def read(folder: Path, name: str) -> None:
        if b"x" in (folder / name).read_bytes():
            raise KeyError("x")

    folder, files = valid("landmarks")
    file = next(iter(files))
    reader = fuzz.Reader(fuzz.READERS["landmarks"].write, read)
    with pytest.raises(KeyError):
        fuzz.outcome(reader, folder, file, b"x", files[file])
    assert (folder / file).read_bytes() == files[file]

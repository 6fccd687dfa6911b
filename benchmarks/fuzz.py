"""python benchmarks/fuzz.py reader=landmarks,manifest cases=100000 seed=0

What every reader makes of broken files: small valid ones, changed at random (bytes and numbers of headers, words
of text, blocks left out, doubled or cut off), are read as a user's would be. A case is accepted or refused with an
error of the library; anything else is a finding: another exception, a warning, a crash of native code, more than
`limit_s` seconds of CPU time or `limit_mib` of memory. Findings are kept in `out`/<reader>/, one of a kind, with
what was wrong. Without `reader`: all of them, in turn. A case depends on seed and number alone.

`engine=atheris` lets coverage guide the changes instead (`pip install atheris`), for one reader of text:
landmarks, dirlab or manifest. It stops at the first finding.

Writes `out`/fuzz.json and prints the table that fuzz.md beside this file holds.
"""

from __future__ import annotations

import gzip
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydicom.uid import UID

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from data import load_data
from run import chosen, settings_of, start
from run_directory import CONFIGS, check_numbers
from run_directory import settings_of as section_of

from stnerp import InputError, MissingDependencyError, STNeRP, StnerpError, fit_deformation, load_series
from stnerp.geometry import Grid
from stnerp.io import dirlab, landmarks, manifest
from stnerp.io.dicom import DicomSeries, read_dicom_series, write_dicom_series
from stnerp.io.dirlab import dirlab_case, dirlab_grid, write_case
from stnerp.io.four_d_lung import breathing_series, index_4d_lung
from stnerp.io.image import as_images
from stnerp.io.landmarks import read_landmarks, write_landmarks
from stnerp.io.manifest import read_manifest
from stnerp.io.nifti_4d import write_nifti_4d
from stnerp.io.rtstruct import read_rtstruct, roi_mask, rtstruct_contents, write_rtstruct
from stnerp.presets import DefNetSettings, RefNetSettings, with_changes
from stnerp.report import markdown_table

GRID = Grid((5, 4, 4), (1.0, 2.0, 2.5), (-3.0, 7.0, 11.0))
Read = Callable[[Path, str], object]


@dataclass
class Settings:
    """What the command line can change.

    Attributes:
        reader: names of `READERS`, or all.
        cases: of each.
        seed: of the changes.
        first: number of the first case.
        engine: random or atheris.
        limit_s: CPU time of a case.
        limit_mib: memory that a case may take.
        out: where findings are kept.
        scratch: where the files lie; best in memory.
    """

    reader: Any = "all"
    cases: int = 1000
    seed: int = 0
    first: int = 0
    engine: str = "random"
    limit_s: float = 2.0
    limit_mib: int = 1024
    out: str = "runs/fuzz"
    scratch: str = "/dev/shm"


@dataclass(frozen=True)
class Reader:
    """A reader and what it is given.

    Attributes:
        write: small valid files into a folder.
        read: one of them, by the folder and its name there.
        fuzzed: pattern of the files that are changed.
    """

    write: Callable[[Path], None]
    read: Read
    fuzzed: str = "*"


# -- changes


@dataclass(frozen=True)
class Edit:
    """One change of a file; its numbers mean something for a file of any length.

    Attributes:
        kind: of `KINDS`.
        where, other: places, from 0 to 1.
        choice: of a value.
    """

    kind: str
    where: float
    other: float
    choice: int


KINDS = ("byte", "number", "number", "word", "word", "cut", "drop", "double", "overwrite")
TEXT_KINDS = ("byte", "word", "word", "word", "word", "word", "cut", "drop", "double", "overwrite")
NUMBERS = [
    struct.pack(form, value)
    for form, values in {
        "<b": (0, 1, -1, -128, 127),
        "<h": (0, 1, 2, 7, -1, -32768, 32767, 256),
        ">h": (1, 32767),
        "<i": (0, 1, -1, 2**31 - 1, -(2**31), 2**16, 4096),
        ">i": (1, 2**31 - 1),
        "<q": (-1, 2**63 - 1, 2**32, 2**40),
        "<f": (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e30, 1e-40),
        "<d": (0.0, float("nan"), float("inf"), 1e300, 5e-324),
    }.items()
    for value in values
]
WORDS = [
    *(b"0", b"1", b"-1", b"2", b"4", b"0.5", b"-0.0", b"1e-320", b"1e30", b"1e308", b"1e999", b"nan", b"inf"),
    *(b"-inf", b"65535", b"65536", b"2147483647", b"4294967296", b"9223372036854775808", b"9" * 5000, b"0x10"),
    *(b"1_0", b"1,5", b"", b" ", b"\n", b"\t", b"\0", b"\r\n", b"\\", b"'", b'"', b"#", b":", b"-", b"[", b"]"),
    *(b"{", b"}", b"&a *a", b"\xff\xfe", *(text.encode() for text in ("²", "٣", "\ufeff", "\u2028", "é"))),
    *(b"../../x", b"/dev/zero", b"*", b"**", b"?", b"<script>", b"=cmd()", b"%n%s", b"null", b"true", b"x" * 300),
    *(b"uint8", b"double", b"MET_DOUBLE", b"LIST", b"gzip", b"index", b"point", b"RTSTRUCT", b"100%"),
]  # fmt: skip
_WORD = re.compile(rb"[-+.\w]+|[^\s\w]")


def changed(content: bytes, edits: Sequence[Edit]) -> bytes:
    """A file's content after some edits."""
    for edit in edits:
        content = _CHANGES[edit.kind](content, edit)
    return content


def _span(content: bytes, edit: Edit) -> tuple[int, int]:
    """A short block, more often than not."""
    first = int(edit.where * len(content))
    return first, min(len(content), first + 1 + int(edit.other**4 * len(content)))


def _byte(content: bytes, edit: Edit) -> bytes:
    at = int(edit.where * len(content))
    return content[:at] + bytes([edit.choice % 256]) + content[at + 1 :]


def _number(content: bytes, edit: Edit) -> bytes:
    number = NUMBERS[edit.choice % len(NUMBERS)]
    at = int(edit.where * len(content))
    at -= at % min(len(number), 2)  # fields of headers lie at even places, more often than not
    return content[:at] + number + content[at + len(number) :]


def _word(content: bytes, edit: Edit) -> bytes:
    """One word replaced; of those that begin in a block, so that long files aren't searched."""
    begin = int(edit.where * len(content))
    found = _WORD.search(content, begin)
    if found is None:
        return content + WORDS[edit.choice % len(WORDS)]
    return content[: found.start()] + WORDS[edit.choice % len(WORDS)] + content[found.end() :]


def _cut(content: bytes, edit: Edit) -> bytes:
    return content[: int(edit.where * len(content))]


def _drop(content: bytes, edit: Edit) -> bytes:
    first, last = _span(content, edit)
    return content[:first] + content[last:]


def _double(content: bytes, edit: Edit) -> bytes:
    first, last = _span(content, edit)
    return content[:last] + content[first:]


def _overwrite(content: bytes, edit: Edit) -> bytes:
    first, last = _span(content, edit)
    to = edit.choice % (len(content) + 1)
    return content[:to] + content[first:last] + content[to + last - first :]


_CHANGES: dict[str, Callable[[bytes, Edit], bytes]] = {
    "byte": _byte,
    "number": _number,
    "word": _word,
    "cut": _cut,
    "drop": _drop,
    "double": _double,
    "overwrite": _overwrite,
}


def broken(name: str, content: bytes, edits: Sequence[Edit]) -> bytes:
    """A file changed; of a gzipped one, two times out of three, what is in it."""
    if name.endswith(".gz") and edits and edits[0].choice % 3:
        return gzip.compress(changed(gzip.decompress(content), edits), 1, mtime=0)
    return changed(content, edits)


def drawn(files: Mapping[str, bytes], draw: random.Random) -> tuple[str, bytes]:
    """A file's name and its new content: one to four edits."""
    name = draw.choice(list(files))
    kinds = KINDS if b"\0" in files[name] else TEXT_KINDS
    edits = [
        Edit(draw.choice(kinds), draw.random(), draw.random(), draw.getrandbits(24))
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4)))
    ]
    return name, broken(name, files[name], edits)


# -- readers


def _voxels(seed: int = 0, dtype: type = np.int16) -> sitk.Image:
    return GRID.image(np.random.default_rng(seed).integers(-1000, 1000, GRID.shape).astype(dtype))


def _labels() -> sitk.Image:
    labels = np.zeros(GRID.shape, np.uint8)
    labels[1:3, 1:3, 1:4] = 1
    return GRID.image(labels)


def _write_images(suffixes: Sequence[str]) -> Callable[[Path], None]:
    """Of two types each, compressed or not."""

    def write(folder: Path) -> None:
        for suffix in suffixes:
            for name, dtype in (("short", np.int16), ("float", np.float32)):
                sitk.WriteImage(_voxels(0, dtype), str(folder / f"{name}{suffix}"), useCompression=name == "float")

    return write


def _read_image(folder: Path, name: str) -> object:
    return [Grid.of(image) for image in as_images(folder / name)[0]]


def _write_4d(folder: Path) -> None:
    volumes = [_voxels(i) for i in range(3)]
    write_nifti_4d(volumes, [0, 35, 70], folder / "even.nii", dtype="int16", time_unit="ms")
    write_nifti_4d(volumes, [0, 35, 70], folder / "even.nii.gz")
    write_nifti_4d(volumes, [0, 1, 7], folder / "uneven.nii", dtype="int16")
    sitk.WriteImage(sitk.JoinSeries(volumes, 5.0, 0.5), str(folder / "joined.mha"))


def _read_4d(folder: Path, name: str) -> object:
    path = folder / name
    if path.suffix == ".json":
        path = path.with_suffix(".nii")
    return load_series(str(path))


def _write_dicom(folder: Path) -> None:
    _write_ct(_voxels()[:, :, :2], folder / "ct", "1.2.3.1", description="Gated, 30%")


def _write_ct(image: sitk.Image, folder: Path, uid: str, description: str = "") -> DicomSeries:
    """The same bytes every time."""
    return write_dicom_series(
        image,
        folder,
        patient_id="p",
        description=description,
        date="20030702",
        time="101500",
        study_uid="1.2.3",
        series_uid=uid,
        frame_uid="1.2.4",
    )


def _write_contours(series: DicomSeries, path: Path, name: str) -> None:
    """The same bytes every time."""
    write_rtstruct(_labels(), {1: name}, series, path)
    dataset = pydicom.dcmread(path)
    for element in dataset.iterall():
        if element.VR in ("DA", "TM"):
            element.value = {"DA": "20030702", "TM": "101500"}[element.VR]
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"{series.series_uid}.9")
    dataset.SeriesInstanceUID = f"{series.series_uid}.8"
    dataset.save_as(path)


def _read_dicom(folder: Path, _: str) -> object:
    return Grid.of(read_dicom_series(folder / "ct"))


def _write_landmarks(folder: Path) -> None:
    points = GRID.index_to_world(np.array([[0.0, 1, 2], [1, 2, 3], [4, 3, 0.5]]))
    write_landmarks(points, folder / "table.csv")
    rows = [" ".join(map(str, point)) for point in points.tolist()]
    (folder / "labels.csv").write_text(
        "\n".join(f"carina {i};{';'.join(row.split())}" for i, row in enumerate(rows))
    )
    (folder / "points.txt").write_text("\n".join(["point", "3", *rows]))
    (folder / "index.txt").write_text("index\n3\n0 1 2\n1 2 3\n4 3 0\n")
    header = "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n"
    (folder / "slicer.fcsv").write_text(
        header + "\n".join(f"{i},{','.join(row.split())},F-{i}" for i, row in enumerate(rows))
    )


def _read_landmarks(folder: Path, name: str) -> object:
    return read_landmarks(folder / name, GRID)


_DIRLAB_GRID = dirlab_grid((6, 5, 4), (1.0, 1.0, 2.5))


def _write_dirlab(folder: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, (6, 5, 4), (300, 3))
    points = _DIRLAB_GRID.index_to_world(voxels.astype(float))
    images = {p: _DIRLAB_GRID.image(np.full(_DIRLAB_GRID.shape, p, np.int16)) for p in (0, 50)}
    write_case(folder, 1, images, {0: points, 50: points}, {0: points[:75]})


def _read_dirlab(folder: Path, name: str) -> object:
    case = dirlab_case(folder, 1, _DIRLAB_GRID)
    phase = 50 if "T50" in name else 0
    if "Images" in name:
        return case.image(phase)
    return case.landmarks(phase) if "Extreme" in name else case.sampled_landmarks(phase)


MANIFEST = """patient: p1
images: [a.nii, b.nii]
times: [0, 12.5]
period: 30
reference: 0
masks: {0: a.nii}
landmarks: [null, b.csv]
label_names: {1: tumour}
window: [-1000, 1000]
"""


def _write_manifest(folder: Path) -> None:
    for name in ("a.nii", "b.nii", "b.csv"):
        (folder / name).touch()
    (folder / "one.yaml").write_text(MANIFEST)
    second = MANIFEST.replace("p1", "p2").replace("\n", "\n    ").rstrip(" ")
    (folder / "cohort.yaml").write_text(f"patients:\n  - {{patient: p1, images: '*.nii'}}\n  - {second}")


def _read_manifest(folder: Path, name: str) -> object:
    return read_manifest(folder / name)


def _write_rtstruct(folder: Path) -> None:
    _write_contours(_write_ct(_voxels(), folder / "ct", "1.2.3.1"), folder / "rs.dcm", "Tumor_c00")


def _read_rtstruct(folder: Path, name: str) -> object:
    rtstruct_contents(folder / name)
    return [roi_mask(roi, GRID) for roi in read_rtstruct(folder / name).rois]


def _write_4d_lung(folder: Path) -> None:
    for percent in (0, 50):
        image = GRID.image(np.full(GRID.shape, percent, np.int16))[:, :, :2]
        description = f"P4^P100^S300^I00003, Gated, {percent}.0%A"
        series = _write_ct(image, folder / f"{percent}", f"1.2.3.{percent + 1}", description=description)
        _write_contours(series, folder / f"{percent}" / "rs.dcm", f"Tumor_c{percent:02d}")


def _read_4d_lung(folder: Path, _: str) -> object:
    collection = index_4d_lung(folder)
    str(collection)
    return [breathing_series(collection, patient, rois=()) for patient in collection.patients]


def _write_model(folder: Path) -> None:
    images = [Grid((6, 5, 4), (4.0, 4.0, 4.0)).image(np.random.default_rng(i).random((4, 5, 6))) for i in range(2)]
    small: dict[str, Any] = {"levels": [(8, 16, 1)], "width": 4, "layers": 2, "fourier_width": 4}
    model = fit_deformation(load_series(images), None, align="none", progress=False, **small)
    model.save(folder / "model.pt")


def _read_model(folder: Path, name: str) -> object:
    return STNeRP.load(folder / name).image(0.5)


OVERRIDES = """data.times=[0,12]
data.reference=0
data.period=30
data.masks={0: m.nii}
data.window=[-100,200]
data.label_names={1: heart}
preset.def_net.levels=[[8,12,60],[4,6,25,1]]
preset.def_net.loss=global_ncc
preset.def_net.diffusion=0.05
preset.ref_net.iterations=20
"""


def _write_config(folder: Path) -> None:
    for i in range(2):
        sitk.WriteImage(_voxels(i), str(folder / f"{'ab'[i]}.nii"))
    sitk.WriteImage(_labels(), str(folder / "m.nii"))
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train_def", ["out=p", "data.images=[a.nii,b.nii]", "data.masks={0: m.nii}"])
    OmegaConf.save(config, folder / "config.yaml")
    for i, line in enumerate(OVERRIDES.splitlines()):
        (folder / f"{i}.override").write_text(line)


_base: dict[Path, Any] = {}


def _read_config(folder: Path, name: str) -> object:
    """As the scripts do: parsed by Hydra, put into the config, read as data and as settings."""
    if folder not in _base:
        _base[folder] = OmegaConf.load(folder / "config.yaml")
    config = _base[folder].copy()
    OmegaConf.set_struct(config, True)
    here = Path.cwd()
    os.chdir(folder)
    try:
        text = (folder / name).read_text(encoding="utf-8", errors="surrogateescape")
        check_numbers([text])
        for override in OverridesParser.create().parse_overrides([text]):
            if override.key_or_group in config:  # Hydra knows no group of that value
                raise InputError(f"{override.key_or_group}: is no single value")
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        with_changes(DefNetSettings(), section_of(config.preset.def_net))
        with_changes(RefNetSettings(), section_of(config.preset.ref_net))
        return load_data(config.data)
    finally:
        os.chdir(here)


READERS: dict[str, Reader] = {
    "nifti": Reader(_write_images([".nii", ".hdr"]), _read_image, "*.[nh]??"),
    "nifti_gz": Reader(_write_images([".nii.gz"]), _read_image),
    "metaimage": Reader(_write_images([".mha", ".mhd"]), _read_image, "*.mh?"),
    "nrrd": Reader(_write_images([".nrrd", ".nhdr"]), _read_image, "*.n*"),
    "series_4d": Reader(_write_4d, _read_4d),
    "dicom": Reader(_write_dicom, _read_dicom, "**/*.dcm"),
    "landmarks": Reader(_write_landmarks, _read_landmarks),
    "dirlab": Reader(_write_dirlab, _read_dirlab, "*/*/*"),
    "manifest": Reader(_write_manifest, _read_manifest, "*.yaml"),
    "rtstruct": Reader(_write_rtstruct, _read_rtstruct, "rs.dcm"),
    "four_d_lung": Reader(_write_4d_lung, _read_4d_lung, "**/*.dcm"),
    "model": Reader(_write_model, _read_model),
    "config": Reader(_write_config, _read_config, "*.override"),
}
#: What is no finding: the library's errors, and those of Hydra and OmegaConf, which scripts say in one line too.
REFUSALS = (StnerpError, HydraException, OmegaConfBaseException)
_TEXT: dict[str, tuple[ModuleType, str]] = {
    "landmarks": (landmarks, "table.csv"),
    "dirlab": (dirlab, "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt"),
    "manifest": (manifest, "one.yaml"),
}


def seeds_of(reader: Reader, folder: Path) -> dict[str, bytes]:
    """The valid files, written into a folder: those that are to be changed, by their names in it."""
    folder.mkdir(parents=True)
    reader.write(folder)
    found = sorted(path for path in folder.glob(reader.fuzzed) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def outcome(reader: Reader, folder: Path, name: str, content: bytes, valid: bytes) -> bool:
    """Whether a changed file is accepted; it is put back afterwards.

    Raises:
        Exception: what is no refusal.
    """
    (folder / name).write_bytes(content)
    try:
        reader.read(folder, name)
    except REFUSALS as error:
        # A header that lies about its size is to be refused before memory is asked for.
        unclear = re.search(r"alloc|memory", str(error), re.IGNORECASE) or "\n" in str(error)
        if unclear and isinstance(error, StnerpError):
            raise AssertionError(f"refused, but how: {error}") from error
        return False
    finally:
        (folder / name).write_bytes(valid)
    return True


# -- one reader after another


CASE, ACCEPTED, REFUSED, FOUND, PEAK_MIB = range(5)


def fuzz(name: str, settings: Settings) -> dict[str, Any]:
    """Every case of a reader, in processes that may die; a row of the table."""
    reader, last = READERS[name], settings.first + settings.cases
    out = Path(settings.out) / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with _scratch(settings) as folder:
        files = seeds_of(reader, folder / "files")
        for file, content in files.items():  # what isn't changed is accepted
            if not outcome(reader, folder / "files", file, content, content):
                raise AssertionError(f"{name}: refuses the valid {file}")
        counts = multiprocessing.get_context("fork").Array("q", [settings.first, 0, 0, 0, 0])
        begin = time.perf_counter()
        while counts[CASE] < last:
            process = multiprocessing.get_context("fork").Process(
                target=_work, args=(reader, name, folder / "files", files, counts, last, settings)
            )
            process.start()
            process.join()
            if counts[CASE] < last:  # killed, while it was at this one
                how = signal.Signals(-process.exitcode).name if process.exitcode else "ended"
                slow = f"SIGPROF, more than {settings.limit_s:g} s"
                file, content = drawn(files, _draw(name, settings.seed, counts[CASE]))
                _keep(out, slow if how == "SIGPROF" else how, counts[CASE], file, content, "killed by a signal")
                (folder / "files" / file).write_bytes(files[file])
                counts[FOUND] += 1
                counts[CASE] += 1
        seconds = time.perf_counter() - begin
    kinds = len([path for path in out.iterdir() if path.is_dir()])
    return {
        "reader": name,
        "cases": settings.cases,
        "accepted": counts[ACCEPTED],
        "refused": counts[REFUSED],
        "findings": counts[FOUND],
        "kinds": kinds,
        "peak MiB": counts[PEAK_MIB],
        "seconds": round(seconds),
    }


def _draw(name: str, seed: int, case: int) -> random.Random:
    return random.Random(f"{name} {seed} {case}")


@contextmanager
def _scratch(settings: Settings) -> Iterator[Path]:
    root = settings.scratch if Path(settings.scratch).is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=root) as folder:
        yield Path(folder)


def _work(
    reader: Reader, name: str, folder: Path, files: dict[str, bytes], counts: Any, last: int, settings: Settings
) -> None:
    """Cases in a process of its own, until the last or until one kills it."""
    _limit(settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while counts[CASE] < last:
        case = counts[CASE]
        file, content = drawn(files, _draw(name, settings.seed, case))
        signal.setitimer(
            signal.ITIMER_PROF, settings.limit_s
        )  # whose signal ends the process, native code included
        try:
            accepted = outcome(reader, folder, file, content, files[file])
            counts[ACCEPTED if accepted else REFUSED] += 1
        except Exception as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            counts[FOUND] += 1
            _keep(Path(settings.out) / name, _kind(error), case, file, content, traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        counts[PEAK_MIB] = max(counts[PEAK_MIB], grown)
        counts[CASE] += 1


def _limit(settings: Settings) -> None:
    """Little memory, no core dumps, silence, and warnings as errors."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + settings.limit_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    torch.set_num_threads(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(sink, stream)
    warnings.simplefilter("error")


def _kind(error: Exception) -> str:
    """Findings of one kind come from one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "stnerp" in Path(frame.filename).parts] or list(frames)
    return f"{type(error).__name__} {Path(own[-1].filename).name} {own[-1].name} {own[-1].lineno}"


def _keep(out: Path, kind: str, case: int, name: str, content: bytes, report: str) -> None:
    folder = out / re.sub(r"\W+", "_", kind)
    if not folder.exists():
        folder.mkdir()
        (folder / Path(name).name).write_bytes(content)
        (folder / "report.txt").write_text(f"case {case}, {name}\n{kind}\n{report}\n", "utf-8", "backslashreplace")


def guided(name: str, settings: Settings) -> None:
    """One text reader under atheris, which ends the program when it is done."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        raise MissingDependencyError("engine=atheris needs atheris; pip install atheris") from None
    if name not in _TEXT:
        raise InputError(f"reader: {name!r}: atheris runs on one of {', '.join(_TEXT)}")
    module, file = _TEXT[name]
    for function in vars(module).values():
        if (
            callable(function)
            and getattr(function, "__module__", "") == module.__name__
            and hasattr(function, "__code__")
        ):
            atheris.instrument_func(function)
    with _scratch(settings) as folder:
        reader = READERS[name]
        files = seeds_of(reader, folder / "files")
        (folder / "corpus").mkdir()
        for path, content in files.items():
            if Path(path).suffix != ".img":
                (folder / "corpus" / Path(path).name).write_bytes(content)

        def one(content: bytes) -> None:
            outcome(reader, folder / "files", file, content, files[file])

        options = [f"-atheris_runs={settings.cases}", f"-seed={settings.seed + 1}", "-max_len=8192"]
        options += [f"-timeout={max(60, round(settings.limit_s))}", f"-rss_limit_mb={settings.limit_mib * 4}"]
        atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
        atheris.Fuzz()


def main(arguments: list[str]) -> None:
    """Fuzz what the command line asks for; the rows of earlier runs stay in the table."""
    settings = settings_of(Settings(), arguments)
    names = chosen(settings.reader, list(READERS), "reader")
    if settings.engine not in ("random", "atheris"):
        raise InputError(f"engine: {settings.engine!r} must be random or atheris")
    if settings.engine == "atheris":
        guided(names[0], settings)
    path = Path(settings.out) / "fuzz.json"
    for name in names:
        row = fuzz(name, settings)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        rows = {key: (known | {name: row})[key] for key in READERS if key in known | {name: row}}
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(markdown_table([row]), flush=True)
    print(markdown_table(list(json.loads(path.read_text(encoding="utf-8")).values())))


if __name__ == "__main__":
    start(main)

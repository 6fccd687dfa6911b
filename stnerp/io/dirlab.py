"""The DIR-Lab 4DCT set as its owners distribute it: ten patients, raw phases, landmarks in text files.

Source: R. Castillo et al., Phys. Med. Biol. 54 (2009) 1849 and 55 (2010) 305. The files are free, by a form.

- Images: int16, little-endian, x fastest, HU + 1024, without a header; sizes and spacings are `GRIDS`.
- Axes: rows and columns as in DICOM, x to the patient's left, y to posterior. Slices run from the head to
  the feet. The files don't say so; the public loaders that reorient them all flip z, and so the grid's third
  axis points to the feet here, voxels stay as they are stored, and pictures are upright.
- Landmarks: whole voxel indices x y z, counted from 1: 300 in T00 (end of inhalation) and T50 (end of
  exhalation), 75 of them in T00 to T50.

Folders and files differ from case to case in names and in upper and lower case; all variants are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid, Triple
from stnerp.io.image import check_writable

WEBSITE = (
    "https://med.emory.edu/departments/radiation-oncology/research-laboratories/"
    "deformable-image-registration/downloads-and-reference-data/4dct.html"
)
HOW_TO_GET = f"request the set with the form at {WEBSITE} and unpack it there"

HEAD_TO_FEET = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
AIR_HU = -1024

#: Size (x, y, z) and pixel (mm) of each case; slices are 2.5 mm apart.
_SIZES = {
    1: ((256, 256, 94), 0.97),
    2: ((256, 256, 112), 1.16),
    3: ((256, 256, 104), 1.15),
    4: ((256, 256, 99), 1.13),
    5: ((256, 256, 106), 1.10),
    6: ((512, 512, 128), 0.97),
    7: ((512, 512, 136), 0.97),
    8: ((512, 512, 128), 0.97),
    9: ((512, 512, 128), 0.97),
    10: ((512, 512, 120), 0.97),
}


def dirlab_grid(size: tuple[int, int, int], spacing_mm: Triple) -> Grid:
    """A grid as DIR-Lab's: the first voxel at the origin, slices from head to feet."""
    return Grid(size, spacing_mm, direction=HEAD_TO_FEET)


#: Where the voxels of each case lie; the origin is arbitrary.
GRIDS = {case: dirlab_grid(size, (pixel, pixel, 2.5)) for case, (size, pixel) in _SIZES.items()}

PHASES = tuple(range(0, 100, 10))
EXTREME_PHASES = (0, 50)  # T00, end of inhalation, and T50, end of exhalation
SAMPLED_PHASES = (0, 10, 20, 30, 40, 50)
LANDMARKS, SAMPLED_LANDMARKS = 300, 75


@dataclass(frozen=True)
class DirLabCase:
    """One patient's files; nothing is read before it is asked for.

    Attributes:
        number: of the case.
        folder: that holds Images, ExtremePhases and Sampled4D.
        grid: of every phase.
    """

    number: int
    folder: Path
    grid: Grid

    @property
    def phases(self) -> list[int]:
        """Phases whose images are there, of 0, 10, ... 90."""
        return [phase for phase in PHASES if _matches(self.folder, "images", self._image_pattern(phase))]

    def image(self, phase: int) -> sitk.Image:
        """A phase in HU, int16; -1024 where the file holds less than 0, outside the scanner's field of view.

        Raises:
            MissingFileError: no such file.
            InputError: not a phase, several files of it, or a file of another size than the grid's.
        """
        _check_phase(phase, PHASES, "the images")
        path = self._file("images", self._image_pattern(phase), f"image of T{phase:02d}")
        expected, found = 2 * self.grid.voxels, path.stat().st_size
        if found != expected:
            x, y, z = self.grid.size
            raise InputError(
                f"{path}: {found} bytes, case {self.number} has {x} x {y} x {z} voxels of 2 bytes, {expected}; "
                "download it again, or is it another case's?"
            )
        raw = np.fromfile(path, dtype="<i2").reshape(self.grid.shape)
        return self.grid.image(np.maximum(raw, 0).astype(np.int16) + np.int16(AIR_HU))

    def landmarks(self, phase: int) -> np.ndarray:
        """The 300 landmarks in T00 or T50, (300, 3) LPS mm; row by row the same points.

        Raises:
            MissingFileError: no such file.
            InputError: another phase, another number of lines, or a line that isn't a voxel of the image.
        """
        _check_phase(phase, EXTREME_PHASES, "the 300 landmarks")
        pattern = rf"case0*{self.number}_(dirlab)?300_T{phase:02d}(_xyz)?\.txt"
        path = self._file("extremephases", pattern, f"300 landmarks of T{phase:02d}")
        return self._points(path, LANDMARKS)

    def sampled_landmarks(self, phase: int) -> np.ndarray:
        """The 75 landmarks that were followed through T00 to T50, (75, 3) LPS mm; errors as `landmarks`."""
        _check_phase(phase, SAMPLED_PHASES, "the 75 landmarks")
        pattern = rf"case0*{self.number}_4D-?75_T{phase:02d}(_xyz)?\.txt"
        path = self._file("sampled4d", pattern, f"75 landmarks of T{phase:02d}")
        return self._points(path, SAMPLED_LANDMARKS)

    def _image_pattern(self, phase: int) -> str:
        return rf"case0*{self.number}_T{phase:02d}([-_]s|[-_]ssm)?\.img"

    def _file(self, folder: str, pattern: str, what: str) -> Path:
        found = _matches(self.folder, folder, pattern)
        if not found:
            raise MissingFileError(f"{self.folder}: no {what} of DIR-Lab case {self.number}; {HOW_TO_GET}")
        if len(found) > 1:
            raise InputError(f"{found[0]}: and {found[1].name} are both the {what}; keep one")
        return found[0]

    def _points(self, path: Path, count: int) -> np.ndarray:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        numbered = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        voxels = np.array([_voxel(path, number, words, self.grid) for number, words in numbered]).reshape(-1, 3)
        if len(voxels) != count:
            raise InputError(f"{path}: {len(voxels)} landmarks, expected {count}; download it again")
        return self.grid.index_to_world(voxels - 1.0)


def dirlab_case(root: str | os.PathLike[str], number: int, grid: Grid | None = None) -> DirLabCase:
    """A case below the folder that all cases were unpacked into.

    Args:
        root: holds `Case1Pack`, `Case8Deploy` and so on, or each of them in a folder of its own name, as some
            programs unpack archives.
        number: 1 to 10, or any with a grid of its own.
        grid: of files that aren't the owners', such as a small phantom's; None: that of `GRIDS`.

    Raises:
        MissingFileError: no folder of that case.
        InputError: a case without a grid.
    """
    if grid is None and number not in GRIDS:
        raise InputError(f"case: {number!r} must be a whole number from 1 to {max(GRIDS)}")
    name = rf"case[-_ ]?0*{number}(pack)?(deploy)?"
    outer = [folder for folder in _entries(Path(root), name) if folder.is_dir()]
    folders = [inner for folder in outer for inner in (folder, *_entries(folder, name)) if inner.is_dir()]
    if not folders:
        raise MissingFileError(f"{root}: no folder {_folder_name(number)} of DIR-Lab case {number}; {HOW_TO_GET}")
    complete = [folder for folder in folders if _entries(folder, "images")]
    return DirLabCase(number, (complete or folders)[0], grid or GRIDS[number])


def write_case(
    root: str | os.PathLike[str],
    number: int,
    images: Mapping[int, sitk.Image],
    landmarks: Mapping[int, np.ndarray] | None = None,
    sampled_landmarks: Mapping[int, np.ndarray] | None = None,
    overwrite: bool = False,
) -> DirLabCase:
    """Write a patient in the layout that the owners give this case, as `dirlab_case` reads it.

    The layout has no place for an origin: what is read again begins at (0, 0, 0).

    Args:
        root: an existing folder.
        number: of the case, which decides on names.
        images: phase -> image in HU, all on one grid whose slices run from head to feet; at least one.
        landmarks: 0 and 50 -> points (N, 3) in LPS mm of the images' own grid; they go to the nearest voxel.
        sampled_landmarks: 0 to 50 -> likewise.

    Returns:
        The case as it is read, on a grid at the origin.

    Raises:
        MissingFileError: no such folder.
        InputError: a phase of another number, images on different grids or of another direction, landmarks
            outside of them, or a file that is there already and `overwrite` is false.
    """
    if not Path(root).is_dir():
        raise MissingFileError(f"{root}: no such folder; create it first")
    landmarks, sampled_landmarks = landmarks or {}, sampled_landmarks or {}
    for name, given, known in (
        ("images", images, PHASES),
        ("landmarks", landmarks, EXTREME_PHASES),
        ("sampled_landmarks", sampled_landmarks, SAMPLED_PHASES),
    ):
        for phase in given:
            _check_phase(phase, known, name)
    grids = [Grid.of(image) for image in images.values()]
    if not grids or not all(grid.is_close(grids[0]) for grid in grids):
        raise InputError("images: give one or more, all on one grid")
    grid = grids[0]
    if not np.allclose(grid.direction, HEAD_TO_FEET):
        raise InputError("images: slices must run from head to feet, direction (1, 0, 0, 0, 1, 0, 0, 0, -1)")

    case = DirLabCase(number, Path(root) / _folder_name(number), dirlab_grid(grid.size, grid.spacing_mm))
    early = number <= 5
    extremes = "ExtremePhases" if early else "extremePhases"
    suffix = "_s" if number == 1 else "-ssm" if early else ""
    label = f"Case{number}_300" if early else f"case{number}_dirLab300"
    files = {f"Images/case{number}_T{phase:02d}{suffix}.img": _raw(image) for phase, image in images.items()}
    files |= {f"{extremes}/{label}_T{p:02d}_xyz.txt": _lines(points, grid) for p, points in landmarks.items()}
    files |= {
        f"Sampled4D/case{number}_4D-75_T{p:02d}.txt": _lines(points, grid)
        for p, points in sampled_landmarks.items()
    }
    for name, content in files.items():
        path = case.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path, overwrite)
        path.write_bytes(content)
    return case


# -- parts of the above


def _folder_name(number: int) -> str:
    return f"Case{number}Deploy" if number == 8 else f"Case{number}Pack"


def _entries(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds under names of a pattern, in upper or lower case; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name, re.IGNORECASE))


def _matches(folder: Path, subfolder: str, pattern: str) -> list[Path]:
    return [path for inner in _entries(folder, subfolder) for path in _entries(inner, pattern)]


def _check_phase(phase: int, known: tuple[int, ...], what: str) -> None:
    if phase not in known:
        listed = ", ".join(map(str, known))
        raise InputError(f"phase: {phase!r}: {what} of DIR-Lab are of phases {listed} (0 is T00)")


def _voxel(path: Path, number: int, words: list[str], grid: Grid) -> list[int]:
    """A line's indices x, y, z, from 1."""
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) != 3 or not all(value.is_integer() for value in values):
        raise InputError(f"{path}, line {number}: '{' '.join(words)[:60]}' is not three whole voxel indices x y z")
    if not all(1 <= value <= size for value, size in zip(values, grid.size, strict=True)):
        x, y, z = grid.size
        raise InputError(
            f"{path}, line {number}: voxel {' '.join(words)} lies outside {x} x {y} x {z}; indices are 1-based, "
            f"from 1 1 1 to {x} {y} {z}"
        )
    return [int(value) for value in values]


def _raw(image: sitk.Image) -> bytes:
    hu = np.rint(sitk.GetArrayViewFromImage(image)).astype(np.int32)
    return np.clip(hu - AIR_HU, 0, np.iinfo(np.int16).max).astype("<i2").tobytes()


def _lines(points_mm: np.ndarray, grid: Grid) -> bytes:
    voxels = np.rint(grid.world_to_index(np.asarray(points_mm, float))).astype(int) + 1
    if not ((voxels >= 1) & (voxels <= grid.size)).all():
        raise InputError("landmarks: some lie outside the images; leave those out")
    return "".join(f"{x}\t{y}\t{z}\n" for x, y, z in voxels.tolist()).encode("ascii")

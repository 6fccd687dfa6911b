"""Landmark files to world points (LPS mm), and back."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from stnerp.atomic import replacing
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.image import check_writable

#: A coordinate is no anatomy's beyond that.
FARTHEST_MM = 1e6
_Line = tuple[int, str]  # line number from 1, and what stands there


def read_landmarks(path: str | os.PathLike[str], grid: Grid | None = None) -> np.ndarray:
    """Points (N, 3), float64, LPS mm, in the order of the file.

    Formats, told apart by what is in them:

    - elastix and transformix: `point` (LPS mm) or `index` (voxel indices from 0) on the first line,
      the number of points on the second.
    - 3D Slicer .fcsv, with RAS or LPS in its header (RAS where it has none, as Slicer reads it), and .mrk.json
      with one list of control points, RAS or LPS.
    - rows of x, y, z in LPS mm, separated by commas, semicolons, tabs or spaces; columns are found by
      a header (x or x_mm, ...), else a fourth column, in front, is a label: names or whole numbers. Where
      the last column may be the labels as well, the first must be the one that counts, from 0 or 1.

    Lines that are empty or start with # are skipped.

    Args:
        path: the file.
        grid: of the image that the landmarks belong to; needed for `index` files.

    Raises:
        MissingFileError: no such file.
        InputError: an empty file, a line that isn't a point (its number is named), another number of
            points than the file states, columns that can be read in two ways, an `index` file without
            `grid`, or points that were named in Slicer and not placed.
    """
    if not os.path.isfile(path):
        raise MissingFileError(f"{path}: no such landmark file; check the path")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: can't be read as text; save the landmarks as CSV") from None
    if Path(path).suffix.lower() == ".json":
        return _markups(path, text)
    every_line = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in every_line if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"{path}: holds no landmarks; expected one point x, y, z per line")
    if lines[0][1].lower() in ("point", "index"):
        return _elastix(path, lines, grid)
    if Path(path).suffix.lower() == ".fcsv":
        comments = [line for _, line in every_line if line.startswith("#")]
        return _slicer(path, comments, lines)
    return _table(path, lines)


def write_landmarks(points_mm: np.ndarray, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write points (N, 3), LPS mm, as CSV with the header x_mm,y_mm,z_mm; every digit is kept.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: not (N, 3), or the file exists and `overwrite` is false.
    """
    points_mm = np.asarray(points_mm, dtype=np.float64)
    if points_mm.ndim != 2 or points_mm.shape[1] != 3:
        raise InputError(f"landmarks: shape {points_mm.shape} must be (N, 3), x, y, z in mm")
    path = Path(path)
    check_writable(path, overwrite)
    rows = ["x_mm,y_mm,z_mm", *(",".join(map(repr, point)) for point in points_mm.tolist())]
    with replacing(path) as partial:
        partial.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _elastix(path: str | os.PathLike[str], lines: Sequence[_Line], grid: Grid | None) -> np.ndarray:
    kind = lines[0][1].lower()
    if len(lines) < 2 or not re.fullmatch(r"[0-9]{1,9}", lines[1][1]):
        raise InputError(f"{path}: the line after '{kind}' must be the number of points")
    stated = int(lines[1][1])
    points = np.array([_point(path, line, line[1].split()) for line in lines[2:]]).reshape(-1, 3)
    if len(points) != stated or stated == 0:
        raise InputError(f"{path}: states {stated} points and holds {len(points)}; correct its second line")
    if kind == "point":
        return points
    if grid is None:
        raise InputError(f"{path}: holds voxel indices; pass the grid of its image (grid=Grid.of(image))")
    return grid.index_to_world(points)


def _slicer(path: str | os.PathLike[str], comments: Sequence[str], lines: Sequence[_Line]) -> np.ndarray:
    stated = dict(re.findall(r"#\s*(CoordinateSystem|columns)\s*=\s*(.*)", "\n".join(comments)))
    system = stated.get("CoordinateSystem", "RAS").strip()
    if system not in ("0", "1", "RAS", "LPS"):
        raise InputError(f"{path}: coordinate system {system} is not known; save it from Slicer as RAS or LPS")
    columns = [name.strip() for name in stated.get("columns", "id,x,y,z").split(",")]
    if not {"x", "y", "z"} <= set(columns):
        raise InputError(f"{path}: the header's columns lack x, y or z; save it from Slicer again")
    where = [columns.index(axis) for axis in "xyz"]
    points = []
    for number, text in lines:
        fields = _split(text, ",")
        picked = [fields[i] for i in where] if len(fields) > max(where) else fields
        points.append(_point(path, (number, text), picked))
    return np.array(points) * ([1, 1, 1] if system in ("1", "LPS") else [-1, -1, 1])


def _markups(path: str | os.PathLike[str], text: str) -> np.ndarray:
    try:
        (markups,) = json.loads(text)["markups"]
        system, unit = markups["coordinateSystem"], markups.get("coordinateUnits", "mm")
        points = markups["controlPoints"]
        placed = all(point.get("positionStatus", "defined") == "defined" for point in points)
        positions = [[float(value) for value in point["position"]] for point in points]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{path}: is no list of control points; save one list of points from Slicer") from None
    if system not in ("RAS", "LPS") or unit != "mm":
        raise InputError(f"{path}: must hold mm as RAS or LPS; save it from Slicer as such")
    if not placed or not positions:
        raise InputError(f"{path}: holds no points, or some that weren't placed; place or delete them in Slicer")
    if not all(len(point) == 3 and all(abs(value) < FARTHEST_MM for value in point) for point in positions):
        raise InputError(f"{path}: a position is not a point; expected three numbers x, y, z")
    return np.array(positions) * ([1, 1, 1] if system == "LPS" else [-1, -1, 1])


def _table(path: str | os.PathLike[str], lines: Sequence[_Line]) -> np.ndarray:
    rows = [(line, _fields(line[1])) for line in lines]
    header = rows[0][1]
    names = [re.sub(r"[^a-z]", "", field.lower()) for field in header]
    if any(_is_number(field) for field in header):
        where = _columns_without_names(path, [fields for _, fields in rows])
    else:
        rows = rows[1:]
        where = _columns_by_name(path, names)
    if not rows:
        raise InputError(f"{path}: holds a header and no landmarks; expected one point x, y, z per line")
    points = []
    for line, fields in rows:
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {line[0]}: {len(fields)} columns, the first line has {len(header)}; correct it"
            )
        points.append(_point(path, line, [fields[i] for i in where]))
    return np.array(points)


def _fields(text: str) -> list[str]:
    separator = next((s for s in ";\t," if s in text), None)
    if separator is None:
        return text.split()
    return [field.strip() for field in _split(text, separator)]


def _split(text: str, separator: str) -> list[str]:
    """Fields of a line of CSV; of one that is none, the line itself."""
    try:
        return next(csv.reader([text], delimiter=separator))
    except csv.Error:  # a field of more than 131072 characters, a NUL for Python 3.10
        return [text]


def _columns_by_name(path: str | os.PathLike[str], names: Sequence[str]) -> list[int]:
    triples = (("x", "y", "z"), ("xmm", "ymm", "zmm"), ("xlpsmm", "ylpsmm", "zlpsmm"), ("xlps", "ylps", "zlps"))
    found = [triple for triple in triples if set(triple) <= set(names)]
    if not found:
        raise InputError(f"{path}: the header must name the columns x, y, z (LPS mm); rename them")
    if len(found) > 1 or any(names.count(axis) > 1 for axis in found[0]):
        raise InputError(
            f"{path}: the header names x, y and z more than once; keep the columns of one image, in mm"
        )
    return [names.index(axis) for axis in found[0]]


def _columns_without_names(path: str | os.PathLike[str], rows: Sequence[Sequence[str]]) -> list[int]:
    # A label may stand in front: names or whole numbers. A coordinate there means it stands behind.
    columns = len(rows[0])
    if columns not in (3, 4):
        raise InputError(
            f"{path}: {columns} columns; give x, y, z, with or without a label before "
            "them, or add a header that names x, y, z"
        )
    first, last = [row[0] for row in rows], [row[-1] for row in rows]
    if columns == 4 and any(_is_number(field) and not _is_whole(field) for field in first):
        raise InputError(f"{path}: four columns, and the first is no label; add a header that names x, y, z")
    if columns == 4 and all(map(_is_whole, [*first, *last])) and (_counts(last) or not _counts(first)):
        raise InputError(
            f"{path}: four columns, and the first or the last may be the label; add a header that names x, y, z"
        )
    return list(range(columns))[-3:]


def _is_whole(field: str) -> bool:
    return _is_number(field) and float(field) >= 0 and float(field).is_integer()


def _counts(fields: Sequence[str]) -> bool:
    """Whether these are 0, 1, 2, ... or 1, 2, 3, ..."""
    numbers = [float(field) for field in fields]
    return numbers[0] in (0, 1) and all(b - a == 1 for a, b in pairwise(numbers))


def _point(path: str | os.PathLike[str], line: _Line, fields: Sequence[str]) -> list[float]:
    number, text = line
    if len(fields) != 3 or not all(_is_number(field) and abs(float(field)) < FARTHEST_MM for field in fields):
        shown = "".join(c if c.isprintable() else " " for c in text[:60])
        raise InputError(f"{path}, line {number}: '{shown}' is not a point; expected three numbers x, y, z")
    return [float(field) for field in fields]


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False

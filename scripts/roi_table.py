"""A table of regions of interest over time that is there already, and that further times join.

All rows are measured anew; those that are there must come out the same.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from run_directory import REPLACE, time_name

from stnerp import InputError

CLOSE = 1e-3  # relative, and in mm, ml or percent: another device rounds otherwise, another fit says more


def rows_before(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no such file.

    Raises:
        InputError: a table that a spreadsheet saved in another form, with semicolons say.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        joined([], rows)  # each has a time
    except (csv.Error, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: isn't as it was written (did a spreadsheet save it?); {REPLACE}") from None
    return rows


def joined(times: Sequence[float], before: Sequence[Mapping[str, str]]) -> list[float]:
    """These times and those of a table, where they lost their last digits."""
    known = {time_name(float(row["time"])): float(row["time"]) for row in before}
    return list((known | {time_name(t): t for t in times}).values())


def check_same(before: Sequence[Mapping[str, str]], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse to replace rows that say something else.

    Raises:
        InputError: the table at `path` is of another ROI, another fit, or has more columns.
    """
    found = {(row["roi"], time_name(row["time"])): row for row in rows}
    for old in before:
        new = found.get((old.get("roi"), time_name(float(old["time"]))), {})
        if not all(_same(text, new.get(name)) for name, text in old.items()):
            raise InputError(
                f"{path}: already exists, of another ROI, another fit or with more columns; {REPLACE}"
            )


def _same(text: str, value: Any) -> bool:
    if isinstance(value, float):
        try:
            number = float(text or "nan")
        except ValueError:
            return False
        close = math.isclose(number, value, rel_tol=CLOSE, abs_tol=CLOSE)
        return close or (math.isnan(number) and math.isnan(value))
    return text == ("" if value is None else str(value))  # a time's text: of the same name, so the same

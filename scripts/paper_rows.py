"""The paper's figures in a table of ours: beside the methods that stand for the paper's, the others below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def beside(
    published: Sequence[Mapping[str, Any]],
    stand_for: Mapping[str, Sequence[str]],
    columns: Mapping[str, str],
    method: str,
    **where: object,
) -> Row:
    """The paper's figures for a method, by the titles of `columns`; empty where it has none.

    Args:
        published: the paper's table.
        stand_for: the methods here that are one of the paper's.
        columns: titles, and names in the paper's table.
        where: what else the paper's row must say.
    """
    for row in published:
        if method in stand_for.get(row["method"], ()) and all(row[name] == value for name, value in where.items()):
            return _figures(row, columns)
    return dict.fromkeys(columns, "")


def published_only(
    published: Sequence[Mapping[str, Any]],
    stand_for: Mapping[str, Sequence[str]],
    columns: Mapping[str, str],
    names: Sequence[str],
    shown: Iterable[tuple[object, ...]],
) -> list[Row]:
    """A row for each of the paper's that stands beside none of this table's.

    Args:
        published, stand_for, columns: as `beside`.
        names: what a row of either table is of, besides the method, "task".
        shown: the values of `names`, and the method, of rows that have the paper's figures beside them.
    """
    have = set(shown)
    rows: list[Row] = []
    for row in published:
        of = tuple(row[name] for name in names)
        if not any((*of, method) in have for method in stand_for.get(row["method"], ())):
            about = {name: str(row[name]) for name in names} | {"method": f"{row['method']}, published only"}
            rows.append(about | _figures(row, columns))
    return rows


def _figures(row: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """Figures of a row of the paper's tables, by the titles of `columns`."""
    return {title: f"{row[name]}" for title, name in columns.items()}

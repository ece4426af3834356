"""Rows of bench/results/, read back: one JSON object a line, as `bench.record` writes them.

Raises RowError, with file and line, for a line that is no JSON object, for a field that a reader
needs and the row lacks, and for figures that are no finite numbers.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from bench.record import RESULTS


class RowError(ValueError):
    """A row that cannot be read: where it is, what is wrong with it, what to do."""


class Row(dict[str, Any]):
    """One line of a results file; a field that is missing is a RowError."""

    where: str = ""

    def __missing__(self, name: str) -> NoReturn:
        raise RowError(f"{self.where}: no field {name!r}; measure again, or remove the line")

    def number(self, name: str) -> float:
        return self._number(name, self[name])

    def figures(self, name: str) -> dict[str, float]:
        """A field that holds {name: number}."""
        found = self[name]
        if not isinstance(found, dict):
            raise RowError(f"{self.where}: {name} is {found!r}, and an object is wanted")
        return {part: self._number(f"{name}.{part}", value) for part, value in found.items()}

    def median(self, name: str, part: str) -> float:
        """Of a field that holds {part: [numbers]}."""
        found = self[name].get(part) if isinstance(self[name], dict) else None
        if not isinstance(found, list) or not found:
            raise RowError(f"{self.where}: {name}.{part} is {found!r}, and numbers are wanted")
        return statistics.median(self._number(f"{name}.{part}", value) for value in found)

    @property
    def date(self) -> datetime:
        try:
            return datetime.fromisoformat(self["date"])
        except (TypeError, ValueError):
            raise RowError(f"{self.where}: date {self['date']!r} is no ISO date") from None

    def _number(self, name: str, value: object) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise RowError(f"{self.where}: {name} is {value!r}, and a number is wanted")
        return float(value)


def read_rows(question: str, folder: Path = RESULTS) -> list[Row]:
    """All rows of one question, oldest first; none where it was never measured."""
    path = folder / f"{question}.jsonl"
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(f"{where}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RowError(f"{where}: {str(fields)[:40]!r} is no object")
        row = Row(fields)
        row.where = where
        rows.append(row)
    return rows


def newest(rows: Iterable[Row], conditions: Iterable[str]) -> list[Row]:
    """The last of the rows that agree in all `conditions`."""
    names = tuple(conditions)
    return list({tuple(str(row.get(name)) for name in names): row for row in rows}.values())


def newest_figures(rows: Iterable[Row], conditions: Iterable[str], field: str) -> list[Row]:
    """As `newest`, by each name in `field`, {name: number}: rows keep there what no later row
    of the same conditions measured again, and those that keep nothing are left out."""
    names = tuple(conditions)
    kept: list[Row] = []
    seen: set[tuple[str, ...]] = set()
    for row in reversed(list(rows)):
        key = tuple(str(row.get(name)) for name in names)
        figures = {n: x for n, x in row.figures(field).items() if (*key, n) not in seen}
        seen |= {(*key, name) for name in figures}
        if figures:
            some = Row({**row, field: figures})
            some.where = row.where
            kept.append(some)
    return kept[::-1]

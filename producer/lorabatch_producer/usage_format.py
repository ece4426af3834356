"""The usage report as a table for people, as CSV for spreadsheets, as JSON for programs.

The totals row is in the table only, so that summing a column of the CSV is right. A CSV cell
that a spreadsheet would run as a formula gets an apostrophe in front, and line ends inside a
cell are written as \\n.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from typing import TextIO

from rich.table import Table
from rich.text import Text

from lorabatch_producer.usage import FIGURES, UsageRow, total

__all__ = ["safe_cell", "usage_table", "write_csv", "write_json"]

NONE_SHOWN = {"adapter": "(base model)"}


def usage_table(rows: Sequence[UsageRow], by: Sequence[str]) -> Table:
    """A table with a totals row."""
    table = Table(show_footer=True, show_edge=False, pad_edge=False)
    for place, name in enumerate(by):
        table.add_column(name, footer="total" if place == 0 else "", overflow="fold")
    for name, figure in zip(FIGURES, total(rows).figures, strict=True):
        table.add_column(
            name.replace("_tokens", ""), footer=f"{figure:,}", justify="right", no_wrap=True
        )
    for row in rows:
        names = [
            NONE_SHOWN.get(name, "-") if value is None else _one_line(value)
            for name, value in zip(by, row.group, strict=True)
        ]
        table.add_row(*map(Text, names), *(f"{figure:,}" for figure in row.figures))
    return table


def write_csv(rows: Sequence[UsageRow], by: Sequence[str], file: TextIO) -> None:
    """A header and one line a row; a group's None is an empty cell."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*by, *FIGURES])
    for row in rows:
        writer.writerow([*map(safe_cell, row.group), *row.figures])


def write_json(rows: Sequence[UsageRow], by: Sequence[str], file: TextIO) -> None:
    """A list of objects, one a row."""
    found = [dict(zip([*by, *FIGURES], [*row.group, *row.figures], strict=True)) for row in rows]
    file.write(json.dumps(found, indent=2) + "\n")


def safe_cell(value: str | None) -> str:
    """A text that no spreadsheet takes for a formula, on one line."""
    text = _one_line(value or "")
    return "'" + text if re.match(r"[=+\-@\t]", text) else text


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")

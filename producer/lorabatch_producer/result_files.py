"""Results as JSONL, CSV or Parquet, a row at a time.

In CSV, text that a spreadsheet would run as a formula gets an apostrophe in front; line ends in a
text are kept, inside quotes. Several texts, or log probabilities, are JSON in `choices`. In Parquet
texts and numbers have their types; what comes from the input is text, or JSON. Parquet wants
pyarrow. Raises LoraBatchError if that is missing.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from lorabatch_producer.reading import Format
from lorabatch_producer.table_rows import pyarrow

__all__ = ["INPUT", "RESULT_COLUMNS", "cell", "flat", "row_writer"]

INPUT = "input_"  # before the name of a column of the input
NUMBERS = ("line", "prompt_tokens", "output_tokens", "cached_tokens")
RESULT_COLUMNS = (
    *("file", "line", "custom_id", "job_id", "tenant", "adapter_id", "text", "finish_reason"),
    *("prompt_tokens", "output_tokens", "cached_tokens", "error_code", "error_message", "choices"),
)
PARQUET_ROWS = 500
Write = Callable[[Mapping[str, Any]], None]


@contextmanager
def row_writer(file: TextIO, form: Format, columns: Sequence[str]) -> Any:
    """Writes rows, of tables those columns; what is missing is empty. A file of JSONL has rows as
    they are."""
    if form == "jsonl":
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif form == "csv":
        table = csv.writer(file, lineterminator="\n")
        table.writerow([cell(column) for column in columns])
        yield lambda row: table.writerow([cell(row.get(column)) for column in columns])
    else:
        parquet = _Parquet(file, columns)
        try:
            yield parquet.write
        finally:
            parquet.close()


class _Parquet:
    def __init__(self, file: TextIO, columns: Sequence[str]) -> None:
        self._arrow = pyarrow("pyarrow")
        kinds = {True: self._arrow.int64(), False: self._arrow.string()}
        fields = [(column, kinds[column in NUMBERS]) for column in columns]
        self._schema = self._arrow.schema(fields)
        self._writer = pyarrow("pyarrow.parquet").ParquetWriter(file.buffer, self._schema)
        self._columns = columns
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.append({name: v if name in NUMBERS else _text(v) for name, v in row.items()})
        if len(self._rows) == PARQUET_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            columns = {name: [row.get(name) for row in rows] for name in self._columns}
            self._writer.write_table(self._arrow.table(columns, schema=self._schema))


def flat(line: Mapping[str, Any], file: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """A result line in the short form as a row of a table, the input's columns beside."""
    usage, error = line["usage"] or {}, line["error"] or {}
    figures = {name: usage.get(name) for name in NUMBERS[1:]}
    errors = {"error_code": error.get("code"), "error_message": error.get("message")}
    own = {INPUT + name: value for name, value in row.items()}
    return {**own, "file": file, **line, **figures, **errors}


def cell(value: Any) -> str:
    """A cell of CSV that no spreadsheet takes for a formula."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    text = _text(value) or ""
    return "'" + text if re.match(r"[=+\-@\t\r]", text) else text


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)

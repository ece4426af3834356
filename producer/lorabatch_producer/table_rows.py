"""Rows of CSV and Parquet files as mappings by column, a few at a time.

A row's number is where it stands: of CSV the line of the file that it begins on, where the header
is line 1; of Parquet its count from 1. Memory: a row of CSV, at most MAX_LINE_BYTES, or a batch of
Parquet's, with the column pages it comes from. Parquet wants pyarrow. Raises LoraBatchError for a
file that has no rows to read; a bad row is a Refused.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from lorabatch.errors import LoraBatchError, shown
from lorabatch_producer.jsonl import MAX_LINE_BYTES, Refused, Rows

__all__ = ["csv_columns", "csv_rows", "parquet_columns", "parquet_file", "parquet_rows", "pyarrow"]

PARQUET_ROWS = 500
SKIP_CHARS = 1024 * 1024


def csv_rows(file: BinaryIO, name: str) -> Rows:
    """Below the header; blank lines are skipped."""
    lines = _Lines(file)
    reader = _reader(lines)
    columns = _header(reader, name)
    while True:
        number = lines.number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.take_too_long()
            yield number, Refused("not_csv", f"not valid CSV: {error}")
            continue
        if row:
            yield number, _named(columns, row, lines.take_too_long())


def csv_columns(file: BinaryIO, name: str) -> list[str]:
    """The header's names. Raises LoraBatchError if there is none, or a name is there twice."""
    return _header(_reader(_Lines(file)), name)


class _Lines:
    """Lines of text for the reader; one that is too long is cut, and remembered."""

    def __init__(self, file: BinaryIO) -> None:
        self._text = io.TextIOWrapper(
            io.BufferedReader(_Borrowed(file)), "utf-8-sig", errors="surrogateescape", newline=""
        )
        self.number = 0
        self._too_long = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith("\n"):
            self._too_long = True
            while (more := self._text.readline(SKIP_CHARS)) and not more.endswith("\n"):
                pass
        return line

    def take_too_long(self) -> bool:
        was, self._too_long = self._too_long, False
        return was


class _Borrowed(io.RawIOBase):
    """A file that is not closed with the text that is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        some = self._file.read(len(buffer))
        buffer[: len(some)] = some
        return len(some)


def _reader(lines: Iterator[str]) -> Any:
    csv.field_size_limit(MAX_LINE_BYTES)
    return csv.reader(lines, strict=True)


def _header(reader: Any, name: str) -> list[str]:
    try:
        columns: list[str] | None = next((row for row in reader if row), None)
    except csv.Error as error:
        raise LoraBatchError(f"{name}: its header is not valid CSV: {error}") from None
    if columns is None:
        raise LoraBatchError(f"{name}: empty; wanted a first line with the columns' names")
    _once_each(columns, name)
    return columns


def _once_each(columns: Sequence[str], name: str) -> None:
    for at, column in enumerate(columns):
        if column in columns[:at]:
            raise LoraBatchError(f"{name}: two columns are called {shown(column)}; rename one")


def _named(columns: Sequence[str], row: list[str], too_long: bool) -> dict[str, Any] | Refused:
    if too_long:
        return Refused("line_too_long", f"a line is longer than {MAX_LINE_BYTES} characters")
    if len(row) != len(columns):
        wanted = f"the header has {len(columns)}"
        return Refused("columns", f"the row has {len(row)} columns, {wanted}; check its quotes")
    for column, value in zip(columns, row, strict=True):
        try:
            value.encode()
        except UnicodeEncodeError:
            return Refused("not_utf8", f"{shown(column)}: not UTF-8; save the file as UTF-8")
    return dict(zip(columns, row, strict=True))


def parquet_rows(file: BinaryIO, name: str, keep: Callable[[str], bool]) -> Rows:
    """All rows; of the columns those to `keep`."""
    table = parquet_file(file, name)
    columns = [column for column in table.schema_arrow.names if keep(column)]
    number = 0
    with _readable(name):
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def parquet_columns(file: BinaryIO, name: str) -> list[str]:
    names = [str(column) for column in parquet_file(file, name).schema_arrow.names]
    _once_each(names, name)
    return names


def parquet_file(file: BinaryIO, name: str) -> Any:
    """pyarrow's reader. Raises LoraBatchError if it is no Parquet, or pyarrow is missing."""
    with _readable(name):
        return pyarrow("pyarrow.parquet").ParquetFile(file, pre_buffer=False)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    arrow = pyarrow("pyarrow")
    try:
        yield
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise LoraBatchError(f"{name}: not a Parquet file that can be read: {reason}") from None


def pyarrow(module: str) -> Any:
    """One of its modules. Raises LoraBatchError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LoraBatchError(
            f"Parquet needs {error.name}: pip install 'lorabatch[tables]', or use CSV or JSONL"
        ) from None

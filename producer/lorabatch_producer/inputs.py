"""The files of a bulk run: named, matched by patterns, compressed or on stdin, read one by one.

Their digest is of what the rows are and mean: the same content compressed, or under another name,
is the same. A single JSONL file whose lines say it all has its own digest, as it always had.
Raises LoraBatchError for what cannot be read.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

from lorabatch.errors import LoraBatchError
from lorabatch_producer.bulk import BadLine, GoodLine, LineReader
from lorabatch_producer.console import printable
from lorabatch_producer.jsonl import Rows, json_rows
from lorabatch_producer.reading import Format, Reading
from lorabatch_producer.table_rows import csv_columns, csv_rows, parquet_columns, parquet_rows

__all__ = ["Inputs", "Source", "file_digest", "format_of", "gathered"]

STDIN = "-"
GZIP = b"\x1f\x8b"
READ_BYTES = 1024 * 1024
SUFFIXES: dict[str, Format] = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True)
class Source:
    """One file; `label` is what the user knows it by, as `printable` has it."""

    label: str
    path: Path
    format: Format

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its content, without gzip."""
        try:
            with self.path.open("rb") as raw, contextlib.ExitStack() as stack:
                file: BinaryIO = raw
                if raw.read(2) == GZIP:
                    unpacked = stack.enter_context(gzip.open(self.path, "rb"))
                    file = cast(BinaryIO, unpacked)
                raw.seek(0)
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise LoraBatchError(
                f"{self.label}: not a whole gzip file: {error}; compress it again"
            ) from None

    def columns(self) -> list[str] | None:
        """Of a table; None: rows of JSONL each have their own."""
        with self.open() as file:
            if self.format == "csv":
                return csv_columns(file, self.label)
            return parquet_columns(file, self.label) if self.format == "parquet" else None

    def digest(self) -> str:
        with self.open() as file:
            return file_digest(file)


@dataclass(frozen=True)
class Inputs:
    """All files of a batch, in order, and how their rows are jobs."""

    sources: tuple[Source, ...]
    reading: Reading = field(default_factory=Reading)

    @classmethod
    def of(cls, path: Path, reading: Reading | None = None) -> Inputs:
        """A single file."""
        reading = reading or Reading()
        form = reading.format or format_of(path.name)
        return cls((Source(printable(path.name), path, form),), reading)

    @property
    def name(self) -> str:
        more = len(self.sources) - 1
        return self.sources[0].label + (f" and {more} more" if more else "")

    @property
    def plain(self) -> bool:
        """Whether each row says all that its job needs."""
        return self.reading.plain and all(source.format == "jsonl" for source in self.sources)

    def check(self) -> None:
        """Raise InvalidJob or LoraBatchError for what could be read by no row."""
        self.reading.check()
        for source in self.sources:
            columns = source.columns()
            if columns is not None:
                self.reading.check_columns(columns, source.label)

    def digest(self) -> str:
        """sha256, in hexadecimal."""
        files = [(source.format, source.digest()) for source in self.sources]
        if self.plain and len(files) == 1:
            return files[0][1]
        reading = self.reading.model_dump(exclude_defaults=True, exclude={"format"})
        whole = json.dumps([reading, files], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    def lines(
        self, batch_id: str, tenant: str, base: frozenset[str] | None, whole_rows: bool = False
    ) -> Iterator[GoodLine | BadLine]:
        """Every row of every file; `whole_rows`: with columns that no job needs, too."""
        reader = LineReader(batch_id, tenant, base)
        plain = self.plain
        for number, source in enumerate(self.sources):
            label = None if plain and len(self.sources) == 1 else source.label
            place = f"file {number + 1} " if number else ""
            with source.open() as file:
                rows = self._rows(source, file, whole_rows)
                yield from reader.lines(rows, None if plain else self.reading, label, place)

    def _rows(self, source: Source, file: BinaryIO, whole_rows: bool) -> Rows:
        if source.format == "csv":
            return csv_rows(file, source.label)
        if source.format == "parquet":
            keep = (lambda column: True) if whole_rows else self.reading.needs
            return parquet_rows(file, source.label, keep)
        return json_rows(file)


def file_digest(file: BinaryIO) -> str:
    """sha256 of the content, in hexadecimal; the file is at its start again afterwards."""
    file.seek(0)
    digest = hashlib.sha256()
    while some := file.read(READ_BYTES):
        digest.update(some)
    file.seek(0)
    return digest.hexdigest()


@contextlib.contextmanager
def gathered(names: Sequence[str], reading: Reading) -> Iterator[Inputs]:
    """The files of these names and patterns; `-` is stdin. That, and pipes, are kept on the disk
    meanwhile."""
    with contextlib.ExitStack() as stack:
        paths: list[tuple[str, Path]] = []
        for name in names:
            if name == STDIN:
                paths.append(("stdin", stack.enter_context(_spooled(sys.stdin.buffer))))
            elif Path(name).is_fifo():  # as the shell's <(...)
                with Path(name).open("rb") as pipe:
                    paths.append((name, stack.enter_context(_spooled(pipe))))
            else:
                paths += [(str(path), path) for path in _matched(name)]
        whole = [path.resolve() for _, path in paths]
        for at, path in enumerate(whole):
            if path in whole[:at]:
                raise LoraBatchError(f"{path} is given twice; each file once")
        short = [Path(name).name for name, _ in paths]
        sources = [
            Source(
                printable(short[at] if short.count(short[at]) == 1 else name),
                path,
                reading.format or format_of(name),
            )
            for at, (name, path) in enumerate(paths)
        ]
        yield Inputs(tuple(sources), reading)


def _matched(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise LoraBatchError(f"{name} is a folder; give its files, as {name.rstrip('/')}/*.jsonl")
    found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
    files = [one for one in found if one.is_file()]
    if not files:
        raise LoraBatchError(f"{name}: does not exist, nor does a file whose name is like that")
    return files


@contextlib.contextmanager
def _spooled(stream: IO[bytes]) -> Iterator[Path]:
    """Files are read twice: a batch's id follows from their content."""
    with tempfile.NamedTemporaryFile(prefix="lorabatch-stdin-") as file:
        shutil.copyfileobj(stream, file)
        file.flush()
        yield Path(file.name)


def format_of(name: str) -> Format:
    """As a file's name says it."""
    return SUFFIXES.get(Path(name.lower().removesuffix(".gz")).suffix, "jsonl")

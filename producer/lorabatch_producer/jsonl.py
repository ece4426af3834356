"""Rows of a JSONL file, line by line: each a decoded object, or why it is none.

Blank lines are skipped, a byte order mark is tolerated. Memory: one line of at most MAX_LINE_BYTES.
Raises nothing for bad content; it yields a Refused in place of the row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any, BinaryIO

from lorabatch.errors import shown

__all__ = ["MAX_LINE_BYTES", "Refused", "Rows", "json_rows"]

MAX_LINE_BYTES = 8 * 1024 * 1024
SKIP_BYTES = 1024 * 1024
BOM = b"\xef\xbb\xbf"


class Refused(Exception):
    """A row that is no job, and why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


Rows = Iterator[tuple[int, "dict[str, Any] | Refused"]]  # with its number, from 1


def json_rows(file: BinaryIO) -> Rows:
    """Every line that is not blank, in order."""
    for number, raw, whole in _raw_lines(file):
        try:
            yield number, _decode(raw, whole)
        except Refused as error:
            yield number, error


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """(number, bytes without the line end, whether it had one and was not cut at the limit)."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        whole = raw.endswith(b"\n")
        if not whole and len(raw) > MAX_LINE_BYTES:
            while (more := file.readline(SKIP_BYTES)) and not more.endswith(b"\n"):
                pass
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip(b" \t\r\n"):
            yield number, raw, whole


def _decode(raw: bytes, whole: bool) -> dict[str, Any]:
    if len(raw.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise Refused("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    if b"\x00" in raw:
        raise Refused("nul", f"NUL byte at byte {raw.index(0) + 1} of the line; remove it")
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode(), object_pairs_hook=_no_field_twice)
    except UnicodeDecodeError as error:
        raise Refused("not_utf8", f"not UTF-8 at byte {error.start + 1} of the line") from None
    except RecursionError:
        raise Refused("not_json", "not valid JSON: nested too deeply") from None
    except ValueError as error:
        why = (
            f"{error.msg} at {error.pos + 1}" if isinstance(error, JSONDecodeError) else str(error)
        )
        cut = "" if whole else "; the file ends in the middle of this line"
        raise Refused("not_json", f"not valid JSON: {why}{cut}") from None
    if not isinstance(value, dict):
        raise Refused("not_object", f"a line must be a JSON object (got {shown(value)})")
    return value


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        times = Counter(name for name, _ in pairs)
        twice = next(name for name in times if times[name] > 1)
        raise ValueError(f"the field {shown(twice)} is given twice")
    return fields

"""The lines of an OpenAI batch: checked before any is accepted, and what became of each.

Raises OSError if the batch's file is not there.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabatch import Ledger, Result
from lorabatch.errors import DeadlinePassed
from lorabatch_producer.bulk import BadLine, GoodLine, read_lines
from lorabatch_producer.console import printable
from lorabatch_producer.openai_line import CHAT_URL
from lorabatch_producer.output import atomic_files, openai_line, outcomes
from lorabatch_producer.sending import chunked

__all__ = ["Written", "check", "lines_of", "write_files"]

SHOWN_ERRORS = 1000
SHOWN_CHARS = 500
CHUNK = 500
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}
CANCELLED = {"code": "batch_cancelled", "message": "The batch was cancelled before this request."}
Keep = Callable[[], None]


@dataclass(frozen=True)
class Written:
    """What came of a batch: lines by `completed` and `failed`, whether some were too late, and the
    files that were written, by the columns of the batch that name them. A line that was cancelled
    or too late is neither, as with OpenAI, though it is in the error file."""

    counts: Counter[str]
    expired: bool
    files: dict[str, Path]


def lines_of(path: Path, batch: Any, keep: Keep) -> Iterator[GoodLine | BadLine]:
    """Of its file; `keep` is called before each, and may raise to end it."""
    with path.open("rb") as file:
        names = frozenset(batch.base_names)
        for line in read_lines(file, batch.batch_id, batch.tenant, names):
            keep()
            yield line


def check(path: Path, batch: Any, most: int, keep: Keep) -> tuple[int, list[dict[str, Any]]]:
    """How many lines it has, and as OpenAI shows them the errors for which it must fail."""
    total, bad, errors = 0, 0, list[dict[str, Any]]()
    for total, line in enumerate(lines_of(path, batch, keep), start=1):
        if total > most:
            return total, [_error("too_many_lines", f"wanted {most} lines at most", None)]
        error = _refused(line, batch.endpoint)
        if error is not None:
            bad += 1
            if bad <= SHOWN_ERRORS:
                errors.append(error)
    if bad > SHOWN_ERRORS:
        more = f"{bad - SHOWN_ERRORS} more lines are bad"
        errors.append(_error("more_errors", more, None))
    if not total:
        errors.append(_error("empty_file", "the file has no lines; wanted one at least", None))
    return total, errors


def _refused(line: GoodLine | BadLine, endpoint: str) -> dict[str, Any] | None:
    if isinstance(line, BadLine):
        return _error(line.code, line.message, line.number)
    if line.form == ("chat" if endpoint == CHAT_URL else "completion"):
        return None
    seen = "not OpenAI's form of a line" if line.form == "short" else "of another endpoint"
    return _error("wrong_url", f"url: wanted the batch's, {endpoint} (it is {seen})", line.number)


def _error(code: str, message: str, line: int | None) -> dict[str, Any]:
    plain = printable(message)[:SHOWN_CHARS]  # names of fields are the file's
    param = re.match(r"([a-z_][\w.]*): ", plain)
    return {"code": code, "message": plain, "param": param and param[1], "line": line}


def write_files(ledger: Ledger, folder: Path, batch: Any, keep: Keep) -> Written:
    """What became of its lines, in their order: output and errors, each if it has lines. Written
    again they have the same names and the same content."""
    source = folder / batch.input_file_id
    source.stat()  # what is not there is no fault of the output's
    paths = {
        f"{what}_file_id": folder / f"file-{uuid.uuid5(uuid.UUID(batch.batch_id), what).hex}"
        for what in ("output", "error")
    }
    counts, expired = Counter[str](completed=0, failed=0), False
    empty = set(paths)
    with atomic_files(*paths.values()) as (output, errors):
        for some in chunked(lines_of(source, batch, keep), CHUNK):
            good = [line for line in some if isinstance(line, GoodLine)]
            found = outcomes(ledger, [line.job.job_id for line in good])
            for line in good:
                result = found.get(line.job.job_id)
                written = openai_line(line, result)
                succeeded = result is not None and result.state == "succeeded"
                why = None if succeeded else _why(result, batch)
                written["error"] = why or written["error"]
                expired = expired or why is EXPIRED
                counts["completed" if succeeded else "failed"] += why is None
                text = json.dumps(written, ensure_ascii=False)
                (output if succeeded else errors).write(text + "\n")
                empty.discard("output_file_id" if succeeded else "error_file_id")
    for name in empty:
        paths.pop(name).unlink()
    return Written(counts, expired, paths)


def _why(result: Result | None, batch: Any) -> dict[str, str] | None:
    """If it was the batch that ended: a line that did not run in time, or was cancelled."""
    cancelled = batch.status == "cancelling"
    if result is None:
        return CANCELLED if cancelled else EXPIRED
    if result.error is not None and result.error.code == DeadlinePassed.code:
        return EXPIRED
    if result.state != "cancelled":
        return None
    if (result.finished_us or 0) >= batch.done_by_us:
        return EXPIRED
    return CANCELLED if cancelled else None

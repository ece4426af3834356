"""A batch's results as JSONL, in the order of its file, one line for each good line.

OpenAI lines get OpenAI's shape, short lines a flat one. A job that failed or was cancelled has
an `error` in its place; bad lines go to a second file, OUT.errors.jsonl. The ledger says which
lines are jobs; what their `model` means is not asked again. Each file appears whole or not at all.
Raises LoraBatchError if jobs are open (unless `partial`), if the file is not the batch's or cannot
be read, or if the output cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any, TextIO

from lorabatch import Result
from lorabatch.batches import Batches
from lorabatch.errors import LoraBatchError
from lorabatch.ledger import Ledger
from lorabatch_producer.batch import BatchStatus, batch_status, file_digest
from lorabatch_producer.bulk import BadLine, GoodLine, read_lines
from lorabatch_producer.openai_body import answer_body
from lorabatch_producer.sending import chunked

__all__ = ["Written", "atomic_files", "errors_path", "openai_line", "outcomes", "write_output"]

CHUNK = 500


@dataclass(frozen=True)
class Written:
    """Lines of the output by what their jobs ended as, and bad lines of the input."""

    succeeded: int
    failed: int
    cancelled: int
    not_finished: int
    bad: int


def errors_path(out: Path) -> Path:
    """Where bad lines go: `results.jsonl` -> `results.errors.jsonl`."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".errors.jsonl")


def write_output(
    ledger: Ledger, batch_id: str, path: Path, out: Path, partial: bool = False
) -> Written:
    """Write the results of the batch that the file at `path` was submitted as."""
    status = batch_status(ledger, batch_id)
    if status.ended < status.total and not partial:
        raise LoraBatchError(
            f"batch {batch_id}: {status.total - status.ended} of {status.total} jobs are open; "
            "wait for them, or take what is there with --partial"
        )
    if out.resolve() == path.resolve():
        raise LoraBatchError(f"the output would replace its input {path}; give another name")
    counts = Counter[str]()
    errors = errors_path(out)
    with atomic_files(out, errors) as (results, bad):
        for some in chunked(_lines(status, path), CHUNK):
            good = [line.job.job_id for line in some if isinstance(line, GoodLine)]
            accepted = outcomes(ledger, good)
            for line in some:
                if isinstance(line, GoodLine) and line.job.job_id in accepted:
                    result = accepted[line.job.job_id]
                    counts[result.state if result else "not_finished"] += 1
                    results.write(json.dumps(_line(line, result), ensure_ascii=False) + "\n")
                else:
                    counts["bad"] += 1
                    bad.write(_bad(line).as_json() + "\n")
    if not counts["bad"]:
        errors.unlink()
    names = ("succeeded", "failed", "cancelled", "not_finished", "bad")
    return Written(**{name: counts[name] for name in names})


def _lines(status: BatchStatus, path: Path) -> Iterator[GoodLine | BadLine]:
    """Of the batch's file. Raises LoraBatchError if it is another, or cannot be read."""
    try:
        with path.open("rb") as file:
            if not status.source.endswith(f"sha256:{file_digest(file)}"):
                raise LoraBatchError(
                    f"batch {status.batch_id} was made from {status.source!r}, and {path} is not "
                    "that file; give the file that was submitted"
                )
            yield from read_lines(file, status.batch_id, status.tenant, None)
    except OSError as error:
        raise LoraBatchError(
            f"{path} cannot be read: {error.strerror or error}; give the file that was submitted"
        ) from error


@contextlib.contextmanager
def atomic_files(*paths: Path) -> Iterator[list[TextIO]]:
    """Text files that appear under their names only once all are complete and on the disk. Raises
    LoraBatchError if they cannot be written."""
    done: list[Path] = []
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}.new") for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files: list[TextIO] = [
                stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for path in temporary
            ]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for new, path in zip(temporary, paths, strict=True):
            new.replace(path)
            done.append(path)
    except OSError as error:
        kept = f"{done[0]} is the new one" if done else "what was there before is as it was"
        raise LoraBatchError(
            f"{paths[len(done)]} cannot be written: {error.strerror or error}; {kept}: make room, "
            "or give another place, and ask for the output again"
        ) from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def outcomes(ledger: Ledger, job_ids: Sequence[str]) -> dict[str, Result | None]:
    """Of lines by the ids of their first jobs, those that are jobs; None while they are open."""
    latest = Batches(ledger.engine).latest(job_ids)
    states = ledger.states(list(latest.values()))
    found = ledger.results(list(states))
    return {first: found.get(last) for first, last in latest.items() if last in states}


def _bad(line: GoodLine | BadLine) -> BadLine:
    if isinstance(line, BadLine):
        return line
    why = "the line was refused when its file was submitted, or not read yet; submit the file again"
    return BadLine(line.number, line.job.custom_id, "not_accepted", why)


def _line(line: GoodLine, result: Result | None) -> dict[str, Any]:
    return _short_line(line, result) if line.form == "short" else openai_line(line, result)


def _error(result: Result | None) -> dict[str, str] | None:
    if result is None:
        return {"code": "not_finished", "message": "the job is still open"}
    if result.state == "succeeded":
        return None
    if result.error is not None:
        return {"code": result.error.code, "message": result.error.message}
    return {"code": f"job_{result.state}", "message": f"the job {result.state}"}


def _short_line(line: GoodLine, result: Result | None) -> dict[str, Any]:
    usage = None
    if result is not None:
        usage = {**result.usage.model_dump(), "total_tokens": result.usage.total_tokens}
    choices = [one.model_dump(mode="json") for one in (result and result.choices) or ()]
    return {
        "line": line.number,
        "custom_id": line.job.custom_id,
        "job_id": line.job.job_id,
        "tenant": line.job.tenant,
        "adapter_id": line.job.adapter_name,
        "text": result.text if result else None,
        "finish_reason": result.finish_reason if result else None,
        **({"choices": choices} if choices else {}),
        "usage": usage,
        "error": _error(result),
    }


def openai_line(line: GoodLine, result: Result | None) -> dict[str, Any]:
    job_id = line.job.job_id
    response = None
    if result is not None and result.state == "succeeded":
        body = answer_body(line.form == "chat", line.model, result)
        response = {"status_code": 200, "request_id": job_id, "body": body}
    return {
        "id": f"batch_req_{job_id}",
        "custom_id": line.job.custom_id,
        "response": response,
        "error": _error(result),
    }

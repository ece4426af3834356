"""A batch's results as JSONL, CSV or Parquet, in the order of its files, a row for each good row.

In JSONL, OpenAI lines get OpenAI's shape, all others a flat one. A job that failed or was cancelled
has an `error` in its place; bad lines go to a second file, OUT.errors.jsonl. The ledger says which
lines are jobs; what their `model` means is not asked again. Each file appears whole or not at all.
Raises LoraBatchError if jobs are open (unless `partial`), if the file is not the batch's or cannot
be read, or if the output cannot be written.
"""

from __future__ import annotations

import contextlib
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
from lorabatch_producer.batch import BatchStatus, batch_status, reading_of
from lorabatch_producer.bulk import BadLine, GoodLine
from lorabatch_producer.inputs import Inputs, format_of
from lorabatch_producer.openai_body import answer_body
from lorabatch_producer.result_files import INPUT, RESULT_COLUMNS, flat, row_writer
from lorabatch_producer.sending import chunked
from lorabatch_producer.table_rows import pyarrow

__all__ = [
    "Written",
    "atomic_files",
    "check_output",
    "errors_path",
    "openai_line",
    "outcomes",
    "write_output",
]

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
    stem = out.name
    for suffix in (".jsonl", ".csv", ".parquet"):
        stem = stem.removesuffix(suffix)
    return out.with_name(stem + ".errors.jsonl")


def write_output(
    ledger: Ledger,
    batch_id: str,
    files: Path | Inputs,
    out: Path,
    partial: bool = False,
    with_input: bool = False,
) -> Written:
    """Write the results of the batch that these files were submitted as, in the format that `out`
    says by its name. `with_input`: with what stood in each row."""
    status = batch_status(ledger, batch_id)
    if status.ended < status.total and not partial:
        raise LoraBatchError(
            f"batch {batch_id}: {status.total - status.ended} of {status.total} jobs are open; "
            "wait for them, or take what is there with --partial"
        )
    if isinstance(files, Path):
        files = Inputs.of(files, reading_of(ledger, batch_id))
    columns, form = check_output(files, out, with_input), format_of(out.name)
    counts, errors = Counter[str](), errors_path(out)
    with atomic_files(out, errors) as (results, bad), row_writer(results, form, columns) as write:
        for line, result in _answered(ledger, _lines(status, files, with_input), counts):
            if isinstance(line, BadLine):
                bad.write(line.as_json() + "\n")
            elif form == "jsonl":
                write(_line(line, result, with_input))
            else:
                row = line.row if with_input else {}
                write(flat(_short_line(line, result), line.file, row))
    if not counts["bad"]:
        errors.unlink()
    names = ("succeeded", "failed", "cancelled", "not_finished", "bad")
    return Written(**{name: counts[name] for name in names})


def _answered(
    ledger: Ledger, lines: Iterator[GoodLine | BadLine], counts: Counter[str]
) -> Iterator[tuple[GoodLine | BadLine, Result | None]]:
    """Lines with their results, counted."""
    for some in chunked(lines, CHUNK):
        accepted = outcomes(ledger, [one.job.job_id for one in some if isinstance(one, GoodLine)])
        for line in some:
            if isinstance(line, GoodLine) and line.job.job_id in accepted:
                result = accepted[line.job.job_id]
                counts[result.state if result else "not_finished"] += 1
                yield line, result
            else:
                counts["bad"] += 1
                yield _bad(line), None


def check_output(files: Inputs, out: Path, with_input: bool = False) -> list[str]:
    """The columns of the results, if they are a table. Raises LoraBatchError if they could not be
    written there, which is better known before the batch has run."""
    written = {path.resolve() for path in (out, errors_path(out))}
    for source in files.sources:
        if source.path.resolve() in written:
            raise LoraBatchError(
                f"the output {out}, with its {errors_path(out).name}, would replace its input "
                f"{source.path}; give another name"
            )
    if out.suffix == ".gz":
        raise LoraBatchError(f"{out}: results are not compressed; leave out .gz")
    if not out.resolve().parent.is_dir():
        raise LoraBatchError(f"{out}: no such folder; make it, or give another place")
    form = format_of(out.name)
    if form == "parquet":
        pyarrow("pyarrow.parquet")
    return [] if form == "jsonl" else _columns(files, with_input)


def _columns(inputs: Inputs, with_input: bool) -> list[str]:
    """Of a table of results. Raises LoraBatchError if the input's cannot be known."""
    own: dict[str, None] = {}
    for source in inputs.sources if with_input else ():
        columns = source.columns()
        if columns is None:
            raise LoraBatchError(
                f"{source.label}: lines of JSONL have no columns to put beside the results; write "
                "the output as JSONL"
            )
        own.update(dict.fromkeys(INPUT + column for column in columns))
    return [*own, *RESULT_COLUMNS]


def _lines(status: BatchStatus, inputs: Inputs, with_input: bool) -> Iterator[GoodLine | BadLine]:
    """Of the batch's files. Raises LoraBatchError if they are others, or cannot be read."""
    try:
        if not status.source.endswith(f"sha256:{inputs.digest()}"):
            raise LoraBatchError(
                f"batch {status.batch_id} was made from {status.source!r}, and {inputs.name} is "
                "not that file; give what was submitted, in that order"
            )
        yield from inputs.lines(status.batch_id, status.tenant, None, with_input)
    except OSError as error:
        raise LoraBatchError(
            f"{error.filename or inputs.name} cannot be read: {error.strerror or error}; give the "
            "file that was submitted"
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
    return BadLine(line.number, line.job.custom_id, "not_accepted", why, line.file)


def _line(line: GoodLine, result: Result | None, with_input: bool) -> dict[str, Any]:
    if line.form != "short":
        found = openai_line(line, result)
    else:
        found = {**({"file": line.file} if line.file else {}), **_short_line(line, result)}
    return {**found, "input": dict(line.row)} if with_input else found


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
        tools = line.job.tools is not None
        body = answer_body(line.form == "chat", line.model, result, tools)
        response = {"status_code": 200, "request_id": job_id, "body": body}
    return {
        "id": f"batch_req_{job_id}",
        "custom_id": line.job.custom_id,
        "response": response,
        "error": _error(result),
    }

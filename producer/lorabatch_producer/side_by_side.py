"""One file of prompts against several adapters: each row is a job for each of them, all with the
row's seed, and what came of it is a table with a column for each adapter.

It is a batch like any other: the same files, adapters and options again find the same jobs. Raises
InvalidJob for adapters that cannot be compared, and LoraBatchError for files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lorabatch import Job, Ledger, Result
from lorabatch.errors import InvalidJob, LoraBatchError, shown
from lorabatch.fields import AdapterName
from lorabatch.messages import ChatMessage
from lorabatch_producer.batch import BatchStatus, base_names_of
from lorabatch_producer.bulk import BadLine, GoodLine
from lorabatch_producer.client import Producer
from lorabatch_producer.comparison_page import Answer, beginning, ending, table_row
from lorabatch_producer.inputs import Inputs
from lorabatch_producer.output import atomic_files, outcomes
from lorabatch_producer.result_files import row_writer
from lorabatch_producer.sending import chunked

__all__ = ["SideBySide", "check_places", "label", "write_comparison"]

ROWS = 50  # whose results are in memory at once
FIGURES = ("text", "prompt_tokens", "output_tokens", "finish_reason", "error")


@dataclass(frozen=True)
class SideBySide(Inputs):
    """Every row of the files, once for each adapter; None: the base model. Which adapter a row
    itself names does not matter."""

    adapters: tuple[str | None, ...] = ()

    @property
    def plain(self) -> bool:
        return False

    def check(self) -> None:
        """Raise InvalidJob or LoraBatchError for what could not be compared."""
        for at, name in enumerate(self.adapters):
            if name in self.adapters[:at]:
                raise InvalidJob(f"adapters: {shown(name)} is given twice; each once")
            try:
                TypeAdapter(AdapterName | None).validate_python(name)
            except ValidationError:
                raise InvalidJob(
                    f"adapters: wanted names of adapters, separated by commas (got {shown(name)})"
                ) from None
        super().check()

    def digest(self) -> str:
        """In any order of the adapters the same."""
        whole = ["side by side", sorted(map(label, self.adapters)), super().digest()]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def lines(
        self, batch_id: str, tenant: str, base: frozenset[str] | None, whole_rows: bool = False
    ) -> Iterator[GoodLine | BadLine]:
        for line in super().lines(batch_id, tenant, base, whole_rows):
            texts = 1 if isinstance(line, BadLine) else line.job.sampling_params.candidates
            if isinstance(line, BadLine):
                yield line
            elif texts > 1:
                why = f"n, best_of: wanted one text of each adapter (got {texts}); leave them out"
                custom_id = line.job.custom_id
                yield BadLine(line.number, custom_id, InvalidJob.code, why, line.file)
            else:
                for name in self.adapters:
                    yield dataclasses.replace(line, job=_job_for(line.job, name))


def _job_for(job: Job, adapter: str | None) -> Job:
    """With the seed of the row, which otherwise would follow from the id."""
    return job.model_copy(
        update={
            "job_id": str(uuid.uuid5(uuid.UUID(job.job_id), label(adapter))),
            "adapter_id": adapter,
            "merged_adapters": None,
            "sampling_params": job.sampling_params.model_copy(update={"seed": job.seed}),
        }
    )


def label(adapter: str | None) -> str:
    """A column's name."""
    return adapter or "(base model)"


def write_comparison(
    producer: Producer, status: BatchStatus, sides: SideBySide, page: Path, table: Path | None
) -> int:
    """Write what came of a batch as a page and, if wanted, as CSV: how many rows. Each file appears
    whole or not at all. Jobs that are open, or were not accepted, have that as error."""
    names = [label(one) for one in sides.adapters]
    columns = ["file", "line", "custom_id", "prompt"]
    columns += [f"{name} {figure}" for name in names for figure in FIGURES]
    lines = sides.lines(status.batch_id, status.tenant, base_names_of(producer))
    count, paths = 0, [page, *filter(None, [table])]
    with atomic_files(*paths) as files, contextlib.ExitStack() as stack:
        write = stack.enter_context(row_writer(files[1], "csv", columns)) if table else None
        files[0].write(beginning(f"batch {status.batch_id}", _about(sides, status), names))
        for line, answers in _compared(producer.ledger, lines, len(names)):
            count += 1
            by_name, asked = dict(zip(names, answers, strict=True)), _asked(line.job)
            place = line.job.custom_id or str(line.number)
            files[0].write(table_row(place, asked, by_name))
            if write:
                write(_csv_row(line, asked, by_name))
        files[0].write(ending())
    return count


def _about(sides: SideBySide, status: BatchStatus) -> str:
    return (
        f"{sides.name}, tenant {status.tenant}: {status.succeeded} of {status.total} jobs "
        f"succeeded, {status.failed} failed, {status.cancelled} cancelled, "
        f"{status.rejected_lines} bad rows"
    )


def check_places(inputs: Inputs, page: Path, table: Path | None) -> None:
    """Raise LoraBatchError if the results could not be written there."""
    taken = [source.path.resolve() for source in inputs.sources]
    for path in filter(None, (page, table)):
        if not path.resolve().parent.is_dir():
            raise LoraBatchError(f"{path}: no such folder; make it, or give another place")
        if path.resolve() in taken:
            raise LoraBatchError(f"{path} is given twice, or is a file of prompts; give another")
        taken.append(path.resolve())


def _compared(
    ledger: Ledger, lines: Iterator[GoodLine | BadLine], width: int
) -> Iterator[tuple[GoodLine, list[Answer]]]:
    """Each row with the answers of all adapters, in their order."""
    good = (line for line in lines if isinstance(line, GoodLine))
    for some in chunked(good, ROWS * width):
        found = outcomes(ledger, [line.job.job_id for line in some])
        for at in range(0, len(some), width):
            mine = some[at : at + width]
            yield mine[0], [_answer(line.job.job_id, found) for line in mine]


def _answer(job_id: str, found: dict[str, Result | None]) -> Answer:
    result = found.get(job_id)
    if result is None:
        return Answer(error="the job is still open" if job_id in found else "never accepted")
    error = None
    if result.state != "succeeded":
        error = f"{result.error.code}: {result.error.message}" if result.error else result.state
    usage = result.usage
    return Answer(
        result.text, usage.prompt_tokens, usage.output_tokens, result.finish_reason, error
    )


def _asked(job: Job) -> str:
    if job.prompt is not None:
        return job.prompt
    return "\n\n".join(f"{said.role}: {_said(said)}" for said in job.messages or ())


def _said(message: ChatMessage) -> str:
    calls = (call.model_dump_json() for call in message.tool_calls or ())
    return "\n".join([*filter(None, [message.content]), *calls])


def _csv_row(line: GoodLine, asked: str, answers: dict[str, Answer]) -> dict[str, Any]:
    figures = {
        f"{name} {figure}": getattr(answer, figure)
        for name, answer in answers.items()
        for figure in FIGURES
    }
    own = {"file": line.file, "line": line.number, "custom_id": line.job.custom_id}
    return {**own, "prompt": asked, **figures}

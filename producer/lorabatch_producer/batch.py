"""A user's files as one batch: its identity, its submission and its status.

The batch id follows from tenant and file content, a job's id from batch id and custom_id (or
file and line number). So a file that is submitted again, after a crash or by mistake, finds its own
jobs and is not billed twice; what failed or was cancelled runs again. `new=True` forces another
run of all. Raises JobNotFound, IdempotencyConflict, QueueFull, InvalidJob, BudgetExhausted.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from lorabatch import Job, Ledger
from lorabatch.batches import Batches
from lorabatch.budgets import Budget, budget_of
from lorabatch.errors import IdempotencyConflict, JobNotFound, LoraBatchError, QueueFull
from lorabatch.queues import Queues
from lorabatch.statements import known_jobs
from lorabatch.stopping import limit
from lorabatch.tables import batches as batch_rows
from lorabatch_producer.bulk import BadLine, GoodLine, base_names
from lorabatch_producer.inputs import Inputs, file_digest
from lorabatch_producer.reading import Reading
from lorabatch_producer.sending import NotSent, chunked

if TYPE_CHECKING:
    from lorabatch_producer.client import Producer

__all__ = [
    "BatchStatus",
    "Limits",
    "Lines",
    "Submitted",
    "base_names_of",
    "batch_id_for",
    "batch_status",
    "file_digest",
    "reading_of",
    "submit",
]

NAMESPACE = uuid.UUID("1f0f6c34-9a4d-5e0e-8c55-6d0a54f5a1b0")


@dataclass(frozen=True)
class Limits:
    """What a batch may spend. `max_failures`: jobs, or below 1 a share of all, which is told once
    the files were read. None: no limit, or the one that it has."""

    max_tokens: int | None = None
    max_failures: float | None = None

    @property
    def failures(self) -> int | None:
        whole = self.max_failures is not None and self.max_failures >= 1
        return int(self.max_failures or 0) if whole else None

    def failures_of(self, jobs: int) -> int | None:
        """Of a share; None where it is none."""
        share = self.max_failures is not None and self.max_failures < 1
        return max(1, math.ceil((self.max_failures or 0) * jobs)) if share else None


@dataclass(frozen=True)
class Submitted:
    """What a submission came to, in lines. `again`: of those accepted, what had failed or was
    cancelled before. `not_sent`: accepted, but the broker was down."""

    batch_id: str
    accepted: int
    rejected: int
    again: int = 0
    not_sent: NotSent | None = None


@dataclass(frozen=True)
class BatchStatus:
    """A batch and its jobs by state. Time: microseconds UTC."""

    batch_id: str
    tenant: str
    source: str
    created_us: int
    rejected_lines: int
    budget: Budget = field(default_factory=Budget)
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def total(self) -> int:
        return self.queued + self.running + self.ended

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled


def batch_id_for(tenant: str, digest: str, new: bool = False) -> str:
    """The id of a tenant's file of that content; a random one if `new`."""
    return str(uuid.uuid4() if new else uuid.uuid5(NAMESPACE, f"{tenant}\n{digest}"))


def submit(
    producer: Producer,
    files: Path | Inputs,
    tenant: str = "default",
    new: bool = False,
    on_bad: Callable[[BadLine], None] = lambda line: None,
    limits: Limits = Limits(),
) -> Submitted:
    """Accept and send every good line of files; `on_bad` is told of the others as they come."""
    inputs = Inputs.of(files) if isinstance(files, Path) else files
    inputs.check()
    digest = inputs.digest()
    lines, batch_id = Lines(producer), batch_id_for(tenant, digest, new)
    reading = None if inputs.plain else inputs.reading.model_dump(exclude_defaults=True)
    lines.batches.add(batch_id, tenant, f"{inputs.name} sha256:{digest}", reading)
    limit(producer.ledger.engine, batch_id, limits.max_tokens, limits.failures)
    counts = _Counts(on_bad)
    try:
        for some in chunked(counts.good(inputs.lines(batch_id, tenant, base_names_of(producer)))):
            lines.accept(some)
        counts.whole = True
    except IdempotencyConflict as error:
        raise _read_otherwise(batch_id, error) from None
    except QueueFull as error:
        raise _no_more(batch_id, lines, error) from None
    finally:
        lines.batches.count(batch_id, lines.accepted, counts.bad, counts.whole)
    if inputs.digest() != digest:
        raise LoraBatchError(
            f"{inputs.name} changed while it was read; what was accepted belongs to batch "
            f"{batch_id}: cancel that, and submit the finished file"
        )
    share = limits.failures_of(lines.accepted)
    if share is not None:
        limit(producer.ledger.engine, batch_id, None, share, under_way=True)
    return Submitted(batch_id, lines.accepted, counts.bad, lines.again, lines.finish())


def base_names_of(producer: Producer) -> frozenset[str]:
    """What rows may call the base model of our settings' queue."""
    theirs = Queues(producer.ledger.engine).list().get(producer.settings.queue)
    return base_names(producer.settings, theirs)


class _Counts:
    """Passes jobs on, and counts what is none."""

    def __init__(self, on_bad: Callable[[BadLine], None]) -> None:
        self.bad, self.whole = 0, False
        self._on_bad = on_bad

    def good(self, lines: Iterable[GoodLine | BadLine]) -> Iterator[Job]:
        for line in lines:
            if isinstance(line, BadLine):
                self.bad += 1
                self._on_bad(line)
            else:
                yield line.job


class Lines:
    """Accepts lines, as many of a chunk as may wait, and runs again what had ended badly, unless
    `again` is false. `queue`: for whose workers; None: that of our settings."""

    def __init__(self, producer: Producer, queue: str | None = None, again: bool = True) -> None:
        self.accepted = self.again = 0
        self.batches = Batches(producer.ledger.engine)
        self._ledger = producer.ledger
        self._sender = producer.sender(queue)
        self._run_again = again

    def accept(self, some: Sequence[Job]) -> None:
        if not self._run_again:
            self._fill(some)
            return
        ended_badly = _ended_badly(self._ledger, some)  # before the new ones begin to end
        self._fill(some)
        again = self.batches.run_again(ended_badly)
        self.again += len(again.jobs)
        if again.full is not None:
            raise again.full

    def finish(self) -> NotSent | None:
        try:
            self._sender.finish()
        except NotSent as error:
            return error
        return None

    def _fill(self, some: Sequence[Job]) -> None:
        size, at = len(some), 0
        while at < len(some):
            try:
                taken = len(self._sender.chunk(some[at : at + size]))
            except QueueFull:
                if size == 1:
                    raise
                size //= 2
            else:
                at += taken
                self.accepted += taken


def _ended_badly(ledger: Ledger, some: Sequence[Job]) -> list[str]:
    """Of lines that were accepted before: the ids of their jobs that failed or were cancelled."""
    with ledger.engine.execution_options(read_only=True).begin() as connection:
        known = [str(row.job_id) for row in known_jobs(connection, some).values()]
    latest = Batches(ledger.engine).latest(known).values()
    states = ledger.states(list(latest))
    return [job_id for job_id, state in states.items() if state in ("failed", "cancelled")]


def _no_more(batch_id: str, lines: Lines, error: QueueFull) -> QueueFull:
    reason = str(error).partition(";")[0]
    again = f", {lines.again} of them run again" if lines.again else ""
    return QueueFull(
        f"batch {batch_id}: {lines.accepted} lines accepted{again}, the rest not: {reason}; submit "
        "the same file again to go on when some have ended, or raise the limit with `lorabatch "
        "tenants set`"
    )


def _read_otherwise(batch_id: str, error: IdempotencyConflict) -> IdempotencyConflict:
    return IdempotencyConflict(
        f"batch {batch_id}: this file was submitted before, and its lines meant something else "
        "then (another queue, LORABATCH_BASE_MODEL or version, or no worker had said yet what the "
        f"queue's base model is); submit it as a new batch ({error})"
    )


def reading_of(ledger: Ledger, batch_id: str) -> Reading:
    """How the rows of a batch's files were made jobs."""
    query = sa.select(batch_rows.c.reading).where(batch_rows.c.batch_id == batch_id)
    with ledger.engine.execution_options(read_only=True).begin() as connection:
        return Reading.model_validate(connection.scalar(query) or {})


def batch_status(ledger: Ledger, batch_id: str) -> BatchStatus:
    """A batch's jobs by state. Raises JobNotFound."""
    with ledger.engine.execution_options(read_only=True).begin() as connection:
        query = sa.select(batch_rows).where(batch_rows.c.batch_id == batch_id)
        row = connection.execute(query).one_or_none()
    if row is None:
        raise JobNotFound(f"batch {batch_id!r}: no such batch in this ledger")
    return BatchStatus(
        batch_id=row.batch_id,
        tenant=row.tenant,
        source=row.source,
        created_us=row.created_us,
        rejected_lines=row.rejected_lines,
        budget=budget_of(row),
        **ledger.counts(batch_id),
    )

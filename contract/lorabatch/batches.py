"""A user's files in the ledger: their lines' jobs cancelled at once, or run again.

A line that failed or was cancelled runs again as another job, whose id follows from the id of the
first; that keeps its outcome and is superseded: its batch no longer counts it. Raises JobNotFound;
database errors pass through.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lorabatch.bindings import bound
from lorabatch.database import now_us
from lorabatch.errors import JobCancelled, JobNotFound, QueueFull
from lorabatch.job import Job
from lorabatch.outbox import delivery_row
from lorabatch.result import ErrorInfo
from lorabatch.rows import job_row, names_of, stored_job
from lorabatch.statements import chunks, insert, locked
from lorabatch.tables import batches, jobs, results, usage_events, webhook_deliveries
from lorabatch.tenants import Room

__all__ = ["Again", "Batches", "end_open"]

NAMESPACE = uuid.UUID("7c0c8a1e-3f7a-5d0c-9f0e-9a6f6f1f2c11")
CANCELLED = "cancelled"


@dataclass(frozen=True)
class Again:
    """What runs again, by the ids of the old jobs those of the new; and if there was no room for
    all, why."""

    jobs: dict[str, str]
    full: QueueFull | None = None


class Batches:
    """Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(
        self, batch_id: str, tenant: str, source: str, reading: dict[str, Any] | None = None
    ) -> None:
        """Note a bulk file, before its first line is accepted; the same again changes nothing.
        `reading`: how its rows are jobs, unless each line says it all."""
        with self._engine.begin() as connection:
            row = {
                "batch_id": batch_id,
                "tenant": tenant,
                "source": source,
                "accepted_lines": 0,
                "rejected_lines": 0,
                "reading": sa.null() if reading is None else reading,
                "created_us": connection.scalar(sa.select(now_us())),
            }
            connection.execute(insert(connection, batches).on_conflict_do_nothing(), [row])

    def count(self, batch_id: str, accepted: int, bad: int, whole: bool = False) -> None:
        """Note its line counts, as far as it was read. Unless that was the `whole` file, what was
        read before stays counted."""
        with self._engine.begin() as connection:
            for column, seen in (
                (batches.c.accepted_lines, accepted),
                (batches.c.rejected_lines, bad),
            ):
                fewer = sa.true() if whole else column < seen
                mine = sa.update(batches).where(batches.c.batch_id == batch_id, fewer)
                connection.execute(mine.values({column: seen}))

    def cancel(self, batch_id: str) -> dict[str, int]:
        """End what waits, in a few statements however much it is, and ask what runs to end: how
        many jobs of each, by `cancelled` and `asked`. Raises JobNotFound."""
        mine = jobs.c.batch_id == batch_id
        with self._engine.begin() as connection:
            if connection.scalar(sa.select(sa.exists().where(mine))) is not True:
                raise JobNotFound(f"batch {batch_id!r}: no jobs of it in this ledger")
            return end_open(
                connection, batch_id, ErrorInfo(code=JobCancelled.code, message=CANCELLED)
            )

    def latest(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Of lines by the ids of their first jobs: the ids of those that count now."""
        found = {job_id: job_id for job_id in job_ids}
        look = list(found)
        with self._engine.execution_options(read_only=True).begin() as connection:
            while look:  # as often as a line was run again
                gone = set[str]()
                for some in chunks(sorted({found[first] for first in look})):
                    query = sa.select(jobs.c.job_id).where(
                        jobs.c.job_id.in_(some), jobs.c.superseded
                    )
                    gone.update(connection.scalars(query))
                look = [first for first in look if found[first] in gone]
                found.update((first, again_id(found[first])) for first in look)
        return found

    def run_again(self, job_ids: Sequence[str]) -> Again:
        """Accept those of these that failed or were cancelled as new jobs, as many as may wait.
        With the adapters' versions of now. Once, however often it is asked for."""
        again: dict[str, str] = {}
        left: list[tuple[Room, str]] = []
        for some in chunks(job_ids):
            with self._engine.begin() as connection:
                rows = []
                for row, room in _with_rooms(connection, _ended_badly(connection, some)):
                    if (reached := room.take(row.tenant)) is None:
                        rows.append(row)
                    else:
                        left.append((room, reached))
                again |= _made_again(connection, rows)
        if not left:
            return Again(again)
        room, reached = left[0]
        return Again(again, room.full(reached, f"{len(again)} run again, {len(left)} do not"))


def end_open(
    connection: sa.Connection,
    batch_id: str,
    why: ErrorInfo,
    ask: sa.ColumnElement[bool] | None = None,
) -> dict[str, int]:
    """End what waits of a batch, and ask what runs, or those of it that meet a condition, to end:
    how many of each, by `cancelled` and `asked`."""
    mine = jobs.c.batch_id == batch_id
    now = int(connection.scalar(sa.select(now_us())) or 0)
    # Locked in id order, as by all others; and none changes sides between the updates.
    open_ones = mine, jobs.c.state.in_(("queued", "running"))
    held = sa.select(jobs.c.job_id).where(*open_ones).order_by(jobs.c.job_id).with_for_update()
    connection.execute(sa.select(sa.func.count()).select_from(held.subquery()))
    waiting = sa.update(jobs).where(mine, jobs.c.state == "queued")
    ended = connection.execute(waiting.values(state=CANCELLED, finished_us=now))
    running = mine, jobs.c.state == "running", sa.true() if ask is None else ask
    asked = connection.execute(sa.update(jobs).where(*running).values(cancel_requested=True))
    known = sa.exists().where(results.c.job_id == jobs.c.job_id)
    fresh = sa.and_(mine, jobs.c.state == CANCELLED, sa.not_(known))
    _record_cancelled(connection, fresh, now, why)
    return {"cancelled": ended.rowcount, "asked": asked.rowcount}


def _ended_badly(connection: sa.Connection, job_ids: Sequence[str]) -> list[Any]:
    """Locked rows of those that failed or were cancelled, and were jobs."""
    ended = sa.and_(jobs.c.state.in_(("failed", CANCELLED)), sa.not_(jobs.c.superseded))
    return [row for row in locked(connection, job_ids, ended, whole=True) if row.body]


def _with_rooms(connection: sa.Connection, rows: Sequence[Any]) -> list[tuple[Any, Room]]:
    """Each with the room in its queue."""
    tenants = {row.tenant for row in rows}  # of all: the first room locks them, in their order
    rooms = {queue: Room(connection, tenants, queue) for queue in {row.queue for row in rows}}
    return [(row, rooms[row.queue]) for row in rows]


def _made_again(connection: sa.Connection, rows: Sequence[Any]) -> dict[str, str]:
    if not rows:
        return {}
    now = int(connection.scalar(sa.select(now_us())) or 0)
    new = [_renewed(row) for row in rows]
    versions = bound(connection, (pair for job in new for pair in names_of(job)))
    made = [
        {
            **job_row(job, now, versions),
            "publish_result": row.publish_result,
            "queue": row.queue,
        }
        for job, row in zip(new, rows, strict=True)
    ]
    connection.execute(insert(connection, jobs).on_conflict_do_nothing(), made)
    old = [row.job_id for row in rows]
    connection.execute(sa.update(jobs).where(jobs.c.job_id.in_(old)).values(superseded=True))
    return {row.job_id: job.job_id for row, job in zip(rows, new, strict=True)}


def again_id(job_id: str) -> str:
    """Of the job that runs another's request again."""
    return str(uuid.uuid5(NAMESPACE, job_id))


def _renewed(row: Any) -> Job:
    job = stored_job(row)
    new_id = again_id(job.job_id)
    fresh = {"job_id": new_id, "idempotency_key": new_id, "done_by": None}
    return job.model_copy(update={**fresh, "webhook": row.webhook})


def _record_cancelled(
    connection: sa.Connection, which: sa.ColumnElement[bool], now: int, why: ErrorInfo
) -> None:
    """Results, usage and webhooks of jobs that never ran, as `endings.write_results` has
    them."""
    columns = (jobs.c.job_id, jobs.c.tenant, jobs.c.webhook)
    query = sa.select(*columns).where(which, jobs.c.webhook.is_not(None))
    told = [delivery_row(("job", CANCELLED), *row, now, now) for row in connection.execute(query)]
    if told:
        connection.execute(webhook_deliveries.insert(), told)
    zero, at = sa.literal(0), sa.literal(now)
    none = sa.null()
    usage = {
        "event_key": jobs.c.job_id + "/generation",
        "job_id": jobs.c.job_id,
        "tenant": jobs.c.tenant,
        "adapter_id": jobs.c.adapter_id,
        "batch_id": jobs.c.batch_id,
        "attempt": jobs.c.attempts,
        "kind": sa.literal("generation"),
        "input_tokens": zero,
        "cached_tokens": zero,
        "output_tokens": zero,
        "queue_us": sa.case((jobs.c.submitted_us < at, at - jobs.c.submitted_us), else_=zero),
        "run_us": zero,
        "billable": sa.false(),
        "occurred_us": at,
        "recorded_us": at,
    }
    result = {
        "job_id": jobs.c.job_id,
        "state": sa.literal(CANCELLED),
        "text": none,
        "token_ids": sa.literal([], results.c.token_ids.type),
        "prompt_tokens": zero,
        "cached_tokens": zero,
        "attempt": jobs.c.attempts,
        "error_code": sa.literal(why.code),
        "error_message": sa.literal(why.message),
        "recorded_us": at,
    }
    for table, values in ((usage_events, usage), (results, result)):
        chosen = sa.select(*values.values()).where(which)
        connection.execute(table.insert().from_select(list(values), chosen))

"""SQL of the ledger's transactions: each works on the caller's connection and commits nothing.

Raises IdempotencyConflict; database errors pass through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from lorabatch.claim import Claim, Start, suspected
from lorabatch.errors import IdempotencyConflict
from lorabatch.job import Job
from lorabatch.rows import stored_job
from lorabatch.tables import (
    job_attempts,
    jobs,
)

__all__ = [
    "BODILESS",
    "ago_us",
    "chunks",
    "count_starts",
    "end_attempts",
    "insert",
    "known_jobs",
    "lease",
    "locked",
    "same_request",
    "stands",
]

CHUNK = 500
BODILESS = [column for column in jobs.c if column is not jobs.c.body]
# Of a job that is ended, renewed or handed back; more of them cost a tenth of the queue's time.
ACCOUNT = [
    jobs.c.job_id,
    jobs.c.tenant,
    jobs.c.adapter_id,
    jobs.c.batch_id,
    jobs.c.request_hash,
    jobs.c.state,
    jobs.c.attempts,
    jobs.c.lease_token,
    jobs.c.cancel_requested,
    jobs.c.done_by_us,
    jobs.c.submitted_us,
    jobs.c.started_us,
    jobs.c.webhook,
]
EARLIER_FIELDS = (  # of SamplingParams, when all of them were in a row
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty", "stop", "seed", "ignore_eos"),
)
T = TypeVar("T")


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An insert that knows `on_conflict_do_nothing`."""
    postgres = connection.dialect.name == "postgresql"
    return postgresql.insert(table) if postgres else sqlite.insert(table)


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def locked(
    connection: sa.Connection,
    job_ids: Sequence[str],
    condition: sa.ColumnElement[bool] | None = None,
    skip_locked: bool = False,
    whole: bool = False,
) -> Iterator[Any]:
    """Job rows, `whole` or as ACCOUNT, locked for this transaction, in id order so that two callers
    never deadlock."""
    columns = list(jobs.c) if whole else ACCOUNT
    for chunk in chunks(sorted(set(job_ids))):
        query = sa.select(*columns).where(jobs.c.job_id.in_(chunk)).order_by(jobs.c.job_id)
        if condition is not None:  # in a CASE, or SQLite looks through all jobs of a state
            query = query.where(sa.case((condition, 1), else_=0) == 1)
        yield from connection.execute(query.with_for_update(skip_locked=skip_locked)).all()


def known_jobs(connection: sa.Connection, asked: Sequence[Job]) -> dict[tuple[str, str], Any]:
    """Rows by (tenant, idempotency key)."""
    found: dict[tuple[str, str], Any] = {}
    names = ("job_id", "tenant", "idempotency_key", "request_hash", "queue")
    columns = [jobs.c[name] for name in names]
    for chunk in chunks(asked):
        keys = [job.key for job in chunk]
        tenants = {job.tenant for job in chunk}
        query = sa.select(*columns).where(
            jobs.c.tenant.in_(tenants), jobs.c.idempotency_key.in_(keys)
        )
        found.update(((r.tenant, r.idempotency_key), r) for r in connection.execute(query))
    return found


def same_request(
    job: Job, request_hash: str, known: dict[tuple[str, str], Any], queue: str | None
) -> str:
    """The id that this request is known by; IdempotencyConflict if its key asked otherwise, or for
    workers of another queue. None: of any."""
    row = known.get((job.tenant, job.key))
    if row is None:
        raise IdempotencyConflict(
            f"job {job.job_id!r}: this id is taken by a job of another tenant or key; "
            "leave job_id out or give a new one"
        )
    if row.request_hash not in (request_hash, _earlier_hash(job)):
        raise IdempotencyConflict(
            f"job {job.job_id!r}: idempotency key {job.key!r} of tenant {job.tenant!r} belongs to "
            f"job {row.job_id!r}, which asks for something else; use a new key"
        )
    if queue not in (row.queue, None):
        raise IdempotencyConflict(
            f"job {job.job_id!r}: idempotency key {job.key!r} of tenant {job.tenant!r} belongs to "
            f"job {row.job_id!r} in queue {row.queue!r}, and this is for {queue!r}; use a new key, "
            "or that queue"
        )
    return str(row.job_id)


def _earlier_hash(job: Job) -> str:
    """Of rows from before sampling fields that were left out stayed out."""
    params, body = job.sampling_params, job.body()
    whole = params.model_dump(mode="json", exclude_none=True, include=set(EARLIER_FIELDS))
    return job.request_hash({**body, "sampling_params": {**whole, **body["sampling_params"]}})


def lease(
    connection: sa.Connection, rows: Sequence[Any], owner: str, now: int, expires: int
) -> dict[str, Claim]:
    """Claims by job id on these locked rows, under a new token each."""
    if not rows:
        return {}
    lost = jobs.c.state == "running"  # the lease ran out: whoever had it has not handed it back
    crashed = sa.and_(lost, jobs.c.begun)
    leased = sa.update(jobs).values(
        state="running",
        lease_owner=owner,
        lease_token=jobs.c.lease_token + 1,
        lease_expires_us=expires,
        started_us=now,
        begun=False,
        crashes=jobs.c.crashes + sa.case((crashed, 1), else_=0),
        losses=jobs.c.losses + sa.case((lost, 1), else_=0),
    )
    attempt = sa.select(jobs.c.job_id, jobs.c.lease_token, sa.literal(owner), sa.literal(now))
    columns = ("job_id", "lease_token", "worker", "started_us")
    for some in chunks([row.job_id for row in rows]):
        connection.execute(leased.where(jobs.c.job_id.in_(some)))
        these = attempt.where(jobs.c.job_id.in_(some))
        connection.execute(job_attempts.insert().from_select(columns, these))
    claims: dict[str, Claim] = {}
    for row in rows:
        claims[row.job_id] = Claim(
            job=stored_job(row),
            lease_token=row.lease_token + 1,
            attempt=row.attempts + 1,
            submitted_us=row.submitted_us,
            started_us=now,
            publish_result=row.publish_result,
            adapter_versions=row.adapter_versions or {},
            crashes=row.crashes + _crashed(row),
            losses=row.losses + _lost(row),
            died_alone=bool(_crashed(row)) and suspected(row.crashes, row.losses),
        )
    return claims


def _lost(row: Any) -> int:
    """1 if the lease on this free row ran out."""
    return int(row.state == "running")


def _crashed(row: Any) -> int:
    return _lost(row) and int(row.begun)


def count_starts(
    connection: sa.Connection, starts: Sequence[Start], rows: Mapping[str, Any], now: int
) -> dict[str, int]:
    """Count an attempt for those of these whose claim stands, by their locked rows: when each
    began."""
    begun = {}
    for start in starts:
        row: Any = rows.get(start.claim.job.job_id)
        if stands(row, start.claim):
            begun[row.job_id] = max(row.submitted_us, now - ago_us(start.at_s))
    if begun:
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.job_id == sa.bindparam("id"))
            .values(attempts=jobs.c.attempts + 1, started_us=sa.bindparam("at"), begun=True),
            [{"id": job_id, "at": at_us} for job_id, at_us in begun.items()],
        )
    return begun


def stands(row: Any, claim: Claim) -> bool:
    """Whether a job, by its locked row, still runs under this claim."""
    return row is not None and row.state == "running" and row.lease_token == claim.lease_token


def ago_us(at_s: float) -> int:
    """Microseconds since a time of this process's monotonic clock."""
    return max(0, round((time.monotonic() - at_s) * 1e6))


def end_attempts(connection: sa.Connection, ended: Sequence[tuple[Any, str]], now: int) -> None:
    """Note how the attempt under the token of each of these locked rows ended."""
    by_outcome: dict[str, list[str]] = {}
    for row, how in ended:
        by_outcome.setdefault(how, []).append(row.job_id)
    token = sa.select(jobs.c.lease_token).where(jobs.c.job_id == job_attempts.c.job_id)
    last = job_attempts.c.lease_token == token.scalar_subquery()
    for how, job_ids in by_outcome.items():
        for some in chunks(job_ids):
            connection.execute(
                sa.update(job_attempts)
                .where(job_attempts.c.job_id.in_(some), last)
                .values(outcome=how, finished_us=now)
            )

"""The ledger: which jobs were accepted, who runs them, and what each ended as, exactly once.

A job's row is the truth; a queue message only hints that it is there. Workers claim by lease:
an owner, an expiry by the database's clock, and a fencing token that grows with every claim.
`record` writes result, usage and final state in one transaction, and only for claims whose
token still stands, so that a worker that was presumed dead cannot write a second outcome.

Raises IdempotencyConflict, JobNotFound; database errors pass through for the caller to retry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from lorabatch.database import now_us
from lorabatch.errors import IdempotencyConflict, JobNotFound
from lorabatch.job import Job
from lorabatch.result import ErrorInfo, JobState, Result
from lorabatch.rows import bare_result, job_row, result_row, stored_job, stored_result, usage_row
from lorabatch.tables import batches, job_attempts, jobs, results, usage_events

__all__ = ["Claim", "Ledger", "Message", "Outcome"]

CHUNK = 500
T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """The right to run a job until the lease runs out; `attempt` is the number of this run."""

    job: Job
    lease_token: int
    attempt: int
    submitted_us: int
    started_us: int
    publish_result: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an attempt ended as, to be recorded if its claim still stands."""

    claim: Claim
    result: Result


class Message(NamedTuple):
    """What the queue carries of an accepted job: enough to route by, nothing private."""

    job_id: str
    tenant: str
    adapter_id: str | None
    publish_result: bool = False


class Ledger:
    """All writes to the job tables. Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert

    # -- producers -----------------------------------------------------------

    def accept(self, accepted: Sequence[Job], publish_result: bool = False) -> dict[str, str]:
        """Commit jobs as queued: {job_id asked for: job_id it is known by}.

        A key that is known with the same request gives the known id. With another request it
        raises IdempotencyConflict and none of this call's jobs is accepted.
        """
        if not accepted:
            return {}
        with self.engine.begin() as connection:
            now = self._now(connection)
            statement = self._insert(jobs).on_conflict_do_nothing()
            rows = [job_row(job, now, publish_result) for job in accepted]
            rows.sort(key=lambda row: (row["tenant"], row["idempotency_key"]))  # no deadlocks
            connection.execute(statement, rows)
            known = _known(connection, accepted)
            return {job.job_id: _same_request(job, known) for job in accepted}

    def add_batch(self, batch_id: str, tenant: str, source: str, accepted: int, bad: int) -> None:
        """Note a bulk file and its line counts; the same file again changes nothing."""
        with self.engine.begin() as connection:
            row = {
                "batch_id": batch_id,
                "tenant": tenant,
                "source": source,
                "accepted_lines": accepted,
                "rejected_lines": bad,
                "created_us": self._now(connection),
            }
            connection.execute(self._insert(batches).on_conflict_do_nothing(), [row])

    def mark_sent(self, job_ids: Sequence[str]) -> None:
        """Note that a message for each of these jobs is in the queue."""
        with self.engine.begin() as connection:
            known = [row.job_id for row in _locked(connection, job_ids)]
            for chunk in _chunks(known):
                connection.execute(
                    sa.update(jobs).where(jobs.c.job_id.in_(chunk)).values(sent_us=now_us())
                )

    def cancel(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Cancel: queued jobs at once, running ones as soon as their worker looks.

        Returns the state each job is in now. Raises JobNotFound for the first unknown id.
        """
        states: dict[str, JobState] = {}
        with self.engine.begin() as connection:
            for row in _locked(connection, job_ids):
                states[row.job_id] = row.state
                if row.state == "queued":
                    states[row.job_id] = "cancelled"
                    result = bare_result(row, ErrorInfo(code="job_cancelled", message="cancelled"))
                    self._write(connection, row, result.model_copy(update={"state": "cancelled"}))
                elif row.state == "running":
                    connection.execute(
                        sa.update(jobs)
                        .where(jobs.c.job_id == row.job_id)
                        .values(cancel_requested=True)
                    )
        for job_id in job_ids:
            if job_id not in states:
                raise JobNotFound(f"job {job_id!r}: no such job in this ledger")
        return states

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """The state of each job that is known."""
        found: dict[str, JobState] = {}
        with self._read() as connection:
            for chunk in _chunks(job_ids):
                query = sa.select(jobs.c.job_id, jobs.c.state).where(jobs.c.job_id.in_(chunk))
                found.update((row.job_id, row.state) for row in connection.execute(query))
        return found

    def results(self, job_ids: Sequence[str]) -> dict[str, Result]:
        """The result of each of these jobs that has ended."""
        found: dict[str, Result] = {}
        with self._read() as connection:
            for chunk in _chunks(job_ids):
                query = (
                    sa.select(jobs, results)
                    .join(results, results.c.job_id == jobs.c.job_id)
                    .where(jobs.c.job_id.in_(chunk))
                    .set_label_style(sa.LABEL_STYLE_TABLENAME_PLUS_COL)
                )
                for row in connection.execute(query):
                    found[row.jobs_job_id] = stored_result(row)
        return found

    def counts(self, batch_id: str | None = None) -> dict[str, int]:
        """Jobs by state, of one batch or of all."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        if batch_id is not None:
            query = query.where(jobs.c.batch_id == batch_id)
        with self._read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    # -- workers -------------------------------------------------------------

    def claim(self, job_ids: Sequence[str], owner: str, lease_s: float) -> dict[str, Claim]:
        """Lease those of these jobs that are queued or whose lease has run out."""
        claims: dict[str, Claim] = {}
        with self.engine.begin() as connection:
            now = self._now(connection)
            free = sa.or_(
                jobs.c.state == "queued",
                sa.and_(jobs.c.state == "running", jobs.c.lease_expires_us < now),
            )
            rows = list(_locked(connection, job_ids, free, skip_locked=True))
            if not rows:
                return {}
            expires = now + round(lease_s * 1e6)
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.job_id == sa.bindparam("id"))
                .values(
                    state="running",
                    lease_owner=owner,
                    lease_token=jobs.c.lease_token + 1,
                    lease_expires_us=expires,
                    started_us=now,
                ),
                [{"id": row.job_id} for row in rows],
            )
            attempts = []
            for row in rows:
                claims[row.job_id] = Claim(
                    job=stored_job(row),
                    lease_token=row.lease_token + 1,
                    attempt=row.attempts + 1,
                    submitted_us=row.submitted_us,
                    started_us=now,
                    publish_result=row.publish_result,
                )
                attempts.append(
                    {
                        "job_id": row.job_id,
                        "lease_token": row.lease_token + 1,
                        "worker": owner,
                        "started_us": now,
                    }
                )
            connection.execute(job_attempts.insert(), attempts)
        return claims

    def mark_started(self, claims: Sequence[Claim]) -> None:
        """Count an attempt for claimed jobs that begin to run now: what was only fetched ahead
        when a worker died has lost nothing."""
        tokens = {claim.job.job_id: claim.lease_token for claim in claims}
        with self.engine.begin() as connection:
            now = self._now(connection)
            begun = [
                {"id": row.job_id}
                for row in _locked(connection, list(tokens))
                if row.state == "running" and row.lease_token == tokens[row.job_id]
            ]
            if begun:
                connection.execute(
                    sa.update(jobs)
                    .where(jobs.c.job_id == sa.bindparam("id"))
                    .values(attempts=jobs.c.attempts + 1, started_us=now),
                    begun,
                )

    def renew(self, claims: Sequence[Claim], lease_s: float) -> tuple[set[str], set[str]]:
        """Extend leases: (jobs whose lease is no longer ours, jobs asked to be cancelled)."""
        lost, cancelled = set[str](), set[str]()
        tokens = {claim.job.job_id: claim.lease_token for claim in claims}
        with self.engine.begin() as connection:
            held = []
            for row in _locked(connection, list(tokens)):
                if row.state != "running" or row.lease_token != tokens[row.job_id]:
                    lost.add(row.job_id)
                    continue
                held.append({"id": row.job_id})
                if row.cancel_requested:
                    cancelled.add(row.job_id)
            if held:
                expires = self._now(connection) + round(lease_s * 1e6)
                connection.execute(
                    sa.update(jobs)
                    .where(jobs.c.job_id == sa.bindparam("id"))
                    .values(lease_expires_us=expires),
                    held,
                )
        return lost, cancelled

    def release(self, claims: Sequence[Claim]) -> None:
        """Hand jobs back unrun, as queued; one whose lease was lost is left alone."""
        tokens = {claim.job.job_id: claim.lease_token for claim in claims}
        with self.engine.begin() as connection:
            now = self._now(connection)
            for row in _locked(connection, list(tokens)):
                if row.state != "running" or row.lease_token != tokens[row.job_id]:
                    continue
                connection.execute(
                    sa.update(jobs)
                    .where(jobs.c.job_id == row.job_id)
                    .values(
                        state="queued",
                        lease_owner=None,
                        lease_expires_us=None,
                    )
                )
                _end_attempt(connection, row.job_id, row.lease_token, "released", now)

    def record(self, outcomes: Sequence[Outcome]) -> set[str]:
        """Write results, usage and final states in one transaction: the job ids written.

        An outcome whose claim no longer stands is left out: somebody else has the job.
        """
        by_id = {outcome.claim.job.job_id: outcome for outcome in outcomes}
        written = set[str]()
        with self.engine.begin() as connection:
            now = self._now(connection)
            rows = []
            for row in _locked(connection, list(by_id)):
                outcome = by_id[row.job_id]
                if row.state == "running" and row.lease_token == outcome.claim.lease_token:
                    rows.append((row, outcome.result))
                    written.add(row.job_id)
            self._write_many(connection, rows, now)
        return written

    def reject(self, job_id: str, tenant: str, error: ErrorInfo) -> None:
        """Record a message that is no valid job as a failed job, unless the id is known."""
        row: dict[str, Any] = {
            "job_id": job_id,
            "tenant": tenant,
            "idempotency_key": job_id,
            "request_hash": "",
            "body": {},
            "state": "queued",
        }
        with self.engine.begin() as connection:
            row["submitted_us"] = self._now(connection)
            connection.execute(self._insert(jobs).on_conflict_do_nothing(), [row])
            for found in _locked(connection, [job_id]):
                if found.state == "queued" and found.request_hash == "":
                    self._write(connection, found, bare_result(found, error))

    def nowhere(self, resend_after_s: float, limit: int = 1000) -> list[Message]:
        """Open jobs that may have no message: queued and sent long ago or never, or running
        under a lease that has run out. Oldest first."""
        with self._read() as connection:
            now = self._now(connection)
            old = now - round(resend_after_s * 1e6)
            queued = sa.and_(
                jobs.c.state == "queued",
                sa.func.coalesce(jobs.c.sent_us, jobs.c.submitted_us) < old,
            )
            expired = sa.and_(jobs.c.state == "running", jobs.c.lease_expires_us < now)
            query = (
                sa.select(jobs.c.job_id, jobs.c.tenant, jobs.c.adapter_id, jobs.c.publish_result)
                .where(sa.or_(queued, expired))
                .order_by(jobs.c.submitted_us)
                .limit(limit)
            )
            return [Message(*row) for row in connection.execute(query)]

    # -- inside --------------------------------------------------------------

    def _read(self) -> Any:
        return self.engine.execution_options(read_only=True).begin()

    @staticmethod
    def _now(connection: sa.Connection) -> int:
        return int(connection.scalar(sa.select(now_us())) or 0)

    def _write(self, connection: sa.Connection, row: Any, result: Result) -> None:
        self._write_many(connection, [(row, result)], self._now(connection))

    def _write_many(
        self, connection: sa.Connection, rows: Sequence[tuple[Any, Result]], now: int
    ) -> None:
        if not rows:
            return
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.job_id == sa.bindparam("id"))
            .values(
                state=sa.bindparam("to"),
                finished_us=now,
                lease_owner=None,
                lease_expires_us=None,
            ),
            [{"id": row.job_id, "to": result.state} for row, result in rows],
        )
        connection.execute(results.insert(), [result_row(r, now) for _, r in rows])
        connection.execute(usage_events.insert(), [usage_row(j, r, now) for j, r in rows])
        for row, result in rows:
            if row.state == "running":
                _end_attempt(connection, row.job_id, row.lease_token, result.state, now)


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def _locked(
    connection: sa.Connection,
    job_ids: Sequence[str],
    condition: sa.ColumnElement[bool] | None = None,
    skip_locked: bool = False,
) -> Iterator[Any]:
    """Job rows locked for this transaction, in id order so that two callers never deadlock."""
    for chunk in _chunks(sorted(set(job_ids))):
        query = sa.select(jobs).where(jobs.c.job_id.in_(chunk)).order_by(jobs.c.job_id)
        if condition is not None:
            query = query.where(condition)
        yield from connection.execute(query.with_for_update(skip_locked=skip_locked)).all()


def _end_attempt(
    connection: sa.Connection, job_id: str, lease_token: int, outcome: str, now: int
) -> None:
    connection.execute(
        sa.update(job_attempts)
        .where(job_attempts.c.job_id == job_id, job_attempts.c.lease_token == lease_token)
        .values(outcome=outcome, finished_us=now)
    )


def _known(connection: sa.Connection, asked: Sequence[Job]) -> dict[tuple[str, str], Any]:
    """Rows by (tenant, idempotency key)."""
    found: dict[tuple[str, str], Any] = {}
    columns = (jobs.c.job_id, jobs.c.tenant, jobs.c.idempotency_key, jobs.c.request_hash)
    for chunk in _chunks(asked):
        keys = [job.key for job in chunk]
        tenants = {job.tenant for job in chunk}
        query = sa.select(*columns).where(
            jobs.c.tenant.in_(tenants), jobs.c.idempotency_key.in_(keys)
        )
        found.update(((r.tenant, r.idempotency_key), r) for r in connection.execute(query))
    return found


def _same_request(job: Job, known: dict[tuple[str, str], Any]) -> str:
    row = known.get((job.tenant, job.key))
    if row is None:
        raise IdempotencyConflict(
            f"job {job.job_id!r}: this id is taken by a job of another tenant or key; "
            "leave job_id out or give a new one"
        )
    if row.request_hash != job.request_hash():
        raise IdempotencyConflict(
            f"job {job.job_id!r}: idempotency key {job.key!r} of tenant {job.tenant!r} belongs to "
            f"job {row.job_id!r}, which asks for something else; use a new key"
        )
    return str(row.job_id)

"""The ledger: which jobs were accepted, who runs them, and what each ended as, exactly once.

A job's row is the truth; a queue message only hints that it is there. Workers claim by lease:
an owner, an expiry by the database's clock, and a fencing token that grows with every claim.
`record` writes result, usage and final state in one transaction, and only for claims whose
token still stands, so that a worker that was presumed dead cannot write a second outcome.

Here are the operations, one transaction each; the SQL that they share is in `statements`.

Raises IdempotencyConflict, JobNotFound; database errors pass through for the caller to retry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from lorabatch.bindings import bound
from lorabatch.claim import Claim, Outcome, Start
from lorabatch.database import now_us
from lorabatch.errors import JobNotFound
from lorabatch.job import Job
from lorabatch.result import ErrorInfo, JobState, Result
from lorabatch.rows import bare_result, job_row, names_of, stored_result
from lorabatch.statements import (
    BODILESS,
    Ended,
    ago_us,
    chunks,
    count_starts,
    end_attempts,
    known_jobs,
    lease,
    locked,
    same_request,
    stands,
    write_results,
)
from lorabatch.tables import batches, jobs, results

__all__ = ["Claim", "Ledger", "Message", "Outcome", "Start"]


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
            versions = bound(connection, (pair for job in accepted for pair in names_of(job)))
            rows = [job_row(job, now, publish_result, versions) for job in accepted]
            hashes = [row["request_hash"] for row in rows]
            rows.sort(key=lambda row: (row["tenant"], row["idempotency_key"]))  # no deadlocks
            connection.execute(statement, rows)
            known = known_jobs(connection, accepted)
            asked = zip(accepted, hashes, strict=True)
            return {job.job_id: same_request(job, hash_, known) for job, hash_ in asked}

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
            known = [row.job_id for row in locked(connection, job_ids)]
            for chunk in chunks(known):
                connection.execute(
                    sa.update(jobs).where(jobs.c.job_id.in_(chunk)).values(sent_us=now_us())
                )

    def cancel(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Cancel: queued jobs at once, running ones as soon as their worker looks.

        Returns the state each job is in now. Raises JobNotFound for the first unknown id.
        """
        states: dict[str, JobState] = {}
        with self.engine.begin() as connection:
            for row in locked(connection, job_ids):
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
            for chunk in chunks(job_ids):
                query = sa.select(jobs.c.job_id, jobs.c.state).where(jobs.c.job_id.in_(chunk))
                found.update((row.job_id, row.state) for row in connection.execute(query))
        return found

    def results(self, job_ids: Sequence[str]) -> dict[str, Result]:
        """The result of each of these jobs that has ended."""
        found: dict[str, Result] = {}
        with self._read() as connection:
            for chunk in chunks(job_ids):
                query = (
                    sa.select(*BODILESS, results)
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
        with self.engine.begin() as connection:
            now = self._now(connection)
            free = sa.or_(
                jobs.c.state == "queued",
                sa.and_(jobs.c.state == "running", jobs.c.lease_expires_us < now),
            )
            rows = list(locked(connection, job_ids, free, skip_locked=True, with_body=True))
            return lease(connection, rows, owner, now, now + round(lease_s * 1e6))

    def mark_started(self, starts: Sequence[Start]) -> None:
        """Count an attempt for claimed jobs that have begun to run: what was only fetched ahead
        when a worker died has lost nothing."""
        with self.engine.begin() as connection:
            rows = _by_id(locked(connection, [start.claim.job.job_id for start in starts]))
            count_starts(connection, starts, rows, self._now(connection))

    def renew(self, claims: Sequence[Claim], lease_s: float) -> tuple[set[str], set[str]]:
        """Extend leases: (jobs whose lease is no longer ours, jobs asked to be cancelled)."""
        lost, cancelled = set[str](), set[str]()
        by_id = {claim.job.job_id: claim for claim in claims}
        with self.engine.begin() as connection:
            held = []
            for row in locked(connection, list(by_id)):
                if not stands(row, by_id[row.job_id]):
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

    def release(self, claims: Sequence[Claim], as_sent: bool = False) -> None:
        """Hand jobs back unrun, as queued; one whose lease was lost is left alone. `as_sent`: their
        message is taken to be sent now, by who goes on to do that."""
        with self.engine.begin() as connection:
            rows = _by_id(locked(connection, [claim.job.job_id for claim in claims]))
            held = [rows[c.job.job_id] for c in claims if stands(rows.get(c.job.job_id), c)]
            if not held:
                return
            now = self._now(connection)
            sent = {"sent_us": now} if as_sent else {}
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.job_id == sa.bindparam("id"))
                .values(state="queued", lease_owner=None, lease_expires_us=None, **sent),
                [{"id": row.job_id} for row in held],
            )
            end_attempts(connection, [(row, "released") for row in held], now)

    def record(self, outcomes: Sequence[Outcome], starts: Sequence[Start] = ()) -> set[str]:
        """Write results, usage and final states in one transaction: the job ids written.

        An outcome whose claim no longer stands is left out: somebody else has the job. `starts`
        are counted first, as by `mark_started`.
        """
        ids = [outcome.claim.job.job_id for outcome in outcomes]
        ids += [start.claim.job.job_id for start in starts]
        with self.engine.begin() as connection:
            now = self._now(connection)
            rows = _by_id(locked(connection, ids))
            begun = count_starts(connection, starts, rows, now)
            ended = []
            for outcome in outcomes:
                row: Any = rows.get(outcome.claim.job.job_id)
                if stands(row, outcome.claim):
                    started = begun.get(row.job_id, row.started_us)
                    finished = max(started, now - ago_us(outcome.at_s))
                    ended.append(Ended(row, outcome.result, started, finished))
            write_results(connection, ended, now)
        return {job.row.job_id for job in ended}

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
            for found in locked(connection, [job_id]):
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
        now = self._now(connection)
        started = row.started_us if row.state == "running" else now
        write_results(connection, [Ended(row, result, started, now)], now)


def _by_id(rows: Iterable[Any]) -> dict[str, Any]:
    return {row.job_id: row for row in rows}

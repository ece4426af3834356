"""The ledger: which jobs were accepted, who runs them, and what each ended as, exactly once.

A job's row is the truth; a queue message only hints that it is there. Workers claim by lease:
an owner, an expiry by the database's clock, and a fencing token that grows with every claim.
`record` writes result, usage and final state in one transaction, and only for claims whose
token still stands, so that a worker that was presumed dead cannot write a second outcome.

Here are the operations, one transaction each; the SQL that they share is in `statements`.

Raises IdempotencyConflict, JobNotFound, QueueFull; database errors pass through for the caller to
retry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from lorabatch.bindings import bound
from lorabatch.budgets import reasons
from lorabatch.claim import Claim, Message, Outcome, Start
from lorabatch.database import now_us
from lorabatch.endings import Ended, write_results
from lorabatch.errors import JobNotFound
from lorabatch.job import Job
from lorabatch.result import ErrorInfo, JobState, Result
from lorabatch.rows import bare_result, cancelled, job_row, names_of, stored_result, too_late
from lorabatch.statements import (
    BODILESS,
    ago_us,
    chunks,
    count_starts,
    end_attempts,
    insert,
    known_jobs,
    lease,
    locked,
    same_request,
    stands,
)
from lorabatch.tables import NEVER_US, jobs, results
from lorabatch.tenants import check_room

__all__ = ["Claim", "Ledger", "Message", "Outcome", "Start"]


class Ledger:
    """All writes to the job tables. Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    # -- producers -----------------------------------------------------------

    def accept(
        self,
        accepted: Sequence[Job],
        publish_result: bool = False,
        queue: str = "lorabatch",
        as_sent: bool = False,
    ) -> dict[str, str]:
        """Commit jobs as queued, for workers of `queue`: {job_id asked for: id it is known by}.
        `as_sent`: they came by a message; otherwise they wait for somebody to send one (feed.py).

        A key that is known with the same request gives the known id. With another request, or in
        another queue unless `as_sent` (a message is where it is), it raises IdempotencyConflict and
        none of this call's jobs is accepted.
        """
        if not accepted:
            return {}
        with self.engine.begin() as connection:
            now = self._now(connection)
            statement = insert(connection, jobs).on_conflict_do_nothing()
            versions = bound(connection, (pair for job in accepted for pair in names_of(job)))
            more = {"publish_result": publish_result, "queue": queue}
            more["sent_us"] = now if as_sent else None
            rows = [{**job_row(job, now, versions), **more} for job in accepted]
            hashes = [row["request_hash"] for row in rows]
            rows.sort(key=lambda row: (row["tenant"], row["idempotency_key"]))  # no deadlocks
            counted = statement.execution_options(preserve_rowcount=True)
            added = connection.execute(counted, rows).rowcount
            if added and not as_sent:  # what came by the broker cannot be refused any more
                check_room(connection, {job.tenant for job in accepted}, queue)
            known = known_jobs(connection, accepted)
            asked = zip(accepted, hashes, strict=True)
            where = None if as_sent else queue
            return {job.job_id: same_request(job, hash_, known, where) for job, hash_ in asked}

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
                    self._write(connection, row, cancelled(row))
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

    def states(self, job_ids: Sequence[str], tenant: str | None = None) -> dict[str, JobState]:
        """The state of each job that is known; of one tenant's only, if it is given."""
        mine = sa.true() if tenant is None else jobs.c.tenant == tenant
        found: dict[str, JobState] = {}
        with self._read() as connection:
            for chunk in chunks(job_ids):
                query = sa.select(jobs.c.job_id, jobs.c.state).where(jobs.c.job_id.in_(chunk), mine)
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
        """Jobs by state: of all, or the lines of one batch, each by the job that counts now."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        if batch_id is not None:
            query = query.where(jobs.c.batch_id == batch_id, sa.not_(jobs.c.superseded))
        with self._read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    # -- workers -------------------------------------------------------------

    def claim(self, job_ids: Sequence[str], owner: str, lease_s: float) -> dict[str, Claim]:
        """Lease those of these jobs that are queued or whose lease has run out. Those whose batch
        may spend no more end as cancelled instead."""
        with self.engine.begin() as connection:
            now = self._now(connection)
            free = sa.or_(
                jobs.c.state == "queued",
                sa.and_(jobs.c.state == "running", jobs.c.lease_expires_us < now),
            )
            rows = list(locked(connection, job_ids, free, skip_locked=True, whole=True))
            over = reasons(connection, (row.batch_id for row in rows))
            unpaid = [row for row in rows if row.batch_id in over]
            write_results(connection, [Ended(r, cancelled(r), now, now) for r in unpaid], now)
            rows = [row for row in rows if row.batch_id not in over]
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

    def release(self, claims: Sequence[Claim], again_s: float | None = None) -> None:
        """Hand jobs back unrun, as queued, or as cancelled where that was asked for; one whose
        lease was lost is left alone. `again_s`: their messages come again after so long."""
        with self.engine.begin() as connection:
            rows = _by_id(locked(connection, [claim.job.job_id for claim in claims]))
            held = [rows[c.job.job_id] for c in claims if stands(rows.get(c.job.job_id), c)]
            now = self._now(connection)
            write_results(
                connection,
                [Ended(r, cancelled(r), r.started_us, now) for r in held if r.cancel_requested],
                now,
            )
            left = [row for row in held if not row.cancel_requested]
            if not left:
                return
            sent = {} if again_s is None else {"sent_us": now + round(again_s * 1e6)}
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.job_id == sa.bindparam("id"))
                .values(state="queued", lease_owner=None, lease_expires_us=None, **sent),
                [{"id": row.job_id} for row in left],
            )
            end_attempts(connection, [(row, "released") for row in left], now)

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
            connection.execute(insert(connection, jobs).on_conflict_do_nothing(), [row])
            for found in locked(connection, [job_id]):
                if found.state == "queued" and found.request_hash == "":
                    self._write(connection, found, bare_result(found, error))

    def end_late(self, limit: int = 1000) -> list[str]:
        """End queued jobs whose deadline has passed, as failed: their ids."""
        late = sa.text(f"state = 'queued' AND done_by_us < {NEVER_US}")
        with self.engine.begin() as connection:
            now = self._now(connection)
            query = sa.select(jobs.c.job_id).where(late, jobs.c.done_by_us < now).limit(limit)
            ids = list(connection.scalars(query))
            rows = list(locked(connection, ids, jobs.c.state == "queued", skip_locked=True))
            write_results(connection, [Ended(row, too_late(row), now, now) for row in rows], now)
        return [row.job_id for row in rows]

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

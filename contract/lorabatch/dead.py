"""Dead letters: jobs that were given up because they stopped the workers, for a person to look at.

A dead job has its outcome, failed as `attempts_exhausted`, and keeps it. `retry` runs its request
again as another job; `drop` takes it off the list. Raises JobNotFound; database errors pass
through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from lorabatch.batches import Again, Batches
from lorabatch.database import now_us
from lorabatch.errors import JobNotFound
from lorabatch.tables import dead_letters, jobs, results

__all__ = ["DeadLetter", "DeadLetters"]


@dataclass(frozen=True)
class DeadLetter:
    """`died_us`: microseconds UTC."""

    job_id: str
    tenant: str
    adapter_id: str | None
    batch_id: str | None
    attempts: int
    crashes: int
    died_us: int
    reason: str


class DeadLetters:
    """Those that nobody has handled."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def list(self, tenant: str | None = None, limit: int = 1000) -> list[DeadLetter]:
        """Oldest first."""
        query = (
            sa.select(
                jobs.c.job_id,
                jobs.c.tenant,
                jobs.c.adapter_id,
                jobs.c.batch_id,
                jobs.c.attempts,
                jobs.c.crashes,
                dead_letters.c.died_us,
                results.c.error_message,
            )
            .join(dead_letters, dead_letters.c.job_id == jobs.c.job_id)
            .join(results, results.c.job_id == jobs.c.job_id)
            .where(dead_letters.c.handled_us.is_(None))
            .order_by(dead_letters.c.died_us, jobs.c.job_id)
            .limit(limit)
        )
        if tenant is not None:
            query = query.where(jobs.c.tenant == tenant)
        with self._engine.execution_options(read_only=True).begin() as connection:
            return [DeadLetter(*row) for row in connection.execute(query)]

    def retry(self, job_ids: Sequence[str]) -> Again:
        """Run their requests again, as many as may wait: the others stay on the list. The new job
        of one may be there already, because the file of their batch was submitted again."""
        self._check(job_ids)
        batches = Batches(self._engine)
        made = batches.run_again(job_ids)
        latest = batches.latest([job_id for job_id in job_ids if job_id not in made.jobs])
        before = {job_id: new for job_id, new in latest.items() if new != job_id}
        again = Again(before | made.jobs, made.full)
        self._handled(again.jobs)
        return again

    def drop(self, job_ids: Sequence[str]) -> None:
        self._check(job_ids)
        self._handled(dict.fromkeys(job_ids))

    def _check(self, job_ids: Sequence[str]) -> None:
        known = {letter.job_id for letter in self.list(limit=1_000_000)}
        unknown = [job_id for job_id in job_ids if job_id not in known]
        if unknown:
            raise JobNotFound(f"job {unknown[0]!r}: not among the dead (`lorabatch dead list`)")

    def _handled(self, as_what: dict[str, str] | dict[str, None]) -> None:
        if not as_what:
            return
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(dead_letters)
                .where(dead_letters.c.job_id == sa.bindparam("id"))
                .values(handled_us=now_us(), retried_as=sa.bindparam("again")),
                [{"id": job_id, "again": new} for job_id, new in as_what.items()],
            )

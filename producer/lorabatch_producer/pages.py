"""The results of a batch, a page at a time, so that one of any size takes little memory.

Of each line the job that counts now; jobs that are open are left out. The ids are asked for by
many at once, because each time the database goes over all jobs of the batch for them. Nothing is
held open between two pages. Raises JobNotFound; database errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from lorabatch import Ledger, Result
from lorabatch.errors import JobNotFound
from lorabatch.statements import chunks
from lorabatch.tables import batches, jobs

__all__ = ["pages"]

IDS = 50_000


def pages(ledger: Ledger, batch_id: str) -> Iterator[list[Result]]:
    """Of those that have ended, in the order of their ids."""
    _check_known(ledger, batch_id)
    after = ""
    while ids := _ended(ledger, batch_id, after):
        after = ids[-1]
        for some in chunks(ids):
            yield list(ledger.results(some).values())


def _check_known(ledger: Ledger, batch_id: str) -> None:
    found = [sa.exists().where(table.c.batch_id == batch_id) for table in (batches, jobs)]
    with ledger.engine.execution_options(read_only=True).begin() as connection:
        if not connection.scalar(sa.select(sa.or_(*found))):
            raise JobNotFound(f"batch {batch_id!r}: no such batch in this ledger")


def _ended(ledger: Ledger, batch_id: str, after: str) -> list[str]:
    ended = jobs.c.state.in_(("succeeded", "failed", "cancelled")), sa.not_(jobs.c.superseded)
    mine = sa.select(jobs.c.job_id).where(jobs.c.batch_id == batch_id, *ended)
    query = mine.where(jobs.c.job_id > after).order_by(jobs.c.job_id).limit(IDS)
    with ledger.engine.execution_options(read_only=True).begin() as connection:
        return list(connection.scalars(query))

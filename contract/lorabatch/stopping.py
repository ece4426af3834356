"""Batches that may spend no more are stopped, and go on when they may again.

Whatever stops first, client, feeder or worker, the limits are in the ledger: the next worker's
feeder cancels what waits, and asks what a worker holds and has not begun to end. What runs goes on
to its outcome. Raises JobNotFound, BudgetExhausted; database errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from lorabatch.batches import Again, Batches, end_open
from lorabatch.budgets import budget_of
from lorabatch.database import now_us
from lorabatch.errors import BudgetExhausted, JobNotFound
from lorabatch.result import ErrorInfo
from lorabatch.tables import batches, jobs, usage_events

__all__ = ["limit", "resume", "stop_exhausted"]

PAGE = 1000
# As the index says it.
WATCHED = sa.text("(max_tokens IS NOT NULL OR max_failures IS NOT NULL) AND stopped_us IS NULL")


def stop_exhausted(engine: sa.Engine) -> dict[str, dict[str, int]]:
    """End what waits of batches that may spend no more: of each how many jobs were `cancelled`, and
    how many that a worker holds were `asked` to end before they begin."""
    with engine.execution_options(read_only=True).begin() as connection:
        rows = connection.execute(sa.select(batches).where(WATCHED))
        over = {row.batch_id: why for row in rows if (why := budget_of(row).exhausted)}
    return {batch_id: _stop(engine, batch_id, why) for batch_id, why in over.items()}


def _stop(engine: sa.Engine, batch_id: str, why: str) -> dict[str, int]:
    error = ErrorInfo(code=BudgetExhausted.code, message=f"batch {batch_id}: {why}")
    with engine.begin() as connection:
        counts = end_open(connection, batch_id, error, ask=sa.not_(jobs.c.begun))
        mine = sa.update(batches).where(batches.c.batch_id == batch_id)
        connection.execute(mine.values(stopped_us=now_us()))
    return counts


def limit(
    engine: sa.Engine,
    batch_id: str,
    max_tokens: int | None = None,
    max_failures: int | None = None,
    under_way: bool = False,
) -> None:
    """Say what a batch may spend, where it is not None; what its jobs have taken before counts.
    Raises JobNotFound, and BudgetExhausted if that is as much already: then nothing changes. One
    that is `under_way` stops then instead."""
    limits = {"max_tokens": max_tokens, "max_failures": max_failures}
    with engine.begin() as connection:
        why = _allow(connection, batch_id, limits, fresh=False)
        if why is not None and not under_way:
            raise _exhausted(batch_id, why)


def resume(
    engine: sa.Engine, batch_id: str, max_tokens: int | None = None, max_failures: int | None = None
) -> Again:
    """Let a batch go on: what failed or was cancelled runs again, and failures count from here.
    None: the limit stays. Raises as `limit` does."""
    limits = {"max_tokens": max_tokens, "max_failures": max_failures}
    with engine.begin() as connection:
        why = _allow(connection, batch_id, limits, fresh=True)
        if why is not None:
            raise _exhausted(batch_id, why)
    again: dict[str, str] = {}
    new = set[str]()  # some may have failed by the time that their page comes
    for some in _ended_badly(engine, batch_id):
        made = Batches(engine).run_again([job_id for job_id in some if job_id not in new])
        again |= made.jobs
        new.update(made.jobs.values())
        if made.full is not None:
            return Again(again, made.full)
    return Again(again)


def _allow(
    connection: sa.Connection, batch_id: str, limits: dict[str, int | None], fresh: bool
) -> str | None:
    """Why it may spend no more even so. `fresh`: failures count from here."""
    mine = batches.c.batch_id == batch_id
    row = connection.execute(sa.select(batches).where(mine).with_for_update()).one_or_none()
    if row is None:
        raise JobNotFound(f"batch {batch_id!r}: no such batch in this ledger")
    given = {name: value for name, value in limits.items() if value is not None}
    if not given and row.max_tokens is None and row.max_failures is None:
        return None
    spent = connection.scalar(_spent(batch_id)) or 0
    values = {**given, "spent_tokens": spent, "stopped_us": sa.null()}
    if fresh:
        values["failures"] = 0
    elif row.max_tokens is None and row.max_failures is None:  # nobody has counted them
        failed = jobs.c.batch_id == batch_id, jobs.c.state == "failed"
        count = sa.select(sa.func.count()).where(*failed, sa.not_(jobs.c.superseded))
        values["failures"] = connection.scalar(count)
    connection.execute(sa.update(batches).where(mine).values(**values))
    return budget_of(connection.execute(sa.select(batches).where(mine)).one()).exhausted


def _exhausted(batch_id: str, why: str) -> BudgetExhausted:
    return BudgetExhausted(
        f"batch {batch_id}: {why}; go on with a higher limit: `lorabatch batch resume "
        f"{batch_id} --max-tokens-total N --max-failures N`"
    )


def _spent(batch_id: str) -> sa.Select[Any]:
    """What all jobs of a batch have taken, those that were run again, too."""
    tokens = usage_events.c.input_tokens + usage_events.c.output_tokens
    joined = sa.join(jobs, usage_events, usage_events.c.job_id == jobs.c.job_id)
    return sa.select(sa.func.sum(tokens)).select_from(joined).where(jobs.c.batch_id == batch_id)


def _ended_badly(engine: sa.Engine, batch_id: str) -> Iterator[list[str]]:
    """Of its lines the jobs that failed or were cancelled, a page at a time."""
    ended = jobs.c.batch_id == batch_id, jobs.c.state.in_(("failed", "cancelled"))
    last = ""
    while True:
        query = sa.select(jobs.c.job_id).where(*ended, jobs.c.job_id > last)
        query = query.where(sa.not_(jobs.c.superseded)).order_by(jobs.c.job_id).limit(PAGE)
        with engine.execution_options(read_only=True).begin() as connection:
            some = list(connection.scalars(query))
        if not some:
            return
        yield some
        last = some[-1]

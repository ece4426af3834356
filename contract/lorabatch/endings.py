"""Ending jobs inside a transaction: results, usage, dead letters, webhooks and budgets, together.

Database errors pass through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from lorabatch.budgets import charge, reasons
from lorabatch.errors import AttemptsExhausted, BudgetExhausted
from lorabatch.outbox import delivery_row
from lorabatch.result import ErrorInfo, Result
from lorabatch.rows import result_row, usage_row
from lorabatch.statements import end_attempts
from lorabatch.tables import dead_letters, jobs, results, usage_events, webhook_deliveries

__all__ = ["Ended", "write_results"]


class Ended(NamedTuple):
    """A job's row as it was locked, its result, and when it began and ended."""

    row: Any
    result: Result
    started_us: int
    finished_us: int


def write_results(connection: sa.Connection, ended: Sequence[Ended], now: int) -> None:
    """End jobs."""
    if not ended:
        return
    ended = _explained(connection, ended)
    connection.execute(
        sa.update(jobs)
        .where(jobs.c.job_id == sa.bindparam("id"))
        .values(
            state=sa.bindparam("to"),
            finished_us=sa.bindparam("at"),
            lease_owner=None,
            lease_expires_us=None,
        ),
        [{"id": e.row.job_id, "to": e.result.state, "at": e.finished_us} for e in ended],
    )
    connection.execute(results.insert(), [result_row(e.result, now) for e in ended])
    connection.execute(usage_events.insert(), [usage_row(*e, now) for e in ended])
    dead = [e.row.job_id for e in ended if _code(e.result) == AttemptsExhausted.code]
    if dead:
        connection.execute(
            dead_letters.insert(), [{"job_id": job_id, "died_us": now} for job_id in dead]
        )
    told = [
        delivery_row(("job", state), row.job_id, row.tenant, row.webhook, at, now)
        for row, state, at in ((e.row, e.result.state, e.finished_us) for e in ended)
        if row.webhook is not None
    ]
    if told:
        connection.execute(webhook_deliveries.insert(), told)
    running = [(e.row, e.result.state) for e in ended if e.row.state == "running"]
    end_attempts(connection, running, now)
    charge(connection, [(e.row.batch_id, e.result) for e in ended])


def _explained(connection: sa.Connection, ended: Sequence[Ended]) -> list[Ended]:
    """The same; what was cancelled because its batch may spend no more says so."""
    stopped = reasons(connection, (e.row.batch_id for e in ended if e.result.state == "cancelled"))
    found = []
    for one in ended:
        why = stopped.get(one.row.batch_id) if one.result.state == "cancelled" else None
        error = None if why is None else ErrorInfo(code=BudgetExhausted.code, message=why)
        result = one.result if error is None else one.result.model_copy(update={"error": error})
        found.append(one._replace(result=result))
    return found


def _code(result: Result) -> str | None:
    return None if result.error is None else result.error.code

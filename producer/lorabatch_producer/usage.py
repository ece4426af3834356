"""The usage report: tokens and jobs from the ledger, summed by tenant, adapter, day and more.

Times are UTC: an ISO day is its first microsecond, a time without an offset is UTC; `since` is
included, `until` is not, and both look at when a job ended. `cached_tokens` are a part of the
input, `total_tokens` are input and output, and `billable_tokens` is the total of those jobs
that succeeded: what a failed or cancelled job has burnt is shown and not billed.
Raises ValueError for a group or a time that is none. Reads SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from lorabatch.tables import jobs, usage_events

__all__ = ["FIGURES", "GROUPS", "UsageRow", "parse_time", "total", "usage_report"]

DAY_US = 86_400_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
GROUPS: dict[str, sa.ColumnElement[Any]] = {
    "tenant": usage_events.c.tenant,
    "adapter": usage_events.c.adapter_id,
    "version": usage_events.c.adapter_version,
    "model": usage_events.c.base_model,
    "batch": usage_events.c.batch_id,
    "day": usage_events.c.occurred_us // sa.literal_column(str(DAY_US), sa.BigInteger),
}
FIGURES = (
    *("jobs", "succeeded", "failed", "cancelled"),
    *("input_tokens", "cached_tokens", "output_tokens", "total_tokens", "billable_tokens"),
)


@dataclass(frozen=True)
class UsageRow:
    """One group's figures; `group` has a value for each name of `by`, or None."""

    group: tuple[str | None, ...]
    jobs: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    billable_tokens: int = 0

    @property
    def figures(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in FIGURES)


def parse_time(text: str) -> datetime:
    """An ISO day or time as an aware UTC datetime. Raises ValueError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no time; give 2026-01-31 or 2026-01-31T18:00:00 (UTC)"
        ) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def usage_report(
    engine: sa.Engine,
    by: Sequence[str] = ("tenant", "adapter"),
    since: datetime | date | None = None,
    until: datetime | date | None = None,
) -> list[UsageRow]:
    """Figures by group, sorted by the group's names."""
    unknown = [name for name in by if name not in GROUPS]
    if unknown or not by or len(set(by)) < len(by):
        raise ValueError(f"by {list(by)!r}: give some of {', '.join(GROUPS)}, each once")
    event = usage_events.c
    both = event.input_tokens + event.output_tokens
    query = (
        sa.select(
            *(GROUPS[name].label(name) for name in by),
            sa.func.count(sa.distinct(event.job_id)),
            *(_jobs_in(state) for state in ("succeeded", "failed", "cancelled")),
            sa.func.sum(event.input_tokens),
            sa.func.sum(event.cached_tokens),
            sa.func.sum(event.output_tokens),
            sa.func.sum(both),
            sa.func.sum(sa.case((event.billable, both), else_=0)),
        )
        .select_from(usage_events.outerjoin(jobs, jobs.c.job_id == event.job_id))
        .group_by(*(GROUPS[name] for name in by))
    )
    if since is not None:
        query = query.where(event.occurred_us >= _micros(since))
    if until is not None:
        query = query.where(event.occurred_us < _micros(until))
    with engine.execution_options(read_only=True).begin() as connection:
        rows = [_row(by, tuple(row)) for row in connection.execute(query)]
    return sorted(rows, key=lambda row: [(value is not None, value or "") for value in row.group])


def total(rows: Sequence[UsageRow]) -> UsageRow:
    """The sum of all rows."""
    sums = (sum(getattr(row, name) for row in rows) for name in FIGURES)
    return UsageRow((), *sums)


def _jobs_in(state: str) -> sa.ColumnElement[int]:
    in_state = sa.case((jobs.c.state == state, usage_events.c.job_id))
    return sa.func.count(sa.distinct(in_state))


def _row(by: Sequence[str], values: tuple[Any, ...]) -> UsageRow:
    group = tuple(
        _day(value) if name == "day" else value for name, value in zip(by, values, strict=False)
    )
    return UsageRow(group, *(int(value) for value in values[len(by) :]))


def _day(number: int) -> str:
    return (EPOCH + timedelta(days=number)).date().isoformat()


def _micros(time: datetime | date) -> int:
    if not isinstance(time, datetime):
        time = datetime(time.year, time.month, time.day, tzinfo=UTC)
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return (time - EPOCH) // timedelta(microseconds=1)

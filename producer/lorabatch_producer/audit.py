"""The audit: the ledger counted again, job by job, from jobs and results against usage.

Every job that ended has one result and one usage event, which agree with it and with the
tokens that are stored; an open job has neither; nothing belongs to no job; each tenant's sum
is what its results add up to. Reads one snapshot of the database, a page of jobs at a time, so
it may run while workers do. Reads SQLite and PostgreSQL; changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lorabatch.result import TERMINAL_STATES
from lorabatch.rows import output_tokens
from lorabatch.tables import jobs, results, usage_events

__all__ = ["Difference", "audit"]

PAGE = 500
GENERATION = "generation"


@dataclass(frozen=True)
class Difference:
    """One thing that does not add up. `subject` is a job id, or `tenant NAME` for sums."""

    subject: str
    what: str
    seen: object
    wanted: object

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}: seen {self.seen!r}, wanted {self.wanted!r}"


def audit(engine: sa.Engine) -> list[Difference]:
    """All differences; none is what should be. Found before the first is given: a reader that
    pauses, as a pager does, would hold up the snapshot until the server ends it."""
    options: dict[str, Any] = {"read_only": True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.execution_options(**options).begin() as connection:
        return list(_differences(connection))


def _differences(connection: sa.Connection) -> Iterator[Difference]:
    recounted = Counter[tuple[str, str]]()
    for page in _pages(connection):
        events = _events(connection, [row.job_id for row in page])
        for row in page:
            yield from _job(row, events.get(row.job_id, []))
            _recount(row, recounted)
    yield from _orphans(connection)
    yield from _sums(connection, recounted)


def _pages(connection: sa.Connection) -> Iterator[Sequence[Any]]:
    """Jobs with their results, in id order."""
    job, result = jobs.c, results.c
    query = (
        sa.select(
            *(job.job_id, job.tenant, job.adapter_id, job.batch_id, job.state),
            result.job_id.label("result_id"),
            result.state.label("result_state"),
            *(result.token_ids, result.choices, result.prompt_tokens, result.cached_tokens),
            *(result.adapter_version, result.base_model),
        )
        .select_from(jobs.outerjoin(results, result.job_id == job.job_id))
        .order_by(job.job_id)
        .limit(PAGE)
    )
    last = ""
    while page := connection.execute(query.where(job.job_id > last)).all():
        yield page
        last = page[-1].job_id


def _events(connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    query = sa.select(usage_events).where(usage_events.c.job_id.in_(job_ids))
    for event in connection.execute(query.order_by(usage_events.c.usage_event_id)):
        found.setdefault(event.job_id, []).append(event)
    return found


def _job(row: Any, events: Sequence[Any]) -> Iterator[Difference]:
    wanted = 1 if row.state in TERMINAL_STATES else 0
    seen = 0 if row.result_id is None else 1
    if seen != wanted:
        yield Difference(row.job_id, f"results of a {row.state} job", seen, wanted)
    if len(events) != wanted:
        yield Difference(row.job_id, f"usage events of a {row.state} job", len(events), wanted)
    if seen and wanted and row.result_state != row.state:
        yield Difference(row.job_id, "state of the result", row.result_state, row.state)
    for event in events:
        yield from _event(row, event)


def _event(row: Any, event: Any) -> Iterator[Difference]:
    """A usage event against its job and its result."""
    pairs = [
        ("kind", event.kind, GENERATION),
        ("tenant", event.tenant, row.tenant),
        ("adapter_id", event.adapter_id, row.adapter_id),
        ("batch_id", event.batch_id, row.batch_id),
        ("billable", event.billable, row.state == "succeeded"),
    ]
    if row.result_id is not None:
        pairs += [
            ("adapter_version", event.adapter_version, row.adapter_version),
            ("base_model", event.base_model, row.base_model),
            ("input_tokens", event.input_tokens, row.prompt_tokens),
            ("cached_tokens", event.cached_tokens, row.cached_tokens),
            ("output_tokens", event.output_tokens, output_tokens(row.token_ids, row.choices)),
        ]
    for what, seen, wanted in pairs:
        if seen != wanted:
            yield Difference(row.job_id, f"usage {what}", seen, wanted)


def _recount(row: Any, into: Counter[tuple[str, str]]) -> None:
    """Add a result's stored tokens to its tenant's sums."""
    if row.result_id is None:
        return
    generated = output_tokens(row.token_ids, row.choices)
    into[row.tenant, "input_tokens"] += row.prompt_tokens
    into[row.tenant, "cached_tokens"] += row.cached_tokens
    into[row.tenant, "output_tokens"] += generated
    if row.state == "succeeded":
        into[row.tenant, "billable_tokens"] += row.prompt_tokens + generated


def _orphans(connection: sa.Connection) -> Iterator[Difference]:
    """Results and usage events of no job."""
    for table, what in ((results, "results of no job"), (usage_events, "usage events of no job")):
        query = (
            sa.select(table.c.job_id, sa.func.count())
            .select_from(table.outerjoin(jobs, jobs.c.job_id == table.c.job_id))
            .where(jobs.c.job_id.is_(None))
            .group_by(table.c.job_id)
            .order_by(table.c.job_id)
        )
        for job_id, count in connection.execute(query.execution_options(yield_per=PAGE)):
            yield Difference(job_id, what, count, 0)


def _sums(connection: sa.Connection, recounted: Counter[tuple[str, str]]) -> Iterator[Difference]:
    """Each tenant's usage as the report sums it, against the recount."""
    event = usage_events.c
    both = event.input_tokens + event.output_tokens
    query = sa.select(
        event.tenant,
        sa.func.sum(event.input_tokens).label("input_tokens"),
        sa.func.sum(event.cached_tokens).label("cached_tokens"),
        sa.func.sum(event.output_tokens).label("output_tokens"),
        sa.func.sum(sa.case((event.billable, both), else_=0)).label("billable_tokens"),
    ).group_by(event.tenant)
    billed = Counter[tuple[str, str]]()
    for row in connection.execute(query):
        for what, value in row._mapping.items():
            if what != "tenant":
                billed[row.tenant, str(what)] = int(value)
    for tenant, what in sorted(set(billed) | set(recounted)):
        seen, wanted = billed[tenant, what], recounted[tenant, what]
        if seen != wanted:
            yield Difference(f"tenant {tenant}", f"sum of {what}", seen, wanted)

"""Why a job waits: what the ledger knows of it, by looks at indexes whatever else it holds.

Times are microseconds UTC by the database's clock. Counts end at MOST. What comes before a job:
its tenant's, by priority, then deadline, then age, as feeding has it. Raises JobNotFound; database
errors pass through. Does not cover: workers (services.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lorabatch.batches import Batches
from lorabatch.claim import suspected
from lorabatch.database import now_us
from lorabatch.errors import JobNotFound
from lorabatch.feed import UNDER_WAY, UNSENT
from lorabatch.registry import SHARED
from lorabatch.statements import BODILESS
from lorabatch.tables import NEVER_US, adapter_faults, jobs, results, usage_events
from lorabatch.tenants import EACH, Limits, Tenants

__all__ = ["MOST", "Ahead", "Bound", "Facts", "How", "SetAside", "adapters_of", "facts"]

MOST = 100_000
MINUTE_US = 60_000_000


@dataclass(frozen=True)
class SetAside:
    """Of an adapter's version, for workers of a base model."""

    base_model: str
    code: str
    reason: str
    failures: int
    retry_us: int


@dataclass(frozen=True)
class Bound:
    """An adapter's name and the version that it stands for in this job."""

    adapter_id: str
    version: str
    set_aside: tuple[SetAside, ...]


@dataclass(frozen=True)
class Ahead:
    """What a queued job waits behind. `more`: there are more than `jobs`. `alike`: of its tenant,
    as old as it, so that nothing says which is first. `weights`: of all `tenants` that have open
    jobs in its queue, together. `under_way`: of its tenant, in the queue or running."""

    jobs: int
    more: bool
    alike: int
    tenants: int
    weight: float
    weights: float
    under_way: int
    max_running: int | None
    ended_last_minute: int


@dataclass(frozen=True)
class How:
    """How a job ended."""

    finish_reason: str | None
    error_code: str | None
    error_message: str | None
    input_tokens: int
    output_tokens: int
    run_us: int


@dataclass(frozen=True)
class Facts:
    """Of one job. `sent_us`: of its message; in the future: it is to come again then. `ahead` is
    there while it is queued, `how` when it has ended. `again`: the job that runs its line again."""

    job_id: str
    tenant: str
    queue: str
    adapter_id: str | None
    priority: int
    state: str
    now_us: int
    submitted_us: int
    sent_us: int | None
    done_by_us: int | None
    started_us: int | None
    finished_us: int | None
    attempts: int
    crashes: int
    losses: int
    suspect: bool
    begun: bool
    worker: str | None
    lease_expires_us: int | None
    cancel_requested: bool
    adapters: tuple[Bound, ...]
    ahead: Ahead | None
    how: How | None
    again: str | None


def adapters_of(found: Facts) -> dict[str, str | None]:
    """Names and versions; None: what each worker has of that name."""
    if found.adapters or found.adapter_id is None:
        return {bound.adapter_id: bound.version for bound in found.adapters}
    return {found.adapter_id: None}


def facts(engine: sa.Engine, job_id: str) -> Facts:
    """All that can be said of it. Raises JobNotFound."""
    limits = {one.tenant: one for one in Tenants(engine).list()}
    with engine.execution_options(read_only=True).begin() as connection:
        query = sa.select(*BODILESS, now_us().label("now_us")).where(jobs.c.job_id == job_id)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise JobNotFound(f"job {job_id!r}: no such job in this ledger")
        bound = _bound(connection, row)
        ahead = _ahead(connection, row, limits) if row.state == "queued" else None
        how = _how(connection, job_id)
    again = Batches(engine).latest([job_id])[job_id] if row.superseded else None
    return Facts(
        **{name: getattr(row, name) for name in SAME},
        done_by_us=None if row.done_by_us == NEVER_US else row.done_by_us,
        suspect=suspected(row.crashes, row.losses),
        worker=row.lease_owner,
        adapters=bound,
        ahead=ahead,
        how=how,
        again=again,
    )


SAME = (
    *("job_id", "tenant", "queue", "adapter_id", "priority", "state", "now_us", "submitted_us"),
    *("sent_us", "started_us", "finished_us", "attempts", "crashes", "losses", "begun"),
    *("lease_expires_us", "cancel_requested"),
)


def _bound(connection: sa.Connection, row: Any) -> tuple[Bound, ...]:
    found = []
    for adapter_id, version in sorted((row.adapter_versions or {}).items()):
        query = (
            sa.select(*(adapter_faults.c[name] for name in SetAside.__dataclass_fields__))
            .where(
                adapter_faults.c.tenant.in_((row.tenant, SHARED)),
                adapter_faults.c.adapter_id == adapter_id,
                adapter_faults.c.version == version,
            )
            .order_by(adapter_faults.c.base_model)
        )
        faults = tuple(SetAside(*fault) for fault in connection.execute(query))
        found.append(Bound(adapter_id, version, faults))
    return tuple(found)


def _how(connection: sa.Connection, job_id: str) -> How | None:
    """Not the text and its tokens, which may be long."""
    query = (
        sa.select(
            results.c.finish_reason,
            results.c.error_code,
            results.c.error_message,
            usage_events.c.input_tokens,
            usage_events.c.output_tokens,
            usage_events.c.run_us,
        )
        .join(usage_events, usage_events.c.job_id == results.c.job_id)
        .where(results.c.job_id == job_id)
    )
    row = connection.execute(query).first()
    return None if row is None else How(*row)


def _ahead(connection: sa.Connection, row: Any, limits: dict[str, Limits]) -> Ahead:
    queue = jobs.c.queue == row.queue
    names = _names(connection, sa.and_(UNSENT, queue))
    names |= _names(connection, sa.and_(UNDER_WAY, queue))
    under_way, sent_before = _sent(connection, row)
    same = jobs.c.priority == row.priority, jobs.c.done_by_us == row.done_by_us
    waits = UNSENT, queue, jobs.c.tenant == row.tenant
    before, alike = sent_before, 0
    if row.sent_us is None:
        for earlier in (
            (jobs.c.priority > row.priority,),
            (same[0], jobs.c.done_by_us < row.done_by_us),
            (*same, jobs.c.submitted_us < row.submitted_us),
        ):
            before += _count(connection, *waits, *earlier, most=MOST + 1 - before)
        at_once = jobs.c.submitted_us == row.submitted_us, jobs.c.job_id != row.job_id
        alike = _count(connection, *waits, *same, *at_once, most=MOST)
    return Ahead(
        jobs=min(before, MOST),
        more=before > MOST,
        alike=alike,
        tenants=len(names),
        weight=_weight(row.tenant, limits),
        weights=sum(_weight(name, limits) for name in names),
        under_way=under_way,
        max_running=_max_running(row.tenant, limits),
        ended_last_minute=_ended_last_minute(connection, row),
    )


def _weight(tenant: str, limits: dict[str, Limits]) -> float:
    """As workers have it."""
    said = limits.get(tenant) or limits.get(EACH)
    return 1.0 if said is None else said.weight


def _max_running(tenant: str, limits: dict[str, Limits]) -> int | None:
    said = (limits[name].max_running for name in (tenant, EACH) if name in limits)
    return next((most for most in said if most is not None), None)


def _names(connection: sa.Connection, which: sa.ColumnElement[bool]) -> set[str]:
    """Tenants of these jobs: one look at the index for each, however many jobs it has."""
    found = (
        sa.select(sa.func.min(jobs.c.tenant).label("tenant"))
        .where(which)
        .cte("found", recursive=True)
    )
    after = sa.select(sa.func.min(jobs.c.tenant)).where(which, jobs.c.tenant > found.c.tenant)
    next_one = after.correlate(found).scalar_subquery()
    found = found.union_all(sa.select(next_one).where(found.c.tenant.is_not(None)))
    return set(connection.scalars(sa.select(found.c.tenant).where(found.c.tenant.is_not(None))))


def _sent(connection: sa.Connection, row: Any) -> tuple[int, int]:
    """Of its tenant's jobs that have a message or run: how many, and how many of those that wait
    come before it. Of MOST of them, where there are more."""
    columns = ("job_id", "priority", "done_by_us", "submitted_us", "sent_us", "state")
    out = (
        sa.select(*(jobs.c[name] for name in columns))
        .where(UNDER_WAY, jobs.c.queue == row.queue, jobs.c.tenant == row.tenant)
        .limit(MOST + 1)
        .subquery()
    ).c
    before = out.job_id != row.job_id
    if row.sent_us is not None:
        mine = -row.priority, row.done_by_us, row.submitted_us
        before = sa.tuple_(-out.priority, out.done_by_us, out.submitted_us) < sa.tuple_(*mine)
    due = out.sent_us <= row.now_us  # and not to come again later
    counted = (due, sa.and_(due, out.state == "queued", before))
    sums = [sa.func.coalesce(sa.func.sum(sa.case((one, 1), else_=0)), 0) for one in counted]
    under_way, waiting_before = connection.execute(sa.select(*sums)).one()
    return int(under_way), int(waiting_before)


def _count(connection: sa.Connection, *which: sa.ColumnElement[bool] | Any, most: int) -> int:
    if most <= 0:
        return 0
    some = sa.select(sa.literal(1)).where(*which).limit(most).subquery()
    return int(connection.scalar(sa.select(sa.func.count()).select_from(some)) or 0)


def _ended_last_minute(connection: sa.Connection, row: Any) -> int:
    """Of its tenant's jobs, those that ran."""
    ran = sa.or_(usage_events.c.billable, usage_events.c.run_us > 0)
    recent = usage_events.c.occurred_us > row.now_us - MINUTE_US
    return _count(connection, usage_events.c.tenant == row.tenant, recent, ran, most=MOST)

"""What each tenant may have: its weight in fair shares, how many jobs may run and may wait, and
how much it may ask for in a minute.

EACH stands for every tenant that says nothing of its own, ALL for all tenants together. Limits hold
from the next look on, for jobs that were not sent or accepted yet. Raises QueueFull; database
errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.errors import QueueFull
from lorabatch.tables import jobs, tenants

__all__ = ["ALL", "EACH", "Limits", "Room", "Tenants", "check_room"]

EACH, ALL = "*each", "*all"  # no tenant's names


@dataclass(frozen=True)
class Limits:
    """None: no limit of its own; 0: none may. `weight`: twice as much gets twice the tokens, where
    several wait. What is said of a minute, the HTTP API holds to (`rates`)."""

    tenant: str
    weight: float = 1.0
    max_running: int | None = None
    max_queued: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Tenants:
    """Those that something was said of."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def list(self) -> list[Limits]:
        with self._engine.execution_options(read_only=True).begin() as connection:
            return _limits(connection, sa.true())

    def set(self, limits: Limits) -> None:
        """In place of what was said before."""
        with self._engine.begin() as connection:
            mine = tenants.c.tenant == limits.tenant
            row = {**asdict(limits), "updated_us": connection.scalar(sa.select(now_us()))}
            if not connection.execute(sa.update(tenants).where(mine).values(row)).rowcount:
                connection.execute(tenants.insert(), [row])

    def forget(self, tenant: str) -> bool:
        """Whether there was anything to forget."""
        with self._engine.begin() as connection:
            gone = connection.execute(sa.delete(tenants).where(tenants.c.tenant == tenant))
            return bool(gone.rowcount)


class Room:
    """How many more jobs may wait in a queue: of each of these tenants that has a limit, and of all
    together. Below zero: too many wait."""

    def __init__(self, connection: sa.Connection, of: Iterable[str], queue: str) -> None:
        """Costs a look at one small table without limits. They are locked until the transaction
        ends, because two that insert do not see each other's jobs."""
        names = sorted(set(of))
        limited = tenants.c.tenant.in_([*names, EACH, ALL]), tenants.c.max_queued.is_not(None)
        found = _limits(connection, sa.and_(*limited), lock=True)
        most = {one.tenant: one.max_queued for one in found}
        caps = {name: most.get(name, most.get(EACH)) for name in names} | {ALL: most.get(ALL)}
        self._caps = {name: cap for name, cap in caps.items() if cap is not None}
        self._left = {
            name: cap - _waiting(connection, queue, None if name == ALL else name, cap)
            for name, cap in self._caps.items()
        }

    def take(self, tenant: str) -> str | None:
        """Room for one more job of a tenant; if there is none, whose limit is reached."""
        limited = [name for name in (tenant, ALL) if name in self._left]
        for name in limited:
            if self._left[name] <= 0:
                return name
        for name in limited:
            self._left[name] -= 1
        return None

    def overfull(self) -> str | None:
        """Whose limit is passed."""
        return next((name for name, left in self._left.items() if left < 0), None)

    def full(self, name: str, done: str) -> QueueFull:
        """The error for whose limit is reached; `done`: what became of the call."""
        cap, whose, which = self._caps[name], f"tenant {name!r}", name
        if name == ALL:
            whose, which = "all tenants together", "--all"
        fix = f"raise the limit with `lorabatch tenants set {which} --max-queued N`"
        if not cap:
            return QueueFull(f"{whose}: no jobs may wait; {done}: {fix}")
        return QueueFull(
            f"{whose}: {cap} jobs may wait and as many do; {done}: come again when some have "
            f"ended, or {fix}"
        )


def check_room(connection: sa.Connection, of: Iterable[str], queue: str) -> None:
    """Raise QueueFull if more jobs of one of these tenants wait in this queue than may, those that
    were inserted in this transaction included."""
    room = Room(connection, of, queue)
    if (name := room.overfull()) is not None:
        raise room.full(name, "nothing of this call was accepted")


def _limits(
    connection: sa.Connection, condition: sa.ColumnElement[bool], lock: bool = False
) -> list[Limits]:
    columns = [tenants.c[field.name] for field in fields(Limits)]
    query = sa.select(*columns).where(condition).order_by(tenants.c.tenant)
    if lock:
        query = query.with_for_update()
    return [Limits(*row) for row in connection.execute(query)]


def _waiting(connection: sa.Connection, queue: str, tenant: str | None, cap: int) -> int:
    """Counted up to one more than the cap, by the indexes that feeding has."""
    mine = [jobs.c.queue == queue]
    if tenant is not None:
        mine.append(jobs.c.tenant == tenant)
    count = 0
    for where in (
        "jobs.state = 'queued' AND jobs.sent_us IS NULL",
        "jobs.state IN ('queued', 'running') AND jobs.sent_us IS NOT NULL AND state = 'queued'",
    ):
        some = sa.select(sa.literal(1)).where(sa.text(where), *mine).limit(cap + 1 - count)
        count += int(
            connection.scalar(sa.select(sa.func.count()).select_from(some.subquery())) or 0
        )
        if count > cap:
            break
    return count

"""The outbox: webhooks to deliver, each written with the outcome that it tells of.

A sender holds a delivery by a lease, as a worker holds a job, by the database's clock: what a
sender that was killed had in hand is another's when that has run out, under the same id. Each host
has its turn, however much waits for others. Database errors pass through.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.outgoing import parse_url
from lorabatch.webhook_tables import webhook_deliveries

__all__ = ["Outbox", "State", "delivery_row"]

State = Literal["waiting", "delivered", "failed"]
NAMESPACE = uuid.UUID("0d0b8bd6-7f2c-5a51-8a52-3f7f3f2f9d11")
KEPT_US: Final = 30 * 86_400_000_000
WAITING = sa.text("state = 'waiting'")  # as the index has it
# Steps from host to host through the index, however many deliveries of one wait.
DUE_HOSTS = sa.text("""
    WITH RECURSIVE hosts(host) AS (
        SELECT min(host) FROM webhook_deliveries WHERE state = 'waiting'
        UNION ALL
        SELECT (SELECT min(d.host) FROM webhook_deliveries d
                WHERE d.state = 'waiting' AND d.host > hosts.host)
        FROM hosts WHERE hosts.host IS NOT NULL
    ), first AS (
        SELECT host, (SELECT min(d.due_us) FROM webhook_deliveries d
                      WHERE d.state = 'waiting' AND d.host = hosts.host) AS due_us
        FROM hosts WHERE host IS NOT NULL
    )
    SELECT host FROM first WHERE due_us <= :now ORDER BY due_us
""")
t = webhook_deliveries.c


def delivery_row(
    event: tuple[Literal["job", "batch"], str],
    subject: str,
    tenant: str,
    url: str,
    at_us: int,
    now: int,
) -> dict[str, Any]:
    """To be delivered from now on. Raises nothing: an outcome is recorded whatever its webhook."""
    what, state = event
    try:
        host = parse_url(url).host
    except ValueError:
        host = ""
    return {
        "webhook_id": f"msg_{uuid.uuid5(NAMESPACE, f'{what} {subject}').hex}",
        "tenant": tenant,
        "event": f"{what}.{state}",
        "subject": subject,
        "url": url,
        "host": host,
        "state": "waiting",
        "attempts": 0,
        "happened_us": at_us,
        "since_us": now,
        "due_us": now,
    }


class Outbox:
    """Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._read = engine.execution_options(read_only=True)

    # -- senders -------------------------------------------------------------

    def take(self, most: int, room: Callable[[str], int], lease_s: float) -> list[Any]:
        """Hold up to `most` that are due, of each host as many as it has room for: their rows. An
        attempt is counted, so that what stops its sender is not tried for ever."""
        with self._read.begin() as connection:
            due = connection.execute(DUE_HOSTS, {"now": _now(connection)})
            hosts = [host for host in due.scalars() if room(host) > 0]
        taken: list[Any] = []
        for host in hosts:
            if len(taken) >= most:
                break
            taken += self._of(host, min(room(host), most - len(taken)), lease_s)
        return taken

    def _of(self, host: str, most: int, lease_s: float) -> Sequence[Any]:
        with self._engine.begin() as connection:
            now = _now(connection)
            query = sa.select(t.webhook_id).where(WAITING, t.host == host, t.due_us <= now)
            query = query.order_by(t.due_us).limit(most).with_for_update(skip_locked=True)
            ids = list(connection.scalars(query))
            values = {
                "holder": str(uuid.uuid4()),
                "due_us": now + round(lease_s * 1e6),
                "attempts": t.attempts + 1,
            }
            _change(connection, t.webhook_id.in_(ids), values)
            held = webhook_deliveries.select().where(t.webhook_id.in_(ids))
            return connection.execute(held.order_by(t.since_us)).all()

    def end(self, held: Any, state: State, status: int | None, error: str | None) -> bool:
        """Delivered, or given up: whether it was still held."""
        ended = {"state": state, "status": status, "error": error, "ended_us": now_us()}
        return self._note(held, ended)

    def again(self, held: Any, in_s: float, status: int | None, error: str | None) -> bool:
        """To be tried again after so long: whether it was still held."""
        due = now_us() + round(in_s * 1e6)
        return self._note(held, {"due_us": due, "status": status, "error": error})

    def age_s(self, held: Any) -> float:
        """For how long it has been tried."""
        with self._read.begin() as connection:
            return (_now(connection) - int(held.since_us)) / 1e6

    def _note(self, held: Any, values: Mapping[str, Any]) -> bool:
        mine = sa.and_(WAITING, t.webhook_id == held.webhook_id, t.holder == held.holder)
        with self._engine.begin() as connection:
            return bool(_change(connection, mine, {**values, "holder": None}))

    def tidy(self) -> None:
        """Forget what ended long ago."""
        with self._engine.begin() as connection:
            old = t.ended_us < _now(connection) - KEPT_US
            connection.execute(sa.delete(webhook_deliveries).where(old))

    # -- operators -----------------------------------------------------------

    def list(
        self, state: State | None = None, tenant: str | None = None, limit: int = 1000
    ) -> Sequence[Any]:
        """Rows, the oldest first."""
        query = webhook_deliveries.select().order_by(t.happened_us, t.webhook_id).limit(limit)
        if state is not None:
            query = query.where(t.state == state)
        if tenant is not None:
            query = query.where(t.tenant == tenant)
        with self._read.begin() as connection:
            return connection.execute(query).all()

    def retry(self, webhook_ids: Collection[str] | None) -> Sequence[str]:
        """Try those of these that have failed as if they were new, under the same ids: which. None:
        all that have failed."""
        mine = sa.true() if webhook_ids is None else t.webhook_id.in_(webhook_ids)
        failed = sa.and_(t.state == "failed", mine)
        with self._engine.begin() as connection:
            ids = list(connection.scalars(sa.select(t.webhook_id).where(failed).with_for_update()))
            now = _now(connection)
            fresh = {"state": "waiting", "attempts": 0, "since_us": now, "due_us": now}
            _change(connection, failed, {**fresh, "ended_us": None})
            return ids

    def counts(self) -> dict[State, int]:
        """How many wait, and how many have failed."""
        queries: dict[State, sa.ColumnElement[bool]] = {
            "waiting": sa.and_(WAITING),
            "failed": sa.and_(t.state == "failed", t.ended_us.is_not(None)),
        }
        count = sa.select(sa.func.count()).select_from(webhook_deliveries)
        with self._read.begin() as connection:
            found = {name: connection.scalar(count.where(one)) for name, one in queries.items()}
        return {name: int(number or 0) for name, number in found.items()}


def _change(
    connection: sa.Connection, which: sa.ColumnElement[bool], values: Mapping[str, Any]
) -> int:
    return connection.execute(sa.update(webhook_deliveries).where(which).values(values)).rowcount


def _now(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.select(now_us())) or 0)

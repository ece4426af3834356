"""Batches as OpenAI's API has them: what their owner sees, and which server works on each.

A server holds a batch by a lease, as a worker holds a job: a name that is made for each time, and
when it runs out by the database's clock. All that a holder writes asks whether it still holds.
Database errors pass through.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.fields import is_identifier
from lorabatch.file_tables import OPEN
from lorabatch.files import live, page
from lorabatch.outbox import delivery_row
from lorabatch.statements import insert
from lorabatch.tables import files, jobs, openai_batches, webhook_deliveries

__all__ = ["OpenAIBatches"]

IS_OPEN = sa.text(f"status IN {OPEN!r}")  # as the index has it
NAMESPACE = uuid.UUID("5b0e3c52-6a0e-5d7b-9a43-0f1f5a4f8a11")
CANCELLABLE = ("validating", "in_progress")


class OpenAIBatches:
    """Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._read = engine.execution_options(read_only=True)

    # -- owners --------------------------------------------------------------

    def add(
        self,
        tenant: str,
        input_file_id: str,
        window_s: float,
        key: str | None = None,
        **fields: Any,
    ) -> Any | None:
        """A new batch of a tenant's file, or the one that it made with the same `key`: its row.
        None: it has no such file to make batches of."""
        if not is_identifier(input_file_id):
            return None
        made = uuid.uuid4() if key is None else uuid.uuid5(NAMESPACE, f"{tenant}\n{key}")
        with self._engine.begin() as connection:
            if key is not None and (row := _row(connection, str(made))) is not None:
                return row  # its file may be gone since
            query = files.select().where(
                files.c.file_id == input_file_id, files.c.tenant == tenant, live()
            )
            # Locked, so that it is not removed meanwhile.
            file = connection.execute(query.with_for_update()).one_or_none()
            if file is None or file.purpose != "batch":
                return None
            now = int(connection.scalar(sa.select(now_us())) or 0)
            row = {
                **fields,
                "batch_id": str(made),
                "tenant": tenant,
                "input_file_id": input_file_id,
                "status": "validating",
                "created_us": now,
                "done_by_us": now + round(window_s * 1e6),
                "due_us": now,
            }
            connection.execute(insert(connection, openai_batches).on_conflict_do_nothing(), [row])
            return _row(connection, row["batch_id"])

    def find(self, batch_id: str, tenant: str) -> Any | None:
        """The row of a tenant's batch; None: it has none of that id."""
        if not is_identifier(batch_id):
            return None
        with self._read.begin() as connection:
            row = _row(connection, batch_id)
        return row if row is not None and row.tenant == tenant else None

    def list(self, tenant: str, limit: int, after: Any | None = None) -> Sequence[Any]:
        """A tenant's batches, the newest first, those that come `after` a row of it."""
        query = openai_batches.select().where(openai_batches.c.tenant == tenant)
        with self._read.begin() as connection:
            return connection.execute(page(query, openai_batches, limit, after)).all()

    def counts(self, batch_ids: Collection[str]) -> Mapping[str, Mapping[str, int]]:
        """Their jobs by state."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        query = sa.select(jobs.c.batch_id, jobs.c.state, sa.func.count())
        query = query.where(jobs.c.batch_id.in_(batch_ids), sa.not_(jobs.c.superseded))
        with self._read.begin() as connection:
            for row in connection.execute(query.group_by(jobs.c.batch_id, jobs.c.state)):
                found[row[0]][row[1]] = row[2]
        return found

    def cancel(self, batch_id: str) -> bool:
        """Ask for it to be cancelled: whether it could be, or was asked for already."""
        with self._engine.begin() as connection:
            mine = openai_batches.c.batch_id == batch_id
            now = connection.scalar(sa.select(now_us()))
            asked = connection.execute(
                sa.update(openai_batches)
                .where(mine, openai_batches.c.status.in_(CANCELLABLE))
                .values(
                    status="cancelling",
                    cancelling_us=now,
                    due_us=sa.case(
                        (openai_batches.c.holder.is_(None), now), else_=openai_batches.c.due_us
                    ),
                )
            )
            row = _row(connection, batch_id)
            return bool(asked.rowcount) or (row is not None and row.status == "cancelling")

    # -- servers -------------------------------------------------------------

    def take(self, lease_s: float) -> Any | None:
        """Hold one that is due: its row, with the holder's name in it."""
        due = (IS_OPEN, openai_batches.c.due_us <= now_us())
        query = sa.select(openai_batches.c.batch_id).where(*due)
        query = query.order_by(openai_batches.c.due_us).limit(1)
        with self._read.begin() as connection:
            if connection.scalar(query) is None:
                return None
        with self._engine.begin() as connection:
            now = int(connection.scalar(sa.select(now_us())) or 0)
            batch_id = connection.scalar(query.with_for_update(skip_locked=True))
            if batch_id is None:
                return None
            connection.execute(
                sa.update(openai_batches)
                .where(openai_batches.c.batch_id == batch_id)
                .values(holder=str(uuid.uuid4()), due_us=now + round(lease_s * 1e6))
            )
            return _row(connection, batch_id)

    def keep(self, held: Any, lease_s: float) -> Any | None:
        """Hold it longer: its row as it is now; None: somebody else has it."""
        return self.change(held, {"due_us": now_us() + round(lease_s * 1e6)}, any_status=True)

    def now_us(self) -> int:
        """By the database's clock, as all times of its batches."""
        with self._read.begin() as connection:
            return int(connection.scalar(sa.select(now_us())) or 0)

    def give_back(self, held: Any, again_s: float) -> None:
        """To be looked at after so long, by whoever comes first."""
        due = now_us() + round(again_s * 1e6)
        self.change(held, {"holder": None, "due_us": due}, any_status=True)

    def change(
        self,
        held: Any,
        values: Mapping[str, Any],
        written: Sequence[Mapping[str, Any]] = (),
        any_status: bool = False,
    ) -> Any | None:
        """Write what has become of it, if it is still held and its status is what it was: its new
        row. A new status is dated, and its webhook hears of the last. `written`: files that are
        there from then on."""
        mine = [openai_batches.c.batch_id == held.batch_id, openai_batches.c.holder == held.holder]
        if not any_status:
            mine.append(openai_batches.c.status == held.status)
        with self._engine.begin() as connection:
            now = int(connection.scalar(sa.select(now_us())) or 0)
            dated = {f"{values['status']}_us": now} if "status" in values else {}
            changed = sa.update(openai_batches).where(*mine).values({**values, **dated})
            if not connection.execute(changed).rowcount:
                return None
            for file in written:
                connection.execute(files.insert().values({**file, "created_us": now}))
            if "status" in values:
                _tell(connection, held, values["status"], now)
            return _row(connection, held.batch_id)


def _tell(connection: sa.Connection, held: Any, status: str, now: int) -> None:
    """Its webhook hears of its end."""
    if held.webhook is not None and status not in OPEN:
        told = delivery_row(("batch", status), held.batch_id, held.tenant, held.webhook, now, now)
        connection.execute(webhook_deliveries.insert(), [told])


def _row(connection: sa.Connection, batch_id: str) -> Any | None:
    query = openai_batches.select().where(openai_batches.c.batch_id == batch_id)
    return connection.execute(query).one_or_none()

"""Which base model each queue is for: all workers that drain it have the same one.

The first worker of a queue says it, and a worker with another base model is refused until somebody
says otherwise (`lorabatch queues set`): jobs would get another model's answers, and no error.
Raises SettingsError; database errors pass through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.errors import SettingsError
from lorabatch.statements import insert
from lorabatch.tables import queues

__all__ = ["Queues"]


class Queues:
    """Safe for many processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def list(self) -> dict[str, str]:
        """Base models by queue."""
        query = sa.select(queues.c.queue, queues.c.base_model).order_by(queues.c.queue)
        with self._engine.execution_options(read_only=True).begin() as connection:
            return {row.queue: row.base_model for row in connection.execute(query)}

    def set(self, queue: str, base_model: str) -> None:
        """From now on. Workers that run already are not asked."""
        with self._engine.begin() as connection:
            row = {"queue": queue, "base_model": base_model, "updated_us": now_us()}
            known = insert(connection, queues).values(row)
            there = {name: row[name] for name in ("base_model", "updated_us")}
            connection.execute(known.on_conflict_do_update(index_elements=["queue"], set_=there))

    def drain(self, names: Iterable[str], base_model: str, aliases: Collection[str] = ()) -> None:
        """A worker with this base model is about to drain these. Raises SettingsError if one of
        them is for another."""
        with self._engine.begin() as connection:
            rows = [{"queue": name, "base_model": base_model} for name in sorted(set(names))]
            made = insert(connection, queues).values(updated_us=now_us()).on_conflict_do_nothing()
            connection.execute(made, rows)
        known = self.list()
        for row in rows:
            theirs = known[row["queue"]]
            if theirs not in {base_model, *aliases}:
                raise SettingsError(
                    f"LORABATCH_CONSUME: queue {row['queue']!r} is for base model {theirs!r} and "
                    f"this worker has {base_model!r}: drain another queue, or name the first in "
                    "LORABATCH_BASE_MODEL_ALIASES if both are the same, or `lorabatch queues set "
                    f"{row['queue']} {base_model}` if it is for the second from now on"
                )

"""Which base model each queue is for: all workers that drain it have the same one.

The first worker of a queue says it, and a worker with another base model is refused until somebody
says otherwise (`lorabatch queues set`): jobs would get another model's answers, and no error.
Raises SettingsError, and to a worker DatabaseNotReady; other database errors pass through.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from lorabatch.database import answering, now_us
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
        with self._engine.execution_options(read_only=True).begin() as connection:
            return _base_models(connection)

    def set(self, queue: str, base_model: str) -> None:
        """From now on. Workers that run already are not asked."""
        with self._engine.begin() as connection:
            row = {"queue": queue, "base_model": base_model, "updated_us": now_us()}
            known = insert(connection, queues).values(row)
            there = {name: row[name] for name in ("base_model", "updated_us")}
            connection.execute(known.on_conflict_do_update(index_elements=["queue"], set_=there))

    def check(self, names: Collection[str], base_model: str, aliases: Collection[str] = ()) -> None:
        """Raise SettingsError if some of these are for another base model. Notes nothing."""
        read = self._engine.execution_options(read_only=True)
        with answering(read), read.begin() as connection:
            _check(connection, names, base_model, aliases)

    def drain(self, names: Collection[str], base_model: str, aliases: Collection[str] = ()) -> None:
        """A worker with this base model is about to drain these: those that are for none yet are
        for this one, if `check` has nothing against all of them."""
        rows = [{"queue": name, "base_model": base_model} for name in sorted(set(names))]
        with answering(self._engine), self._engine.begin() as connection:
            made = insert(connection, queues).values(updated_us=now_us()).on_conflict_do_nothing()
            connection.execute(made, rows)
            # Afterwards, to see who was faster; what it raises takes back what was inserted.
            _check(connection, names, base_model, aliases)


def _base_models(connection: sa.Connection) -> dict[str, str]:
    query = sa.select(queues.c.queue, queues.c.base_model).order_by(queues.c.queue)
    return {row.queue: row.base_model for row in connection.execute(query)}


def _check(
    connection: sa.Connection, names: Collection[str], base_model: str, aliases: Collection[str]
) -> None:
    mine = {base_model, *aliases}
    found = _base_models(connection)
    others = {
        name: found[name] for name in sorted(names) if found.get(name, base_model) not in mine
    }
    if others:
        what = ", ".join(
            f"queue {name!r} is for base model {other!r}" for name, other in others.items()
        )
        changes = " and ".join(f"`lorabatch queues set {name} {base_model}`" for name in others)
        raise SettingsError(
            f"LORABATCH_CONSUME: {what}, and this worker has {base_model!r}: drain other queues, "
            "or name theirs in LORABATCH_BASE_MODEL_ALIASES if it is the same model, or "
            f"{changes} to change what they are for from now on"
        )

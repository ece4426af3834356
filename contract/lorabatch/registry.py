"""The registry: which adapters there are by name, for everybody or for one tenant.

A name stands for a version, the sha256 of the adapter's files, which never change; to register
other files under the same name makes another version. A job is bound to a version when it is
accepted, and nothing that is queued changes after that. A tenant's own names go before the shared
ones, and nobody sees another tenant's. A version that could not be used is set aside for everyone
until a time, which is later after each failure, or until `forgive`.

Times are UTC microseconds by the database's clock. Raises UnknownAdapter; database errors pass
through. Does not cover: the files (location.py and the worker's sources).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from lorabatch.database import now_us
from lorabatch.errors import UnknownAdapter
from lorabatch.tables import adapter_faults, adapter_versions, adapters, jobs

__all__ = ["SHARED", "Fault", "Registered", "Registry", "bound"]

SHARED = ""  # the tenant of names that everybody may use
RETRY_FIRST_S, RETRY_LAST_S = 60, 3600


@dataclass(frozen=True)
class Fault:
    """Why a version is set aside, how often it failed, and from when on it is tried again."""

    code: str
    reason: str
    failures: int
    retry_us: int
    due: bool


@dataclass(frozen=True)
class Registered:
    """One version of an adapter. `current`: its name stands for it now."""

    tenant: str
    adapter_id: str
    version: str
    location: str
    base_model: str | None
    rank: int | None
    nbytes: int
    created_us: int
    current: bool = True
    pinned: bool = False
    fault: Fault | None = None


class Registry:
    """Names and versions of adapters. Safe for many threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert

    def add(self, entry: Registered) -> bool:
        """Let the name stand for this version from now on: whether that is a new one."""
        with self.engine.begin() as connection:
            now = _now(connection)
            row = {
                "tenant": entry.tenant,
                "adapter_id": entry.adapter_id,
                "version": entry.version,
                "location": entry.location,
                "base_model": entry.base_model,
                "rank": entry.rank,
                "nbytes": entry.nbytes,
            }
            made = self._insert(adapter_versions).values(**row, created_us=now)
            known = list(adapter_versions.primary_key)
            fresh = {"location": entry.location, "base_model": entry.base_model}
            connection.execute(made.on_conflict_do_update(index_elements=known, set_=fresh))
            where = _named(entry.tenant, entry.adapter_id)
            query = sa.select(adapters.c.version).where(where).with_for_update()
            before = connection.scalar(query)
            name = {"version": entry.version, "updated_us": now}
            added = self._insert(adapters).values(
                tenant=entry.tenant, adapter_id=entry.adapter_id, pinned=entry.pinned, **name
            )
            connection.execute(
                added.on_conflict_do_update(index_elements=list(adapters.primary_key), set_=name)
            )
            _forgive(connection, entry.version)
        return before != entry.version

    def names(self, tenant: str | None = None) -> list[Registered]:
        """What names stand for now: those that a tenant may use, or all."""
        mine = sa.true() if tenant is None else adapters.c.tenant.in_({tenant, SHARED})
        found = self._select(mine & (adapters.c.version == adapter_versions.c.version))
        if tenant is None:
            return found
        own = {entry.adapter_id for entry in found if entry.tenant == tenant}
        return [e for e in found if e.tenant == tenant or e.adapter_id not in own]

    def versions(self, tenant: str, adapter_id: str) -> list[Registered]:
        """Every version that this very name has had, newest first."""
        return self._select(_versioned(tenant, adapter_id))[::-1]

    def find(self, tenant: str, adapter_id: str, version: str | None = None) -> Registered | None:
        """What a name stands for, or stood for, to this tenant."""
        which = sa.and_(
            adapter_versions.c.tenant.in_({tenant, SHARED}),
            adapter_versions.c.adapter_id == adapter_id,
            adapter_versions.c.version == (adapters.c.version if version is None else version),
        )
        found = self._select(which)
        return max(found, key=lambda entry: entry.tenant, default=None)  # the tenant's own first

    def remove(self, tenant: str, adapter_id: str) -> int:
        """Forget a name: how many open jobs are bound to it, which still run."""
        with self.engine.begin() as connection:
            where = _named(tenant, adapter_id)
            if not connection.execute(sa.delete(adapters).where(where)).rowcount:
                raise _unknown(tenant, adapter_id)
            return sum(adapter_id in bound_to for bound_to in _open(connection))

    def pin(self, tenant: str, adapter_id: str, pinned: bool) -> None:
        """Keep it in workers' memory and disk caches, or no longer."""
        with self.engine.begin() as connection:
            change = sa.update(adapters).where(_named(tenant, adapter_id)).values(pinned=pinned)
            if not connection.execute(change).rowcount:
                raise _unknown(tenant, adapter_id)

    def everything(self) -> list[Registered]:
        """All versions of all names."""
        return self._select(sa.true())

    def unused(self) -> list[Registered]:
        """Versions that no name stands for and no open job is bound to."""
        with self._read() as connection:
            held = {version for bound_to in _open(connection) for version in bound_to.values()}
            held |= set(connection.scalars(sa.select(adapters.c.version)))
        return [entry for entry in self.everything() if entry.version not in held]

    def forget(self, entry: Registered) -> None:
        """Drop a version for good."""
        where = _versioned(entry.tenant, entry.adapter_id)
        with self.engine.begin() as connection:
            connection.execute(
                sa.delete(adapter_versions).where(
                    where, adapter_versions.c.version == entry.version
                )
            )
            _forgive(connection, entry.version)

    # -- what could not be used ------------------------------------------------

    def set_aside(self, version: str, code: str, reason: str) -> None:
        """Note that a version failed: it is tried again later each time."""
        with self.engine.begin() as connection:
            now = _now(connection)
            query = sa.select(adapter_faults.c.failures).where(adapter_faults.c.version == version)
            failures = (connection.scalar(query.with_for_update()) or 0) + 1
            wait_s = min(RETRY_FIRST_S << min(failures - 1, 16), RETRY_LAST_S)
            what = {"code": code, "reason": reason, "failures": failures}
            what["retry_us"] = now + wait_s * 1_000_000
            made = self._insert(adapter_faults).values(version=version, since_us=now, **what)
            connection.execute(made.on_conflict_do_update(index_elements=["version"], set_=what))

    def forgive(self, version: str) -> None:
        """It works again, or somebody says that it is to be tried again at once."""
        with self.engine.begin() as connection:
            _forgive(connection, version)

    # -- inside ----------------------------------------------------------------

    def _read(self) -> Any:
        return self.engine.execution_options(read_only=True).begin()

    def _select(self, which: sa.ColumnElement[bool]) -> list[Registered]:
        """Oldest first."""
        same = (adapters.c.tenant == adapter_versions.c.tenant) & (
            adapters.c.adapter_id == adapter_versions.c.adapter_id
        )
        joined = adapter_versions.outerjoin(adapters, same).outerjoin(
            adapter_faults, adapter_faults.c.version == adapter_versions.c.version
        )
        query = (
            sa.select(
                adapter_versions,
                adapters.c.version.label("stands_for"),
                sa.func.coalesce(adapters.c.pinned, sa.false()).label("pinned"),
                adapter_faults.c.code,
                adapter_faults.c.reason,
                adapter_faults.c.failures,
                adapter_faults.c.retry_us,
                (adapter_faults.c.retry_us <= now_us()).label("due"),
            )
            .select_from(joined)
            .where(which)
            .order_by(adapter_versions.c.adapter_id, adapter_versions.c.created_us)
        )
        with self._read() as connection:
            return [_registered(row) for row in connection.execute(query)]


def bound(
    connection: sa.Connection, wanted: Iterable[tuple[str, str]]
) -> Mapping[tuple[str, str], str]:
    """The versions that names stand for now, by (tenant, adapter_id); unknown ones are left out."""
    pairs = set(wanted)
    if not pairs:
        return {}
    ids = sorted({adapter_id for _, adapter_id in pairs})
    tenants = {tenant for tenant, _ in pairs} | {SHARED}
    found: dict[tuple[str, str], str] = {}
    for start in range(0, len(ids), 500):
        query = sa.select(adapters.c.tenant, adapters.c.adapter_id, adapters.c.version).where(
            adapters.c.adapter_id.in_(ids[start : start + 500]), adapters.c.tenant.in_(tenants)
        )
        found |= {(row.tenant, row.adapter_id): row.version for row in connection.execute(query)}
    return {
        pair: version
        for pair in pairs
        if (version := found.get(pair) or found.get((SHARED, pair[1]))) is not None
    }


def _open(connection: sa.Connection) -> list[dict[str, str]]:
    query = sa.select(jobs.c.adapter_versions).where(
        jobs.c.state.in_(("queued", "running")), jobs.c.adapter_versions.is_not(None)
    )
    return [versions for versions in connection.scalars(query) if versions]


def _registered(row: Any) -> Registered:
    fault = None
    if row.code is not None:
        fault = Fault(row.code, row.reason, row.failures, row.retry_us, bool(row.due))
    current = row.stands_for == row.version
    return Registered(
        tenant=row.tenant,
        adapter_id=row.adapter_id,
        version=row.version,
        location=row.location,
        base_model=row.base_model,
        rank=row.rank,
        nbytes=row.nbytes,
        created_us=row.created_us,
        current=current,
        pinned=current and bool(row.pinned),
        fault=fault,
    )


def _named(tenant: str, adapter_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(adapters.c.tenant == tenant, adapters.c.adapter_id == adapter_id)


def _versioned(tenant: str, adapter_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(adapter_versions.c.tenant == tenant, adapter_versions.c.adapter_id == adapter_id)


def _forgive(connection: sa.Connection, version: str) -> None:
    connection.execute(sa.delete(adapter_faults).where(adapter_faults.c.version == version))


def _now(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.select(now_us())) or 0)


def _unknown(tenant: str, adapter_id: str) -> UnknownAdapter:
    whose = f"tenant {tenant!r}" if tenant else "everybody"
    return UnknownAdapter(
        f"adapter {adapter_id!r}: not registered for {whose}; see `lorabatch adapters list`"
    )

"""The registry: which adapters there are by name, for everybody or for one tenant.

A name stands for a version, the sha256 of the adapter's files, which never change; to register
other files under the same name makes another version. A job is bound to a version when it is
accepted, and nothing that is queued changes after that. A tenant's own names go before the shared
ones, and nobody sees another tenant's. A version that could not be used is set aside, under its
name and for all workers of a base model, until a time, which is later after each failure, or until
`forgive`.

Times are UTC microseconds by the database's clock. Raises UnknownAdapter; database errors pass
through. Does not cover: the files (location.py and the worker's sources).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from lorabatch.bindings import SHARED, open_bindings
from lorabatch.database import now_us
from lorabatch.errors import UnknownAdapter
from lorabatch.tables import adapter_faults, adapter_versions, adapters

__all__ = ["SHARED", "Fault", "Registered", "Registry"]

RETRY_FIRST_S, RETRY_LAST_S = 60, 3600
LONGEST_REASON = 4000  # characters
Key = tuple[str, str, str]  # tenant, adapter_id, version


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

    @property
    def key(self) -> Key:
        return self.tenant, self.adapter_id, self.version


class Registry:
    """Names and versions of adapters. Safe for many threads and processes. `base_model`: of the
    workers whose faults are meant."""

    def __init__(self, engine: sa.Engine, base_model: str = "") -> None:
        self.engine = engine
        self._base_model = base_model
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
            fresh: dict[str, object] = {"location": entry.location}
            if entry.base_model is not None:  # checked this time
                fresh |= {"base_model": entry.base_model, "rank": entry.rank}
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
            connection.execute(sa.delete(adapter_faults).where(_same(adapter_faults, entry.key)))
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
        """Forget a name: how many open jobs are bound to a version of it, which still run."""
        versions = {entry.version for entry in self.versions(tenant, adapter_id)}
        with self.engine.begin() as connection:
            where = _named(tenant, adapter_id)
            if not connection.execute(sa.delete(adapters).where(where)).rowcount:
                raise _unknown(tenant, adapter_id)
        with self._read() as connection:
            bound_to = open_bindings(connection, tenant or None)
            return sum(held.get(adapter_id) in versions for held in bound_to)

    def pin(self, tenant: str, adapter_id: str, pinned: bool) -> None:
        """Keep it in workers' memory and disk caches, or no longer."""
        with self.engine.begin() as connection:
            change = sa.update(adapters).where(_named(tenant, adapter_id)).values(pinned=pinned)
            if not connection.execute(change).rowcount:
                raise _unknown(tenant, adapter_id)

    def pinned_versions(self) -> set[str]:
        with self._read() as connection:
            return set(connection.scalars(sa.select(adapters.c.version).where(adapters.c.pinned)))

    def everything(self) -> list[Registered]:
        """All versions of all names."""
        return self._select(sa.true())

    def prune(self, names: Collection[tuple[str, str]] | None = None) -> list[Registered]:
        """Drop versions, of these names or of all, that no name stands for and no open job is bound
        to: which."""
        known = self.everything()
        with self.engine.begin() as connection:
            # Names first: who is about to bind a job to one holds it until the job is there.
            current = sa.select(adapters.c.version).with_for_update()
            held = set(connection.scalars(current))
            for bindings in open_bindings(connection):
                held |= set(bindings.values())
            chosen = [
                entry
                for entry in known
                if entry.version not in held
                and (names is None or (entry.tenant, entry.adapter_id) in names)
            ]
            for entry in chosen:
                for table in (adapter_versions, adapter_faults):
                    connection.execute(sa.delete(table).where(_same(table, entry.key)))
        return chosen

    # -- what could not be used ------------------------------------------------

    def set_aside(self, key: Key, code: str, reason: str) -> None:
        """Note that a version failed: it is tried again later each time. Failures of the same try,
        of other jobs or workers, count once."""
        with self.engine.begin() as connection:
            now = _now(connection)
            columns = (adapter_faults.c.failures, adapter_faults.c.retry_us)
            query = sa.select(*columns).where(self._fault(key)).with_for_update()
            before = connection.execute(query).one_or_none()
            if before is not None and before.retry_us > now:
                return
            failures = (before.failures if before else 0) + 1
            wait_s = min(RETRY_FIRST_S << min(failures - 1, 16), RETRY_LAST_S)
            what = {"code": code, "failures": failures, "retry_us": now + wait_s * 1_000_000}
            what["reason"] = reason.replace("\x00", "\ufffd")[:LONGEST_REASON]
            known = list(adapter_faults.primary_key)
            named = dict(zip(("tenant", "adapter_id", "version"), key, strict=True))
            named["base_model"] = self._base_model
            made = self._insert(adapter_faults).values(**named, since_us=now, **what)
            connection.execute(made.on_conflict_do_update(index_elements=known, set_=what))

    def forgive(self, key: Key) -> None:
        """It works again, or somebody says that it is to be tried again at once."""
        with self.engine.begin() as connection:
            connection.execute(sa.delete(adapter_faults).where(self._fault(key)))

    # -- inside ----------------------------------------------------------------

    def _fault(self, key: Key) -> sa.ColumnElement[bool]:
        same = _same(adapter_faults, key)
        return sa.and_(same, adapter_faults.c.base_model == self._base_model)

    def _read(self) -> Any:
        return self.engine.execution_options(read_only=True).begin()

    def _select(self, which: sa.ColumnElement[bool]) -> list[Registered]:
        """Oldest first."""
        same = (adapters.c.tenant == adapter_versions.c.tenant) & (
            adapters.c.adapter_id == adapter_versions.c.adapter_id
        )
        key = ("tenant", "adapter_id", "version")
        failed = sa.and_(
            *(adapter_faults.c[name] == adapter_versions.c[name] for name in key),
            adapter_faults.c.base_model == self._base_model,
        )
        joined = adapter_versions.outerjoin(adapters, same).outerjoin(adapter_faults, failed)
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


def _same(table: sa.Table, key: Key) -> sa.ColumnElement[bool]:
    tenant, adapter_id, version = key
    return sa.and_(
        table.c.tenant == tenant, table.c.adapter_id == adapter_id, table.c.version == version
    )


def _now(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.select(now_us())) or 0)


def _unknown(tenant: str, adapter_id: str) -> UnknownAdapter:
    whose = f"tenant {tenant!r}" if tenant else "everybody"
    return UnknownAdapter(
        f"adapter {adapter_id!r}: not registered for {whose}; see `lorabatch adapters list`"
    )

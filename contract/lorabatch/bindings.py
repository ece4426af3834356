"""Which versions of adapters jobs are bound to: found when they are accepted, kept in their rows.

SQL on the caller's connection; commits nothing. Database errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from lorabatch.tables import adapters, jobs

__all__ = ["SHARED", "bound", "open_bindings"]

SHARED = ""  # the tenant of names that everybody may use


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
        # Held until the jobs are there: or the version could be pruned in between.
        query = query.order_by(*adapters.primary_key).with_for_update(read=True)
        found |= {(row.tenant, row.adapter_id): row.version for row in connection.execute(query)}
    return {
        pair: version
        for pair in pairs
        if (version := found.get(pair) or found.get((SHARED, pair[1]))) is not None
    }


def open_bindings(connection: sa.Connection, tenant: str | None = None) -> list[dict[str, str]]:
    """What open jobs, of one tenant or of all, are bound to."""
    query = sa.select(jobs.c.adapter_versions).where(
        jobs.c.state.in_(("queued", "running")), jobs.c.adapter_versions.is_not(None)
    )
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    return [versions for versions in connection.scalars(query) if versions]

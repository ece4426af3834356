"""Remote control, by Celery's own way: what `lorabatch adapters warm` and `why` ask of a worker.

Runs on the hub's thread, so nothing here waits, but `warm_adapter` of a name without a version for
the file times of its local folder.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, inspect_command

from lorabatch_worker.adapters.wanted import Wanted

__all__ = ["adapter_place", "warm_adapter"]


@control_command(
    args=[("tenant", str), ("adapter_id", str), ("version", str)],
    signature="TENANT ADAPTER_ID VERSION",
)
def warm_adapter(state: Any, tenant: str, adapter_id: str, version: str = "") -> dict[str, str]:
    """Load an adapter ahead of its jobs: "loaded", "loading", or why not."""
    service = state.consumer.pool.service
    if service is None:
        return {"ok": "loading"}
    return {"ok": service.runner.warm(Wanted(tenant, adapter_id, version or None))}


@inspect_command(
    args=[("tenant", str), ("adapter_id", str), ("version", str)],
    signature="TENANT ADAPTER_ID VERSION",
)
def adapter_place(
    state: Any, tenant: str, adapter_id: str, version: str | None = None
) -> dict[str, str]:
    """Where an adapter is, as `Runner.place` says it."""
    service = state.consumer.pool.service
    if service is None:
        return {"ok": "nowhere"}
    return {"ok": service.runner.place(Wanted(tenant, adapter_id, version or None))}

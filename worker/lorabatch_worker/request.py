"""The Celery request of a generate task: revocation and shutdown go through the ledger.

Celery's own request acknowledges a revoked or expired task at once, and on a cold shutdown it
cancels what is active. Here a revoked message travels on to the intake, which has the ledger
say "cancelled" first; terminating aborts one sequence; a shutdown leaves the jobs to the pool,
which hands them back. `inspect` and events show no prompt. Raises nothing of its own.
"""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request

__all__ = ["REVOKED", "JobRequest"]

REVOKED = "lorabatch_revoked"


class JobRequest(Request):
    """One delivered generate message, as Celery's worker state and control commands see it."""

    def revoked(self) -> bool:
        """Never drop the message here: `_announce_revoked` marks it for the intake."""
        super().revoked()
        return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        if not terminated:
            self._request_dict[REVOKED] = reason
            return
        self.send_event("task-revoked", terminated=True, signum=None, expired=False)
        self.acknowledge()
        self._already_revoked = True

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """revoke(terminate=True): waiting or running, the job ends as cancelled."""
        pool.terminate_job(self.id, signal)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown cancels nothing: the pool releases the claims."""

    @property
    def argsrepr(self) -> str:
        return ""

    @property
    def kwargsrepr(self) -> str:
        return ""

    def info(self, safe: bool = False) -> dict[str, Any]:
        shown = {name: self._kwargs.get(name) for name in ("tenant", "adapter_id")}
        return {**super().info(safe=safe), "args": "", "kwargs": shown}

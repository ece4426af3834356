"""The Celery request of a generate task: revocation and shutdown go through the ledger.

Celery's own request acknowledges a revoked or expired task at once, and on a cold shutdown it
cancels what is active. Here a revoked message travels on to the intake, which has the ledger
say "cancelled" first; terminating aborts one sequence; a shutdown leaves the jobs to the pool,
which hands them back. `inspect` and events show no prompt. What the pool needs besides is put into
the request's fields: the links, the time after which the job is not to begin, and how to hand the
message back. Raises nothing of its own.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from celery.worker.request import Request
from celery.worker.state import task_ready

from lorabatch_worker.links import links_in
from lorabatch_worker.visibility import hide

__all__ = ["EXPIRES_S", "HAND_BACK", "REVOKED", "JobRequest"]

EXPIRES_S = "lorabatch_expires_s"
HAND_BACK = "lorabatch_hand_back"
REVOKED = "lorabatch_revoked"


class JobRequest(Request):
    """One delivered generate message, as Celery's worker state and control commands see it."""

    acknowledged: bool

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        _, _, embedded = self._payload
        self._request_dict.update(links_in(embedded))
        if self.expires is not None:
            left = self.expires - datetime.now(UTC if self.expires.tzinfo else None)
            self._request_dict[EXPIRES_S] = time.monotonic() + left.total_seconds()

        self._request_dict[HAND_BACK] = self.hand_back

    def hand_back(self, delay_s: float, why: str | None) -> None:
        """The broker is to give the message out again after so long; until then it is nobody's.
        Monitors are told `why`, but for a job that has ended (None), which is not retried."""
        if self.acknowledged:
            return
        task_ready(self)
        hide(self._message.channel, self._message.delivery_tag, delay_s)
        self.acknowledged = True
        if why is not None:
            self.send_event("task-retried", exception=why, traceback="")

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

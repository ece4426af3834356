"""Tenants' weights in fair shares, as the ledger has them; nobody waits for it to be asked.

A thread of its own asks every EVERY_S. Until the first answer, and while the database is away, the
weights are as they were last, 1.0 for who is not known. Raises nothing.
"""

from __future__ import annotations

import threading
import time

import sqlalchemy as sa
import structlog

from lorabatch.tenants import EACH, Tenants
from lorabatch_worker.retry import OUTAGES, reason

__all__ = ["TenantWeights"]

log = structlog.get_logger(__name__)

EVERY_S = 5.0
LEAST, MOST = 1e-3, 1e3  # beyond these, sums of shares would lose what is small


class TenantWeights:
    """As they were a moment ago."""

    def __init__(self, engine: sa.Engine) -> None:
        self._tenants = Tenants(engine)
        self._known: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def of(self, tenant: str) -> float:
        known = self._known
        return known.get(tenant, known.get(EACH, 1.0))

    def ask(self) -> None:
        self._known = {
            limits.tenant: min(max(limits.weight, LEAST), MOST) for limits in self._tenants.list()
        }

    def _run(self) -> None:
        while True:
            try:
                self.ask()
            except OUTAGES as error:
                log.warning("tenants' weights not read", error=reason(error))
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one look
                log.error("tenants' weights: unexpected", error=reason(error))
            time.sleep(EVERY_S)

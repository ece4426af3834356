"""A thread beside the engine for what may take seconds to prepare: tenants have their turns.

An adapter's chat template or a job's grammar is a tenant's, who may send many that take as long as
they are let: only its own jobs are to wait for them all. Raises nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

from lorabatch_worker.retry import reason

__all__ = ["Aside"]

log = structlog.get_logger(__name__)

HELD_UP_S = 5.0  # what one may take that is over its bound


class Aside:
    """Does one call after another. The thread begins with the first of them."""

    def __init__(self, name: str) -> None:
        self._calls: dict[str, deque[Callable[[], None]]] = {}  # by tenant, whose turn it is first
        self._changed = threading.Condition()
        self._busy_since_s: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_held_up(self) -> bool:
        """It has had no pause for HELD_UP_S."""
        since_s = self._busy_since_s
        return since_s is not None and time.monotonic() - since_s > HELD_UP_S

    def put(self, tenant: str, call: Callable[[], None]) -> None:
        """Once it is closed, nothing is done any more."""
        with self._changed:
            if self._closed:
                return
            self._calls.setdefault(tenant, deque()).append(call)
            if self._busy_since_s is None:
                self._busy_since_s = time.monotonic()
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Forget what has not begun."""
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one job
                log.error("not prepared", error=reason(error))

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._calls:
                self._busy_since_s = None
                if self._closed:
                    return None
                self._changed.wait()
            tenant, calls = next(iter(self._calls.items()))
            del self._calls[tenant]
            call = calls.popleft()
            if calls:
                self._calls[tenant] = calls  # behind the others
            return call

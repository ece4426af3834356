"""The publisher: results for who waits on the Celery result backend, then the acknowledgement.

It comes after the commit and before the acknowledgement, on purpose: a crash in between leaves
the message with the broker, its next delivery finds the job ended in the ledger, publishes
again and is acknowledged. The ledger is the truth; a backend that stays away for a few tries
is logged and passed over. Raises nothing. Not covered: chords, chains and links.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog
from celery import Celery

from lorabatch.result import Result
from lorabatch_worker.delivery import Delivery, failure

__all__ = ["Publisher"]

log = structlog.get_logger(__name__)

TRIES = 3
PAUSE_S = 0.2
BACKEND_REST_S = 5.0


@dataclass(frozen=True)
class _Ended:
    result: Result
    deliveries: Sequence[Delivery]
    task_ids: frozenset[str]


class Publisher:
    """A thread between the recorder and the hub. `post` runs a call on the hub's thread."""

    def __init__(self, app: Celery, post: Callable[[Callable[[], None]], None]) -> None:
        self._app = app
        self._post = post
        self._queue: queue.SimpleQueue[_Ended | None] = queue.SimpleQueue()
        self._failed_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(
        self, result: Result, deliveries: Sequence[Delivery], extra: Iterable[str] = ()
    ) -> None:
        """Publish to whoever of these wants it (and to the task ids in `extra`), then end them."""
        wanted = frozenset(d.task_id for d in deliveries if d.publish) | frozenset(extra)
        self._queue.put(_Ended(result, deliveries, wanted))

    def close(self) -> None:
        """Finish what is queued, then stop."""
        self._queue.put(None)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while (ended := self._queue.get()) is not None:
            for task_id in sorted(ended.task_ids):
                self._publish(task_id, ended.result)
            for delivery in ended.deliveries:
                self._post(lambda d=delivery, r=ended.result: d.on_ended(r))  # type: ignore[misc]

    def _publish(self, task_id: str, result: Result) -> None:
        resting = time.monotonic() - self._failed_s < BACKEND_REST_S
        tries = 1 if resting else TRIES
        for left in reversed(range(tries)):
            try:
                self._store(task_id, result)
                return
            except Exception as error:  # noqa: BLE001 - the result is in the ledger whatever this is
                if not left:
                    self._failed_s = time.monotonic()
                    log.warning("result not published", job_id=task_id, error=type(error).__name__)
                else:
                    time.sleep(PAUSE_S)

    def _store(self, task_id: str, result: Result) -> None:
        backend = self._app.backend  # one a thread: ask for it on this one
        if result.state == "succeeded":
            backend.mark_as_done(task_id, result.model_dump(mode="json"))
        elif result.state == "cancelled":
            backend.mark_as_revoked(task_id, "cancelled")
        else:
            backend.mark_as_failure(task_id, failure(result))

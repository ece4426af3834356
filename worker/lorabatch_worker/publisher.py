"""The publisher: links and results for who waits on the Celery result backend, then the
acknowledgement.

It comes after the commit and before the acknowledgement, on purpose: a crash in between leaves
the message with the broker, its next delivery finds the job ended in the ledger, publishes
again and is acknowledged. The ledger is the truth; a backend that stays away for a few tries
is logged and passed over. A link (links.py) is in its message alone: one that raises is logged and
passed over; while the broker does not take it, its message goes back to the broker instead of being
acknowledged, and its next delivery, AGAIN_S later, calls the links again.
Raises nothing. Not covered: chords.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from celery import Celery, states
from celery.app.task import Context

from lorabatch.result import Result
from lorabatch.told import told
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.links import OUTAGES, after_failure, after_success

__all__ = ["Publisher"]

log = structlog.get_logger(__name__)

TRIES = 3
PAUSE_S = 0.2
BACKEND_REST_S = 5.0
AGAIN_S = 10.0


@dataclass(frozen=True)
class _Ended:
    result: Result
    deliveries: Sequence[Delivery]
    wanted: frozenset[str]
    """Task ids that the result is published under."""
    links: Mapping[str, Context]
    """By task id: copies of a message call theirs once."""


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
        """Tell whoever of these wants it (and the task ids in `extra`), then end them."""
        wanted = frozenset(d.task_id for d in deliveries if d.publish) | frozenset(extra)
        links = {d.task_id: d.links for d in deliveries if d.links is not None}
        self._queue.put(_Ended(result, deliveries, wanted, links))

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
            called = {
                task_id: self._publish(task_id, ended)
                for task_id in sorted(ended.wanted | ended.links.keys())
            }
            for delivery in ended.deliveries:
                if called.get(delivery.task_id, True) or delivery.on_postponed is None:
                    self._post(partial(delivery.on_ended, ended.result))
                else:
                    self._post(partial(delivery.on_postponed, AGAIN_S))

    def _publish(self, task_id: str, ended: _Ended) -> bool:
        """In Celery's order: links, so that the stored result names them; the result; errbacks.
        False: the broker did not take a link."""
        called = True
        state, value = told(ended.result)
        links = ended.links.get(task_id)
        stored: dict[str, Any] = {}
        if links is not None:
            stored = {"request": links, "store_result": task_id in ended.wanted}
        if links is not None and state == states.SUCCESS:
            for call in after_success(self._app, links, value):
                called &= self._attempt("link not called", task_id, call, OUTAGES)
        self._attempt(
            "result not published", task_id, partial(self._store, task_id, state, value, stored)
        )
        if links is not None and isinstance(value, Exception) and state == states.FAILURE:
            for call in after_failure(self._app, links, value):
                called &= self._attempt("link not called", task_id, call, OUTAGES)
        return called

    def _attempt(
        self,
        failed: str,
        task_id: str,
        call: Callable[[], None],
        passing: tuple[type[Exception], ...] = (Exception,),
    ) -> bool:
        """Make a call, a few times if what it raises may pass; at last log that it `failed`. False:
        it may work later."""
        resting = time.monotonic() - self._failed_s < BACKEND_REST_S
        for left in reversed(range(1 if resting else TRIES)):
            try:
                call()
                break
            except Exception as error:  # noqa: BLE001 - the ledger has the result whatever this is
                may_pass = isinstance(error, passing)
                if not left or not may_pass:
                    self._failed_s = time.monotonic() if may_pass else self._failed_s
                    log.warning(failed, job_id=task_id, error=type(error).__name__)
                    return not may_pass
                time.sleep(PAUSE_S)
        return True

    def _store(self, task_id: str, state: str, value: Any, options: Mapping[str, Any]) -> None:
        """`options`: the request, for one with links; the rest of its chain fails with it."""
        backend = self._app.backend  # one a thread: ask for it on this one
        if state == states.SUCCESS:
            backend.mark_as_done(task_id, value, **options)
        elif state == states.REVOKED:
            backend.mark_as_revoked(task_id, "cancelled", **options)
        else:
            apart = {"call_errbacks": False} if options else {}
            backend.mark_as_failure(task_id, value, **options, **apart)

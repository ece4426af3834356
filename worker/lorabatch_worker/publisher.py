"""The publisher: links and results for who waits on the Celery result backend, then the
acknowledgement.

It comes after the commit and before the acknowledgement, on purpose: a crash in between leaves
the message with the broker, its next delivery finds the job ended in the ledger, publishes
again and is acknowledged. A backend that refuses a result for a few tries, or a broker that refuses
a link (links.py), does not end the message either: it goes back to the broker, and comes again
after as long as the job has ended by then, AGAIN_S at least, so that a backend that stays away is
not asked more and more; for BACKEND_REST_S after a failure others go back untried. When the result
would have expired it is left to the ledger, which has it. It is left there as well when it alone
was refused and links were called before or after: coming again would call them again, and Celery,
which calls them before it stores, acknowledges such a message too.
A link that raises anything else is logged and passed over. What nobody waits for is acknowledged
at once, past those that wait for a slow backend.
Raises nothing. Not covered: chords.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import structlog
from celery import Celery, states
from celery.app.task import Context

from lorabatch.result import Result
from lorabatch.told import told
from lorabatch_worker.delivery import AGAIN_S, Delivery
from lorabatch_worker.links import OUTAGES, after_failure, after_success

__all__ = ["Publisher"]

log = structlog.get_logger(__name__)

TRIES = 3
PAUSE_S = 0.2
BACKEND_REST_S = 5.0
AGAIN_MAX_S = 600.0
LINK, RESULT = "link not called", "result not published"

_Call = tuple[str, Callable[[], None], tuple[type[Exception], ...]]
"""What is said if it fails, the call, and what it may raise that may pass."""
_How = Literal["done", "refused", "given up"]


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
        waiting = [d for d in deliveries if d.task_id in wanted or d.task_id in links]
        if wanted or links:
            self._queue.put(_Ended(result, waiting, wanted, links))
        for delivery in deliveries:
            if delivery not in waiting:
                self._post(partial(delivery.on_ended, result))

    def close(self) -> None:
        """Finish what is queued, then stop."""
        self._queue.put(None)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def _resting(self) -> bool:
        return time.monotonic() - self._failed_s < BACKEND_REST_S

    def _run(self) -> None:
        while (ended := self._queue.get()) is not None:
            again_s = self._again_s(ended.result)
            may_wait = {d.task_id for d in ended.deliveries if d.on_postponed and again_s}
            untold = set()
            for task_id in sorted(ended.wanted | ended.links.keys()):
                put_off = task_id in may_wait and self._resting
                if put_off or not self._publish(task_id, ended):
                    untold.add(task_id)
            for delivery in ended.deliveries:
                hand_back = delivery.on_postponed if delivery.task_id in untold else None
                if hand_back is not None and again_s is not None:
                    self._post(partial(hand_back, again_s, None))
                else:
                    self._post(partial(delivery.on_ended, ended.result))

    def _again_s(self, result: Result) -> float | None:
        """After how long to try again; None if nobody could get the result any more."""
        if result.finished_us is None:  # no job, so that nothing says for how long it was tried
            return None
        age_s = time.time() - result.finished_us / 1e6
        if age_s > self._app.conf.result_expires:
            return None
        return min(max(AGAIN_S, age_s), AGAIN_MAX_S)

    def _publish(self, task_id: str, ended: _Ended) -> bool:
        """Make all its calls. False if they are to be made again."""
        made = [(call[0], self._attempt(task_id, *call)) for call in self._calls(task_id, ended)]
        refused = {what for what, how in made if how == "refused"}
        return not refused or (refused == {RESULT} and (LINK, "done") in made)

    def _calls(self, task_id: str, ended: _Ended) -> Iterator[_Call]:
        """In Celery's order: links, so that the stored result names them; the result; errbacks."""
        state, value = told(ended.result)
        links = ended.links.get(task_id)
        stored: dict[str, Any] = {}
        if links is not None:
            stored = {"request": links, "store_result": task_id in ended.wanted}
        if links is not None and state == states.SUCCESS:
            for call in after_success(self._app, links, value):
                yield LINK, call, OUTAGES
        store = partial(self._store, task_id, state, value, stored)
        yield RESULT, store, (Exception,)
        if links is not None and isinstance(value, Exception) and state == states.FAILURE:
            for call in after_failure(self._app, links, value):
                yield LINK, call, OUTAGES

    def _attempt(
        self,
        task_id: str,
        failed: str,
        call: Callable[[], None],
        passing: tuple[type[Exception], ...],
    ) -> _How:
        """Make a call, a few times if what it raises may pass; at last log that it `failed`:
        "refused" if that may still pass."""
        for left in reversed(range(1 if self._resting else TRIES)):
            try:
                call()
                return "done"
            except Exception as error:  # noqa: BLE001 - the ledger has the result whatever this is
                may_pass = isinstance(error, passing)
                if not left or not may_pass:
                    self._failed_s = time.monotonic() if may_pass else self._failed_s
                    log.warning(failed, job_id=task_id, error=type(error).__name__)
                    return "refused" if may_pass else "given up"
                time.sleep(PAUSE_S)
        raise AssertionError("the last try ends it")

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

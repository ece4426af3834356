"""Jobs that the runner gave up for now: handed back to the ledger, and sent again when it is time.

Their adapter is being fetched, and there are so many of them that others could not be taken. First
the ledger has them as queued, then their messages are acknowledged, and when the adapter has come,
or will not come, new ones are sent. A worker that dies meanwhile loses none: the sweeper sends what
is queued and has no message for `resend_after_s`, and so it does with those beyond KEPT_MAX. A
message that says more than a pointer to the row (a time limit, another task id) is held instead.
Raises nothing; an outage of the database is waited out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import structlog
from celery import Celery

from lorabatch.errors import QueueNotReady
from lorabatch.ledger import Claim, Ledger, Message
from lorabatch.queue import send
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.retry import Stopped, reason, until_it_works

__all__ = ["Postponed"]

log = structlog.get_logger(__name__)

KEPT_MAX = 100_000
HOLD_S = 10.0


class Postponed:
    """A thread between the runner and the queue. `post` runs a call on the hub's thread."""

    def __init__(
        self,
        app: Celery,
        to_queue: str,
        ledger: Ledger,
        live: LiveJobs,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._app = app
        self._to_queue = to_queue
        self._ledger = ledger
        self._live = live
        self._post = post
        self._kept: dict[str, Message] = {}
        self._stop = threading.Event()
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="postponed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, claims: Sequence[Claim], until: Future[Any]) -> None:
        """Hand these back now, and send them again when the future is done."""
        self._steps.put(partial(self._hand_back, claims))
        job_ids = [claim.job.job_id for claim in claims]
        until.add_done_callback(lambda _: self._steps.put(partial(self._send, job_ids)))

    def close(self) -> None:
        """Send what is left, for other workers, and stop."""
        self._stop.set()
        self._steps.put(lambda: self._send(list(self._kept)))
        self._steps.put(None)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def ids(self) -> set[str]:
        """Jobs that are to be sent again, and need nobody else to do it."""
        return set(self._kept.copy())

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                step()
            except Stopped:  # whoever stops the worker hands the jobs back
                continue
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one step
                log.error("jobs not postponed", error=reason(error))

    def _hand_back(self, claims: Sequence[Claim]) -> None:
        until_it_works(
            "hand jobs back", self._stop, lambda: self._ledger.release(claims, as_sent=True)
        )
        gone = self._live.lose(claims)
        for claim in claims:
            job = claim.job
            if job.job_id in gone and len(self._kept) < KEPT_MAX:
                message = Message(job.job_id, job.tenant, job.adapter_id, claim.publish_result)
                self._kept[job.job_id] = message
        for job_id, deliveries in gone.items():
            self._part_with(job_id, deliveries)
        log.info("jobs postponed: their adapter is being fetched", jobs=len(gone))

    def _part_with(self, job_id: str, deliveries: Sequence[Delivery]) -> None:
        held = []
        for delivery in deliveries:
            if delivery.on_postponed is None or delivery.task_id != job_id:
                held.append(delivery)
            else:
                self._post(delivery.on_postponed)
        self._live.hold(job_id, held, HOLD_S)

    def _send(self, job_ids: Sequence[str]) -> None:
        messages = [m for job_id in job_ids if (m := self._kept.pop(job_id, None)) is not None]
        if not messages:
            return
        try:
            send(self._app, self._to_queue, messages)
        except QueueNotReady as error:  # the sweeper will
            log.warning("postponed jobs not sent again yet", jobs=len(messages), error=str(error))
        else:
            log.info("postponed jobs sent again", jobs=len(messages))

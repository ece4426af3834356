"""The feeder: fills the queue with what was accepted and not sent, and ends what is too late, or
of a batch that may spend no more.

Every worker runs one; each takes other jobs. Looks every FIRST_PAUSE_S while there is something,
and rests longer while there is nothing. Messages that the broker does not take are unsent again,
and so they wait in the ledger. Raises nothing; an outage is logged, and the next look tries again.
"""

from __future__ import annotations

import threading
import time

import structlog
from celery import Celery

from lorabatch.errors import QueueNotReady
from lorabatch.feed import Feed
from lorabatch.ledger import Ledger
from lorabatch.queue import send
from lorabatch.settings import Settings
from lorabatch.stopping import stop_exhausted
from lorabatch_worker.retry import reason

__all__ = ["Feeder", "feeds"]

log = structlog.get_logger(__name__)

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 0.4
OUTAGE_PAUSE_S = 2.0
GROWTH = 1.5
LATE_EVERY_S = 1.0


def feeds(settings: Settings, ledger: Ledger) -> dict[str, Feed]:
    """Of every queue that this worker drains or sends to."""
    names = dict.fromkeys((settings.queue, *settings.consume))
    return {name: Feed(ledger.engine, name) for name in names}


class Feeder:
    """A thread."""

    def __init__(self, app: Celery, settings: Settings, ledger: Ledger) -> None:
        self._app = app
        self._ledger = ledger
        self._feeds = feeds(settings, ledger)
        self._looked_s = float("-inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stop.wait(pause_s):
            try:
                self._end_what_must_end()
                sent = self.feed()
                pause_s = FIRST_PAUSE_S if sent else min(pause_s * GROWTH, LAST_PAUSE_S)
            except Exception as error:  # noqa: BLE001 - database or broker away: the next look
                log.warning("the queue is not fed", error=reason(error))
                pause_s = OUTAGE_PAUSE_S

    def feed(self) -> int:
        """One look at each queue: how many jobs were sent."""
        return sum(self._fill(queue, feed) for queue, feed in self._feeds.items())

    def _fill(self, queue: str, feed: Feed) -> int:
        messages = feed.take()
        if messages:
            try:
                send(self._app, queue, messages)
            except QueueNotReady:
                feed.give_back([message.job_id for message in messages])
                raise
        return len(messages)

    def _end_what_must_end(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < LATE_EVERY_S:
            return
        self._looked_s = now_s
        late = self._ledger.end_late()
        if late:
            log.info("jobs not done by their deadline", jobs=len(late))
        for batch_id, counts in stop_exhausted(self._ledger.engine).items():
            log.info("batch stopped: it may spend no more", batch_id=batch_id, **counts)

"""The sweeper: accepted jobs that no message leads to are sent again.

Brokers lose messages (a worker killed between pop and note, FLUSHALL, a disk); the ledger does
not. Every sweep_interval_s, jittered, it takes the ledger's open jobs that are older than
resend_after_s or whose lease ran out, leaves out those that are in this worker's hands or that
the broker still has, and sends the rest. A second message is harmless and a missing one is not,
so in doubt it sends: it looks at SCAN_MAX messages of a queue, the oldest, and not further.
Raises nothing; an outage is logged and the next sweep tries again.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import structlog
from celery import Celery

from lorabatch.errors import QueueNotReady
from lorabatch.feed import Feed
from lorabatch.ledger import Ledger, Message
from lorabatch.queue import drained, send
from lorabatch.settings import Settings
from lorabatch_worker.feeder import feeds
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.retry import reason

__all__ = ["Sweeper", "task_id_of"]

log = structlog.get_logger(__name__)

LOOKED_AT = 1000
SCAN_CHUNK = 500
SCAN_MAX = 50_000


class Sweeper:
    """A thread; every worker runs one, and two that send the same job do no harm."""

    def __init__(self, app: Celery, settings: Settings, ledger: Ledger, live: LiveJobs) -> None:
        self._app = app
        self._settings = settings
        self._ledger = ledger
        self._feeds = feeds(settings, ledger)
        self._live = live
        self._sent_s: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._settings.sweep_interval_s * random.uniform(0.75, 1.25)):
            try:
                self.sweep()
            except Exception as error:  # noqa: BLE001 - database or broker away: the next sweep
                log.warning("sweep failed", error=reason(error))

    def sweep(self) -> int:
        """One look: how many jobs were sent again."""
        after_s = self._settings.resend_after_s
        now_s = time.monotonic()
        self._sent_s = {i: s for i, s in self._sent_s.items() if now_s - s < after_s}
        return sum(self._sweep(queue, feed) for queue, feed in self._feeds.items())

    def _sweep(self, queue: str, feed: Feed) -> int:
        mine = self._live.ids() | self._sent_s.keys()
        found = feed.nowhere(self._settings.resend_after_s, LOOKED_AT + len(mine))
        missing = [message for message in found if message.job_id not in mine]
        if not missing:
            return 0
        held = self._broker_has(missing)
        lost = [message for message in missing if message.job_id not in held]
        if lost:
            try:
                send(self._app, queue, lost)
            except QueueNotReady as error:
                log.warning("jobs not sent again", jobs=len(lost), error=str(error))
                return 0
            log.info("jobs sent again", jobs=len(lost))
        now_s = time.monotonic()
        self._sent_s.update((message.job_id, now_s) for message in lost)
        feed.mark_sent([message.job_id for message in missing])
        return len(lost)

    def _broker_has(self, missing: Sequence[Message]) -> set[str]:
        """Those of these jobs that the broker has a message of.

        A message that was given out but not acknowledged counts, unless its job's lease ran out:
        whoever has that message has stopped, and the visibility timeout is longer than a lease.
        """
        wanted = {message.job_id for message in missing}
        states = self._ledger.states(list(wanted))
        queued = {job_id for job_id, state in states.items() if state == "queued"}
        found: set[str] = set()
        with self._app.connection_for_read() as connection:
            channel = connection.default_channel
            for queue in drained([*{*self._settings.consume, self._settings.queue}]):
                for raw in _queued(channel.client, queue):
                    found.add(task_id_of(raw))
                    if found >= wanted:
                        return wanted
            given_out = {task_id_of(raw) for raw in _given_out(channel.client, channel.unacked_key)}
        return wanted & (found | (queued & given_out))


def _queued(client: Any, queue: str) -> Iterator[bytes]:
    """A queue's messages, oldest first: kombu pushes left and pops right."""
    for start in range(0, SCAN_MAX, SCAN_CHUNK):
        chunk = client.lrange(queue, -start - SCAN_CHUNK, -start - 1)
        yield from reversed(chunk)
        if len(chunk) < SCAN_CHUNK:
            return


def _given_out(client: Any, key: str) -> Iterator[bytes]:
    for _, raw in client.hscan_iter(key, count=SCAN_CHUNK):
        yield raw


def task_id_of(raw: bytes) -> str:
    """The task id in a raw message, or in an entry of kombu's unacked hash; '' if there is none."""
    try:
        message = json.loads(raw)
        if isinstance(message, list):
            message = message[0]
        return str(message["headers"]["id"])
    except (ValueError, LookupError, TypeError):
        return ""

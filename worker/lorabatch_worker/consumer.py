"""Celery's consumer, made to survive the messages that stop it.

In celery 5.7 an exception that is no connection error, raised while a message is taken apart or
while an acknowledgement runs on the hub, ends the worker; the message is given out again and
ends the next one. Here a generate message that cannot be read becomes a recorded failure, any
other is rejected, and an acknowledgement on a channel that is gone is logged: the broker gives
that message out again. What another worker may know, a task that this one does not have or a
pointer of a newer schema, is parked: the broker keeps it, and gives it out again after a visibility
timeout, until a worker takes it; the first time is logged. A pointer's job is in the ledger and
waits for a newer worker. An unknown task that a worker has parked for PARKED_MAX_S fails as Celery
has it fail at once; a restart begins anew. A broker that is away is asked for every few seconds.
Raises the broker's connection errors, on which Celery reconnects. Bytes in the queue that are no
kombu message are the transport's (transport.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from celery.exceptions import NotRegistered
from celery.utils.functional import LRUCache
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer

from lorabatch.errors import shown
from lorabatch.queue import TASK_NAME
from lorabatch_worker.delivery import newer_pointer, unreadable
from lorabatch_worker.visibility import hide

__all__ = ["JobConsumer"]

log = structlog.get_logger(__name__)
celery_log = get_logger(__name__)

RECONNECT_S = 5
PARKED_MAX_S = 86_400.0
PARKED_KNOWN = 100_000


class JobConsumer(Consumer):
    """`worker_consumer` of our worker app."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parked: LRUCache = LRUCache(PARKED_KNOWN)
        super().__init__(*args, **kwargs)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        receive = super().create_task_handler(*args, **kwargs)
        fatal = tuple(error for error in self.connection_errors if error is not KeyError)

        def on_message(message: Any) -> None:
            try:
                ours = message.headers.get("task") == TASK_NAME
                if ours and (why := unreadable(message, self.app)):
                    self.pool.refuse(message.headers, why, lambda: self._acknowledge(message))
                elif ours and (newer := newer_pointer(message)):
                    self._park(message, newer)
                else:
                    receive(message)
            except fatal:
                raise
            except Exception as error:  # noqa: BLE001 - a message must not stop the worker
                log.error("message rejected: it cannot be taken", error=type(error).__name__)
                self.call_soon_ack(message.reject_log_error, celery_log, self.connection_errors)

        return on_message

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Of another program or version: Celery would fail and drop it."""
        name = exc.args[0]
        since_s = self._parked.get(message.delivery_tag, time.monotonic())
        if time.monotonic() - since_s < PARKED_MAX_S:
            ends = f"if none comes, it fails after {PARKED_MAX_S / 3600:.0f} h"
            self._park(message, f"no task {shown(name)} here; start a worker that has it; {ends}")
            return
        log.error(
            "message failed: no worker has its task", job_id=_id_of(message), task=shown(name)
        )
        self.app.backend.mark_as_failure(_id_of(message), NotRegistered(name))
        self._acknowledge(message)

    def _park(self, message: Any, why: str) -> None:
        if message.delivery_tag not in self._parked:
            self._parked[message.delivery_tag] = time.monotonic()
            log.warning("message parked", job_id=_id_of(message), why=why)
        hide(message.channel, message.delivery_tag, message.channel.visibility_timeout)

    def call_soon(self, p: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run on the hub's thread; a failure is logged and stops nothing."""

        def guarded() -> None:
            try:
                p(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the hub does not guard its callbacks
                log.warning("call on the hub failed", error=type(error).__name__)

        return self.hub.call_soon(guarded)

    call_soon_ack = call_soon

    def ensure_connected(self, conn: Any) -> Any:
        """Until there is a connection. Celery would ask less and less often, twice a minute at
        last, and the broker be back for half a minute before anybody came."""
        conn.ensure_connection = partial(
            conn.ensure_connection, interval_start=1, interval_step=1, interval_max=RECONNECT_S
        )
        return super().ensure_connected(conn)

    def _acknowledge(self, message: Any) -> None:
        self.call_soon_ack(message.ack_log_error, celery_log, self.connection_errors)


def _id_of(message: Any) -> Any:
    task_id = message.headers.get("id")
    return message.payload.get("id") if task_id is None else task_id  # protocol 1

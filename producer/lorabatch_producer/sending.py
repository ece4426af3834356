"""Accepting jobs and sending the first messages of a call, a chunk at a time.

Commit first, note as sent, then send. The workers send what is beyond SENT_MAX, as much of each
tenant's at a time as is its share (feed.py), and what could not be sent, so that a broker that is
down delays jobs and loses none. Raises NotSent (a QueueNotReady), IdempotencyConflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from celery import Celery

from lorabatch import Job, Ledger
from lorabatch.errors import QueueNotReady
from lorabatch.feed import Feed
from lorabatch.queue import send

__all__ = ["CHUNK", "NotSent", "Sender", "chunked"]

CHUNK = 1000
SENT_MAX = 200
T = TypeVar("T")


class NotSent(QueueNotReady):
    """The jobs are accepted, but the broker did not take their messages. `job_ids`: of all jobs of
    the call, in order; `unsent`: of those that wait without a message."""

    def __init__(self, job_ids: Sequence[str], unsent: Sequence[str], reason: object) -> None:
        self.job_ids, self.unsent = list(job_ids), list(unsent)
        who = f"job {unsent[0]!r} is" if len(unsent) == 1 else f"{len(unsent)} jobs are"
        super().__init__(
            f"{who} accepted, but not in the queue yet: {reason}; nothing is lost and nothing has "
            "to be sent again: the workers send what was accepted once the broker is back"
        )


class Sender:
    """Accepts chunks and sends the first of them; once the broker has failed it accepts only."""

    def __init__(self, ledger: Ledger, app: Callable[[], Celery], queue: str) -> None:
        self._ledger = ledger
        self._feed = Feed(ledger.engine, queue)
        self._app = app
        self._queue = queue
        self._left = SENT_MAX
        self._reason: QueueNotReady | None = None
        self._ids: list[str] = []

    def chunk(self, accepted: Sequence[Job]) -> list[str]:
        """Commit up to CHUNK jobs: the ids they are known by, in order."""
        known = self._ledger.accept(accepted, queue=self._queue)
        ids = [known[job.job_id] for job in accepted]
        if self._reason is None:
            self._send(ids[: self._left])
        if self._reason is not None or self._left:
            self._ids.extend(ids)
        self._left = max(0, self._left - len(ids))
        return ids

    def finish(self) -> None:
        """Raise NotSent if the broker has failed and some accepted jobs have no message."""
        unsent = self._feed.unsent(self._ids) if self._reason is not None else []
        if unsent:
            raise NotSent(self._ids, unsent, self._reason)

    def forget(self) -> None:
        """Let `finish` say nothing of the chunks so far: of a call without end it would keep all
        their ids once the broker has failed."""
        self._ids.clear()

    def _send(self, job_ids: Sequence[str]) -> None:
        waiting = self._feed.take_these(job_ids) if job_ids else []
        if not waiting:
            return
        try:
            send(self._app(), self._queue, waiting)
        except QueueNotReady as error:
            self._reason = error
            self._feed.give_back([message.job_id for message in waiting])


def chunked(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some

"""Accepting jobs and sending their messages, a chunk at a time.

Commit first, then send, then note it as sent. What is committed but could not be sent is
found and sent by a worker's sweeper, so a broker that is down delays jobs and loses none.
Raises NotSent (a QueueNotReady), IdempotencyConflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import sqlalchemy as sa
from celery import Celery

from lorabatch import Job, Ledger
from lorabatch.errors import QueueNotReady
from lorabatch.ledger import Message
from lorabatch.queue import send
from lorabatch.tables import jobs

__all__ = ["CHUNK", "NotSent", "Sender", "chunked"]

CHUNK = 1000
PARAMETERS = 500
T = TypeVar("T")


class NotSent(QueueNotReady):
    """The jobs are accepted, but the broker did not take their messages; `job_ids` has them."""

    def __init__(self, job_ids: Sequence[str], reason: object) -> None:
        self.job_ids = list(job_ids)
        who = (
            f"job {self.job_ids[0]!r} is"
            if len(self.job_ids) == 1
            else f"{len(self.job_ids)} jobs are"
        )
        super().__init__(
            f"{who} accepted, but not in the queue yet: {reason}; nothing is lost and nothing has "
            "to be sent again: a worker's sweeper sends what was accepted once the broker is back"
        )


class Sender:
    """Accepts and sends chunks; once the broker has failed it accepts only."""

    def __init__(self, ledger: Ledger, app: Callable[[], Celery], queue: str) -> None:
        self._ledger = ledger
        self._app = app
        self._queue = queue
        self._reason: QueueNotReady | None = None
        self._unsent: list[str] = []

    def chunk(self, accepted: Sequence[Job]) -> list[str]:
        """Commit and send up to CHUNK jobs: the ids they are known by, in order."""
        known = self._ledger.accept(accepted)
        ids = [known[job.job_id] for job in accepted]
        waiting = list(_unsent(self._ledger, ids))
        if waiting and self._reason is None:
            try:
                send(self._app(), self._queue, waiting)
            except QueueNotReady as error:
                self._reason = error
            else:
                self._ledger.mark_sent([message.job_id for message in waiting])
        if self._reason is not None:
            self._unsent.extend(message.job_id for message in waiting)
        return ids

    def finish(self) -> None:
        """Raise NotSent if some accepted jobs could not be sent."""
        if self._unsent:
            raise NotSent(self._unsent, self._reason)


def _unsent(ledger: Ledger, job_ids: Sequence[str]) -> Iterator[Message]:
    """Those of these jobs that wait and were never sent: not what an earlier call has sent."""
    columns = (jobs.c.job_id, jobs.c.tenant, jobs.c.adapter_id, jobs.c.publish_result)
    engine = ledger.engine.execution_options(read_only=True)
    with engine.begin() as connection:
        for some in chunked(dict.fromkeys(job_ids), PARAMETERS):
            query = sa.select(*columns).where(
                jobs.c.job_id.in_(some), jobs.c.state == "queued", jobs.c.sent_us.is_(None)
            )
            found = {row.job_id: Message(*row) for row in connection.execute(query)}
            yield from (found[job_id] for job_id in some if job_id in found)


def chunked(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some

"""The client: put jobs into the queue, wait for them, read results, cancel.

    with Producer() as producer:
        job_id = producer.enqueue(adapter_id="sql", prompt="How many users?", max_new_tokens=32)
        print(producer.wait(job_id).text)

Accepted means committed to the ledger; the broker is only touched by enqueueing. One producer
may be shared by threads, an iterator that it gave may not. Raises InvalidJob, IdempotencyConflict,
NotSent, JobNotFound, JobFailed, JobCancelled, WaitTimeout, QueueFull, DatabaseNotReady.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, overload

from celery import Celery

from lorabatch import Job, Ledger, Result, Settings
from lorabatch.batches import Batches
from lorabatch.database import open_database
from lorabatch.queue import check_name, end_now, make_app, resolve_broker
from lorabatch.result import JobState
from lorabatch_producer.batch import BatchStatus, batch_status
from lorabatch_producer.fields import make_job
from lorabatch_producer.flow import (
    IN_FLIGHT,
    Flow,
    Gives,
    Jobs,
    OnAccepted,
    Turn,
    note_accepted,
    turns,
)
from lorabatch_producer.pages import pages
from lorabatch_producer.sending import CHUNK, Sender, chunked
from lorabatch_producer.texts import follow
from lorabatch_producer.waiting import Watch, succeeded

__all__ = ["Producer"]


class Producer:
    """Enqueues jobs and reads them back. Opens database and broker when first needed."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings if settings is not None else Settings.load()
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None
        self._app: Celery | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; a later call opens new ones."""
        with self._lock:
            if self._ledger is not None:
                self._ledger.engine.dispose()
            if self._app is not None:
                self._app.close()  # kombu's connection pools belong to the whole process
            self._ledger = self._app = None

    @property
    def ledger(self) -> Ledger:
        with self._lock:
            if self._ledger is None:
                self._ledger = Ledger(open_database(self.settings))
            return self._ledger

    def app(self) -> Celery:
        """The Celery app that sends; starts the embedded Valkey where no broker is set."""
        with self._lock:
            if self._app is None:
                self._app = make_app(self.settings)
            return self._app

    def sender(self, queue: str | None = None) -> Sender:
        """What accepts and sends chunks of checked jobs, into our settings' queue or this one."""
        where = self.settings.queue if queue is None else check_name(queue)
        return Sender(self.ledger, self.app, where)

    def enqueue(
        self,
        job: Job | Mapping[str, Any] | None = None,
        /,
        *,
        queue: str | None = None,
        **fields: Any,
    ) -> str:
        """Accept and send one job: its id, or the known one for a known idempotency key. `queue`:
        whose workers run it, and so with which base model; None: that of our settings."""
        sender = self.sender(queue)
        (job_id,) = sender.chunk([make_job(job, **fields)])
        sender.finish()
        return job_id

    def enqueue_many(
        self,
        jobs: Jobs,
        queue: str | None = None,
        *,
        max_in_flight: int | None = None,
        idle_timeout_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> list[str]:
        """Accept and send jobs in chunks of 1000: their ids, in order. `queue`: as in `enqueue`.

        A job that is refused ends the call; the chunks before its own stay accepted, which the
        error notes. With `max_in_flight` or `idle_timeout_s` it waits for room instead: see
        `enqueue_each`.
        """
        if max_in_flight is not None or idle_timeout_s is not None:
            most = IN_FLIGHT if max_in_flight is None else max_in_flight
            options = (queue, most, idle_timeout_s, on_accepted)
            return [job_id for turn in self._turns(jobs, "ids", *options) for job_id in turn.ids]
        sender = self.sender(queue)
        job_ids: list[str] = []
        try:
            for some in chunked(jobs, CHUNK):
                ids = sender.chunk([make_job(job) for job in some])
                job_ids.extend(ids)
                if on_accepted is not None:
                    on_accepted(ids)
        except Exception as error:
            note_accepted(error, job_ids)
            raise
        sender.finish()
        return job_ids

    def enqueue_each(
        self,
        jobs: Jobs,
        queue: str | None = None,
        *,
        max_in_flight: int = IN_FLIGHT,
        idle_timeout_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> Iterator[str]:
        """Ids of jobs from a source of any length, as they are accepted. The source is read no
        further than there is room: at most `max_in_flight` of the call's jobs are open, and a full
        queue is waited for.

        `on_accepted` gets the ids of each commit, whatever becomes of the call. All jobs before one
        that is refused, or before an error of the source, are accepted first. Raises WaitTimeout or
        QueueFull after `idle_timeout_s` in which nothing ended and nothing could be accepted.
        """
        options = (queue, max_in_flight, idle_timeout_s, on_accepted)
        flowing = self._turns(jobs, "ids", *options)
        return (job_id for turn in flowing for job_id in turn.ids)

    def map(
        self,
        jobs: Jobs,
        queue: str | None = None,
        *,
        ordered: bool = False,
        max_in_flight: int = IN_FLIGHT,
        idle_timeout_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> Iterator[Result]:
        """Results of jobs from a source of any length, failed and cancelled ones too: as they come,
        or in its order if `ordered`, one for each. Otherwise as `enqueue_each`; whoever stops early
        leaves what was accepted to run."""
        options = (queue, max_in_flight, idle_timeout_s, on_accepted)
        flowing = self._turns(jobs, "in order" if ordered else "results", *options)
        return (result for turn in flowing for result in turn.results)

    def result(self, job_id: str) -> Result | None:
        """The result; None while the job is open. Raises JobNotFound."""
        found = Watch(self.ledger, [job_id], None).look()
        return found[0] if found else None

    @overload
    def wait(  # type: ignore[overload-overlap]  # a str is an Iterable[str], and comes first
        self, job_id: str, /, timeout_s: float | None = None
    ) -> Result: ...
    @overload
    def wait(
        self, job_ids: Iterable[str], /, timeout_s: float | None = None
    ) -> Iterator[Result]: ...
    def wait(
        self, job_ids: str | Iterable[str], /, timeout_s: float | None = None
    ) -> Result | Iterator[Result]:
        """One id: its result; raises JobFailed, JobCancelled or WaitTimeout.

        Many ids: the results as they come, failed and cancelled ones too; raises WaitTimeout
        when `timeout_s` is over and some are still open. None waits for ever.
        """
        if isinstance(job_ids, str):
            return succeeded(next(self._ended([job_ids], timeout_s)))
        return self._ended(job_ids, timeout_s)

    def as_completed(
        self, job_ids: Iterable[str], /, timeout_s: float | None = None
    ) -> Iterator[Result]:
        """The results of any number of jobs as they come, as `wait` gives them."""
        return self._ended(job_ids, timeout_s)

    def results(self, batch_id: str) -> Iterator[Result]:
        """The results of a batch's jobs that have ended, in no order that means anything, a page at
        a time. Raises JobNotFound."""
        for page in pages(self.ledger, batch_id):
            yield from page

    def stream(self, job_id: str, /, timeout_s: float | None = None) -> Iterator[str]:
        """The text of a job as it grows, if it was enqueued with `stream=True`; of any other at
        once when it ends. Raises as `wait` does, and TextChanged: it was run again, not alike."""
        watch = Watch(self.ledger, [job_id], timeout_s)
        return filter(None, follow(resolve_broker(self.settings), job_id, watch))

    def _ended(self, job_ids: Iterable[str], timeout_s: float | None) -> Iterator[Result]:
        watch = Watch(self.ledger, job_ids, timeout_s)
        while not watch.over:
            yield from watch.look()
            if not watch.over:
                time.sleep(watch.pause_s())

    def _turns(
        self,
        jobs: Jobs,
        gives: Gives,
        queue: str | None,
        max_in_flight: int,
        idle_timeout_s: float | None,
        on_accepted: OnAccepted | None,
    ) -> Iterator[Turn]:
        sender = self.sender(queue)
        limits = (max_in_flight, idle_timeout_s, on_accepted)
        return turns(jobs, Flow(sender, self.ledger, gives, *limits))

    def cancel(self, job_ids: str | Iterable[str], /) -> dict[str, JobState]:
        """Cancel jobs: the state each is in now; a running one ends at its next step."""
        ids = [job_ids] if isinstance(job_ids, str) else list(job_ids)
        states = self.ledger.cancel(ids)
        if running := [job_id for job_id, state in states.items() if state == "running"]:
            end_now(self.app(), running)
        return states

    def cancel_batch(self, batch_id: str) -> dict[str, int]:
        """Cancel what is open of a batch: how many jobs were `cancelled` at once, and how many run
        and were `asked` to end. Raises JobNotFound."""
        return Batches(self.ledger.engine).cancel(batch_id)

    def status(self, batch_id: str) -> BatchStatus:
        """A batch's job counts by state. Raises JobNotFound."""
        return batch_status(self.ledger, batch_id)

"""The awaitable client: `Producer` for asyncio, with the same methods and errors.

    async with AsyncProducer() as producer:
        job_id = await producer.enqueue(adapter_id="sql", prompt="How many users?")
        print((await producer.wait(job_id)).text)
        async for result in producer.wait([job_id]):
            print(result.text)

Database and broker calls run in threads; a wait holds a thread only while it looks. A task that is
cancelled in the middle of such a call hears of it when the call has ended, so that it leaves no
thread and no connection at work. One producer may be shared by tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Coroutine,
    Iterable,
    Mapping,
)
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, overload

from lorabatch import Job, Ledger, Result, Settings
from lorabatch.queue import resolve_broker
from lorabatch.result import JobState
from lorabatch_producer.aio_flow import AsyncJobs, async_turns, in_thread
from lorabatch_producer.batch import BatchStatus
from lorabatch_producer.client import Producer
from lorabatch_producer.flow import IN_FLIGHT, Flow, Gives, OnAccepted, Turn
from lorabatch_producer.pages import pages
from lorabatch_producer.texts import follow
from lorabatch_producer.waiting import Watch, succeeded

__all__ = ["AsyncProducer"]


class AsyncProducer:
    """`Producer` with awaitable methods; `producer` is the blocking one inside."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.producer = Producer(settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; a later call opens new ones."""
        await in_thread(self.producer.close)

    async def enqueue(
        self,
        job: Job | Mapping[str, Any] | None = None,
        /,
        *,
        queue: str | None = None,
        **fields: Any,
    ) -> str:
        """Accept and send one job: its id, or the known one for a known idempotency key. `queue`:
        whose workers run it, and so with which base model; None: that of our settings."""
        return await in_thread(self.producer.enqueue, job, queue=queue, **fields)

    async def enqueue_many(
        self,
        jobs: AsyncJobs,
        queue: str | None = None,
        *,
        max_in_flight: int | None = None,
        idle_timeout_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> list[str]:
        """Accept and send jobs: their ids, in order. See Producer.enqueue_many. With an async
        iterable it waits for room, as with `max_in_flight`."""
        limited = max_in_flight is not None or idle_timeout_s is not None
        if not limited and not isinstance(jobs, AsyncIterable):
            enqueue_many = self.producer.enqueue_many
            return await in_thread(enqueue_many, jobs, queue, on_accepted=on_accepted)
        most = IN_FLIGHT if max_in_flight is None else max_in_flight
        options = (queue, most, idle_timeout_s, on_accepted)
        turns = self._turns(jobs, "ids", *options)
        return [job_id async for turn in turns for job_id in turn.ids]

    async def enqueue_each(
        self,
        jobs: AsyncJobs,
        queue: str | None = None,
        *,
        max_in_flight: int = IN_FLIGHT,
        idle_timeout_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> AsyncIterator[str]:
        """Ids of jobs from a source of any length, as they are accepted. See
        Producer.enqueue_each; the source may be an async iterable, too."""
        options = (queue, max_in_flight, idle_timeout_s, on_accepted)
        async with aclosing(self._turns(jobs, "ids", *options)) as flowing:
            async for turn in flowing:
                for job_id in turn.ids:
                    yield job_id

    async def map(
        self,
        jobs: AsyncJobs,
        queue: str | None = None,
        *,
        ordered: bool = False,
        max_in_flight: int = IN_FLIGHT,
        idle_timeout_s: float | None = None,
        on_accepted: OnAccepted | None = None,
    ) -> AsyncIterator[Result]:
        """Results of jobs from a source of any length, failed and cancelled ones too. See
        Producer.map; the source may be an async iterable, too, and may wait for results."""
        options = (queue, max_in_flight, idle_timeout_s, on_accepted)
        gives: Gives = "in order" if ordered else "results"
        async with aclosing(self._turns(jobs, gives, *options)) as flowing:
            async for turn in flowing:
                for result in turn.results:
                    yield result

    async def result(self, job_id: str) -> Result | None:
        """The result; None while the job is open. Raises JobNotFound."""
        return await in_thread(self.producer.result, job_id)

    @overload
    def wait(  # type: ignore[overload-overlap]  # a str is an Iterable[str], and comes first
        self, job_id: str, /, timeout_s: float | None = None
    ) -> Coroutine[Any, Any, Result]: ...
    @overload
    def wait(
        self, job_ids: Iterable[str], /, timeout_s: float | None = None
    ) -> AsyncIterator[Result]: ...
    def wait(
        self, job_ids: str | Iterable[str], /, timeout_s: float | None = None
    ) -> Coroutine[Any, Any, Result] | AsyncIterator[Result]:
        """`await` it with one id; iterate with `async for` over many. See Producer.wait."""
        if isinstance(job_ids, str):
            return self._one(job_ids, timeout_s)
        return self._ended(job_ids, timeout_s)

    def as_completed(
        self, job_ids: Iterable[str], /, timeout_s: float | None = None
    ) -> AsyncIterator[Result]:
        """The results of any number of jobs as they come, as `wait` gives them."""
        return self._ended(job_ids, timeout_s)

    async def results(self, batch_id: str) -> AsyncIterator[Result]:
        """The results of a batch's jobs that have ended. See Producer.results."""
        found = pages(await self._ledger(), batch_id)
        while (page := await in_thread(next, found, None)) is not None:
            for result in page:
                yield result

    async def stream(self, job_id: str, /, timeout_s: float | None = None) -> AsyncIterator[str]:
        """The text of a job as it grows. See Producer.stream."""
        settings, watch = self.producer.settings, await self._watch([job_id], timeout_s)
        url = await in_thread(resolve_broker, settings)
        pieces = follow(url, job_id, watch)
        try:
            while (piece := await in_thread(next, pieces, None)) is not None:
                if piece:
                    yield piece
        finally:
            pieces.close()

    async def _one(self, job_id: str, timeout_s: float | None) -> Result:
        (result,) = [found async for found in self._ended([job_id], timeout_s)]
        return succeeded(result)

    async def _ended(
        self, job_ids: Iterable[str], timeout_s: float | None
    ) -> AsyncIterator[Result]:
        watch = await self._watch(job_ids, timeout_s)
        while not watch.over:
            for result in await in_thread(watch.look):
                yield result
            if not watch.over:
                await asyncio.sleep(watch.pause_s())

    async def _watch(self, job_ids: Iterable[str], timeout_s: float | None) -> Watch:
        return Watch(await self._ledger(), job_ids, timeout_s)

    async def _turns(
        self,
        jobs: AsyncJobs,
        gives: Gives,
        queue: str | None,
        max_in_flight: int,
        idle_timeout_s: float | None,
        on_accepted: OnAccepted | None,
    ) -> AsyncGenerator[Turn]:
        ledger = await self._ledger()
        sender = await in_thread(self.producer.sender, queue)
        flow = Flow(sender, ledger, gives, max_in_flight, idle_timeout_s, on_accepted)
        async with aclosing(async_turns(jobs, flow)) as turns:
            async for turn in turns:
                yield turn

    async def _ledger(self) -> Ledger:
        return await in_thread(lambda: self.producer.ledger)

    async def cancel(self, job_ids: str | Iterable[str], /) -> dict[str, JobState]:
        """Cancel jobs: the state each is in now; a running one ends at its next step."""
        return await in_thread(self.producer.cancel, job_ids)

    async def cancel_batch(self, batch_id: str) -> dict[str, int]:
        """Cancel what is open of a batch: how many jobs were `cancelled` at once, and how many run
        and were `asked` to end. Raises JobNotFound."""
        return await in_thread(self.producer.cancel_batch, batch_id)

    async def status(self, batch_id: str) -> BatchStatus:
        """A batch's job counts by state. Raises JobNotFound."""
        return await in_thread(self.producer.status, batch_id)

"""The awaitable client: `Producer` for asyncio, with the same methods and errors.

    async with AsyncProducer() as producer:
        job_id = await producer.enqueue(adapter_id="sql", prompt="How many users?")
        print((await producer.wait(job_id)).text)
        async for result in producer.wait([job_id]):
            print(result.text)

Database and broker calls run in threads; a wait holds a thread only while it looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, overload

from lorabatch import Job, Result, Settings
from lorabatch.queue import resolve_broker
from lorabatch.result import JobState
from lorabatch_producer.batch import BatchStatus
from lorabatch_producer.client import Producer
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
        await asyncio.to_thread(self.producer.close)

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
        return await asyncio.to_thread(self.producer.enqueue, job, queue=queue, **fields)

    async def enqueue_many(
        self, jobs: Iterable[Job | Mapping[str, Any]], queue: str | None = None
    ) -> list[str]:
        """Accept and send jobs in chunks of 1000: their ids, in order. `queue`: as in `enqueue`."""
        return await asyncio.to_thread(self.producer.enqueue_many, jobs, queue)

    async def result(self, job_id: str) -> Result | None:
        """The result; None while the job is open. Raises JobNotFound."""
        return await asyncio.to_thread(self.producer.result, job_id)

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

    async def stream(self, job_id: str, /, timeout_s: float | None = None) -> AsyncIterator[str]:
        """The text of a job as it grows. See Producer.stream."""
        settings, watch = self.producer.settings, await self._watch([job_id], timeout_s)
        url = await asyncio.to_thread(resolve_broker, settings)
        pieces = follow(url, job_id, watch)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            if piece:
                yield piece

    async def _one(self, job_id: str, timeout_s: float | None) -> Result:
        (result,) = [found async for found in self._ended([job_id], timeout_s)]
        return succeeded(result)

    async def _ended(
        self, job_ids: Iterable[str], timeout_s: float | None
    ) -> AsyncIterator[Result]:
        watch = await self._watch(job_ids, timeout_s)
        while not watch.over:
            for result in await asyncio.to_thread(watch.look):
                yield result
            if not watch.over:
                await asyncio.sleep(watch.pause_s())

    async def _watch(self, job_ids: Iterable[str], timeout_s: float | None) -> Watch:
        ledger = await asyncio.to_thread(lambda: self.producer.ledger)
        return Watch(ledger, job_ids, timeout_s)

    async def cancel(self, job_ids: str | Iterable[str], /) -> dict[str, JobState]:
        """Cancel jobs: the state each is in now; a running one ends at its next step."""
        return await asyncio.to_thread(self.producer.cancel, job_ids)

    async def cancel_batch(self, batch_id: str) -> dict[str, int]:
        """Cancel what is open of a batch: how many jobs were `cancelled` at once, and how many run
        and were `asked` to end. Raises JobNotFound."""
        return await asyncio.to_thread(self.producer.cancel_batch, batch_id)

    async def status(self, batch_id: str) -> BatchStatus:
        """A batch's job counts by state. Raises JobNotFound."""
        return await asyncio.to_thread(self.producer.status, batch_id)

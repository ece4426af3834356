"""What the awaitable client does that the blocking one need not: calls in threads that are not
left behind, and a flow whose source may be awaited.

An async source is read by one task, one job ahead of what there is room for, so that a slow one
keeps no result waiting; an async generator is closed with the call. An iterable is read in a
thread. Raises what `flow` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
)
from typing import Any, ParamSpec, TypeVar

from lorabatch import Job
from lorabatch_producer.fields import make_job
from lorabatch_producer.flow import LINGER_S, Flow, Source, Turn

__all__ = ["AsyncJobs", "async_turns", "in_thread"]

P = ParamSpec("P")
T = TypeVar("T")
One = Job | Mapping[str, Any]
AsyncJobs = Iterable[One] | AsyncIterable[One]


async def in_thread(blocking: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`; who is cancelled meanwhile hears of it when the call has ended."""
    call = asyncio.ensure_future(asyncio.to_thread(blocking, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():  # however often it is told
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({call})
        if not call.cancelled():
            call.exception()  # nobody else will ask for it
        raise


async def async_turns(jobs: AsyncJobs, flow: Flow) -> AsyncGenerator[Turn]:
    """As `flow.turns`."""
    async with _source(jobs) as source:
        wait_s: float | None = 0.0
        with flow.telling():
            while not flow.over:
                if flow.wants:
                    await source.feed(flow, wait_s)
                else:
                    await asyncio.sleep(wait_s or 0.0)
                yield await in_thread(flow.turn)
                wait_s = flow.pause_s()


class _Threaded:
    """A source that is an iterable."""

    def __init__(self, jobs: Iterable[One]) -> None:
        self._source = Source(jobs)

    async def feed(self, flow: Flow, wait_s: float | None) -> None:
        await in_thread(self._source.feed, flow)


class _Awaited:
    """A source that is an async iterable."""

    def __init__(self, jobs: AsyncIterable[One]) -> None:
        self._next = asyncio.Queue[One | None](1)
        self._error: BaseException | None = None
        self._reading = asyncio.create_task(self._read(jobs))

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def feed(self, flow: Flow, wait_s: float | None) -> None:
        """What comes within `wait_s`, and what comes at once after it."""
        some: list[Job] = []
        most = flow.wants
        try:
            while len(some) < most:
                async with asyncio.timeout(wait_s):
                    job = await self._next.get()
                if job is None:
                    flow.end(self._error)
                    break
                some.append(make_job(job))
                if len(some) == 1:
                    end_s = time.monotonic() + LINGER_S
                wait_s = max(0.0, end_s - time.monotonic())
        except TimeoutError:
            pass
        except Exception as error:  # noqa: BLE001 - raised by the flow, after what came before it
            flow.end(error)
        flow.take(some)

    async def _read(self, jobs: AsyncIterable[One]) -> None:
        try:
            async for job in jobs:
                await self._next.put(job)
        except (Exception, asyncio.CancelledError) as error:  # a task that it waited for, or we
            if self._reading.cancelling():
                raise
            self._error = error
        finally:
            if isinstance(jobs, AsyncGenerator):
                await jobs.aclose()
        await self._next.put(None)


@contextlib.asynccontextmanager
async def _source(jobs: AsyncJobs) -> AsyncIterator[_Threaded | _Awaited]:
    if not isinstance(jobs, AsyncIterable):
        yield _Threaded(jobs)
        return
    source = _Awaited(jobs)
    try:
        yield source
    finally:
        await source.close()

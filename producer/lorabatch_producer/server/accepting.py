"""Jobs of many requests accepted together: one transaction for all that came while the last ran.

A job alone waits for no others. If a group is refused, its halves are tried, so that each request
gets its own answer. Raises what accepting raises; a broker that is down does not, for what is
accepted is sent by the workers.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from lorabatch import Job
from lorabatch.errors import LoraBatchError
from lorabatch_producer.sending import CHUNK, NotSent, Sender

__all__ = ["Accepting"]

log = structlog.get_logger(__name__)


class _Asked(NamedTuple):
    job: Job
    queue: str | None
    answer: asyncio.Future[str]


class Accepting:
    """Used from one event loop."""

    def __init__(self, sender: Callable[[str | None], Sender]) -> None:
        self._sender = sender
        self._asked: list[_Asked] = []
        self._running: asyncio.Task[None] | None = None

    async def accept(self, job: Job, queue: str | None = None) -> str:
        """The id that the job is known by, once it is committed."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(job, queue, answer))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await answer

    async def close(self) -> None:
        """Once all that was asked for is answered."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        try:
            while self._asked:
                group, self._asked = self._asked[:CHUNK], self._asked[CHUNK:]
                by_queue: dict[str | None, list[_Asked]] = defaultdict(list)
                for one in group:
                    by_queue[one.queue].append(one)
                for queue, some in by_queue.items():
                    await self._accept(queue, some)
        finally:
            self._running = None

    async def _accept(self, queue: str | None, some: Sequence[_Asked]) -> None:
        try:
            ids = await asyncio.to_thread(self._commit, queue, [one.job for one in some])
        except Exception as error:  # noqa: BLE001 - it belongs to the requests that wait
            if len(some) == 1 or not isinstance(error, LoraBatchError):
                for one in some:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                return
            half = len(some) // 2
            await self._accept(queue, some[:half])
            await self._accept(queue, some[half:])
            return
        for one, job_id in zip(some, ids, strict=True):
            if not one.answer.done():  # whoever asked may be gone; the job is accepted
                one.answer.set_result(job_id)

    def _commit(self, queue: str | None, jobs: Sequence[Job]) -> list[str]:
        sender = self._sender(queue)
        ids = sender.chunk(jobs)
        try:
            sender.finish()
        except NotSent as error:
            log.warning("accepted, not sent yet", jobs=len(error.unsent))
        return ids

"""What all routes share: accepting jobs, waiting for outcomes, and the ledger to ask.

One for each process, opened with it. Database calls run in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from fastapi import Request

from lorabatch import Job, Ledger, Result, Settings
from lorabatch.errors import JobNotFound, shown
from lorabatch.fields import is_identifier
from lorabatch.queue import resolve_broker
from lorabatch.result import JobState
from lorabatch.streams import Followed, Piece
from lorabatch_producer.client import Producer
from lorabatch_producer.server.accepting import Accepting
from lorabatch_producer.server.following import Following, Pieces
from lorabatch_producer.server.outcomes import Outcomes
from lorabatch_producer.server.rate_gate import RateGate

__all__ = ["Desk", "desk_of"]

P = ParamSpec("P")
T = TypeVar("T")


class Desk:
    """`async with Desk(settings) as desk`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.producer = Producer(settings)
        self._accepting = Accepting(self.producer.sender)
        self._rates = RateGate()
        self._outcomes = Outcomes(self._results)
        self._cancelling = set[asyncio.Task[JobState]]()
        self.accepted = 0  # jobs, since it was opened

    async def __aenter__(self) -> Self:
        ledger = await self.call(lambda: self.producer.ledger)
        ledger.engine.hide_parameters = True  # prompts are parameters, and errors are logged
        self._following = Following(await self.call(resolve_broker, self.settings))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._accepting.close()
        await asyncio.gather(*self._cancelling, return_exceptions=True)
        await self._outcomes.close()
        await self._following.close()
        await self.call(self.producer.close)

    @property
    def ledger(self) -> Ledger:
        return self.producer.ledger

    @property
    def waiting(self) -> int:
        """How many requests wait for an outcome now."""
        return self._outcomes.waiters

    def _results(self, job_ids: Sequence[str]) -> dict[str, Result]:
        return self.ledger.results(job_ids)

    async def call(self, blocking: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In a thread."""
        return await asyncio.to_thread(blocking, *args, **kwargs)

    async def check(self) -> None:
        """Raises what the database raises."""
        await self.call(self.ledger.states, ["-"])

    async def accept(self, request: Request, job: Job, queue: str | None = None) -> str:
        """The id that a job is known by, once it is committed. Raises RateLimited. An error that
        the request is answered with from then on says where the job is."""
        await self._rates.take(self.ledger.engine, job)
        if job.idempotency_key is None:  # a commit may be done though its answer was lost
            request.state.job = job.job_id, None
        job_id = await self._accepting.accept(job, queue)
        request.state.job = job_id, job.idempotency_key
        self.accepted += 1
        return job_id

    async def outcome(self, job_id: str, timeout_s: float) -> Result | None:
        """Of a job that is known; None while it is open."""
        return await self._outcomes.wait(job_id, timeout_s)

    async def follow(self, job_id: str, had: int = 0) -> AsyncIterator[Piece | Result]:
        """The text of a known job as it grows, from character `had` on, and its result at last. A
        piece that does not follow on the one before, at 0, is the whole of another text: the job
        was run again, and not alike."""
        followed = Followed(had)
        with self._following.of(job_id) as pieces:
            ended = asyncio.create_task(self._outcomes.wait(job_id, None))
            ended.add_done_callback(partial(_tell, pieces))
            try:
                while isinstance(item := await pieces.get(), Piece):
                    if new := followed.take(item):
                        at = len(followed.text) - len(new)
                        yield Piece(job_id, at, new, tokens=followed.tokens(item))
            finally:
                ended.cancel()
        if isinstance(item, Exception):
            raise item
        rest = followed.rest(item.text or "") if item.state == "succeeded" else ""
        tokens = followed.rest_of_tokens(item)
        if rest is None:
            yield Piece(job_id, 0, item.text or "")
        elif rest or tokens:
            yield Piece(job_id, len(followed.text) - len(rest), rest, tokens=tokens)
        yield item

    def stop(self) -> None:
        """Whoever waits is answered that the server stops. Nothing is cancelled."""
        self._outcomes.stop()

    async def state(self, job_id: str, tenant: str) -> JobState:
        """Raises JobNotFound, for a job of somebody else too."""
        known = is_identifier(job_id)  # PostgreSQL cannot be asked for a NUL
        found = await self.call(self.ledger.states, [job_id], tenant) if known else {}
        if job_id not in found:
            raise JobNotFound(f"job {shown(job_id)}: no such job")
        return found[job_id]

    async def result(self, job_id: str) -> Result | None:
        """Of a job that is known, if it has ended."""
        return (await self.call(self.ledger.results, [job_id])).get(job_id)

    async def cancel(self, job_id: str) -> JobState:
        return (await self.call(self.producer.cancel, job_id))[job_id]

    def cancel_soon(self, job_id: str) -> None:
        """For whoever cannot wait for it, because it is being cancelled itself."""
        task = asyncio.create_task(self.cancel(job_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)


def _tell(pieces: Pieces, task: asyncio.Task[Result | None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        result = task.result()
        assert result is not None, "it waited for as long as it took"
        pieces.put_nowait(result)
    elif isinstance(error, Exception):
        pieces.put_nowait(error)


def desk_of(request: Request) -> Desk:
    """For `Depends`."""
    desk: Desk = request.app.state.desk
    return desk

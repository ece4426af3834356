"""Texts as they grow, for requests that follow them: one read of the broker for all.

A broker that is away loses pieces, never the text: its end comes from the ledger. Raises nothing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
import structlog

from lorabatch import Result
from lorabatch.queue import plain_url
from lorabatch.streams import Piece, piece_of, stream_key

__all__ = ["Following", "Pieces"]

log = structlog.get_logger(__name__)

LOOK_S = 0.02
REST_S = 1.0
FIRST = "0-0"
Pieces = asyncio.Queue[Piece | Result | Exception]
"""What a follower is given. Pieces may come twice."""


class Following:
    """Used from one event loop."""

    def __init__(self, broker_url: str) -> None:
        self._client = redis.asyncio.Redis.from_url(plain_url(broker_url))
        self._followers: dict[str, list[Pieces]] = defaultdict(list)
        self._read: dict[str, Any] = {}  # the last entry of each that was read
        self._running: asyncio.Task[None] | None = None

    @contextmanager
    def of(self, job_id: str) -> Iterator[Pieces]:
        """A queue that gets the pieces of a job's text, from the first one that is kept."""
        pieces: Pieces = asyncio.Queue()
        self._followers[job_id].append(pieces)
        self._read[job_id] = FIRST
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            yield pieces
        finally:
            self._followers[job_id].remove(pieces)
            if not self._followers[job_id]:
                del self._followers[job_id], self._read[job_id]

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._client.aclose()

    async def _run(self) -> None:
        try:
            while self._followers:
                try:
                    await self._look()
                except redis.RedisError as error:
                    log.warning("texts not read", error=type(error).__name__)
                    await asyncio.sleep(REST_S)
                await asyncio.sleep(LOOK_S)
        finally:
            self._running = None

    async def _look(self) -> None:
        asked = {stream_key(job_id): job_id for job_id in self._followers}
        after: dict[Any, Any] = {key: self._read[job_id] for key, job_id in asked.items()}
        found: Any = await self._client.xread(after)
        for key, entries in found:
            job_id = asked[key.decode()]
            if self._read.get(job_id) != after[key.decode()]:
                continue  # another follower has come meanwhile: it is read from the beginning
            self._read[job_id] = entries[-1][0]
            for _, entry in entries:
                for follower in self._followers[job_id]:
                    follower.put_nowait(piece_of(job_id, entry))

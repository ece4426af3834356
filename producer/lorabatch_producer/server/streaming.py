"""Answers that come piece by piece, by server-sent events, to those who wait for a job.

A comment is sent when nothing else was for PING_S, so that no proxy gives up. An error after the
answer has begun is an event of its own, in the body that the path's clients read. Whoever goes
away, or has waited for `http_wait_s`, has its job cancelled, as in asking.py.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

from lorabatch import Job, Result
from lorabatch.errors import ServerStops, TextChanged, WaitTimeout
from lorabatch.streams import Piece
from lorabatch_producer.chunks import Chunks, Grown
from lorabatch_producer.server.asking import Asking, succeeded_or_raised
from lorabatch_producer.server.dialects import foreign_error
from lorabatch_producer.server.problems import told

__all__ = ["event_stream", "followed"]

PING_S = 10.0
PING = ": still there\n\n"
T = TypeVar("T")


async def followed(asking: Asking, job: Job, job_id: str) -> Grown:
    """An accepted job's pieces and its result, and None when nothing came for PING_S."""
    desk, length, ended = asking.desk, 0, False
    limit_s = desk.settings.http_wait_s
    try:
        async for item in _paced(desk.follow(job_id), PING_S, limit_s):
            if isinstance(item, Result):
                ended = True
                yield succeeded_or_raised(item)
            elif isinstance(item, Piece) and item.at != length:
                raise TextChanged(f"job {job_id!r} was run again and has another text; ask again")
            else:
                length += len(item.text) if item else 0
                yield item
    except ServerStops:
        ended = True  # for this server; the job goes on
        raise
    except TimeoutError:
        raise WaitTimeout(f"job {job_id!r}: not ended after {limit_s:g} s") from None
    finally:
        if not ended and job.idempotency_key is None:
            desk.cancel_soon(job_id)


def event_stream(path: str, chunks: Chunks, last: str = "") -> StreamingResponse:
    """`data:` for each chunk; `last`: that of one more, when all went well."""

    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield PING if chunk is None else _data(chunk)
            if last:
                yield f"data: {last}\n\n"
        except Exception as error:  # noqa: BLE001 - the answer has begun: it is told in it
            status, code, text = told(error)
            found = foreign_error(path, status, code, text)
            assert found is not None, f"{path} has a dialect"
            yield _data(found[1])

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _data(chunk: Any) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def _paced(
    items: AsyncIterator[T], every_s: float, limit_s: float
) -> AsyncIterator[T | None]:
    """The items, and None whenever none came for `every_s`. Raises TimeoutError after `limit_s`."""
    end_s = time.monotonic() + limit_s
    following: asyncio.Future[T] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(items))
            left_s = max(0.0, end_s - time.monotonic())
            done, _ = await asyncio.wait({following}, timeout=min(every_s, left_s))
            if not done:
                if left_s <= every_s:
                    raise TimeoutError
                yield None
                continue
            came, following = following, None
            try:
                item = came.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if following is not None:
            following.cancel()

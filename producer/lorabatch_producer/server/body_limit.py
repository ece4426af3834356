"""Limits on what is sent: 413 before too much is held in memory, 408 if it comes too slowly.

Pure ASGI, so that it counts what really comes: `Content-Length` may be missing. A compressed body
is refused (415): how much it would become cannot be told from its size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorabatch_producer.server.problems import CODES, answer

__all__ = ["BodyLimit"]

COMPRESSED = "Content-Encoding: wanted none; send the body as it is"


class BodyLimit:
    """Around an app. `others`: the limits of paths that have their own. Where more may be sent than
    elsewhere, each piece, and not the whole, must come within `read_s`."""

    def __init__(
        self, app: ASGIApp, limit_bytes: int, others: Mapping[str, int], read_s: float
    ) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._others = others
        self._read_s = read_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if _header(scope, b"content-encoding") not in (b"", b"identity"):
                told = (415, "unsupported_media_type", COMPRESSED)
                await answer(scope["path"], told)(scope, receive, send)
                return
            limit_bytes = self._others.get(scope["path"], self._limit_bytes)
            why = f"the body is too large: wanted {limit_bytes} bytes at most"
            if _announced(scope) > limit_bytes:
                await answer(scope["path"], (413, CODES[413], why))(scope, receive, send)
                return
            pieces = limit_bytes > self._limit_bytes
            receive = _counting(_timed(receive, self._read_s, pieces), limit_bytes, why)
        await self._app(scope, receive, send)


def _counting(receive: Receive, limit_bytes: int, why: str) -> Receive:
    came = 0

    async def counted() -> Message:
        nonlocal came
        message = await receive()
        came += len(message.get("body", b""))
        if came > limit_bytes:
            raise HTTPException(413, why)  # the one kind that a route lets through
        return message

    return counted


def _timed(receive: Receive, read_s: float, pieces: bool) -> Receive:
    """All of the body comes within `read_s`, or each of its pieces does."""
    clock, over = asyncio.get_running_loop().time, False
    end_s = clock() + read_s

    async def timed() -> Message:
        nonlocal over
        if over:  # what is waited for is that the client goes away
            return await receive()
        try:
            async with asyncio.timeout(read_s if pieces else end_s - clock()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not come in time: wanted it within {read_s:g} s"
            ) from None
        over = not message.get("more_body", False)
        return message

    return timed


def _announced(scope: Scope) -> int:
    value = _header(scope, b"content-length")
    return int(value) if value.isdigit() else 0


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")

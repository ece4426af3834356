"""A limit on the size of what is sent: 413 before it is held in memory.

Pure ASGI, so that it counts what really comes: `Content-Length` may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorabatch_producer.server.problems import CODES, answer

__all__ = ["BodyLimit"]


class BodyLimit:
    """Around an app. `others`: the limits of paths that have their own."""

    def __init__(self, app: ASGIApp, limit_bytes: int, others: Mapping[str, int]) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            limit_bytes = self._others.get(scope["path"], self._limit_bytes)
            why = f"the body is too large: wanted {limit_bytes} bytes at most"
            if _announced(scope) > limit_bytes:
                await answer(scope["path"], (413, CODES[413], why))(scope, receive, send)
                return
            receive = _counting(receive, limit_bytes, why)
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


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0

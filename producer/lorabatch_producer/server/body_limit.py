"""A limit on the size of what is sent: 413 before it is held in memory.

Pure ASGI, so that it counts what really comes: `Content-Length` may be missing.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorabatch_producer.server.problems import CODES, answer

__all__ = ["BodyLimit"]


class BodyLimit:
    """Around an app."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._why = f"the body is too large: wanted {limit_bytes} bytes at most"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if _announced(scope) > self._limit_bytes:
                too_large = answer(scope["path"], (413, CODES[413], self._why))
                await too_large(scope, receive, send)
                return
            receive = self._counting(receive)
        await self._app(scope, receive, send)

    def _counting(self, receive: Receive) -> Receive:
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._limit_bytes:
                raise HTTPException(413, self._why)  # the one kind that a route lets through
            return message

        return counted


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0

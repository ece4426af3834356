"""The application on uvicorn: how a connection may begin, and how the server ends.

Headers that do not come within `http_read_s` end their connection, which uvicorn would keep for
ever, and so does a body that goes on after its answer. Told to stop, the server takes no more;
after `drain_s` those who still wait for a job are answered where to ask for it, and nobody's job is
cancelled. Raises what the application raises when it starts.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorabatch import Settings
from lorabatch_producer.server.app import create_app

__all__ = ["Server", "serve_forever"]

LINGER_S = 1.0  # an answer is lost if its connection is closed while the client still sends
ANSWERS_S = 5  # for the answers of those who waited till the end


def serve_forever(settings: Settings) -> None:
    """Until SIGTERM or SIGINT."""
    Server(settings, log_config=None, server_header=False, log_level=settings.log_level).run()


class Server(uvicorn.Server):
    """`options`: uvicorn's."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        self._settings = settings
        self._app: FastAPI = create_app(settings)

        class Opened(_Timed):
            read_s = settings.http_read_s

        super().__init__(
            uvicorn.Config(
                self._app,
                host=settings.http_host,
                port=settings.http_port,
                http=Opened,
                timeout_graceful_shutdown=round(settings.drain_s) + ANSWERS_S,
                **options,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stop = self._app.state.desk.stop
        late = asyncio.get_running_loop().call_later(self._settings.drain_s, stop)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


class _Timed(H11Protocol):
    """A connection. `read_s`: how long it may take to say what it wants."""

    read_s: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end()
        elif self._late is None:
            self._begin()

    def on_response_complete(self) -> None:
        """A body that was answered before it had come, because it was refused, may never end."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(LINGER_S, self._linger, self.cycle)

    def _linger(self, cycle: object) -> None:
        """A body that has come meanwhile was the end of its request, and others may have begun."""
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def _begin(self) -> None:
        self._late = self.loop.call_later(self.read_s, self._too_late)

    def _end(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

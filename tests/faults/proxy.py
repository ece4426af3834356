"""A TCP proxy between a worker and a server that can do to connections what networks do.

Partitions hold bytes back and deliver them when they end, as TCP does. Not here: what a new
connection meets in a partition (this proxy still answers its SYN); see namespaces.py.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from tests.cutting_proxy import end

__all__ = ["Proxy"]

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
RESET = struct.pack("ii", 1, 0)
BYTES = 1 << 16


class _Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.silent = False
        """Half-open: what the client says goes nowhere, and it hears nothing."""
        self.swallow = False
        """The server's next words are its last."""

    def reset(self) -> None:
        """RST, which loses what is on its way."""
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                if side.family != socket.AF_UNIX:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end(side) if side.family == socket.AF_UNIX else _close(side)


class Proxy:
    """Listens on a port of its own. `connect` opens a connection to the server."""

    def __init__(self, connect: Callable[[], socket.socket], host: str = "127.0.0.1") -> None:
        self._connect = connect
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._to_server, self._to_client = threading.Event(), threading.Event()
        self.heal()
        self.refusing = False
        self._commits_left = 0
        self.commits_cut = 0
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> int:
        """Reset all connections: how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.reset()
        return len(pairs)

    def half_open(self) -> None:
        """The server's side of all connections goes; the worker's side hears nothing of it."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.silent = True
            end(pair.server)

    def partition(self, to_server: bool = False, to_client: bool = False) -> None:
        """Let no byte through in these directions, until `heal`."""
        if to_server:
            self._to_server.clear()
        if to_client:
            self._to_client.clear()

    def heal(self) -> None:
        self._to_server.set()
        self._to_client.set()

    def refuse(self) -> None:
        """Cut all, and every new one at once, until `allow`."""
        self.refusing = True
        self.reset()

    def allow(self) -> None:
        self.refusing = False

    def cut_commit(self, count: int) -> None:
        """The count-th COMMIT from now on gets to the server, and its reply to nobody."""
        with self._lock:
            self._commits_left = count

    def close(self) -> None:
        self._listener.close()
        self.heal()
        self.reset()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    if self.refusing:
                        raise ConnectionRefusedError
                    pair = _Pair(client, self._connect())
                except OSError:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    _close(client)
                    continue
                with self._lock:
                    self._pairs.append(pair)
                for pump in (self._forth, self._back):
                    threading.Thread(target=pump, args=(pair,), daemon=True).start()

    def _forth(self, pair: _Pair) -> None:
        with contextlib.suppress(OSError):
            while data := pair.client.recv(BYTES):
                self._to_server.wait()
                if pair.silent:
                    continue
                if COMMIT in data:
                    self._count_commit(pair)
                pair.server.sendall(data)
        end(pair.server)
        if pair.silent:
            end(pair.client)

    def _back(self, pair: _Pair) -> None:
        with contextlib.suppress(OSError):
            while data := pair.server.recv(BYTES):
                self._to_client.wait()
                if pair.swallow:
                    self.commits_cut += 1
                    pair.reset()
                    return
                pair.client.sendall(data)
        if not pair.silent:
            end(pair.client)

    def _count_commit(self, pair: _Pair) -> None:
        with self._lock:
            if self._commits_left:
                self._commits_left -= 1
                pair.swallow = self._commits_left == 0


def _close(side: socket.socket) -> None:
    """`close` alone would not free a socket that another thread reads."""
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RD)
    side.close()

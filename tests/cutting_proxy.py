"""A TCP proxy on this machine that cuts one connection and hears what is asked for."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable


class CuttingProxy:
    """Passes bytes on to `port`. `cut_after`: the next connection that brings more bytes than that
    ends there. `on_request`: called with what a client says, before it is passed on."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.cut_after: int | None = None
        self.on_request: Callable[[bytes], None] | None = None
        self.heard = b""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def asked(self, name: str) -> list[str | None]:
        """The Range of each request for a name, in order."""
        requests = re.findall(rb"GET (\S+) HTTP/1.1\r\n(.*?)\r\n\r\n", self.heard, re.DOTALL)
        found = []
        for path, headers in requests:
            if path.partition(b"?")[0].endswith(name.encode()):
                span = re.search(rb"(?i)^range: (.*?)\r?$", headers, re.MULTILINE)
                found.append(span.group(1).decode() if span else None)
        return found

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for target in (self._forth, self._back):
                    threading.Thread(target=target, args=(client, server), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                self.heard += data
                if self.on_request:
                    self.on_request(data)
                server.sendall(data)
        end(server)

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 14):
                passed += len(data)
                if self.cut_after is not None and passed > self.cut_after:
                    self.cut_after = None
                    break
                client.sendall(data)
        end(client)
        end(server)


def end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()

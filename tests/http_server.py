"""The HTTP API on a port of its own, for tests with real clients."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from lorabatch import Settings
from lorabatch_producer.server.serving import Server

START_S = 30.0


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[str]:
    """Its URL."""
    server = Server(settings.model_copy(update={"http_port": 0}), log_level="warning")
    thread = threading.Thread(target=server.run, name="http")
    thread.start()
    try:
        end_s = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < end_s, "the server did not start in time"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()

"""A consumer on the worker's transport, in a real event loop, and the server that it asks."""

from __future__ import annotations

from typing import Any

import redis
from kombu import Connection, Queue
from kombu.asynchronous import Hub

from lorabatch import Settings
from lorabatch.queue import TASK_NAME, make_app
from lorabatch_worker.transport import Transport

__all__ = ["INDEX", "UNACKED", "BrokerDesk"]

UNACKED, INDEX = "unacked", "unacked_index"


class BrokerDesk:
    """A consumer of two queues, and the server."""

    def __init__(self, settings: Settings, url: str) -> None:
        self.app = make_app(settings)
        self.server: Any = redis.Redis.from_url(url)
        self.url = url
        self.got: list[Any] = []
        self.open(0)

    def open(
        self, prefetch: int, queues: str = "lorabatch celery", prefix: str = "", **options: Any
    ) -> None:
        self.hub = Hub()
        kind = f"{Transport.__module__}:{Transport.__name__}"
        keys = {"global_keyprefix": prefix}
        self.connection = Connection(self.url, transport=kind, transport_options=keys)
        self.connection.register_with_event_loop(self.hub)
        self.channel = self.connection.default_channel
        self.channel.basic_qos(0, prefetch, False)
        names = [Queue(name) for name in queues.split()]
        consumer = self.connection.Consumer(
            names, on_message=self.got.append, accept=["json"], **options
        )
        consumer.consume()

    def send(self, *names: str, queue: str = "lorabatch") -> None:
        for name in names:
            self.app.send_task(TASK_NAME, task_id=name, queue=queue)

    def run(self, rounds: int = 12) -> list[str]:
        """Let the loop go round; the ids that came meanwhile."""
        before = len(self.got)
        for _ in range(rounds):
            self.hub.call_later(0.02, lambda: None)
            next(self.hub.loop)
        return [message.headers.get("id") for message in self.got[before:]]

    def noted(self) -> tuple[int, int]:
        """Messages that the server knows to be in somebody's hands, in the hash and the index."""
        return self.server.hlen(UNACKED), self.server.zcard(INDEX)

    def calls(self, command: str) -> int:
        """How often the server was asked this."""
        stats = self.server.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))

    def close(self) -> None:
        self.connection.close()
        self.hub.close()

"""The worker's end of the broker: messages fetched many at once, acknowledgements sent in groups.

kombu's Redis transport pops a message and notes it as unacknowledged in a second round trip: a
worker that dies in between loses it. Here one script does both on the server (fetch.lua), for as
many messages as there is room for. Outside a worker's loop, where a client waits for a reply, all
is kombu's. Knows private parts of kombu 5.7's transport (`_brpop_start`, `_brpop_read`, `_in_poll`,
`QoS._delivered`), so that version is pinned; LORABATCH_TRANSPORT=stock does without this module.
Raises the connection errors of redis, on which Celery reconnects. Not covered: key prefixes.
"""

from __future__ import annotations

from importlib.resources import files
from queue import Empty
from time import monotonic, time
from typing import Any

import redis
import structlog
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as stock
from kombu.utils.json import loads

__all__ = ["Transport", "use_in_this_process"]

log = structlog.get_logger(__name__)

FETCH = files("lorabatch_worker").joinpath("fetch.lua").read_text()
FETCH_MAX = 256
FETCH_BYTES = 16 << 20
FIRST_PAUSE_S = 0.01
LAST_PAUSE_S = 0.05
GROWTH = 1.5
ACK_WAIT_S = 0.02


class QoS(stock.QoS):
    """What is delivered and not acknowledged; acknowledgements wait up to ACK_WAIT_S for others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acked: list[str] = []

    def note(self, tags: list[str]) -> None:
        """These are ours from now on: the server has noted them, a close hands them back."""
        self._flush()
        for tag in tags:
            self._quick_append(tag, None)

    def append(self, message: Any, delivery_tag: str) -> None:
        if self.channel.fetching:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        loop = self.channel.connection.loop
        if loop is None:
            super().ack(delivery_tag)
            return
        virtual.QoS.ack(self, delivery_tag)
        self._acked.append(delivery_tag)
        if len(self._acked) == 1:  # any thread may be here, and only call_soon is for any thread
            loop.call_soon(loop.call_later, ACK_WAIT_S, self.send_acks)

    def send_acks(self) -> None:
        """Tell the server. What it does not hear it gives out again, which settles it then."""
        tags, self._acked = self._acked, []
        if not tags:
            return
        try:
            with self.pipe_or_acquire() as pipe:
                pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()
        except (redis.RedisError, OSError) as error:
            log.warning("acknowledgements not sent", messages=len(tags), error=type(error).__name__)


class Channel(stock.Channel):
    """`_brpop_start` asks for messages, `_brpop_read` takes the answer."""

    QoS = QoS
    fetching = False
    _not_before_s = 0.0
    _pause_s = FIRST_PAUSE_S

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.connection.loop is None:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or monotonic() < self._not_before_s:
            return
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        room = self.qos.can_consume_max_estimate() or FETCH_MAX
        keys = [self.unacked_key, self.unacked_index_key, *lists]
        limits = [repr(time()), min(room, FETCH_MAX), FETCH_BYTES, len(queues)]
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command("EVAL", FETCH, len(keys), *keys, *limits)

    def _brpop_read(self, **options: Any) -> bool:
        if self.connection.loop is None:
            return bool(super()._brpop_read(**options))
        connection = self.client.connection
        try:
            answer = self.client.parse_response(connection, "EVAL", **options)
        except self.connection_errors:
            connection.disconnect()
            raise
        except redis.ResponseError as error:  # a replica, or a server that is starting
            connection.disconnect()
            raise redis.ConnectionError(f"the broker refused to give messages: {error}") from error
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not answer:
            self._rest()
            raise Empty
        self._pause_s = FIRST_PAUSE_S
        self._deliver(answer)
        return True

    def _rest(self) -> None:
        """Nothing there: ask again in a while."""
        self._not_before_s = monotonic() + self._pause_s
        self.connection.loop.call_later(self._pause_s, _tick)
        self._pause_s = min(self._pause_s * GROWTH, LAST_PAUSE_S)

    def _deliver(self, answer: list[bytes]) -> None:
        names = [name.decode() for name in answer[::3]]
        tags = [tag.decode() for tag in answer[1::3]]
        self.qos.note([tag for tag in tags if tag])
        if self._closing:
            return
        self.fetching = True
        try:
            for name, tag, message in zip(names, tags, answer[2::3], strict=True):
                self._deliver_one(name, tag, message)
        finally:
            self.fetching = False

    def _deliver_one(self, name: str, tag: str, message: bytes) -> None:
        queue = name.rsplit(self.sep, 1)[0]
        try:
            if not tag:
                raise ValueError("no message of kombu's")
            self.connection._deliver(loads(message.decode()), queue)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            # our consumer lets none of these out: the message cannot be taken apart
            self._set_aside(name, tag, message, error)
        else:
            self._queue_cycle.rotate(queue)
            if tag in self.qos._delivered and self.qos._delivered[tag] is None:
                self.qos.ack(tag)  # a consumer without acknowledgements

    def _set_aside(self, name: str, tag: str, message: bytes, error: Exception) -> None:
        """Keep what would stop the worker, and every worker after it, where a person can see it."""
        key = f"{name}:unreadable"
        log.error("message set aside: it cannot be read", key=key, error=type(error).__name__)
        if tag:
            with self.conn_or_acquire() as client:
                client.lpush(key, message)
            self.qos.ack(tag)

    def close(self) -> None:
        if not self.closed:
            self.qos.send_acks()
        super().close()


class Transport(stock.Transport):
    """`loop` is the worker's event loop once the connection is in it."""

    Channel = Channel
    loop: Any = None

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        self.loop = loop


def use_in_this_process() -> None:
    """Connections to redis:// and rediss:// URLs that are made from now on are of this kind."""
    name = f"{__name__}:{Transport.__name__}"
    TRANSPORT_ALIASES.update(redis=name, rediss=name)


def _tick() -> None:
    """A timer's end alone makes the loop look at its connections."""

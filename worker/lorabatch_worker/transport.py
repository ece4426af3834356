"""The worker's end of the broker: messages fetched many at once, acknowledgements sent in groups.

kombu's Redis transport pops a message and notes it as unacknowledged in a second round trip: a
worker that dies in between loses it. Here one script does both on the server (fetch.lua), for as
many messages as there is room for. Outside a worker's loop, where a client waits for a reply, all
is kombu's. Knows private parts of kombu 5.7's transport (`_brpop_start`, `_brpop_read`, `_in_poll`,
`QoS._delivered`), so that version is pinned; LORABATCH_TRANSPORT=stock does without this module.
What cannot be read is set aside in the list KEY:unreadable, because it would stop this worker and
every one after it. Raises the connection errors of redis, on which Celery reconnects. Not covered:
key prefixes and queues without acknowledgements, which stay kombu's.
"""

from __future__ import annotations

import json
from importlib.resources import files
from queue import Empty
from time import monotonic, time
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import kombu.transport
import redis
import structlog
from kombu.transport import redis as stock
from kombu.transport import virtual
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
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, RecursionError, redis.DataError)


class QoS(stock.QoS):
    """What is delivered and not acknowledged. Used on the hub's thread, which a server that is
    silent stops for as long as a socket may wait: once for all that there is to say."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acked: list[str] = []
        self._hidden: dict[str, float] = {}
        self._send_by_s = 0.0

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
        """In a worker's loop the server is told within ACK_WAIT_S of the loop's next round."""
        if self.channel.connection.loop is None:
            super().ack(delivery_tag)
            return
        virtual.QoS.ack(self, delivery_tag)
        self._acked.append(delivery_tag)
        self._send_soon()

    def hide(self, delivery_tag: str, noted_s: float) -> None:
        """As `ack`, but the server keeps the message, as one that was given out at that time."""
        virtual.QoS.ack(self, delivery_tag)
        self._hidden[delivery_tag] = noted_s
        self._send_soon()

    def _send_soon(self) -> None:
        now_s = monotonic()
        if now_s >= self._send_by_s:
            self._send_by_s = now_s + ACK_WAIT_S
            self.channel.connection.loop.call_later(ACK_WAIT_S, self.send_acks)

    def send_acks(self) -> None:
        """And what is hidden. What the server does not hear it gives out again: settled then."""
        tags, self._acked = self._acked, []
        hidden, self._hidden = self._hidden, {}
        if not tags and not hidden:
            return
        try:
            with self.pipe_or_acquire() as pipe:
                if tags:
                    pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags)
                if hidden:
                    pipe.zadd(self.unacked_index_key, hidden, xx=True)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            count = len(tags) + len(hidden)
            log.warning("acknowledgements not sent", messages=count, error=type(error).__name__)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        try:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
        except UNREADABLE as error:
            with self.channel.conn_or_acquire(client) as server:
                raw = server.hget(self.unacked_key, tag) or b""
            self.set_aside(self.unacked_key, tag, raw, error)

    def set_aside(self, key: str, tag: str, raw: bytes, error: Exception) -> None:
        """Keep it where a person can see it, and nowhere else."""
        log.error("message set aside: it cannot be read", key=key, error=type(error).__name__)
        if tag:  # else the script has done it
            with self.pipe_or_acquire() as pipe:
                pipe.lpush(_aside(key), raw)
                pipe.zrem(self.unacked_index_key, tag).hdel(self.unacked_key, tag).execute()
            virtual.QoS.ack(self, tag)


class Channel(stock.Channel):
    """`_brpop_start` asks for messages, `_brpop_read` takes the answer."""

    QoS = QoS
    fetching = False
    _scripted = False
    """What is asked for, or was last, is the script's answer."""
    _not_before_s = 0.0
    _pause_s = FIRST_PAUSE_S

    def _brpop_start(self, timeout: float | None = None) -> None:
        waits = self.connection.cycle._in_protected_read  # a client, before the loop runs
        plain = self.ack_emulation and not self.global_keyprefix
        self._scripted = plain and not waits and self.connection.loop is not None
        if self._scripted:
            self._ask()
        else:
            super()._brpop_start(timeout)

    def _ask(self) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or monotonic() < self._not_before_s:
            return
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        keys = [self.unacked_key, self.unacked_index_key, *lists, *map(_aside, lists)]
        room = min(self.qos.can_consume_max_estimate() or FETCH_MAX, FETCH_MAX)
        limits = [repr(time()), room, FETCH_BYTES, len(queues), len(lists)]
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command("EVAL", FETCH, len(keys), *keys, *limits)

    def _brpop_read(self, **options: Any) -> bool:
        if not self._scripted:
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
            self.connection._deliver(_decode(message), queue)
        except UNREADABLE as error:  # our consumer lets none of these out
            self.qos.set_aside(name, tag, message, error)
        else:
            self._queue_cycle.rotate(queue)
            if tag in self.qos._delivered and self.qos._delivered[tag] is None:
                self.qos.ack(tag)  # a consumer without acknowledgements

    def _connparams(self, asynchronous: bool = False) -> Any:
        """A close that the server did not answer leaves a channel without its connection. kombu
        then raises what neither it nor Celery takes for a lost connection, and the worker ends."""
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("the connection of this channel was closed")
        return super()._connparams(asynchronous)

    def close(self) -> None:
        if not self.closed and isinstance(self.qos, QoS):
            self.qos.send_acks()
        super().close()


class Transport(stock.Transport):
    """`loop` is the worker's event loop once the connection is in it."""

    Channel = Channel
    loop: Any = None

    _ticks: ClassVar[WeakKeyDictionary[Any, set[Any]]] = WeakKeyDictionary()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """A worker's loop has one connection. kombu would leave what the ones before it had put
        into every round of the loop, and with it all that they were made of."""
        loop.on_tick -= self._ticks.pop(loop, set())
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        self._ticks[loop] = loop.on_tick - before
        self.loop = loop


def use_in_this_process() -> None:
    """Connections to redis:// and rediss:// URLs that are made from now on are of this kind."""
    name = f"{__name__}:{Transport.__name__}"
    for scheme in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[scheme] = name
        kombu.transport._transport_cache.pop(scheme, None)


def _decode(message: bytes) -> Any:
    """As kombu's `loads`, which makes a decoder for each message and has it look for values of
    kombu's own types, which few messages have."""
    return loads(message) if b"__type__" in message else json.loads(message)


def _aside(key: str) -> str:
    return f"{key}:unreadable"


def _tick() -> None:
    """A timer's end alone makes the loop look at its connections."""

"""The visibility heartbeat: messages in our hands stay ours while the engine makes steps.

Redis gives a message out again when it was not acknowledged within visibility_timeout_s. Jobs
wait and run longer than that, so this consumer step notes the time of every message that was
delivered to us and not acknowledged, four times a visibility timeout. While the engine hangs it
does not. Knows kombu's Redis transport (`unacked_index`, `QoS._delivered`). `beat` raises what the
broker's connection raises, which makes the consumer reconnect.
"""

from __future__ import annotations

import time
from typing import Any

import redis
import structlog
from celery import bootsteps
from kombu.transport import virtual

from lorabatch_worker.transport import QoS

__all__ = ["VisibilityHeartbeat", "hide"]

log = structlog.get_logger(__name__)


def hide(channel: Any, tag: str, delay_s: float) -> None:
    """Make a delivered message nobody's: the broker gives it out again after so many seconds, as if
    its visibility timeout was over then. Frees its place among those fetched ahead. Raises nothing:
    what the broker does not hear of it gives out again in any case."""
    if channel.closed:  # which has handed it back
        return
    noted_s = time.time() - channel.visibility_timeout + delay_s
    if isinstance(channel.qos, QoS):
        channel.qos.hide(tag, noted_s)
        return
    # Here alone: the server keeps it. First, or it would go on being renewed if the rest fails.
    virtual.QoS.ack(channel.qos, tag)
    try:
        with channel.conn_or_acquire() as client:
            client.zadd(channel.unacked_index_key, {tag: noted_s}, xx=True)
    except (redis.RedisError, OSError) as error:
        log.warning("message comes again late", error=type(error).__name__)


class VisibilityHeartbeat(bootsteps.StartStopStep):
    """Runs on the hub's thread; goes on while a warm shutdown drains."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        self._timer: Any = None
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        self._cancel()
        options = consumer.app.conf.broker_transport_options
        interval_s = float(options["visibility_timeout"]) / 4
        self._timer = consumer.timer.call_repeatedly(interval_s, self.beat, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Called on connection loss, where `start` follows, and when the worker stops, where
        messages are still in hand until `shutdown`."""
        if consumer.blueprint.state == bootsteps.RUN:
            self._cancel()

    def shutdown(self, consumer: Any) -> None:
        self._cancel()

    def beat(self, consumer: Any) -> None:
        if consumer.task_consumer is None or not consumer.pool.beating:
            return
        channel = consumer.task_consumer.channel
        qos = channel.qos
        tags = [tag for tag in list(qos._delivered) if tag not in qos._dirty]
        if tags:
            now = time.time()
            with channel.conn_or_acquire() as client:
                client.zadd(channel.unacked_index_key, dict.fromkeys(tags, now), xx=True)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

"""The queue: one Celery task name, JSON only, on a Redis-protocol broker.

A message of our own producer carries no prompt: the job's row in the ledger has it, and the
task id is the job id. A plain Celery client may send the whole job as keyword arguments; the
worker then makes the row. Producers and workers build their Celery app here, so that both
sides agree on serializer, transport options and queues. Raises QueueNotReady.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import redis
import structlog
from celery import Celery, signals
from kombu import Producer, Queue
from kombu.exceptions import BatchPublishError, OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from lorabatch.embedded import ensure_valkey
from lorabatch.errors import QueueNotReady, SettingsError
from lorabatch.fields import queue_name
from lorabatch.job import SCHEMA_VERSION
from lorabatch.ledger import Message
from lorabatch.settings import Settings

__all__ = [
    "LANES",
    "TASK_NAME",
    "check_broker",
    "check_name",
    "drained",
    "end_now",
    "lane",
    "make_app",
    "plain_url",
    "resolve_broker",
    "send",
]

log = structlog.get_logger(__name__)

TASK_NAME = "lorabatch.generate"
LEDGER = "lorabatch"  # the result backend that reads the ledger, by its entry point
SEND_BATCH = 1000
RESTORE_MAX = 1000
LANES = 16
CELERY = "celery"  # where plain clients send by default; none of our producers does


def check_name(queue: str) -> str:
    """The name of a queue as it is given. Raises SettingsError."""
    try:
        return queue_name(queue)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def lane(queue: str, tenant: str) -> str:
    """The lane of a queue that a tenant's messages go into. Workers take from all lanes in turn, so
    that nobody waits behind another's many messages, but for who shares a lane."""
    return queue if queue == CELERY else f"{queue}.{crc32(tenant.encode()) % LANES}"


def drained(queues: Sequence[str]) -> list[str]:
    """Names on the broker of all that a worker of these queues takes from."""
    lanes = [f"{queue}.{n}" for queue in queues if queue != CELERY for n in range(LANES)]
    return [*queues, *lanes]


def resolve_broker(settings: Settings) -> str:
    """The broker's URL; starts the embedded Valkey of the data folder where none is set."""
    return settings.broker_url or ensure_valkey(settings.home)


def make_app(settings: Settings, name: str = "lorabatch") -> Celery:
    """A Celery app with our conventions. Opens no connection but the embedded server's."""
    url = resolve_broker(settings)
    backend = settings.result_backend_url or url
    if backend == LEDGER:
        backend = f"{LEDGER}+{settings.resolved_database_url}"
    restore_s = min(5.0, settings.visibility_timeout_s / 4)
    app = Celery(name, broker=url, backend=backend, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        result_accept_content=["json"],
        result_expires=settings.result_expires_s,
        task_default_queue=settings.queue,
        task_queues=[Queue(name) for name in drained(settings.consume)],
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout_s,
            "unacked_restore_interval": restore_s,
            "unacked_restore_throttle": 1,
            # a pass is on the hub's thread, which many parked messages at once would stop
            "unacked_restore_limit": RESTORE_MAX,
            # who is cut off while it has the lock keeps it for so long; it only saves work
            "unacked_mutex_expire": restore_s,
            "queue_order_strategy": "round_robin",
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )
    return app


def send(app: Celery, queue: str, messages: Sequence[Message]) -> None:
    """Put messages into their tenants' lanes of the queue, pipelined.

    Raises QueueNotReady when the broker does not take them: some may be there already, which
    is harmless, because a job runs once however often its message arrives.
    """
    try:
        with app.producer_or_acquire() as producer, producer.batch(SEND_BATCH):
            policy = app.conf.task_publish_retry_policy
            for name in {lane(queue, message.tenant) for message in messages}:
                producer.maybe_declare(app.amqp.queues[name], retry=True, **policy)
            for message in messages:
                _publish(app, producer, lane(queue, message.tenant), message, policy)
    except (OperationalError, BatchPublishError, redis.RedisError) as error:
        raise QueueNotReady(f"the broker did not take {len(messages)} messages: {error}") from None


def end_now(app: Celery, job_ids: Sequence[str]) -> None:
    """Have workers end these running jobs, that are cancelled in the ledger, at their next step.

    A hint: where it is lost, or the broker is away, they find out when they renew their leases.
    """
    try:
        app.control.revoke(list(job_ids), terminate=True)
    except (OperationalError, redis.RedisError, OSError) as error:
        log.warning("running jobs end later", jobs=len(job_ids), reason=str(error))


def _publish(
    app: Celery, producer: Producer, key: str, message: Message, policy: Mapping[str, Any]
) -> None:
    """What `send_task` does for a message like ours, at a third of its time."""
    task = app.amqp.as_task_v2(
        message.job_id,
        TASK_NAME,
        args=(),
        kwargs={
            "schema_version": SCHEMA_VERSION,
            "tenant": message.tenant,
            "adapter_id": message.adapter_id,
        },
        argsrepr="",
        kwargsrepr="",
        ignore_result=not message.publish_result,
    )
    told = {"headers": task.headers, "properties": task.properties, "body": task.body}
    told |= {"exchange": "", "routing_key": key}
    signals.before_task_publish.send(sender=TASK_NAME, declare=[], retry_policy=policy, **told)
    producer.publish(
        task.body,
        exchange="",
        routing_key=key,
        serializer="json",
        headers=task.headers,
        retry=True,
        retry_policy=policy,
        **task.properties,
    )
    signals.after_task_publish.send(sender=TASK_NAME, **told)


def plain_url(url: str) -> str:
    """As redis-py has it: kombu calls a Unix socket otherwise."""
    return url.replace("redis+socket://", "unix://", 1)


def check_broker(url: str) -> str:
    """The server's version. Raises QueueNotReady if it is not there or may drop messages."""
    once = Retry(NoBackoff(), 0)
    url = plain_url(url)
    client = redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5, retry=once)
    try:
        info: Any = client.info()
        limit = int(info.get("maxmemory", 0))
        policy = info.get("maxmemory_policy", "noeviction")
    except redis.RedisError as error:
        raise QueueNotReady(
            f"the broker does not answer: {error}; check LORABATCH_BROKER_URL"
        ) from None
    finally:
        client.close()
    if limit and policy != "noeviction":
        raise QueueNotReady(
            f"the broker evicts under memory pressure (maxmemory-policy {policy}), which loses "
            "jobs; set maxmemory-policy noeviction"
        )
    return (
        f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info['redis_version']}"
    )

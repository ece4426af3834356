"""A look at what runs: broker, queue lengths, workers. Starts nothing, changes nothing.

Raises QueueNotReady where a broker was asked and does not answer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from lorabatch import Settings
from lorabatch.embedded import valkey_running
from lorabatch.errors import QueueNotReady
from lorabatch.queue import drained, make_app

__all__ = [
    "NO_WORKER",
    "accounts",
    "answering",
    "loads",
    "masked",
    "occupancies",
    "places",
    "queue_lengths",
    "running_broker",
    "workers",
]

PING_S = 1.0
NO_WORKER = "no worker seems to run: start `lorabatch-worker`"


def masked(text: str) -> str:
    """A URL with its password as ***."""
    text = re.sub(r"(://[^:/@\s]*:)[^/\s]*@", r"\1***@", text)
    return re.sub(r"([?&](?:password|pass)=)[^&\s]*", r"\1***", text)


def running_broker(settings: Settings) -> str | None:
    """The broker's URL; None if it is the embedded one and that does not run."""
    return settings.broker_url or valkey_running(settings.home)


def answering(app: Celery, timeout_s: float = PING_S) -> list[str]:
    """Names of the workers that answer a ping within the time; none if the broker is down."""
    try:
        replies: Sequence[dict[str, Any]] = app.control.ping(timeout=timeout_s) or []
    except (OperationalError, redis.RedisError):
        return []
    return sorted({name for reply in replies for name in reply})


def workers(settings: Settings) -> list[str]:
    """Workers that answer, without starting an embedded broker for the question."""
    with _running_app(settings) as app:
        return answering(app) if app else []


def occupancies(settings: Settings) -> dict[str, float | None]:
    """As `workers`, and how full each one's steps were since it started: mean sequences a step /
    `max_seqs`. None before its first step."""
    return {name: load.get("occupancy") for name, load in loads(settings).items()}


def loads(settings: Settings, queue: str | None = None) -> dict[str, dict[str, float]]:
    """As `workers`, and the figures that each one gives of itself: `waiting`, `running` and more;
    none from one that is still starting. `queue`: those that drain it alone."""
    found = accounts(settings)
    drain = {n: p for n, p in found.items() if queue is None or queue in p.get("queues", [queue])}
    return {name: _figures(pool) for name, pool in drain.items()}


def accounts(settings: Settings) -> dict[str, dict[str, Any]]:
    """As `workers`, and what each one says of itself: `queues`, `base_model` and its figures."""
    with _running_app(settings) as app:
        try:
            replies = (app and app.control.inspect(timeout=PING_S).stats()) or {}
        except (OperationalError, redis.RedisError):
            return {}
    return {name: reply.get("pool", {}) for name, reply in sorted(replies.items())}


def places(
    settings: Settings, tenant: str, adapters: Mapping[str, str | None], workers: list[str]
) -> dict[str, dict[str, str]]:
    """Where each of these adapters (a version, or None for what each worker has of that name) is,
    by worker: "device", "memory", "disk" or "nowhere". Waits for PING_S at most for each."""
    with _running_app(settings) as app:
        if app is None:
            return {}
        return {
            name: _asked(app, {"tenant": tenant, "adapter_id": name, "version": version}, workers)
            for name, version in adapters.items()
        }


def _asked(app: Celery, arguments: dict[str, str | None], workers: list[str]) -> dict[str, str]:
    """Workers of before this question answer with an error, which is none."""
    inspect = app.control.inspect(workers, timeout=PING_S, limit=len(workers))
    try:
        replies = inspect._request("adapter_place", **arguments) or {}
    except (OperationalError, redis.RedisError):
        return {}
    return {worker: said["ok"] for worker, said in sorted(replies.items()) if "ok" in said}


def _figures(pool: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in pool.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _running_app(settings: Settings) -> Iterator[Celery | None]:
    url = running_broker(settings)
    if url is None:
        yield None
        return
    app = make_app(settings.model_copy(update={"broker_url": url}))
    try:
        yield app
    finally:
        app.close()


def queue_lengths(settings: Settings, url: str, others: Iterable[str] = ()) -> dict[str, int]:
    """Messages that no worker has taken, by queue: ours, those that workers drain, and others."""
    names = dict.fromkeys((settings.queue, *settings.consume, *others))
    once = Retry(NoBackoff(), 0)
    client = redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5, retry=once)
    try:
        lengths: list[Any] = [sum(map(client.llen, drained([name]))) for name in names]
    except redis.RedisError as error:
        raise QueueNotReady(
            f"the broker does not answer: {error}; check LORABATCH_BROKER_URL"
        ) from None
    finally:
        client.close()
    return dict(zip(names, map(int, lengths), strict=True))

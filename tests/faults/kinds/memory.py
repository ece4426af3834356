"""The broker has no memory left: it refuses messages, results and notes, and goes on giving."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import redis
from kombu.exceptions import OperationalError

from lorabatch.queue import TASK_NAME
from tests.faults.crew import Member
from tests.faults.kinds.brokers import consuming_again
from tests.faults.observed import Fault, Observed
from tests.faults.shop import Shop

__all__ = ["broker_full"]

FULL_S = (0.5, 2.5)
REFUSED = 3


def broker_full(reconnect: bool = False) -> Fault:
    """While jobs run, are accepted, and are refused to a plain client. `reconnect`: and workers
    lose their connections meanwhile."""

    def full(shop: Shop, rng: random.Random, jobs: int) -> Observed:
        members = shop.crew.ready(2)
        batch = shop.accept(rng, jobs - jobs // 2, tokens=(40, 120), plain=0.25)
        shop.wait_moment(rng, batch, 0.5)
        with _no_memory(shop):
            refused = _refused(shop, rng)
            shop.accept(rng, jobs // 2, into=batch)
            if reconnect:
                client: Any = shop.broker.client
                client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(rng.uniform(*FULL_S))
        observed = consuming_again(shop, batch, shop.now_us())
        observed.published = True
        observed.wrong = lambda: _wrong(shop, members, refused)
        return observed

    return full


@contextlib.contextmanager
def _no_memory(shop: Shop) -> Iterator[None]:
    client: Any = shop.broker.client
    client.config_set("maxmemory", client.info("memory")["used_memory"] // 2)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)


def _refused(shop: Shop, rng: random.Random) -> list[str]:
    """A plain client's jobs: whoever's send raised has nothing that was accepted."""
    refused = []
    for job in shop.make(rng, REFUSED):
        try:
            fields = {"prompt": job.prompt, "tenant": job.tenant}
            shop.client.send_task(TASK_NAME, kwargs=fields, task_id=job.job_id, retry=False)
        except (redis.RedisError, OperationalError):
            refused.append(job.job_id)
    return refused


def _wrong(shop: Shop, members: list[Member], refused: list[str]) -> list[str]:
    dead = [f"a worker has ended: {m.news()[-500:]}" for m in members if not m.alive]
    known = shop.ledger.states(refused)
    found = [f"{len(known)} were refused and are known"] if known else []
    if len(refused) < REFUSED:
        found.append(f"a full broker took {REFUSED - len(refused)} messages")
    return [*dead, *found]

"""The broker loses what it knows, or the worker loses the broker."""

from __future__ import annotations

import json
import random
import time

import sqlalchemy as sa

from lorabatch.tables import job_attempts
from tests.faults.batch import Batch
from tests.faults.crew import Member
from tests.faults.observed import Fault, Observed
from tests.faults.shop import Shop

__all__ = ["consuming_again", "flush", "half_open", "partition", "reset_often", "restart_empty"]

SHORT_HANDS = {"LORABATCH_LOOKAHEAD": "1"}
"""So that some of the jobs are with the broker alone."""
QUICK = json.dumps({"socket_timeout": 2, "health_check_interval": 1})
"""In place of 10 s: how long a silent connection is believed in."""
CONSUMING_LIMIT_S = 30.0


def restart_empty(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Killed and started without its data; some jobs are accepted while it is away."""
    shop.crew.ready(2, **SHORT_HANDS)
    batch = shop.accept(rng, jobs - jobs // 4)
    shop.wait_moment(rng, batch)
    shop.broker.kill(forget=True)
    try:
        shop.accept(rng, jobs // 4, into=batch)
        time.sleep(rng.uniform(0.0, 2.0))
    finally:
        shop.broker.start()
    return consuming_again(shop, batch, shop.now_us())


def flush(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """FLUSHALL around half of the run."""
    shop.crew.ready(2, **SHORT_HANDS)
    batch = shop.accept(rng, jobs)
    shop.wait_ended(batch, rng.randint(jobs // 3, jobs // 2))
    shop.broker.client.flushall()
    flushed_us = shop.now_us()
    states = shop.ledger.states(batch.ids)
    lost = {job_id for job_id, state in states.items() if state == "queued"}
    return Observed(batch, hit=bool(lost), recovered=lambda: shop.taken_up_s(lost, flushed_us))


def reset_often(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Five resets within 3 s."""
    member, batch = _begin(shop, rng, jobs)
    for _ in range(5):
        shop.broker_proxy.reset()
        time.sleep(rng.uniform(0.2, 1.0))
    cut_us = shop.now_us()
    shop.accept(rng, jobs // 2, into=batch)
    return consuming_again(shop, batch, cut_us, member)


def half_open(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """The server forgets all connections; the worker is not told."""
    member, batch = _begin(shop, rng, jobs)
    shop.broker_proxy.half_open()
    cut_us = shop.now_us()
    shop.accept(rng, jobs // 2, into=batch)
    return consuming_again(shop, batch, cut_us, member)


def partition(to_server: bool = False, to_client: bool = False) -> Fault:
    """For a while no byte gets through that way."""

    def part(shop: Shop, rng: random.Random, jobs: int) -> Observed:
        member, batch = _begin(shop, rng, jobs)
        shop.broker_proxy.partition(to_server, to_client)
        shop.accept(rng, jobs // 2, into=batch)
        time.sleep(rng.uniform(1.0, 6.0))
        shop.broker_proxy.heal()
        return consuming_again(shop, batch, shop.now_us(), member)

    return part


def _begin(shop: Shop, rng: random.Random, jobs: int) -> tuple[Member, Batch]:
    """One worker behind the proxy, and half of the jobs."""
    url = shop.broker.url_by("127.0.0.1", shop.broker_proxy.port)
    (member,) = shop.crew.ready(1, LORABATCH_BROKER_URL=url, FAULT_TRANSPORT=QUICK)
    batch = shop.accept(rng, jobs - jobs // 2)
    shop.wait_moment(rng, batch)
    return member, batch


def consuming_again(
    shop: Shop, batch: Batch, since_us: int, member: Member | None = None
) -> Observed:
    """Until the first claim after that."""

    def recovered() -> list[float]:
        query = sa.select(job_attempts.c.started_us).where(job_attempts.c.started_us > since_us)
        claims = shop.rows(query, job_attempts.c.job_id, batch.ids)
        return [(min(row.started_us for row in claims) - since_us) / 1e6] if claims else []

    def wrong() -> list[str]:
        found = [f"consuming only after {s:.0f} s" for s in recovered() if s > CONSUMING_LIMIT_S]
        return found if member is None or member.alive else [*found, "the worker has ended"]

    return Observed(batch, recovered=recovered, wrong=wrong, published=False)

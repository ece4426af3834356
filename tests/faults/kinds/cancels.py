"""Jobs that are cancelled: while they wait, while they run, and while they are being recorded."""

from __future__ import annotations

import random
import time

from tests.faults.batch import Batch
from tests.faults.observed import Observed
from tests.faults.shop import Shop
from tests.faults.waiting import until

__all__ = ["cancel", "queued", "racing", "running"]

CANCELLED = frozenset({"cancelled"})
EITHER = frozenset({"cancelled", "succeeded"})
LONG = (4000, 8000)


def queued(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """A third of what has just been accepted."""
    shop.crew.ready(2)
    batch = shop.accept(rng, jobs)
    cancel(shop, batch, rng.sample(batch.ids, k=max(1, jobs // 3)))

    def wrong() -> list[str]:
        started = shop.started()
        ran = [i for i, may in batch.allowed.items() if may == CANCELLED and started[i]]
        return [f"{len(ran)} ran after they were cancelled"] if ran else []

    return Observed(batch, wrong=wrong)


def running(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Jobs that would run for long, among others."""
    shop.crew.ready(2)
    batch = shop.accept(rng, 4, tokens=LONG)
    long = batch.ids
    shop.accept(rng, jobs - 4, into=batch)
    until("they run", lambda: all(shop.started()[job_id] for job_id in long))
    time.sleep(rng.uniform(0.0, 0.5))
    asked_us = shop.now_us()
    cancel(shop, batch, long)
    batch.allowed.update(dict.fromkeys(long, CANCELLED))
    return Observed(batch, recovered=lambda: shop.taken_up_s(long, asked_us))


def racing(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Each of many short jobs, one after the other, while they end."""
    shop.crew.ready(2)
    batch = shop.accept(rng, jobs, tokens=(1, 10))
    ids = batch.ids
    while ids:
        some, ids = ids[:3], ids[3:]
        cancel(shop, batch, some)
        time.sleep(rng.uniform(0.0, 0.02))
    return Observed(batch)


def cancel(shop: Shop, batch: Batch, job_ids: list[str]) -> None:
    """What each job was at that moment says what it may end as."""
    for job_id, state in shop.ledger.cancel(job_ids).items():
        batch.allowed[job_id] = EITHER if state == "running" else frozenset({state})

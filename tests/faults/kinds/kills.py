"""kill -9 of a worker, at a random moment and at each boundary of a job's way."""

from __future__ import annotations

import random
import signal

from tests.faults.batch import Batch
from tests.faults.crew import Member
from tests.faults.observed import Fault, Observed
from tests.faults.shop import Shop
from tests.faults.waiting import until

__all__ = ["MOST", "kill_at", "kill_sometime"]

PLAIN = 0.25
PORTIONS = 3
MOST = {"popped": 2, "claimed": 2, "published": 2, "stepping": 60}
"""Up to which passing of a boundary the kill may wait: groups make it few."""


def kill_sometime(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    victim, _ = shop.crew.ready(2)
    batch = shop.accept(rng, jobs, plain=PLAIN)
    shop.wait_moment(rng, batch)
    victim.kill()
    return _after(shop, victim, batch)


def kill_at(boundary: str) -> Fault:
    def kill(shop: Shop, rng: random.Random, jobs: int) -> Observed:
        victim, _ = shop.crew.ready(2)
        victim.arm(boundary, rng.randint(1, MOST.get(boundary, 4)), signal.SIGKILL)
        batch = Batch()
        for _ in range(PORTIONS):
            shop.accept(rng, jobs // PORTIONS, plain=PLAIN, into=batch)
        until(
            f"killed at {boundary}",
            lambda: not victim.alive or shop.ended(batch) == len(batch.jobs),
        )
        victim.disarm()
        return _after(shop, victim, batch)

    return kill


def _after(shop: Shop, victim: Member, batch: Batch) -> Observed:
    """Its jobs are those under its lease, and those whose message it may have had."""
    if victim.alive:
        return Observed(batch, hit=False)
    killed_us = shop.now_us()
    shop.crew.start()
    hit = shop.held_by(victim, batch)
    given_out = shop.ids_in_broker(queued=False)
    states = shop.ledger.states([job_id for job_id in batch.ids if job_id in given_out])
    hit |= {
        job_id for job_id in given_out & batch.jobs.keys() if states.get(job_id) in (None, "queued")
    }
    return Observed(batch, recovered=lambda: shop.taken_up_s(hit, killed_us))

"""The device of a worker is lost, or hangs: the process gives itself up, its jobs go elsewhere."""

from __future__ import annotations

import random

from lorabatch_worker.pool import EXIT_BROKEN
from tests.fake_runner import DEVICE_LOST, HANGS
from tests.faults.observed import Fault, Observed
from tests.faults.shop import LEASE_S, Shop
from tests.faults.waiting import until

__all__ = ["hung", "lost"]

EXIT_LIMIT_S = 30.0
STEPS = (20, 200)


def _befallen(number: int) -> Fault:
    def befall(shop: Shop, rng: random.Random, jobs: int) -> Observed:
        victim, _ = shop.crew.ready(2, FAULT_STALL_S=str(LEASE_S))
        batch = shop.accept(rng, jobs, tokens=STEPS, plain=0.25)
        shop.wait_moment(rng, batch, 0.5)
        began_us = shop.now_us()
        held = shop.held_by(victim, batch)
        victim.process.send_signal(number)
        until("given up", lambda: not victim.alive, EXIT_LIMIT_S, victim.text)
        code = victim.process.returncode
        wrong = [] if code == EXIT_BROKEN else [f"exit code {code}, wanted {EXIT_BROKEN}"]
        shop.crew.start(FAULT_STALL_S=str(LEASE_S))
        return Observed(
            batch, recovered=lambda: shop.taken_up_s(held, began_us), wrong=lambda: wrong
        )

    return befall


lost: Fault = _befallen(DEVICE_LOST)
hung: Fault = _befallen(HANGS)

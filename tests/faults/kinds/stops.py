"""Signals that stop a worker: SIGTERM, twice, SIGQUIT; SIGSTOP for longer than its lease."""

from __future__ import annotations

import random
import signal
import time

import psutil

from tests.faults.batch import Batch
from tests.faults.crew import Member
from tests.faults.observed import Fault, Observed
from tests.faults.shop import LEASE_S, Shop
from tests.faults.waiting import NotWithin, until

__all__ = ["sleep_at", "sleep_sometime", "stop_by", "stopped"]

HAND_BACK_LIMIT_S = 30.0
STEPS = (20, 200)
TAKE_OVER_LIMIT_S = 10.0


def stop_by(*signals: signal.Signals) -> Fault:
    """These, one after the other, while jobs run."""

    def stop(shop: Shop, rng: random.Random, jobs: int) -> Observed:
        victim, _ = shop.crew.ready(2)
        batch = shop.accept(rng, jobs, tokens=STEPS, plain=0.25)
        shop.wait_moment(rng, batch, 0.5)
        began_s = time.monotonic()
        for number in signals:
            victim.signal(number)
            if number is not signals[-1]:
                until("stopping", lambda: '"stopping"' in victim.text() or not victim.alive)
                time.sleep(rng.uniform(0.0, 0.3))
        shop.crew.start()
        until("handed back", lambda: not victim.alive, HAND_BACK_LIMIT_S, victim.text)
        took_s = time.monotonic() - began_s
        held = shop.held_by(victim, batch)
        wrong = [f"{len(held)} jobs were not handed back"] if held else []
        if "Unrecoverable" in victim.text():
            wrong.append("the worker's stop was not orderly")
        return Observed(batch, recovered=lambda: [took_s], wrong=lambda: wrong)

    return stop


def sleep_sometime(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    victim, _ = shop.crew.ready(2)
    batch = shop.accept(rng, jobs, tokens=STEPS, plain=0.25)
    shop.wait_moment(rng, batch, 0.5)
    victim.signal(signal.SIGSTOP)
    until("stopped", lambda: stopped(victim))
    return _asleep(shop, victim, batch)


def sleep_at(boundary: str) -> Fault:
    def sleep(shop: Shop, rng: random.Random, jobs: int) -> Observed:
        victim, _ = shop.crew.ready(2)
        victim.arm(boundary, rng.randint(1, 4), signal.SIGSTOP)
        batch = shop.accept(rng, jobs, tokens=STEPS, plain=0.25)
        until("stopped", lambda: stopped(victim) or shop.ended(batch) == len(batch.jobs))
        victim.disarm()
        if not stopped(victim):
            return Observed(batch, hit=False)
        # in the middle of a commit it has the rows' locks, so nobody takes over
        observed = _asleep(shop, victim, batch, taken=boundary != "before-commit")
        if boundary == "ended":
            observed.wrong = lambda: _refused(victim) if observed.recovered() else []
        return observed

    return sleep


def _asleep(shop: Shop, victim: Member, batch: Batch, taken: bool = True) -> Observed:
    """Stopped for 2 leases, and until its jobs are `taken` over."""
    stopped_us = shop.now_us()
    held = shop.held_by(victim, batch) if taken else set()
    time.sleep(2 * LEASE_S)
    try:
        until(
            "taken over",
            lambda: len(shop.taken_up_s(held, stopped_us)) == len(held),
            TAKE_OVER_LIMIT_S,
        )
    except NotWithin:
        held = set()
    victim.signal(signal.SIGCONT)
    return Observed(batch, recovered=lambda: shop.taken_up_s(held, stopped_us))


def _refused(victim: Member) -> list[str]:
    try:  # the others may have ended all before it has looked
        until("refused", lambda: '"outcome came too late"' in victim.news(), TAKE_OVER_LIMIT_S)
    except NotWithin:
        return ["the stale commit was not seen to be refused"]
    return []


def stopped(victim: Member) -> bool:
    return psutil.Process(victim.process.pid).status() == psutil.STATUS_STOPPED

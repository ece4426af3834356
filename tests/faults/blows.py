"""Faults on a going stream of jobs: what `kinds` does to jobs of its own, done to whatever runs.

Each takes a street and dice, makes one fault, lifts it, and says whether it came about; those that
end a worker have another one started. What becomes of the jobs is looked at when all have ended.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.crew import Member
from tests.faults.kinds.cancels import cancel
from tests.faults.kinds.databases import Lock
from tests.faults.kinds.kills import MOST
from tests.faults.kinds.stops import HAND_BACK_LIMIT_S, stopped
from tests.faults.shop import LEASE_S
from tests.faults.street import Street
from tests.faults.traps import BOUNDARIES
from tests.faults.waiting import NotWithin, until

__all__ = ["Blow", "blows"]

Blow = Callable[[Street, random.Random], bool]
BOUNDARY_LIMIT_S = 20.0
AWAY_S = (1.0, 5.0)
CANCELLED = 6
CLOCKS_S = (-3600, -600, 600)


def blows(database: str) -> dict[str, Blow]:
    """By name; those of the other database are left out."""
    of_database: dict[str, Blow] = {"database locked for seconds": _lock}
    if database == "postgresql":
        of_database = {"database refuses": _refuse, "cut after COMMIT was sent": _cut_commit}
    return {
        "kill -9, at random": _kill,
        **{f"kill -9, {boundary}": partial(_kill_at, boundary) for boundary in BOUNDARIES},
        "SIGTERM": partial(_end_by, signal.SIGTERM),
        "SIGQUIT": partial(_end_by, signal.SIGQUIT),
        "SIGSTOP, at random": _sleep,
        "SIGSTOP, outcome not yet written": partial(_sleep_at, "ended"),
        "SIGSTOP, before commit": partial(_sleep_at, "before-commit"),
        "broker killed": partial(_restart, False),
        "broker restarted empty": partial(_restart, True),
        "FLUSHALL": _flush,
        "5 TCP resets": _reset,
        "half-open connections": _half_open,
        "partition, to the broker": partial(_part, True, False),
        "partition, from the broker": partial(_part, False, True),
        "partition, both ways": partial(_part, True, True),
        **of_database,
        "clock set wrong and right again": _set_clock,
        "jobs cancelled": _cancel,
    }


def _kill(street: Street, rng: random.Random) -> bool:
    victim = _another(street, rng)
    victim.kill()
    street.replace(victim)
    return True


def _kill_at(boundary: str, street: Street, rng: random.Random) -> bool:
    victim = _another(street, rng)
    victim.arm(boundary, rng.randint(1, MOST.get(boundary, 4)), signal.SIGKILL)
    if not _within(BOUNDARY_LIMIT_S, lambda: not victim.alive):
        victim.disarm()
        return False
    street.replace(victim)
    return True


def _end_by(number: signal.Signals, street: Street, rng: random.Random) -> bool:
    victim = _another(street, rng)
    victim.signal(number)
    until("handed back", lambda: not victim.alive, HAND_BACK_LIMIT_S, victim.text)
    street.replace(victim)
    return True


def _sleep(street: Street, rng: random.Random) -> bool:
    """The survivor, too, for longer than its lease as a rule."""
    victim = rng.choice([street.survivor, *street.working()])
    victim.signal(signal.SIGSTOP)
    _wake(victim, rng)
    return True


def _sleep_at(boundary: str, street: Street, rng: random.Random) -> bool:
    victim = rng.choice([street.survivor, *street.working()])
    victim.arm(boundary, rng.randint(1, 4), signal.SIGSTOP)
    if not _within(BOUNDARY_LIMIT_S, lambda: stopped(victim)):
        victim.disarm()
        return False
    _wake(victim, rng)
    return True


def _wake(victim: Member, rng: random.Random) -> None:
    time.sleep(rng.uniform(0.5, 2.5) * LEASE_S)
    victim.signal(signal.SIGCONT)


def _restart(forget: bool, street: Street, rng: random.Random) -> bool:
    with street.stream.accepted_only():
        street.shop.broker.kill(forget)
        try:
            time.sleep(rng.uniform(0.0, 2.0))
        finally:
            street.shop.broker.start()
    return True


def _flush(street: Street, rng: random.Random) -> bool:
    with street.stream.accepted_only():
        street.shop.broker.client.flushall()
    return True


def _reset(street: Street, rng: random.Random) -> bool:
    for _ in range(5):
        street.shop.broker_proxy.reset()
        time.sleep(rng.uniform(0.2, 1.0))
    return True


def _half_open(street: Street, rng: random.Random) -> bool:
    street.shop.broker_proxy.half_open()
    return True


def _part(to_server: bool, to_client: bool, street: Street, rng: random.Random) -> bool:
    street.shop.broker_proxy.partition(to_server, to_client)
    try:
        time.sleep(rng.uniform(*AWAY_S))
    finally:
        street.shop.broker_proxy.heal()
    return True


def _refuse(street: Street, rng: random.Random) -> bool:
    proxy = street.shop.database_proxy
    assert proxy is not None
    proxy.refuse()
    try:
        time.sleep(rng.uniform(*AWAY_S))
    finally:
        proxy.allow()
    return True


def _lock(street: Street, rng: random.Random) -> bool:
    lock = Lock(street.shop)
    lock.take()
    try:
        time.sleep(rng.uniform(*AWAY_S))
    finally:
        lock.give()
        lock.close()
    return True


def _cut_commit(street: Street, rng: random.Random) -> bool:
    proxy = street.shop.database_proxy
    assert proxy is not None
    before = proxy.commits_cut
    proxy.cut_commit(rng.randint(1, 20))
    if _within(BOUNDARY_LIMIT_S, lambda: proxy.commits_cut > before):
        return True
    proxy.cut_commit(0)
    return False


def _set_clock(street: Street, rng: random.Random) -> bool:
    """Of one worker, for seconds. It is right again for a while before the next fault, or a worker
    that was ahead and is killed then leaves messages that nobody takes up for so long."""
    clock = Path(rng.choice([street.survivor, *street.working()]).env["FAULT_CLOCK"])
    for ahead_s, for_s in ((rng.choice(CLOCKS_S), rng.uniform(*AWAY_S)), (0, LEASE_S)):
        new = clock.with_suffix(".new")
        new.write_text(str(ahead_s))
        new.rename(clock)
        time.sleep(for_s)
    return True


def _cancel(street: Street, rng: random.Random) -> bool:
    batch, ids = street.stream.recent(CANCELLED)
    cancel(street.shop, batch, ids)
    return bool(ids)


def _another(street: Street, rng: random.Random) -> Member:
    """One that is not the survivor, and works."""
    return rng.choice(until("another worker is ready", street.working))


def _within(limit_s: float, ready: Callable[[], bool]) -> bool:
    try:
        until("it comes", ready, limit_s)
    except NotWithin:
        return False
    return True

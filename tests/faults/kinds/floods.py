"""More jobs than may wait, and results that nobody fetches."""

from __future__ import annotations

import random
from collections import Counter

import psutil

from lorabatch import Job
from lorabatch.tenants import ALL, Limits, Tenants
from tests.faults.batch import Batch
from tests.faults.observed import Observed
from tests.faults.producer import Played
from tests.faults.shop import Shop

__all__ = ["capped", "results_left"]

PROCESSES = 2
MOST_A_CALL = 6
LEFT = 240
LEFT_BYTES = 256 << 10
"""How many results, and how large: small beside what a worker has at a time anyway."""
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""So that a worker's size is what it holds, and not what it once held."""
PORTIONS = 6
"""Results come in so many; in the first half of them a worker gets its size."""


def capped(shop: Shop, rng: random.Random, count: int) -> Observed:
    """Twice as many jobs of two tenants as may wait, of many producers at once."""
    shop.crew.end(shop.crew.members)  # so that what waits is what was accepted
    caps = {"tenant-0": count // 3, "tenant-1": count // 2, ALL: count - count // 3}
    tenants = Tenants(shop.ledger.engine)
    for name, cap in caps.items():
        tenants.set(Limits(name, max_queued=cap))
    made = [job for job in shop.make(rng, 4 * count) if job.tenant in caps][: 2 * count]
    calls: list[list[Job]] = []
    while made:
        size = rng.randint(1, MOST_A_CALL)
        calls.append(made[:size])
        made = made[size:]
    parts = [calls[n::PROCESSES] for n in range(PROCESSES)]
    processes = [Played(shop.crew.env, calls=part) for part in parts]
    for process in processes:
        process.go()
    answers = [answer for process in processes for answer in process.answers()]
    batch = Batch()
    refused: list[list[Job]] = []
    for call, answer in zip([call for part in parts for call in part], answers, strict=True):
        if answer == [job.job_id for job in call]:
            shop.note(call)
            batch.add(call)
        else:
            refused.append(call)
    wrong = [f"a call got {a}" for a in answers if isinstance(a, str) and a != "QueueFull"]
    wrong += _over(batch, refused, caps)
    rows = shop.ledger.states([job.job_id for call in refused for job in call])
    wrong += [f"{len(rows)} rows of calls that were refused"] if rows else []
    for name in caps:
        tenants.forget(name)
    shop.crew.ready(2)
    return Observed(batch, hit=bool(refused), wrong=lambda: wrong)


def _over(batch: Batch, refused: list[list[Job]], caps: dict[str, int]) -> list[str]:
    """No more than the caps, and no less than there was room for."""
    count = Counter([*(job.tenant for job in batch.jobs.values()), *[ALL] * len(batch.jobs)])
    found = [
        f"{count[name]} of {name}, {cap} may wait"
        for name, cap in caps.items()
        if count[name] > cap
    ]
    for call in refused:
        asked = Counter([*(job.tenant for job in call), *[ALL] * len(call)])
        if all(count[name] + asked[name] <= cap for name, cap in caps.items()):
            found.append(f"{len(call)} jobs were refused, there was room: {count} of {caps}")
    return found


def results_left(shop: Shop, rng: random.Random, _: int) -> Observed:
    """A plain client's long results, which it never fetches: in a worker's memory they do not
    stay."""
    members = shop.crew.ready(2, FAKE_STEP_S="0", **EXACT)
    batch = Batch()
    grown, portion = [], LEFT // PORTIONS
    for _ in range(PORTIONS):
        shop.accept(rng, portion, plain=1.0, into=batch, long=LEFT_BYTES)
        shop.wait_ended(batch)
        shop.wait_quiet()
        grown.append(sum(psutil.Process(m.process.pid).memory_info().rss for m in members))
    more = grown[-1] - grown[PORTIONS // 2 - 1]
    left = LEFT_BYTES * portion * (PORTIONS // 2)
    wrong = (
        [f"{left >> 20} MB of results, workers grew by {more >> 20} MB"] if more > left / 2 else []
    )
    return Observed(batch, wrong=lambda: wrong)

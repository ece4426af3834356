"""A job that kills its worker each time it runs, while somebody starts workers again."""

from __future__ import annotations

import random
import threading

from lorabatch import Job
from lorabatch.dead import DeadLetters
from tests.faults.observed import Observed
from tests.faults.shop import Shop

__all__ = ["poison"]

FAILED = frozenset({"failed"})
QUICK = {"LORABATCH_LEASE_S": "1", "LORABATCH_VISIBILITY_TIMEOUT_S": "1"}
MOST_KILLED = 8
"""Four that nobody heard of, or two, then three in which it was alone, and one for bad luck."""


def poison(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """It is given up, alone; all others end well."""
    shop.crew.ready(2, **QUICK)
    batch = shop.accept(rng, jobs // 2)
    (job,) = shop.accept_these([Job(prompt="poison", tenant="tenant-0")], batch)
    batch.allowed[job] = FAILED
    shop.accept(rng, jobs - jobs // 2 - 1, into=batch)
    killed = 0
    pause = threading.Event()
    while shop.ended(batch) < len(batch.jobs) and killed <= MOST_KILLED:
        for member in [m for m in shop.crew.members if not m.alive]:
            shop.crew.members.remove(member)
            shop.crew.start(**QUICK)
            killed += 1
        pause.wait(0.05)

    def wrong() -> list[str]:
        found = [f"it killed {killed} workers"] if not 3 <= killed <= MOST_KILLED else []
        result = shop.ledger.results([job]).get(job)
        code = result.error.code if result and result.error else None
        if code != "attempts_exhausted":
            found.append(f"it ended as {code}")
        if job not in {letter.job_id for letter in DeadLetters(shop.ledger.engine).list()}:
            found.append("it is not among the dead letters")
        return found

    return Observed(batch, wrong=wrong)

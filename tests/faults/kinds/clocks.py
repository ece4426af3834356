"""Workers whose wall clock is wrong, or is set while they run."""

from __future__ import annotations

import random

import sqlalchemy as sa

from lorabatch.tables import usage_events
from tests.faults.batch import Batch
from tests.faults.observed import Observed
from tests.faults.shop import Shop

__all__ = ["off", "stepped"]

LONGEST_S = 300.0
"""No job of the suite waits or runs that long; a clock's step would show as more."""


def off(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Two workers, one 10 minutes ahead, one 10 minutes behind."""
    return _run(shop, rng, jobs, [600.0, -600.0])


def stepped(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """One of two is set back by an hour in mid-run."""
    return _run(shop, rng, jobs, [0.0, 0.0], step_s=-3600.0)


def _run(
    shop: Shop, rng: random.Random, jobs: int, ahead_s: list[float], step_s: float = 0.0
) -> Observed:
    files = [shop.home / f"clock-{number}" for number in range(len(ahead_s))]
    shop.crew.end(shop.crew.members)
    for file, seconds in zip(files, ahead_s, strict=True):
        file.write_text(str(seconds))
        shop.crew.start(FAULT_CLOCK=str(file))
    for member in shop.crew.members:
        member.wait_ready()
    batch = shop.accept(rng, jobs, plain=0.25)
    shop.wait_moment(rng, batch)
    if step_s:
        new = files[0].with_suffix(".new")
        new.write_text(str(step_s))
        new.rename(files[0])
    return Observed(batch, wrong=lambda: _durations(shop, batch))


def _durations(shop: Shop, batch: Batch) -> list[str]:
    """Waits and runs are by clocks that nobody sets."""
    rows = shop.rows(sa.select(usage_events), usage_events.c.job_id, batch.ids)
    longest_s = max(max(row.queue_us, row.run_us) for row in rows) / 1e6
    now_us = shop.now_us()
    ahead = [row for row in rows if row.recorded_us > now_us or row.occurred_us > now_us]
    found = [f"a duration of {longest_s:.0f} s"] if longest_s > LONGEST_S else []
    return [*found, *([f"{len(ahead)} usage rows of the future"] if ahead else [])]

"""What workers and broker take while they run: a sample every ten seconds, and how it grows."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from lorabatch.tables import jobs
from tests.faults.street import Street

__all__ = ["Meter", "at", "growth_per_hour", "series"]

SAMPLE_S = 10.0
MB = 1 << 20
OPEN = ("queued", "running")


class Meter(threading.Thread):
    """`samples`, which are lines of `file`, too. What does not answer at the time is left out."""

    def __init__(self, street: Street, file: Path, sample_s: float = SAMPLE_S) -> None:
        super().__init__(name="meter", daemon=True)
        self._street, self._file, self._sample_s = street, file, sample_s
        self._began_s = time.monotonic()
        self._done = threading.Event()
        self.samples: list[dict[str, Any]] = []

    def stop(self) -> None:
        """After a last sample."""
        self._done.set()
        self.join()

    def run(self) -> None:
        last = False
        while not last:
            last = self._done.wait(self._sample_s)
            sample = self._sample()
            self.samples.append(sample)
            with self._file.open("a") as file:
                file.write(json.dumps(sample) + "\n")

    def _sample(self) -> dict[str, Any]:
        shop = self._street.shop
        counts = shop.ledger.counts()
        held = self._held()
        workers = []
        for member in list(self._street.members):
            if found := _process(member.process.pid):
                mine = sum(count for owner, count in held.items() if member.owner in owner)
                workers.append({**found, "pid": member.process.pid, "held": mine})
        return {
            "minutes": round((time.monotonic() - self._began_s) / 60, 3),
            "survivor": workers[0],
            "others": workers[1:],
            "broker": self._broker(),
            "ledger": counts,
            "open": sum(counts.get(state, 0) for state in OPEN),
        }

    def _held(self) -> dict[str, int]:
        """Jobs under each owner's lease."""
        query = sa.select(jobs.c.lease_owner, sa.func.count()).where(jobs.c.state == "running")
        engine = self._street.shop.ledger.engine.execution_options(read_only=True)
        with engine.begin() as connection:
            rows = connection.execute(query.group_by(jobs.c.lease_owner))
            return {str(owner): count for owner, count in rows}

    def _broker(self) -> dict[str, Any]:
        broker = self._street.shop.broker
        found = _process(broker.pid)
        try:
            info: Any = broker.client.info("memory")
            messages = sum(self._street.shop.in_broker().values())
        except (redis.RedisError, OSError):
            return found
        used_mb = round(info["used_memory"] / MB, 2)
        return {**found, "used_mb": used_mb, "messages": messages}


def _process(pid: int) -> dict[str, Any]:
    """Nothing where it has ended."""
    try:
        process = psutil.Process(pid)
        return {
            "rss_mb": round(process.memory_info().rss / MB, 2),
            "fds": process.num_fds(),
            "threads": process.num_threads(),
        }
    except psutil.Error:
        return {}


def series(samples: Sequence[dict[str, Any]], part: str, name: str) -> list[tuple[float, float]]:
    """(minutes, value) of a field, where it was seen."""
    return [(s["minutes"], s[part][name]) for s in samples if name in s[part]]


def at(points: Sequence[tuple[float, float]], minutes: float) -> float:
    """The value of the sample that is nearest to that time."""
    return min(points, key=lambda point: abs(point[0] - minutes))[1]


def growth_per_hour(points: Sequence[tuple[float, float]], after_minutes: float = 0.0) -> float:
    """The slope of the straight line that fits best, of what was seen after so many minutes."""
    late = [(minutes / 60, value) for minutes, value in points if minutes >= after_minutes]
    if len(late) < 2:
        raise ValueError(f"{len(late)} samples after {after_minutes:g} min: two make a line")
    return statistics.linear_regression(*zip(*late, strict=True)).slope

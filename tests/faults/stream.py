"""Producers that go on accepting jobs of several tenants, at a steady rate, whatever happens."""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from tests.faults.batch import Batch
from tests.faults.shop import Shop
from tests.faults.waiting import until

__all__ = ["Stream"]

TICK_S = 0.4
PLAIN = 0.25
PORTION = 2000
KNOWN_LIMIT_S = 60.0


class Stream(threading.Thread):
    """`rate` jobs a second until `stop`. `portions`: what was accepted, some thousands of jobs
    each, so that no look at the ledger needs all of them. `error`: what ended it before."""

    def __init__(self, shop: Shop, rng: random.Random, rate: float) -> None:
        super().__init__(name="stream", daemon=True)
        self._shop, self._rng = shop, rng
        self._count = max(1, round(rate * TICK_S))
        self._done = threading.Event()
        self._turn = threading.Lock()
        self._plain = PLAIN
        self._unknown: list[str] = []
        self.portions = [Batch()]
        self.error = ""

    @property
    def jobs(self) -> int:
        return sum(len(portion.jobs) for portion in list(self.portions))

    def stop(self) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        try:
            while not self._done.wait(TICK_S):
                with self._turn:
                    self._accept()
        except Exception:  # noqa: BLE001 - whoever runs the stream says so
            self.error = traceback.format_exc()

    def _accept(self) -> None:
        if len(self.portions[-1].jobs) >= PORTION:
            self.portions.append(Batch())
        some = self._shop.accept(self._rng, self._count, plain=self._plain)
        self.portions[-1].add(some.jobs.values())
        self.portions[-1].plain |= some.plain
        self._unknown += some.plain

    @contextmanager
    def accepted_only(self) -> Iterator[None]:
        """For faults that make the broker forget: until then the ledger knows all jobs, and
        meanwhile no plain client sends, because such a job is nowhere but in the broker."""
        with self._turn:
            self._plain = 0.0
        try:
            until("plain jobs are in the ledger", self._all_known, KNOWN_LIMIT_S)
            yield
        finally:
            self._plain = PLAIN

    def recent(self, count: int) -> tuple[Batch, list[str]]:
        """The last jobs that the ledger has known from the start, and whose they are."""
        with self._turn:
            batch = self.portions[-1]
            ids = batch.ids[-4 * count :]
        return batch, [job_id for job_id in ids if job_id not in batch.plain][-count:]

    def _all_known(self) -> bool:
        known = self._shop.ledger.states(self._unknown)
        self._unknown = [job_id for job_id in self._unknown if job_id not in known]
        return not self._unknown

"""What this worker has in its hands: live jobs (claimed, with the engine) and held deliveries.

A job is live from its claim until its outcome is committed. A delivery is held while somebody
else has the lease of its job: it is neither run nor acknowledged, but asked about again later.
Everything here is guarded by one reentrant lock, because a signal may arrive anywhere.
Raises nothing; knows neither Celery nor SQL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lorabatch.ledger import Claim
from lorabatch_worker.delivery import Delivery

__all__ = ["LiveJob", "LiveJobs"]


@dataclass(eq=False)
class LiveJob:
    """A claim of ours, and the messages that wait for its outcome."""

    claim: Claim
    deliveries: list[Delivery]
    started_s: float | None = None
    ended: bool = False
    """The recorder has its outcome; only the commit is missing."""

    def overdue(self, now_s: float) -> bool:
        limits = [d.time_limit_s for d in self.deliveries if d.time_limit_s]
        return self.started_s is not None and bool(limits) and now_s > self.started_s + min(limits)

    def expired(self, now_s: float) -> bool:
        """It has not begun, and none of its messages wants it to begin any more."""
        times = [d.expires_s for d in self.deliveries]
        gone = bool(times) and all(s is not None and s < now_s for s in times)
        return gone and self.started_s is None


class LiveJobs:
    """Live jobs and held deliveries by job id."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._live: dict[str, LiveJob] = {}
        self._held: dict[str, tuple[float, list[Delivery]]] = {}

    def add(self, claim: Claim, deliveries: list[Delivery]) -> None:
        with self._lock:
            self._live[claim.job.job_id] = LiveJob(claim, deliveries)

    def attach(self, job_id: str, deliveries: list[Delivery]) -> bool:
        """Let copies of a live job's message wait for the same outcome. False: not live."""
        with self._lock:
            job = self._live.get(job_id)
            if job is None:
                return False
            job.deliveries.extend(deliveries)
            return True

    def started(self, job_ids: Iterable[str]) -> list[Delivery]:
        """Note that these run now: the deliveries to tell."""
        now_s = time.monotonic()
        with self._lock:
            jobs = [self._live[job_id] for job_id in job_ids if job_id in self._live]
            for job in jobs:
                job.started_s = now_s
            return [delivery for job in jobs for delivery in job.deliveries]

    def ended(self, claim: Claim) -> None:
        with self._lock:
            job = self._of(claim)
            if job is not None:
                job.ended = True

    def pop(self, claim: Claim) -> list[Delivery]:
        """This claim is over: the deliveries that waited for it."""
        with self._lock:
            if self._of(claim) is None:
                return []
            return self._live.pop(claim.job.job_id).deliveries

    def lose(self, claims: Iterable[Claim]) -> dict[str, list[Delivery]]:
        """Give up those of these claims that have no outcome yet: their deliveries by job id."""
        with self._lock:
            jobs = [job for claim in claims if (job := self._of(claim)) and not job.ended]
            for job in jobs:
                del self._live[job.claim.job.job_id]
            return {job.claim.job.job_id: job.deliveries for job in jobs}

    def claims(self, wanted: Callable[[LiveJob], bool] = lambda _: True) -> list[Claim]:
        with self._lock:
            return [job.claim for job in self._live.values() if wanted(job)]

    def hold(self, job_id: str, deliveries: list[Delivery], delay_s: float) -> None:
        """Keep deliveries and ask about their job again after `delay_s`."""
        if not deliveries:
            return
        with self._lock:
            _, others = self._held.get(job_id, (0.0, []))
            self._held[job_id] = (time.monotonic() + delay_s, others + deliveries)

    def due(self) -> list[Delivery]:
        """Held deliveries whose time has come; they are held no longer."""
        now_s = time.monotonic()
        with self._lock:
            ids = [job_id for job_id, (when_s, _) in self._held.items() if when_s <= now_s]
            return [delivery for job_id in ids for delivery in self._held.pop(job_id)[1]]

    def ids(self) -> set[str]:
        with self._lock:
            return self._live.keys() | self._held.keys()

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {"live": len(self._live), "held": len(self._held)}

    def _of(self, claim: Claim) -> LiveJob | None:
        job = self._live.get(claim.job.job_id)
        return job if job is not None and job.claim.lease_token == claim.lease_token else None

"""The leases thread: what the clock does to live jobs.

Renews all claims every lease_s / 3 while the engine makes steps; a hung engine's leases run
out (after `Pulse.limit_s`), so that other workers take its jobs over, and then the process is given
up, for a supervisor to start another. Jobs whose lease was lost
leave the engine without an outcome and their messages are held. Ends jobs that were cancelled
in the ledger, revoked or expired while they waited, or ran past their time limit. Raises nothing; a
database that is away is asked again at the next tick.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from lorabatch.errors import DeadlinePassed
from lorabatch.ledger import Ledger
from lorabatch.settings import Settings
from lorabatch_worker.live import LiveJob, LiveJobs
from lorabatch_worker.pulse import Pulse
from lorabatch_worker.retry import OUTAGES, reason
from lorabatch_worker.runner import Runner

__all__ = ["Leases"]

log = structlog.get_logger(__name__)

TICK_S = 0.2


class Leases:
    """A thread that looks at all live jobs every TICK_S."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        live: LiveJobs,
        runner: Runner,
        pulse: Pulse,
        on_hung: Callable[[], None] = lambda: None,
        is_revoked: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._lease_s = settings.lease_s
        self._ledger = ledger
        self._live = live
        self._runner = runner
        self._pulse = pulse
        self._on_hung = on_hung
        self._is_revoked = is_revoked
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        renew_s = time.monotonic() + self._lease_s / 3
        stalled_s = 0.0  # in ticks of this thread: a process that was stopped has had none
        while not self._stop.wait(TICK_S):
            try:
                self._end_what_must_end()
                if not self._pulse.beating:
                    stalled_s = self._stalled(stalled_s)
                    continue
                stalled_s = 0.0
                if time.monotonic() >= renew_s:
                    self._renew()
                    renew_s = time.monotonic() + self._lease_s / 3
            except OUTAGES as error:
                log.warning("leases not renewed", error=reason(error))
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one tick
                log.error("leases: unexpected", error=reason(error))

    def _stalled(self, before_s: float) -> float:
        """Where steps are that slow, LORABATCH_LEASE_S has to be longer."""
        now_s = before_s + TICK_S
        if before_s == 0.0:
            log.error("the engine makes no steps: its leases are left to run out")
        if before_s < self._lease_s <= now_s:
            log.error("the engine makes no steps: this process gives up", lease_s=self._lease_s)
            self._on_hung()
        return now_s

    def _end_what_must_end(self) -> None:
        now_s = time.monotonic()
        for claim in self._live.claims(lambda job: not job.ended and job.overdue(now_s)):
            self._runner.abort(claim.job.job_id, "time_limit")
        for claim in self._live.claims(lambda job: not job.ended and job.expired(now_s)):
            self._runner.abort(claim.job.job_id, "cancelled")
        now = datetime.now(UTC)
        for claim in self._live.claims(lambda job: not job.ended and _is_late(job, now)):
            self._runner.abort(claim.job.job_id, DeadlinePassed.code)
        for claim in self._live.claims(lambda job: not job.ended and job.started_s is None):
            if self._is_revoked(claim.job.job_id):
                self._runner.abort(claim.job.job_id, "cancelled")

    def _renew(self) -> None:
        claims = self._live.claims()
        if not claims:
            return
        lost, cancelled = self._ledger.renew(claims, self._lease_s)
        for job_id in cancelled:
            self._runner.abort(job_id, "cancelled")
        gone = self._live.lose([claim for claim in claims if claim.job.job_id in lost])
        if gone:
            log.warning("leases lost to other workers", jobs=len(gone))
            self._runner.drop(list(gone))
        for job_id, deliveries in gone.items():
            self._live.hold(job_id, deliveries, self._lease_s / 3)


def _is_late(job: LiveJob, now: datetime) -> bool:
    """By this machine's clock; the ledger ends by its own what is not with a worker."""
    return job.claim.job.done_by is not None and now > job.claim.job.done_by

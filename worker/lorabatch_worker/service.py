"""The service: everything between the Celery pool and the engine, started and stopped together.

Threads: intake, recorder, publisher, postponed, leases, feeder, sweeper, the runner's own. Stopping
goes along the same road as a job: take nothing more, let the engine drain, record what ended,
release the rest (so that another worker can claim it at once), publish. Raises LoraBatchError
when database, broker or engine are not ready; what fails while stopping is logged, because
leases and the visibility timeout bring such jobs back.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
from celery import Celery
from celery.worker import state as worker_state

from lorabatch.database import open_database
from lorabatch.ledger import Ledger
from lorabatch.queue import check_broker, resolve_broker
from lorabatch.queues import Queues
from lorabatch.settings import Settings
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.feeder import Feeder
from lorabatch_worker.intake import Intake, IntakeParts
from lorabatch_worker.leases import Leases
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.postponed import Postponed
from lorabatch_worker.publisher import Publisher
from lorabatch_worker.pulse import Pulse
from lorabatch_worker.recorder import Recorder
from lorabatch_worker.retry import OUTAGES, reason
from lorabatch_worker.runner import Runner
from lorabatch_worker.sweeper import Sweeper
from lorabatch_worker.text_sender import TextSender

__all__ = ["DRAIN", "Pump", "Service"]

log = structlog.get_logger(__name__)

Post = Callable[[Callable[[], None]], None]
SETTLE_S = 10.0
DRAIN = "drain"
RELEASE_TRIES = 5
RELEASE_PAUSE_S = 0.5


class Pump(Protocol):
    """Run the hub's callbacks while `busy()`, at most `limit_s`; `hurry` may cut it short."""

    def __call__(self, busy: Callable[[], bool], limit_s: float, hurry: bool = False) -> None: ...


class Service:
    """One worker process's jobs. `post` runs a call on the hub's thread."""

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        factory: Callable[[Settings], Runner],
        post: Post,
        give_up: Callable[[], None],
    ) -> None:
        """`give_up` is called, from any thread, when only a new process can go on."""
        self._settings = settings
        self._give_up = give_up
        self._blamed = frozenset[str]()
        self._post = post
        self._engine = open_database(settings)
        self._engine.hide_parameters = True  # prompts are parameters
        queues = Queues(self._engine)
        drained = settings.consume, settings.base_model, settings.base_model_aliases
        queues.check(*drained)  # before the model is loaded, which takes long
        broker_url = resolve_broker(settings)
        self.broker = check_broker(broker_url)
        self.runner = factory(settings)
        queues.drain(*drained)
        self.pulse = Pulse(self.runner, settings.lease_s)
        self.owner = f"{socket.gethostname()[:80]}:{os.getpid()}:{secrets.token_hex(4)}"
        self.ledger = Ledger(self._engine)
        self.live = LiveJobs()
        self.publisher = Publisher(app, post)
        self.recorder = Recorder(self.ledger, self.live, self.publisher, settings.in_hand)
        revoked = worker_state.revoked.__contains__
        self.leases = Leases(
            settings, self.ledger, self.live, self.runner, self.pulse, self._hung, revoked
        )
        self.postponed = Postponed(self.ledger, self.live, post)
        self.texts = TextSender(broker_url)
        self.feeder = Feeder(app, settings, self.ledger)
        self.sweeper = Sweeper(app, settings, self.ledger, self.live)
        self.intake = Intake(
            IntakeParts(
                settings=settings,
                owner=self.owner,
                ledger=self.ledger,
                live=self.live,
                runner=self.runner,
                pulse=self.pulse,
                recorder=self.recorder,
                publisher=self.publisher,
                give_back=self.postponed.give_back,
                is_revoked=revoked,
            )
        )

    def start(self) -> None:
        self.runner.start(
            self._started, self.recorder.put, self.postponed.put, self._broken, self.texts.send
        )
        parts = (self.publisher, self.recorder, self.postponed, self.leases)
        for part in (*parts, self.intake, self.sweeper, self.feeder):
            part.start()

    def take(self, delivery: Delivery) -> None:
        self.intake.put(delivery)

    def abort(self, job_id: str) -> None:
        """End a live job as cancelled."""
        self.runner.abort(job_id, "cancelled")

    def counts(self) -> dict[str, float]:
        """The runner's load, live jobs, and `occupancy`: which share of `max_seqs` the steps had on
        average since the start (not before the first one)."""
        load = self.runner.load
        found: dict[str, float] = {**load, **self.live.counts(), "postponed": self.postponed.count}
        if load.get("steps"):
            mean = load["step_seqs"] / load["steps"]
            found["occupancy"] = round(mean / self._settings.max_seqs, 3)
        return found

    def stop(self, drain_s: float, pump: Pump) -> None:
        """Hand everything back or finish it. Called once, on the hub's thread."""
        if not self.pulse.beating and not self._blamed:
            self._blame_what_runs()  # somebody stops this process before it gives itself up
        self.feeder.close()
        self.sweeper.close()
        self.intake.close()
        pump(lambda: self.intake.running, SETTLE_S)
        drain = threading.Thread(target=self._drain, args=(drain_s,), name=DRAIN, daemon=True)
        drain.start()
        settle_s = SETTLE_S if self.pulse.beating else 0.0  # one that hangs will not settle
        pump(drain.is_alive, drain_s + settle_s, hurry=True)
        self.postponed.close()
        self.recorder.close()
        pump(lambda: self.recorder.running, SETTLE_S)
        self.recorder.abandon()
        self.leases.close()  # or it would renew what is given up here
        self._release()
        pump(lambda: self.postponed.running, SETTLE_S)
        self.publisher.close()
        pump(lambda: self.publisher.running, SETTLE_S)
        self._engine.dispose()
        self.texts.close()

    def _started(self, job_ids: Sequence[str]) -> None:
        begun = frozenset(job_ids)
        claims = self.live.claims(lambda job: job.claim.job.job_id in begun)
        suspects = [claim for claim in claims if claim.suspect]
        # Now, for a job may stop this process before a thread gets to it: a suspect's start, and
        # the outcome of one that has run alone, or it would be blamed for what comes after it.
        if suspects or self.live.claims(lambda job: job.ended and job.claim.suspect):
            with self.pulse.excused():
                self.recorder.started_for_certain(suspects)
        self.recorder.started([claim for claim in claims if not claim.suspect])
        for delivery in self.live.started(job_ids):
            self._post(delivery.on_started)

    def _broken(self, job_ids: Sequence[str]) -> None:
        self._blame(job_ids)
        self._give_up()

    def _hung(self) -> None:
        self._blame_what_runs()
        self._give_up()

    def _blame(self, job_ids: Sequence[str]) -> None:
        """Their leases will run out at once, which counts as a crash for what had begun; so has
        what ends the device when its adapter is put there."""
        self._blamed = frozenset(job_ids)
        self.recorder.started(
            self.live.claims(
                lambda job: job.claim.job.job_id in self._blamed and job.started_s is None
            )
        )

    def _blame_what_runs(self) -> None:
        running = self.live.claims(lambda job: job.started_s is not None and not job.ended)
        self._blame([claim.job.job_id for claim in running])

    def _drain(self, drain_s: float) -> None:
        left = self.runner.drain(drain_s)
        log.info("engine drained", not_ended=len(left))

    def _release(self) -> None:
        claims = self.live.claims(lambda job: job.claim.job.job_id not in self._blamed)
        blamed = self.live.claims(lambda job: job.claim.job.job_id in self._blamed)
        for _ in range(RELEASE_TRIES if claims or blamed else 0):
            try:
                self.ledger.release(claims)
                self.ledger.renew(blamed, 0.0)  # run out at once, as if they had ended the process
                log.info("jobs handed back", jobs=len(claims), blamed=len(blamed))
                return
            except OUTAGES as error:
                log.warning("jobs not handed back yet", jobs=len(claims), error=reason(error))
                time.sleep(RELEASE_PAUSE_S)

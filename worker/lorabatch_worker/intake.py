"""The intake: delivered messages become claimed jobs, in groups, one transaction a step.

A group is what was held and is due, and what is delivered while it is gathered (grouping.py).
Every message takes one of these ways: refused (recorded as a failed job, published, acknowledged),
attached to a job that is live here, claimed and submitted, settled (its job has ended already), or
held (somebody else has the lease). Outages are waited out and nothing is acknowledged meanwhile.
Raises nothing. A message that makes a group fail, say of a row of a newer version, is parked: it
goes back to the broker, for any worker to take after a visibility timeout.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from lorabatch.errors import (
    AttemptsExhausted,
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    LoraBatchError,
)
from lorabatch.job import Job, is_identifier
from lorabatch.ledger import Claim, Ledger, Outcome
from lorabatch.result import TERMINAL_STATES, ErrorInfo, Result
from lorabatch.settings import Settings
from lorabatch_worker.delivery import Delivery, failed_result, read, tenant_of
from lorabatch_worker.grouping import GROUP_MAX, Grouping
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.publisher import Publisher
from lorabatch_worker.pulse import Pulse
from lorabatch_worker.recorder import Recorder
from lorabatch_worker.retry import Stopped, reason, until_it_works
from lorabatch_worker.runner import Runner

__all__ = ["Intake", "IntakeParts"]

log = structlog.get_logger(__name__)
T = TypeVar("T")

IDLE_S = 0.1
SOON_S = 0.25


@dataclass(frozen=True)
class IntakeParts:
    """What the intake works with."""

    settings: Settings
    owner: str
    ledger: Ledger
    live: LiveJobs
    runner: Runner
    pulse: Pulse
    recorder: Recorder
    publisher: Publisher
    give_back: Callable[[str, Sequence[Delivery], float, str], None]
    is_revoked: Callable[[str], bool] = lambda _: False


class Intake:
    """A thread between the hub and the runner."""

    def __init__(self, parts: IntakeParts) -> None:
        self._p = parts
        self._stop = threading.Event()
        self._queue: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._grouping = Grouping(parts.settings.in_hand)
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, delivery: Delivery) -> None:
        self._queue.put(delivery)

    def close(self) -> None:
        """Take nothing more; what is queued here stays with the broker."""
        self._stop.set()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            group = self._next_group()
            while group and not self._p.pulse.beating:
                if self._stop.wait(SOON_S):
                    return
            try:
                self._take_all(group)
            except Stopped:
                return

    def _next_group(self) -> list[Delivery]:
        group = self._p.live.due()
        if not group:
            try:
                group = [self._queue.get(timeout=IDLE_S)]
            except queue.Empty:
                return group
        self._grouping.begin()
        while len(group) < GROUP_MAX:
            try:
                group.append(self._queue.get(timeout=self._grouping.left_s()))
            except queue.Empty:
                break
        self._grouping.end()
        return group

    def _take_all(self, group: Sequence[Delivery]) -> None:
        """Take a group; if one of it makes that fail, take each alone and park the culprit."""
        if not group:
            return
        try:
            self._take(group)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - the thread must outlive any one message
            if len(group) > 1:
                for delivery in group:
                    self._take_all([delivery])
                return
            job_id = group[0].job_id or group[0].task_id
            why = reason(error)
            log.error("message parked", job_id=job_id, why=why)
            self._p.give_back(job_id, group, self._p.settings.visibility_timeout_s, why)

    def _take(self, group: Sequence[Delivery]) -> None:
        wanted: dict[str, list[Delivery]] = {}
        whole: list[tuple[Job, Delivery]] = []
        for delivery in group:
            try:
                job = None if delivery.job_id else read(delivery)
            except InvalidJob as error:
                self._refuse(delivery, error)
                continue
            if job is None:
                delivery.job_id = delivery.job_id or delivery.task_id
                wanted.setdefault(delivery.job_id, []).append(delivery)
            else:
                whole.append((job, delivery))
        for publish in (True, False):
            self._accept([(j, d) for j, d in whole if d.publish is publish], publish)
        for _, delivery in whole:
            if delivery.job_id:
                wanted.setdefault(delivery.job_id, []).append(delivery)
        self._claim(wanted)

    def _accept(self, whole: Sequence[tuple[Job, Delivery]], publish: bool) -> None:
        """Give jobs of plain clients their rows; sets each delivery's job id."""
        jobs = [job for job, _ in whole]
        try:
            queue = self._p.settings.queue
            known = self._db("accept", lambda: self._p.ledger.accept(jobs, publish, queue, True))
        except IdempotencyConflict as error:
            if len(whole) == 1:
                self._end(whole[0][1], error)
            else:
                for pair in whole:
                    self._accept([pair], publish)
            return
        for job, delivery in whole:
            delivery.job_id = known[job.job_id]

    def _claim(self, wanted: dict[str, list[Delivery]]) -> None:
        p = self._p
        wanted = {i: d for i, d in wanted.items() if not p.live.attach(i, d)}
        revoked = {i for i, ds in wanted.items() if p.is_revoked(i) or any(d.revoked for d in ds)}
        for job_id in revoked:
            self._cancel(job_id)
        free = [job_id for job_id in wanted if job_id not in revoked]
        claims: dict[str, Claim] = {}
        if free:
            owner, lease_s = p.owner, p.settings.lease_s
            claims = self._db("claim", lambda: p.ledger.claim(free, owner, lease_s))
        exhausted = [claim for claim in claims.values() if self._is_exhausted(claim)]
        for job_id, claim in claims.items():
            p.live.add(claim, wanted.pop(job_id))
        p.recorder.put([_exhausted(claim) for claim in exhausted])
        p.runner.submit([c for c in claims.values() if c not in exhausted])
        self._unclaimed(wanted)

    def _is_exhausted(self, claim: Claim) -> bool:
        settings = self._p.settings
        poison = claim.died_alone and claim.crashes >= settings.max_crashes
        return poison or claim.attempt > settings.max_attempts

    def _unclaimed(self, wanted: dict[str, list[Delivery]]) -> None:
        """Ended already: settle. Leased by somebody: hold. Unknown: no job at all."""
        if not wanted:
            return
        ids = list(wanted)
        states = self._db("read states", lambda: self._p.ledger.states(ids))
        ended = [job_id for job_id in ids if states.get(job_id) in TERMINAL_STATES]
        results = self._db("read results", lambda: self._p.ledger.results(ended))
        for job_id, deliveries in wanted.items():
            state = states.get(job_id)
            if job_id in results:
                self._p.publisher.put(results[job_id], deliveries)
            elif state is None:
                for delivery in deliveries:
                    self._refuse(delivery, _unknown(job_id))
            else:
                wait_s = self._p.settings.lease_s / 3 if state == "running" else SOON_S
                self._p.live.hold(job_id, deliveries, wait_s)

    def _cancel(self, job_id: str) -> None:
        try:
            self._db("cancel", lambda: self._p.ledger.cancel([job_id]))
        except JobNotFound:
            log.info("revoked before it was accepted", job_id=job_id)

    def _refuse(self, delivery: Delivery, error: LoraBatchError) -> None:
        """Record a message that is no job as a failed one, unless its id is a job's already."""
        job_id = delivery.task_id
        if is_identifier(job_id):
            info = ErrorInfo(code=error.code, message=error.public)
            tenant = tenant_of(delivery)
            self._db("reject", lambda: self._p.ledger.reject(job_id, tenant, info))
        self._end(delivery, error)

    def _end(self, delivery: Delivery, error: LoraBatchError) -> None:
        log.warning("message refused", job_id=delivery.task_id, code=error.code)
        tenant = tenant_of(delivery)
        result = failed_result(delivery.task_id, tenant, error.code, error.public)
        self._p.publisher.put(result, [delivery])

    def _db(self, what: str, call: Callable[[], T]) -> T:
        return until_it_works(what, self._stop, call)


def _exhausted(claim: Claim) -> Outcome:
    job, how = claim.job, "without an outcome"
    if claim.died_alone:
        how = "and stopped its worker every time, at last when nothing else ran there"
    message = (
        f"job {job.job_id!r} was started {claim.attempt - 1} times {how}; it is given up "
        f"(`lorabatch dead list`)"
    )
    result = Result(
        job_id=job.job_id,
        tenant=job.tenant,
        adapter_id=job.adapter_name,
        custom_id=job.custom_id,
        batch_id=job.batch_id,
        state="failed",
        error=ErrorInfo(code=AttemptsExhausted.code, message=message),
        attempt=claim.attempt,
    )
    return Outcome(claim, result)


def _unknown(job_id: str) -> InvalidJob:
    return InvalidJob(
        f"job {job_id!r}: the message has neither prompt nor messages and the ledger has no such "
        "job; give prompt or messages, or let producer and worker use the same database"
    )

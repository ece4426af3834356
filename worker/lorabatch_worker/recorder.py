"""The recorder: starts and outcomes go into the ledger in groups, one transaction each.

A group is up to GROUP_MAX outcomes, or what comes while it is gathered (grouping.py). An outage
is waited out and nothing is acknowledged meanwhile. An outcome whose lease was lost is not ours any
more: its messages are held until the ledger says what became of the job. Raises nothing; an outcome
that the database refuses ends as a failed one, alone, and never takes its group with it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from functools import partial

import sqlalchemy as sa
import structlog

from lorabatch.ledger import Claim, Ledger, Outcome, Start
from lorabatch.result import ErrorInfo, Result, Usage
from lorabatch_worker.grouping import GROUP_MAX, Grouping
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.publisher import Publisher
from lorabatch_worker.retry import Stopped, reason, until_it_works

__all__ = ["Recorder"]

log = structlog.get_logger(__name__)

LOOK_S = 0.5
REFUSED = "the database refused the result; nothing of it is stored"


class Recorder:
    """A thread between the runner and the publisher."""

    def __init__(self, ledger: Ledger, live: LiveJobs, publisher: Publisher, in_hand: int) -> None:
        """`in_hand`: how many jobs this worker has at a time."""
        self._ledger = ledger
        self._live = live
        self._publisher = publisher
        self._stop = threading.Event()
        self._queue: queue.SimpleQueue[Outcome | Start | threading.Event | None] = (
            queue.SimpleQueue()
        )
        self._written: list[threading.Event] = []
        self._spare: Outcome | None = None
        self._grouping = Grouping(in_hand)
        self._starts: list[Start] = []
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self._live.ended(outcome.claim)
            self._queue.put(outcome)

    def started(self, claims: Sequence[Claim]) -> None:
        """Count an attempt of each, before any outcome that comes later."""
        for claim in claims:
            self._queue.put(Start(claim))

    def started_for_certain(self, claims: Sequence[Claim]) -> None:
        """The same, and it is in the ledger when this returns, as is all that came before it."""
        self.started(claims)
        written = threading.Event()
        self._queue.put(written)
        while self._thread.is_alive() and not written.wait(LOOK_S):
            pass

    def close(self) -> None:
        """Record what is queued, then stop."""
        self._queue.put(None)

    def abandon(self) -> None:
        """Stop waiting for a database that is away."""
        self._stop.set()
        self._queue.put(None)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        last = False
        while not last:
            group, last = self._next_group()
            starts, self._starts = self._starts, []
            try:
                self._record(group, starts)
            except Stopped:
                return
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one group
                log.error("outcomes not recorded", jobs=len(group), error=reason(error))
            while self._written:
                self._written.pop().set()

    def _next_group(self) -> tuple[list[Outcome], bool]:
        """Outcomes of distinct jobs, and whether they are the last ones."""
        group: dict[str, Outcome] = {}
        item = self._spare or self._queue.get()
        self._spare = None
        self._grouping.begin()
        while item is not None:
            if isinstance(item, threading.Event):
                self._written.append(item)
                break
            if isinstance(item, Start):
                self._starts.append(item)
            elif item.claim.job.job_id in group:
                self._spare = item
                break
            else:
                group[item.claim.job.job_id] = item
            if len(group) + len(self._starts) >= GROUP_MAX:
                break
            try:
                item = self._queue.get(timeout=self._grouping.left_s())
            except queue.Empty:
                break
        self._grouping.end()
        return list(group.values()), item is None

    def _record(self, group: Sequence[Outcome], starts: Sequence[Start] = ()) -> None:
        if not group:
            if starts:
                until_it_works("start", self._stop, lambda: self._ledger.mark_started(starts))
            return
        try:
            write = partial(self._ledger.record, group, starts)
            written = until_it_works("record", self._stop, write)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - one bad outcome must not stop its group
            self._record([], starts)
            if len(group) == 1:
                self._refused(group[0], error)
            else:
                for outcome in group:
                    self._record([outcome])
            return
        self._settle(group, written)

    def _refused(self, outcome: Outcome, error: Exception) -> None:
        job_id = outcome.claim.job.job_id
        log.error("the database refused an outcome", job_id=job_id, error=type(error).__name__)
        info = ErrorInfo(code="engine_fault", message=REFUSED)
        empty = {"text": None, "token_ids": (), "seed": None, "usage": Usage()}
        empty |= {"choices": None, "discarded": None}
        result = outcome.result.model_copy(update={"state": "failed", "error": info, **empty})
        failed = Outcome(outcome.claim, result, outcome.at_s)
        try:
            written = until_it_works("record", self._stop, lambda: self._ledger.record([failed]))
        except sa.exc.SQLAlchemyError as again:
            log.error("the lease of this job will run out", job_id=job_id, error=reason(again))
            written = set()
        self._settle([failed], written)

    def _settle(self, group: Sequence[Outcome], written: set[str]) -> None:
        """The committed are published and acknowledged; the stale are asked about again."""
        ended = [(outcome, self._live.pop(outcome.claim)) for outcome in group]
        ids = [
            outcome.result.job_id
            for outcome, deliveries in ended
            if outcome.claim.publish_result or any(delivery.tells for delivery in deliveries)
        ]
        stored: dict[str, Result] = {}
        if ids:  # read back with the ledger's times
            stored = until_it_works("read", self._stop, lambda: self._ledger.results(ids))
        for outcome, deliveries in ended:
            job_id = outcome.claim.job.job_id
            if job_id in written:
                extra = [job_id] if outcome.claim.publish_result else []
                self._publisher.put(stored.get(job_id, outcome.result), deliveries, extra)
            else:
                log.info("outcome came too late", job_id=job_id)
                self._live.hold(job_id, deliveries, 0.0)

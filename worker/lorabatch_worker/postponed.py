"""Jobs that the runner gave up for now: back to the ledger, and their messages back to the broker.

Their adapter is being fetched, or others of their tenant take long to prepare, and there are so
many of them that others could not be taken. First the ledger has them as queued, then the broker is
told to give their messages out again after AGAIN_S, to any worker: nothing is kept here, and
nothing is lost if this worker dies. If they must still wait then, the same happens again. Raises
nothing; an outage is waited out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from lorabatch.ledger import Claim, Ledger
from lorabatch_worker.delivery import AGAIN_S, Delivery
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.retry import Stopped, reason, until_it_works

__all__ = ["Postponed"]

log = structlog.get_logger(__name__)

ON_ITS_WAY = "what it needs is on its way"


class Postponed:
    """A thread between the runner and the hub. `post` runs a call on the hub's thread."""

    def __init__(
        self, ledger: Ledger, live: LiveJobs, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._post = post
        self.count = 0
        self._stop = threading.Event()
        self._queue: queue.SimpleQueue[Sequence[Claim]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="postponed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, claims: Sequence[Claim]) -> None:
        self._queue.put(claims)

    def close(self) -> None:
        """Postpone what is queued, then stop; without the ledger, at once."""
        self._stop.set()
        self._queue.put(())

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while claims := self._queue.get():
            try:
                self._hand_back(claims)
            except Stopped:  # whoever stops the worker hands the jobs back
                return
            except Exception as error:  # noqa: BLE001 - the thread must outlive any one group
                log.error("jobs not handed back", jobs=len(claims), error=reason(error))
                self._give_up(claims)

    def _hand_back(self, claims: Sequence[Claim]) -> None:
        release = partial(self._ledger.release, claims, again_s=AGAIN_S)
        until_it_works("hand jobs back", self._stop, release)
        self.count += len(claims)
        self._give_up(claims)

    def _give_up(self, claims: Sequence[Claim]) -> None:
        """They are not ours any more. What the ledger did not hear of, it hears by the lease."""
        for job_id, deliveries in self._live.lose(claims).items():
            self.give_back(job_id, deliveries, AGAIN_S, ON_ITS_WAY)

    def give_back(
        self, job_id: str, deliveries: Sequence[Delivery], again_s: float, why: str
    ) -> None:
        """From any thread: messages back to the broker, which gives them out again after so long.
        One that cannot go back is held as long."""
        self._live.hold(job_id, [d for d in deliveries if d.on_postponed is None], again_s)
        for delivery in deliveries:
            if delivery.on_postponed is not None:
                self._post(partial(delivery.on_postponed, again_s, why))

"""Jobs between `submit` and the scheduler: adapter, chat template, tokens.

They are prepared on the adapter store's threads, or aside (aside.py); the engine's thread takes
what is ready before each step, with the aborts of what it has already. A job that cannot be
prepared ends as a failed outcome with a code of the error tree. No more than `room` jobs wait here
for adapters that are being fetched, or for what is held up: the newest beyond that, of the tenants
that have most of them, are postponed, or those of a dead source or of hostile grammars would be all
that this worker has. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from lorabatch.ledger import Claim, Outcome
from lorabatch.result import ErrorInfo
from lorabatch_worker.adapters.store import AdapterStore, Loading
from lorabatch_worker.adapters.wanted import Wanted, WantedMerge, wanted_by
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.aside import Aside
from lorabatch_worker.outcome import aborted, explained, failed
from lorabatch_worker.retry import Stopped
from lorabatch_worker.runner import Postpone
from lorabatch_worker.sequence import Sequence

__all__ = ["Arrivals"]


class _Preparing(NamedTuple):
    claim: Claim
    adapter: Loading | None = None
    aside: Aside | None = None

    @property
    def is_kept_waiting(self) -> bool:
        if self.aside is not None:
            return self.aside.is_held_up
        return self.adapter is not None and self.adapter.fetching and not self.adapter.done()


class Arrivals:
    """What was submitted and is not in the scheduler yet."""

    def __init__(
        self,
        prepare: Callable[[Claim, Adapter | None], Sequence],
        store: AdapterStore,
        base_model: str,
        report: Callable[[List[Outcome]], None],
        room: int,
    ) -> None:
        """`room`: how many may be kept waiting once there is a `postpone`."""
        self.postpone: Postpone | None = None
        self.preparing: dict[str, _Preparing] = {}
        self.ready: list[Sequence] = []
        self._awaited: set[Loading] = set()
        self._aborts: dict[str, str | None] = {}  # job id -> reason; None: without an outcome
        self._sequence_of = prepare
        self._store = store
        self._base_model = base_model
        self._report = report
        self._room = room
        self._rendering = Aside("render")
        self._compiling = Aside("grammar")
        self._changed = threading.Condition()
        self._woken = False

    def __len__(self) -> int:
        with self._changed:
            return len(self.preparing) + len(self.ready)

    def submit(self, claims: List[Claim]) -> None:
        by_adapter: dict[Wanted | WantedMerge | None, list[Claim]] = defaultdict(list)
        with self._changed:
            for claim in claims:
                self.preparing[claim.job.job_id] = _Preparing(claim)
                by_adapter[wanted_by(claim)].append(claim)
        for wanted, group in by_adapter.items():
            if wanted is None:
                self._prepare_all(group, None)
            else:
                self._wait_for(self._store.request(wanted), group)
        self._keep_room()

    def _wait_for(self, adapter: Loading, claims: List[Claim]) -> None:
        with self._changed:
            for claim in claims:
                if self._has(claim):
                    self.preparing[claim.job.job_id] = _Preparing(claim, adapter)
            asked = adapter in self._awaited
            self._awaited.add(adapter)
        if not asked:
            adapter.add_done_callback(self._adapter_came)
        elif adapter.done():  # and who waited for it may have been told before
            self._adapter_came(adapter)

    def withdraw(self, job_ids: List[str], reason: str | None) -> None:
        """End what is still here now, and the rest before the next step. Without a reason, nothing
        is reported."""
        ended = []
        with self._changed:
            ready = {s.job_id: s for s in self.ready}
            for job_id in job_ids:
                preparing = self.preparing.pop(job_id, None)
                claim = preparing and preparing.claim
                if job_id in ready:
                    self.ready.remove(ready[job_id])
                    claim = ready[job_id].claim
                if claim is None:
                    self._aborts[job_id] = reason
                elif reason is not None:
                    ended.append(aborted(claim, reason, self._base_model))
            self._changed.notify()
        if ended:
            self._report(ended)

    def take(self) -> tuple[list[Sequence], dict[str, str | None]]:
        """What is ready to run, and the aborts of what had been taken before."""
        self._keep_room()
        with self._changed:
            ready, self.ready = self.ready, []
            aborts, self._aborts = self._aborts, {}
        return ready, aborts

    def wait(self, timeout_s: float) -> None:
        """Until there is something to take, or `wake` was called once and for all."""
        with self._changed:
            if not (self.ready or self._aborts or self._woken):
                self._changed.wait(timeout_s)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def close(self) -> dict[str, Claim]:
        """What is left, by job. An adapter that comes after this reports nothing."""
        for aside in (self._rendering, self._compiling):
            aside.close()
        with self._changed:
            left = {s.job_id: s.claim for s in self.ready}
            left |= {job_id: one.claim for job_id, one in self.preparing.items()}
            self.ready, self.preparing = [], {}
        return left

    def _keep_room(self) -> None:
        if self.postpone is None or len(self.preparing) <= self._room:
            return
        with self._changed:
            waiting = (one.claim for one in self.preparing.values() if one.is_kept_waiting)
            surplus = _in_turn(waiting)[self._room :]
            for claim in surplus:
                del self.preparing[claim.job.job_id]
        if surplus:
            self.postpone(surplus)

    # -- on the store's threads ----------------------------------------------

    def _adapter_came(self, adapter: Future[Adapter]) -> None:
        with self._changed:
            self._awaited.discard(adapter)
            claims = [one.claim for one in self.preparing.values() if one.adapter is adapter]
        if adapter.cancelled() or not claims:
            return
        error = adapter.exception()
        if error is None:
            self._prepare_all(claims, adapter.result())
        elif not isinstance(error, Stopped):  # else the jobs are handed back
            what = f"adapter {claims[0].job.adapter_name!r}: could not be loaded"
            self._fail(claims, explained(error, what))

    def _prepare_all(self, claims: list[Claim], adapter: Adapter | None) -> None:
        """What an adapter's own template or a job's grammar takes must hold up neither this thread
        nor other tenants' jobs."""
        here = []
        for claim in claims:
            aside = self._aside(claim, adapter)
            if aside is None:
                here.append(claim)
                continue
            with self._changed:
                if self._has(claim):
                    self.preparing[claim.job.job_id] = _Preparing(claim, aside=aside)
            aside.put(claim.job.tenant, partial(self._prepare, [claim], adapter))
        self._prepare(here, adapter)

    def _aside(self, claim: Claim, adapter: Adapter | None) -> Aside | None:
        if adapter is not None and adapter.chat_template and claim.job.messages is not None:
            return self._rendering
        return self._compiling if claim.job.constrained else None

    def _prepare(self, claims: list[Claim], adapter: Adapter | None) -> None:
        for claim in claims:
            with self._changed:
                if not self._has(claim):
                    continue
            try:
                sequence = self._sequence_of(claim, adapter)
            except Exception as error:  # noqa: BLE001 - no job may stay unreported
                what = f"job {claim.job.job_id!r}: could not be prepared"
                self._fail([claim], explained(error, what))
                continue
            with self._changed:
                if self._has(claim):
                    del self.preparing[claim.job.job_id]
                    self.ready.append(sequence)
                    self._changed.notify()

    def _fail(self, claims: list[Claim], info: ErrorInfo) -> None:
        with self._changed:
            mine = [claim for claim in claims if self._has(claim)]
            for claim in mine:
                del self.preparing[claim.job.job_id]
        if mine:
            self._report([failed(c, info, self._base_model) for c in mine])

    def _has(self, claim: Claim) -> bool:
        """Whether it is still to be prepared: it may have been withdrawn, or come again."""
        preparing = self.preparing.get(claim.job.job_id)
        return preparing is not None and preparing.claim is claim


def _in_turn(claims: Iterable[Claim]) -> list[Claim]:
    """The first one of each tenant, then the second ones, and so on."""
    places = Counter[str]()
    found = []
    for claim in claims:
        found.append((places[claim.job.tenant], claim))
        places[claim.job.tenant] += 1
    return [claim for _, claim in sorted(found, key=lambda pair: pair[0])]

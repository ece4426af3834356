"""The engine: continuous batching of claimed jobs over one base model and many adapters.

Jobs come in by `submit` from any thread, are prepared (see arrivals.py) and join the running
micro-batch at the next step; they leave it the moment they end. Every submitted job is reported
exactly once, unless it is dropped or handed back by `drain`. A job that cannot run ends as a failed
outcome with a code of the error tree.

A step for which there is not enough memory is computed in portions (see portions.py). A device that
takes no more work ends the engine: its jobs are handed back, and only a new process can use it.

On a GPU a step is launched and not waited for at once: while the device computes, the host makes
and reports the outcomes of what ended in the step before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as List

import structlog
import torch

from lorabatch.ledger import Claim, Outcome
from lorabatch_worker.adapters.place import place_of
from lorabatch_worker.adapters.store import AdapterStore
from lorabatch_worker.adapters.wanted import Wanted
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.arrivals import Arrivals
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.counters import Counters
from lorabatch_worker.growing_text import GrowingTexts
from lorabatch_worker.memory import out_of_memory
from lorabatch_worker.model_runner import ModelRunner
from lorabatch_worker.outcome import GRAMMAR, explained, failed, finished
from lorabatch_worker.portions import Portions, no_memory_for
from lorabatch_worker.prompt import Preparer
from lorabatch_worker.runner import Broken, OnText, Postpone
from lorabatch_worker.sampler import UNSOUND, Draw
from lorabatch_worker.scheduler import Chunk, Scheduler
from lorabatch_worker.sequence import Sequence
from lorabatch_worker.threads import compute_with

__all__ = ["Engine"]

log = structlog.get_logger(__name__)

IDLE_WAIT_S = 0.5
SHORT_STEPS = 60  # of IDLE_WAIT_S at most: then another process is to have the jobs
NO_PLACE = "it could not be put on the device"


class Engine:
    """A `Runner` that generates text."""

    def __init__(
        self,
        base: BaseModel,
        runner: ModelRunner,
        scheduler: Scheduler,
        store: AdapterStore,
        threads: int = 1,
        fetch_room: int = 16,
    ) -> None:
        """`fetch_room`: jobs that may wait here for adapters that are being fetched."""
        self.threads = threads
        self.base = base
        self.runner = runner
        self.scheduler = scheduler
        self.store = store
        self.preparer = Preparer(base)
        self.counters = Counters()
        self._progress_s = time.monotonic()
        self.overlaps = base.device.type != "cpu"
        self.portions = Portions()
        self._ended: list[tuple[Sequence, str | None]] = []  # with the reason, not reported yet
        self.arrivals = Arrivals(self._prepare, store, base.name, self._report, fetch_room)
        scheduler.on_suspect = lambda one: self._begin([one])
        self._stopping = False
        self._broken = False
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._on_started: Callable[[List[str]], None] = lambda _: None
        self._on_finished: Callable[[List[Outcome]], None] = lambda _: None
        self._on_broken: Broken = lambda _: None

    # -- Runner --------------------------------------------------------------

    @property
    def last_progress_s(self) -> float:
        return self._progress_s

    @property
    def load(self) -> dict[str, int]:
        return {
            "waiting": len(self.arrivals) + len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            **self.counters.as_dict(),
            **self.scheduler.counts,
        }

    @property
    def description(self) -> dict[str, str | list[str]]:
        """What runs here, for logs and `inspect`."""
        return {**self.base.description, "adapters": self.store.catalog.configured()}

    def start(
        self,
        on_started: Callable[[List[str]], None],
        on_finished: Callable[[List[Outcome]], None],
        on_postponed: Postpone | None = None,
        on_broken: Broken = lambda _: None,
        on_text: OnText = lambda _: None,
    ) -> None:
        self._on_started, self._on_finished, self._on_broken = on_started, on_finished, on_broken
        self.arrivals.postpone = on_postponed
        self.texts = GrowingTexts(lambda s: self.base.tokenizer_for(s.adapter), on_text)
        self.texts.start()
        self._thread.start()
        self.store.preload()

    def submit(self, claims: List[Claim]) -> None:
        self.arrivals.submit(claims)

    def abort(self, job_id: str, reason: str) -> None:
        self.arrivals.withdraw([job_id], reason)

    def drop(self, job_ids: List[str]) -> None:
        self.arrivals.withdraw(job_ids, None)

    def warm(self, wanted: Wanted) -> str:
        return self.store.warm(wanted)

    def place(self, wanted: Wanted) -> str:
        return place_of(wanted, self.scheduler.slots, self.store)

    def drain(self, timeout_s: float) -> list[Claim]:
        self._deadline_s = time.monotonic() + timeout_s
        self._stopping = True
        self.arrivals.wake()
        if self._thread.is_alive():
            self._thread.join()
            self.texts.close()
        self.store.close()
        here = (*self.scheduler.running.values(), *self.scheduler.waiting.values())
        left = {s.job_id: s.claim for s in here} | self.arrivals.close()
        self.preparer.close()  # after it, so that no job fails of it
        return list(left.values())

    def _prepare(self, claim: Claim, adapter: Adapter | None) -> Sequence:
        return self.preparer.prepare(claim, adapter)

    def _report(self, outcomes: List[Outcome]) -> None:
        self._on_finished(outcomes)

    # -- the step loop -------------------------------------------------------

    def _run(self) -> None:
        compute_with(self.threads)
        self.runner.warm_up(self._progressed)
        while not self._broken:
            self._take_arrivals()
            late = time.monotonic() > self._deadline_s
            if self._stopping and (late or not self.scheduler.running):
                self._report_ended()
                return
            chunks, admitted = self.scheduler.plan(admit=not self._stopping)
            if admitted:
                self._begin([s for s in admitted if not s.claim.suspect])
                if self._stopping:
                    continue  # it may have waited for a ledger that is away, and for nothing
            if self.scheduler.refused:
                self._fail_refused()
                continue
            self._progressed()
            if not chunks:
                self._report_ended()
                self.arrivals.wait(IDLE_WAIT_S)
                continue
            self._step(chunks)

    def _begin(self, begins: list[Sequence]) -> None:
        if any(s.claim.suspect for s in (*begins, *(s for s, _ in self._ended))):
            self._report_ended()  # or it dies, and is blamed, with what begins now
        self._on_started([s.job_id for s in begins])

    def _fail_refused(self) -> None:
        refused, self.scheduler.refused = self.scheduler.refused, []
        if self._is_lost([s.job_id for s, _ in refused]):
            return
        for adapter, error in {s.adapter: error for s, error in refused}.items():
            assert adapter is not None
            self.store.set_aside(adapter, f"{NO_PLACE} ({type(error).__name__})", here_only=True)
            info = explained(error, f"adapter {adapter.adapter_id!r}: {NO_PLACE}")
            claims = [s.claim for s, _ in refused if s.adapter is adapter]
            self._on_finished([failed(claim, info, self.base.name) for claim in claims])

    def _progressed(self) -> None:
        self._progress_s = time.monotonic()

    def _take_arrivals(self) -> None:
        arrived, aborts = self.arrivals.take()
        gone = [(one, aborts[one.job_id]) for one in self.scheduler.end_jobs(aborts)]
        ended = [finished(one, self.base, reason) for one, reason in gone if reason is not None]
        # Aborts first: they were asked of what was here before these came.
        for sequence in [s for first in arrived for s in first.family.members]:
            self.scheduler.add(sequence)
        if ended:
            self._on_finished(ended)

    def _step(self, chunks: list[Chunk]) -> None:
        """Compute a plan, whole or in portions. What fails takes along only the jobs of its
        portion: nothing in that can be trusted."""
        while portion := self.portions.next(chunks):
            self._progressed()
            launched = False
            try:
                draw = self._launch(portion)
                launched = True
                self._collect(portion, draw)
            except Exception as error:  # noqa: BLE001 - a batch must not take the worker along
                if self._is_lost([c.sequence.job_id for c in portion]):
                    return
                if not launched and out_of_memory(error):
                    self.portions.halve(portion)
                    log.warning("out of memory", next_tokens=self.portions.most_tokens)
                    continue
                self._failed(portion, error)
                chunks = [c for c in chunks if c.sequence.key in self.scheduler.running]
        for misfit in self.portions.judge(len(chunks)):
            self._failed([misfit], no_memory_for(misfit))
        if self.portions.short_steps > SHORT_STEPS:
            self._break([])
        elif self.portions.short_steps:
            self.arrivals.wait(IDLE_WAIT_S)

    @torch.inference_mode()
    def _launch(self, portion: list[Chunk]) -> Draw:
        logits = self.runner.forward(portion)
        draw = Draw(logits, [c.sequence for c in portion if c.samples], self.runner.vocabulary)
        for chunk in portion:
            chunk.sequence.computed = chunk.end
            self.scheduler.blocks.computed(chunk.sequence, chunk.start)
        return draw

    def _collect(self, portion: list[Chunk], draw: Draw) -> None:
        sampling = [c.sequence for c in portion if c.samples]
        self._report_ended()
        tokens = draw.wait()
        self.portions.fitted(self.scheduler.max_step_tokens)
        self.counters.count(portion, len(tokens))
        for row, (sequence, token) in enumerate(zip(sampling, tokens, strict=True)):
            if sequence.grammar is not None and sequence.grammar.failed:
                self._end(sequence, GRAMMAR)
                continue
            if token == UNSOUND:
                self._end(sequence, "nonfinite_logits")
                if sequence.adapter is not None:
                    self.store.set_aside(sequence.adapter, "its logits were NaN or infinite")
                continue
            sequence.append(token, self.base.eos_ids, draw.scores.get(row))
            if sequence.claim.job.stream:
                self.texts.grew(sequence)
            if sequence.finish_reason is not None:
                self._end(sequence, None)
        if not self.overlaps:
            self._report_ended()

    def _end(self, sequence: Sequence, reason: str | None) -> None:
        self.scheduler.remove(sequence.key, keep=reason is None)
        over = reason is not None or sequence.family.is_over
        if over and self.scheduler.end(sequence.family):
            self._ended.append((sequence, reason))

    def _report_ended(self) -> None:
        ended, self._ended = self._ended, []
        if ended:
            self._report([finished(s, self.base, reason) for s, reason in ended])

    def _failed(self, portion: list[Chunk], error: Exception) -> None:
        self._report_ended()
        info = explained(error, "the engine failed in a step")
        gone = [c.sequence for c in portion if self.scheduler.end(c.sequence.family)]
        self._on_finished([failed(s.claim, info, self.base.name) for s in gone])

    def _is_lost(self, job_ids: List[str]) -> bool:
        """After an error: whether the device takes no more work. These jobs may be why."""
        if self.runner.settle():
            return False
        self._break(job_ids)
        return True

    def _break(self, blamed: List[str]) -> None:
        log.error("the device takes no more work from this process", blamed=len(blamed))
        self._broken = True
        self._report_ended()
        self._on_broken(blamed)

"""Our engine under a benchmark's workload: no queue, no ledger, prompts as token ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.workload import Request
from lorabatch import Job, Settings
from lorabatch.ledger import Claim, Outcome
from lorabatch.registry import Registry
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.build import build_engine
from lorabatch_worker.sequence import Sequence as EngineSequence

HOME = Path(__file__).parents[1] / ".lorabatch"


class FixedPrompts:
    """Stands in for the tokenizer: each job's token ids are given."""

    def __init__(self) -> None:
        self.ids: dict[str, tuple[int, ...]] = {}

    def prepare(self, claim: Claim, adapter: Adapter | None) -> EngineSequence:
        return EngineSequence(claim, list(self.ids[claim.job.job_id]), adapter)

    def close(self) -> None:
        pass


class OurEngine:
    """One started engine with its adapters loaded; `run` makes it run all requests."""

    def __init__(
        self,
        adapters: Sequence[Path],
        requests: Sequence[Request],
        *,
        new: int,
        warm_up: bool = True,
        registry: Registry | None = None,
        versions: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """`versions` of adapters in the `registry`, by name; `adapters` are configured ones."""
        self.requests, self.new = list(requests), new
        self._versions = versions or {}
        configured = ",".join(f"{p.name}={p.resolve()}" for p in adapters)
        settings = {"adapter_slots": max(len(adapters), 1), **settings}
        self.settings = Settings.load(home=HOME, adapters=configured, **settings)
        self.engine = build_engine(self.settings, registry)
        self._prompts = FixedPrompts()
        self.engine.preparer = self._prompts  # type: ignore[assignment]
        self._outcomes: list[Outcome] = []
        self._wanted = 0
        self._done = threading.Event()
        self.engine.start(lambda ids: None, self._finished)
        if warm_up:
            self.run(2)

    def run(self, new: int | None = None) -> float:
        """Seconds from the first submit to the last token, prefill included."""
        new = new or self.new
        sampling: Any = {"max_new_tokens": new, "ignore_eos": True}
        claims = []
        for request in self.requests:
            job = Job(prompt="-", adapter_id=request.adapter, sampling_params=sampling)
            self._prompts.ids[job.job_id] = request.ids
            bound = {n: self._versions[n] for n in (request.adapter,) if n in self._versions}
            claims.append(Claim(job, 1, 1, 0, 0, adapter_versions=bound))
        self._outcomes.clear()
        self._done.clear()
        self._wanted = len(claims)
        started = time.perf_counter()
        self.engine.submit(claims)
        if not self._done.wait(3600):
            raise TimeoutError(str(self.engine.load))
        seconds = time.perf_counter() - started
        wrong = [o.result.error for o in self._outcomes if len(o.result.token_ids) != new]
        if wrong:
            raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
        return seconds

    def close(self) -> None:
        self.engine.drain(0)

    def _finished(self, some: Sequence[Outcome]) -> None:
        self._outcomes.extend(some)
        if len(self._outcomes) == self._wanted:
            self._done.set()

"""An engine behind a desk: jobs go in, outcomes are kept in the order in which they come."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorabatch import Job, Result, Settings
from lorabatch.ledger import Claim, Outcome
from lorabatch.streams import Piece
from lorabatch_worker.build import build_engine
from lorabatch_worker.engine import Engine
from tests.models import ROOT, bundled_folder, claim, quiet_peft

WAIT_S = 120.0
PROMPTS = (
    "Once upon a time",
    "The",
    "A longer prompt that takes more than one block, to be sure, and more than one chunk too",
    "x y z " * 12,
)


def settings_for(folder: Path, home: Path, **fields: Any) -> Settings:
    """Small, on one thread."""
    return Settings.load(
        home=home,
        **{
            "base_model": str(folder),
            "base_model_aliases": ("acme/tiny",),
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "max_seqs": 8,
            "max_step_tokens": 256,
            "max_context_tokens": 256,
            "kv_cache_tokens": 4096,
            "block_size": 8,
            "adapter_slots": 3,
            "max_adapter_rank": 8,
            **fields,
        },
    )


def engine_for(folder: Path, home: Path, **fields: Any) -> Engine:
    return build_engine(settings_for(folder, home, **{"threads": 1, **fields}))


class Desk:
    """Submits to an engine and keeps what is reported, in order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.started: list[str] = []
        self.outcomes: list[Outcome] = []
        self.postponed: list[str] = []
        self.blamed: list[str] | None = None
        self._changed = threading.Condition()
        self.pieces: list[Piece] = []
        engine.start(
            *(self._on_started, self._on_finished, self._on_postponed, self._on_broken),
            on_text=self._on_text,
        )

    def _on_started(self, job_ids: Sequence[str]) -> None:
        with self._changed:
            self.started.extend(job_ids)
            self._changed.notify_all()

    def _on_postponed(self, claims: Sequence[Claim]) -> None:
        with self._changed:
            self.postponed += [claim.job.job_id for claim in claims]

    def _on_text(self, pieces: Sequence[Piece]) -> None:
        with self._changed:
            self.pieces += pieces

    def _on_broken(self, job_ids: Sequence[str]) -> None:
        with self._changed:
            self.blamed = list(job_ids)
            self._changed.notify_all()

    def wait_broken(self) -> list[str]:
        """The jobs that may be why."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.blamed is not None, WAIT_S)
        return self.blamed or []

    def _on_finished(self, outcomes: Sequence[Outcome]) -> None:
        with self._changed:
            self.outcomes.extend(outcomes)
            self._changed.notify_all()

    def submit(self, *jobs: Job) -> None:
        self.engine.submit([claim(job) for job in jobs])

    def reported(self) -> list[str]:
        with self._changed:
            return [o.claim.job.job_id for o in self.outcomes]

    def wait(self, job_ids: Iterable[str]) -> dict[str, Result]:
        """Results of these jobs, once all are in."""
        wanted = set(job_ids)
        with self._changed:
            found = self._changed.wait_for(lambda: wanted <= self._done().keys(), WAIT_S)
            assert found, f"no outcome for {sorted(wanted - self._done().keys())}"
            return {i: r for i, r in self._done().items() if i in wanted}

    def wait_started(self, job_id: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: job_id in self.started, WAIT_S)

    def _done(self) -> dict[str, Result]:
        return {o.claim.job.job_id: o.result for o in self.outcomes}

    def run(self, *jobs: Job) -> dict[str, Result]:
        self.submit(*jobs)
        return self.wait(job.job_id for job in jobs)


def start(folder: Path, home: Path, adapters: str = "", **fields: Any) -> Desk:
    return Desk(engine_for(folder, home, adapters=adapters, **fields))


def job(job_id: str, prompt: str = PROMPTS[0], adapter: str | None = None, **params: Any) -> Job:
    params = {"max_new_tokens": 8, "ignore_eos": True, **params}
    return Job(job_id=job_id, prompt=prompt, adapter_id=adapter, sampling_params=params)


def long(job_id: str, **fields: Any) -> Job:
    """Runs until it is ended."""
    return job(job_id, max_new_tokens=240, **fields)


def leave_nothing(engine: Engine) -> None:
    """No block, slot or sequence is held when all jobs have ended."""
    scheduler = engine.scheduler
    assert scheduler.blocks.free == scheduler.blocks.capacity
    assert scheduler.slots.users == 0
    assert not [*scheduler.running, *scheduler.waiting]
    assert len(engine.arrivals) == 0


@functools.cache
def real_desk() -> Desk:
    """The bundled model with the shipped adapters and PEFT's random ones; one for all tests."""
    from tests.parity import SHIPPED, load_reference, write_random_adapters

    home = ROOT / ".lorabatch"
    adapters = {p.parent.name: p.parent for p in sorted(SHIPPED.glob("*/adapter_config.json"))}
    with quiet_peft():
        random = write_random_adapters(load_reference(bundled_folder()), home / "parity-adapters")
    settings = Settings.load(
        home=home,
        adapters=",".join(f"{name}={path}" for name, path in {**adapters, **random}.items()),
        device="cpu",
        dtype="float32",
        threads=1,
        max_seqs=64,
    )
    return Desk(build_engine(settings))

"""What the queue and the ledger cost: the same jobs through the service and through the engine.

    python -m bench.end_to_end [--jobs 1000] [--repeats 3] [--fake]

The service: a producer enqueues all jobs (ledger, Redis), a worker process claims, runs and
records them; time from the first call of the producer until the last result is in the ledger. The
engine alone: the same jobs given to an engine in this process, tokenizing included; the two take
turns. `--fake` asks the other question: jobs a second with an engine that costs nothing.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ours import HOME
from bench.record import record
from bench.service import ROOT, WORKER, adapters_setting, shipped_adapters, start_worker
from lorabatch import Job, Settings
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.ledger import Claim, Outcome
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_producer import Producer
from lorabatch_worker.build import build_engine
from lorabatch_worker.bundled import bundled_checkpoint

NEW_TOKENS = 8
SUBJECTS = "moon tea bridge honey chess winter map glass salt clock".split()


def make_jobs(count: int, adapters: Sequence[str | None]) -> list[Job]:
    """Short jobs of three tenants; no two have the same prompt."""
    sampling: Any = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    return [
        Job(
            job_id=f"{i}-{uuid.uuid4().hex[:8]}",
            tenant=f"tenant-{i % 3}",
            adapter_id=adapters[i % len(adapters)],
            prompt=f"Question {i}: what is {SUBJECTS[i % len(SUBJECTS)]}? Answer:",
            sampling_params=sampling,
        )
        for i in range(count)
    ]


def through_service(settings: Settings, jobs: list[Job]) -> float:
    with Producer(settings) as producer:
        started = time.perf_counter()
        producer.enqueue_many(jobs)
        ended = sum(r.state == "succeeded" for r in producer.wait([j.job_id for j in jobs]))
        seconds = time.perf_counter() - started
    if ended != len(jobs):
        raise RuntimeError(f"{ended} of {len(jobs)} jobs succeeded")
    return seconds


class EngineAlone:
    def __init__(self, settings: Settings) -> None:
        self.engine = build_engine(settings)
        self._done = threading.Event()
        self._outcomes: list[Outcome] = []
        self._wanted = 0
        self.engine.start(lambda ids: None, self._finished)

    def run(self, jobs: list[Job]) -> float:
        self._outcomes.clear()
        self._done.clear()
        self._wanted = len(jobs)
        started = time.perf_counter()
        self.engine.submit([Claim(job, 1, 1, 0, 0) for job in jobs])
        self._done.wait()
        return time.perf_counter() - started

    def _finished(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes.extend(outcomes)
        if len(self._outcomes) == self._wanted:
            self._done.set()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fake", action="store_true", help="an engine that costs nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    home = Path(tempfile.mkdtemp(prefix="lorabatch-bench-"))
    adapters = shipped_adapters()
    names: list[str | None] = [*adapters, None]
    options: dict[str, Any] = {
        "base_model": str(bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)),
        "adapters": adapters_setting(adapters),
        "dtype": args.dtype,
    }
    settings = Settings.load(home=home, **options)
    environment = {f"LORABATCH_{name.upper()}": value for name, value in options.items()}
    command = WORKER
    if args.fake:
        command = [sys.executable, str(ROOT / "tests" / "fake_runner.py")]
        environment |= {"FAKE_STEP_S": "0", "PYTHONPATH": str(ROOT)}
    seconds: dict[str, list[float]] = {"service": [], "engine": []}
    try:
        ensure_valkey(home)
        alone = None if args.fake else EngineAlone(settings)
        worker = start_worker(home, home / "worker.log", command, **environment)
        warm = make_jobs(2 * len(names), names)
        through_service(settings, warm)
        if alone is not None:
            alone.run(warm)
        for _ in range(args.repeats):
            if alone is not None:
                seconds["engine"].append(alone.run(make_jobs(args.jobs, names)))
            seconds["service"].append(through_service(settings, make_jobs(args.jobs, names)))
        worker.terminate()
        worker.wait(60)
        if alone is not None:
            alone.engine.drain(0)
    finally:
        stop_valkey(home)
    shutil.rmtree(home)
    figures: dict[str, Any] = {}
    if not args.fake:
        pairs = zip(seconds["engine"], seconds["service"], strict=True)
        figures["engine_to_service"] = round(statistics.median(e / s for e, s in pairs), 3)
    record(
        "end_to_end",
        engine="fake" if args.fake else "real",
        dtype=args.dtype,
        jobs=args.jobs,
        new_tokens=NEW_TOKENS,
        adapters=len(adapters),
        repeats=args.repeats,
        jobs_per_s=round(args.jobs / statistics.median(seconds["service"]), 1),
        seconds={name: [round(s, 2) for s in some] for name, some in seconds.items()},
        **figures,
    )


if __name__ == "__main__":
    main()

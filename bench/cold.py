"""Does a cold adapter hold up the others? Step times while 20 load, against 20 that are here.

    python -m bench.cold [--running 24] [--arrivals 20] [--rounds 5] [--dtype bfloat16]

`--running` sequences of 8 adapters decode all the time. Every 12 steps one job of another adapter
comes, makes 4 tokens and goes: in `warm` rounds its adapter is in host memory, in `cold` ones its
files are on disk only, and are read, checked and laid out while the others go on. Step times are
the engine's, of the steps between the first arrival and the end of the last one's job; rounds take
turns, each with a new crowd, because texts grow and steps with them. `p99_ratio` is that of cold
over that of warm, median over the rounds; `job_ms` is how long the 20 jobs took on average.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import warnings
from typing import Any

from bench.many import load_once, registered
from bench.ours import HOME, OurEngine
from bench.record import record
from bench.workload import Request, make_requests, write_adapters
from lorabatch import Job
from lorabatch.ledger import Claim, Outcome
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint

STEPS_BETWEEN, SHORT_TOKENS, LONG_TOKENS = 12, 4, 3900


class Clocked:
    """An engine whose steps are timed, and jobs that come one by one."""

    def __init__(self, ours: OurEngine, versions: dict[str, str]) -> None:
        self.ours, self.versions = ours, versions
        self.steps: list[float] = []
        self._ended: dict[str, float] = {}
        self._changed = threading.Condition()
        engine = ours.engine
        step = engine._step

        def timed(chunks: Any) -> None:
            started = time.perf_counter()
            step(chunks)
            self.steps.append(time.perf_counter() - started)

        engine._step = timed  # type: ignore[method-assign]
        engine._on_finished = self._finished

    def submit(self, request: Request, new: int) -> str:
        sampling: Any = {"max_new_tokens": new, "ignore_eos": True}
        job = Job(prompt="-", adapter_id=request.adapter, sampling_params=sampling)
        self.ours._prompts.ids[job.job_id] = request.ids
        bound = {str(request.adapter): self.versions[str(request.adapter)]}
        self.ours.engine.submit([Claim(job, 1, 1, 0, 0, adapter_versions=bound)])
        return job.job_id

    def wait(self, job_ids: list[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(i in self._ended for i in job_ids), 600)

    def wait_steps(self, count: int) -> None:
        end = len(self.steps) + count
        while len(self.steps) < end:
            time.sleep(0.001)

    def round(self, requests: list[Request]) -> tuple[list[float], float]:
        """Step times while these come, and how long each took on average."""
        first, sent, ids = len(self.steps), [], []
        for request in requests:
            sent.append(time.perf_counter())
            ids.append(self.submit(request, SHORT_TOKENS))
            self.wait_steps(STEPS_BETWEEN)
        self.wait(ids)
        took = statistics.mean(self._ended[i] - at for i, at in zip(ids, sent, strict=True))
        return self.steps[first:], took

    def _finished(self, outcomes: Any) -> None:
        with self._changed:
            done: list[Outcome] = list(outcomes)
            wrong = [o.result.error for o in done if o.result.error and o.result.state == "failed"]
            if wrong:
                raise RuntimeError(str(wrong[0]))
            self._ended |= {o.claim.job.job_id: time.perf_counter() for o in done}
            self._changed.notify_all()


def p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * len(times))]


def main() -> None:
    from transformers import AutoConfig, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--running", type=int, default=24)
    parser.add_argument("--arrivals", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    count = 8 + args.arrivals * (args.rounds + 1)
    paths = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", count)
    registry, versions = registered(paths, HOME / "bench-many")
    names = [path.name for path in paths]
    plain = make_requests(AutoTokenizer.from_pretrained(folder), args.running, [])
    ours = OurEngine(
        [],
        plain[:8],
        new=4,
        registry=registry,
        versions=versions,
        adapter_slots=32,
        adapter_cache_bytes=16 << 30,
        max_context_tokens=4096,
        kv_cache_tokens=(args.running + 8) * 4096,
        prefix_cache=False,
        dtype=args.dtype,
    )
    clocked = Clocked(ours, versions)
    warm = names[8 : 8 + args.arrivals]
    load_once(ours, versions, names[: 8 + args.arrivals])
    crowd = [Request(request.ids, names[i % 8]) for i, request in enumerate(plain)]
    short = plain[0].ids[:64]
    found: dict[str, list[tuple[list[float], float]]] = {"warm": [], "cold": []}
    for i in range(args.rounds):
        first = 8 + args.arrivals * (i + 1)
        pair = [("warm", warm), ("cold", names[first : first + args.arrivals])]
        for kind, chosen in pair[:: 1 if i % 2 else -1]:
            running = [clocked.submit(request, LONG_TOKENS) for request in crowd]
            clocked.wait_steps(40)
            found[kind].append(clocked.round([Request(short, name) for name in chosen]))
            for job_id in running:  # texts grow, and steps with them: every round begins anew
                ours.engine.abort(job_id, "cancelled")
            clocked.wait(running)
    pairs = list(zip(found["cold"], found["warm"], strict=True))
    record(
        "cold",
        dtype=args.dtype,
        threads=ours.engine.threads,
        running=args.running,
        arrivals=args.arrivals,
        rounds=args.rounds,
        steps={kind: sum(len(s) for s, _ in some) for kind, some in found.items()},
        p50_ms={k: [round(1e3 * statistics.median(s), 2) for s, _ in r] for k, r in found.items()},
        p99_ms={k: [round(1e3 * p99(s), 2) for s, _ in r] for k, r in found.items()},
        p99_ratio=round(statistics.median(p99(c) / p99(w) for (c, _), (w, _) in pairs), 3),
        p50_ratio=round(
            statistics.median(
                statistics.median(c) / statistics.median(w) for (c, _), (w, _) in pairs
            ),
            3,
        ),
        job_ms={k: round(1e3 * statistics.mean(t for _, t in r), 1) for k, r in found.items()},
    )
    ours.engine._on_finished = lambda _: None
    ours.close()


if __name__ == "__main__":
    main()

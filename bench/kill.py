"""kill -9 of the real worker at random moments: is every accepted job recorded exactly once?

    python -m bench.kill [--jobs 500] [--kills 20] [--seed N]

One worker at a time on the real model and the shipped adapters; each is killed at a random moment
after it is ready, in mid-step as a rule, and another one is started. Checks: accepted = succeeded,
one result and one usage row a job, the audit finds no difference, jobs with the same prompt and
adapter have the same tokens, nothing is left in the broker. Exits 1 if one of these fails.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import redis
import sqlalchemy as sa

from bench.record import record
from bench.service import ROOT, adapters_setting, shipped_adapters, start_worker
from lorabatch import Job, Settings
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch.tables import job_attempts, results, usage_events
from lorabatch_producer import Producer
from lorabatch_producer.audit import audit
from lorabatch_worker.bundled import bundled_checkpoint

SUBJECTS = "moon tea bridge honey chess winter map glass salt clock".split()
END_TIMEOUT_S = 1200
LONGEST_LIFE_S = 6.0  # 20 lives are to end before 500 jobs do


def worker_of(settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    return start_worker(
        settings.home,
        log,
        LORABATCH_BASE_MODEL=settings.base_model,
        LORABATCH_ADAPTERS=adapters_setting(shipped_adapters()),
        LORABATCH_LEASE_S="3",
        LORABATCH_VISIBILITY_TIMEOUT_S="3",
        LORABATCH_SWEEP_INTERVAL_S="1",
        LORABATCH_RESEND_AFTER_S="3",
        LORABATCH_MAX_SEQS="16",
        LORABATCH_MAX_ATTEMPTS="1000",  # this asks about exactly once, not about poison
        LORABATCH_MAX_CRASHES="1000",
    )


def make_jobs(count: int) -> list[Job]:
    names: list[str | None] = [*shipped_adapters(), None]
    asked = [(name, subject) for subject in SUBJECTS for name in names]
    return [
        Job.model_validate(
            {
                "tenant": f"tenant-{i % 3}",
                "adapter_id": asked[i % len(asked)][0],
                "messages": [{"role": "user", "content": f"What is {asked[i % len(asked)][1]}?"}],
                "sampling_params": {"max_new_tokens": 96, "ignore_eos": True},
            }
        )
        for i in range(count)
    ]


def check(producer: Producer, jobs: list[Job], broker: redis.Redis) -> dict[str, int]:
    """Counts of what must be there once, and of what must not be there."""
    with producer.ledger.engine.connect() as connection:
        stored = list(connection.execute(results.select()))
        usage = list(connection.execute(usage_events.select()))
        attempts = connection.scalar(sa.select(sa.func.count()).select_from(job_attempts)) or 0
    outputs: dict[tuple[str | None, str], set[tuple[int, ...]]] = defaultdict(set)
    by_id = {job.job_id: job for job in jobs}
    for row in stored:
        job = by_id[row.job_id]
        assert job.messages is not None
        if row.state == "succeeded":
            outputs[job.adapter_id, job.messages[0].content].add(tuple(row.token_ids))
    return {
        "accepted": len(jobs),
        "succeeded": sum(row.state == "succeeded" for row in stored),
        "results": len({row.job_id for row in stored}),
        "result_rows": len(stored),
        "usage_rows": len(usage),
        "claims": attempts,
        "audit_differences": sum(1 for _ in audit(producer.ledger.engine)),
        "prompts_with_two_outputs": sum(len(some) > 1 for some in outputs.values()),
        "left_in_broker": sum(broker.llen(q) for q in ("lorabatch", "celery"))
        + broker.hlen("unacked"),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    dice = random.Random(args.seed)
    base = bundled_checkpoint(DEFAULT_BASE_MODEL, ROOT / ".lorabatch")
    home = Path(tempfile.mkdtemp(prefix="lorabatch-kill-"))
    settings = Settings.load(home=home, base_model=str(base))
    broker = redis.Redis.from_url(ensure_valkey(home))
    began = time.monotonic()
    open_at_kill = []
    try:
        with Producer(settings) as producer:
            jobs = make_jobs(args.jobs)
            producer.enqueue_many(jobs)
            for kill in range(args.kills):
                worker = worker_of(settings, home / f"worker-{kill}.log")
                time.sleep(dice.uniform(0.0, LONGEST_LIFE_S))
                worker.kill()
                worker.wait()
                done = producer.ledger.counts().get("succeeded", 0)
                open_at_kill.append(args.jobs - done)
                print(f"kill {kill + 1}: {open_at_kill[-1]} jobs open", flush=True)
            worker = worker_of(settings, home / "worker-last.log")
            for _ in producer.wait([j.job_id for j in jobs], timeout_s=END_TIMEOUT_S):
                pass
            deadline = time.monotonic() + 30
            while broker.hlen("unacked") and time.monotonic() < deadline:
                time.sleep(0.1)
            worker.terminate()
            code = worker.wait(60)
            figures = check(producer, jobs, broker)
    finally:
        stop_valkey(home)
    record(
        "kill",
        kills=args.kills,
        seed=args.seed,
        kills_with_open_jobs=sum(n > 0 for n in open_at_kill),
        last_worker_exit_code=code,
        seconds=round(time.monotonic() - began, 1),
        **figures,
    )
    shutil.rmtree(home)
    whole = {figures[k] for k in ("accepted", "succeeded", "results", "result_rows", "usage_rows")}
    zero = [figures[k] for k in ("audit_differences", "prompts_with_two_outputs", "left_in_broker")]
    return 0 if len(whole) == 1 and not any(zero) and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

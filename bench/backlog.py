"""A long backlog of one tenant: what it costs to have it, and how long another tenant waits.

    python -m bench.backlog [--jobs 100000] [--database postgresql|sqlite] [--small 10]

A JSONL file of so many lines is submitted, and again (all known); a worker around the tests' fake
runner drains it, with SEQS jobs at a time. While it does: memory of worker and broker, how long a
claim of 100 jobs takes, and how long `--small` jobs of another tenant wait, which come one after
another. `fair_s` is what such a job takes when the worker has nothing else to do. Then the batch is
cancelled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import redis
import sqlalchemy as sa

from bench.record import record
from bench.service import ROOT, start_worker
from lorabatch import Settings
from lorabatch.batches import Batches
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.tables import jobs
from lorabatch_producer import Producer
from lorabatch_producer.batch import submit
from tests.postgres import fresh_database, postgres

SEQS = 32
TOKENS = 20
STEP_S = 0.01
CLAIMS = 100
PROMPT = "Write one sentence about number {}. " + "It should be plain and true. " * 8


def timed(call: Any, *args: Any) -> tuple[Any, float]:
    start_s = time.monotonic()
    found = call(*args)
    return found, time.monotonic() - start_s


def rss_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def used_bytes(broker: Any) -> int:
    return int(broker.info("memory")["used_memory"])


def waits(producer: Producer, count: int) -> list[float]:
    """Seconds from acceptance to the end of each of so many jobs of a tenant of few."""
    found = []
    for i in range(count):
        job = {"tenant": "small", "prompt": f"small {i}", "max_new_tokens": TOKENS}
        _, waited_s = timed(producer.wait, producer.enqueue(job), 120.0)
        found.append(waited_s)
    return found


def claims_s(producer: Producer, rounds: int) -> list[float]:
    """How long it takes to claim 100 jobs that wait, beside a worker that does the same."""
    query = sa.select(jobs.c.job_id).where(jobs.c.state == "queued", jobs.c.sent_us.is_(None))
    with producer.ledger.engine.connect() as connection:
        ids = list(connection.scalars(query.limit(100 * rounds)))
    took = []
    for start in range(0, len(ids), 100):
        some = ids[start : start + 100]
        claimed, seconds = timed(producer.ledger.claim, some, "bench", 60.0)
        took.append(seconds)
        producer.ledger.release(list(claimed.values()))
    return took


def p(values: list[float], percent: int) -> float:
    return round(quantiles(values, n=100)[percent - 1], 4) if len(values) > 1 else values[0]


def write(path: Path, lines: int) -> None:
    with path.open("w") as file:
        for i in range(lines):
            row = {
                "custom_id": f"line-{i}",
                "adapter_id": None,
                "prompt": PROMPT.format(i),
                "max_new_tokens": TOKENS,
            }
            file.write(json.dumps(row) + "\n")


def measure(url: str | None, lines: int, small: int, stack: ExitStack) -> dict[str, Any]:
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    settings = Settings.load(home=home, database_url=url)
    if url is not None:
        from lorabatch.database import upgrade

        upgrade(url)
    broker = redis.Redis.from_url(ensure_valkey(home))
    stack.callback(stop_valkey, home)
    empty_bytes = used_bytes(broker)
    producer = stack.enter_context(Producer(settings))
    path = home / "in.jsonl"
    write(path, lines)
    figures: dict[str, Any] = {"file_mb": round(path.stat().st_size / 1e6, 1)}
    done, figures["import_s"] = timed(submit, producer, path, "big")
    _, figures["again_s"] = timed(submit, producer, path, "big")
    _, figures["progress_s"] = timed(producer.status, done.batch_id)
    worker = start_worker(
        home,
        home / "log",
        [sys.executable, str(ROOT / "tests" / "fake_runner.py")],
        LORABATCH_MAX_SEQS=str(SEQS),
        FAKE_STEP_S=str(STEP_S),
        **({"LORABATCH_DATABASE_URL": url} if url else {}),
    )
    try:
        fresh_bytes = rss_bytes(worker.pid)
        time.sleep(5)
        beside = waits(producer, small)
        took = claims_s(producer, CLAIMS)
        figures |= {
            "small_wait_p50_s": round(median(beside), 3),
            "small_wait_p95_s": p(beside, 95),
            "claim_100_p50_s": p(took, 50),
            "claim_100_p99_s": p(took, 99),
            "worker_rss_mb": round(rss_bytes(worker.pid) / 1e6, 1),
            "worker_rss_grown_mb": round((rss_bytes(worker.pid) - fresh_bytes) / 1e6, 1),
            "broker_mb": round((used_bytes(broker) - empty_bytes) / 1e6, 2),
        }
        ended, figures["cancel_s"] = timed(Batches(producer.ledger.engine).cancel, done.batch_id)
        figures["cancelled_jobs"] = ended["cancelled"]
        time.sleep(2)
        alone = waits(producer, small)
        figures |= {"fair_s": round(median(alone), 3), "fair_p95_s": p(alone, 95)}
    finally:
        worker.terminate()
        worker.wait(30)
        broker.close()
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="sqlite")
    parser.add_argument("--small", type=int, default=10)
    args = parser.parse_args()
    with ExitStack() as stack:
        url = None
        if args.database == "postgresql":
            url = fresh_database(stack.enter_context(postgres()))
        figures = measure(url, args.jobs, args.small, stack)
    record("backlog", jobs=args.jobs, database=args.database, **figures)


if __name__ == "__main__":
    main()

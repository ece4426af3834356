"""Worker processes around the fake runner or the engine, plain Celery clients, and the oracle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from celery import Celery

from lorabatch import Job, Ledger, Settings
from lorabatch.database import connect, open_database, upgrade
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.feed import Feed
from lorabatch.queue import drained, make_app, send
from lorabatch.tables import job_attempts, jobs, results, usage_events
from lorabatch_worker.sweeper import task_id_of

TESTS = Path(__file__).parents[1]
WORKER = "from lorabatch_worker.main import main; main()"
KEPT = ("PATH", "HOME", "PYTHONPATH")  # the last: which checkout's code a worker runs
FAST = {
    "LORABATCH_MAX_SEQS": "8",
    "LORABATCH_LEASE_S": "2",
    "LORABATCH_VISIBILITY_TIMEOUT_S": "2",
    "LORABATCH_SWEEP_INTERVAL_S": "0.5",
    "LORABATCH_RESEND_AFTER_S": "2",
    "LORABATCH_DRAIN_S": "20",
    "LORABATCH_LOG_FORMAT": "json",
}


def wait_until(
    what: str,
    ready: Callable[[], Any],
    timeout_s: float = 30.0,
    shown: Callable[[], Any] | None = None,
) -> Any:
    """Poll until `ready()` is true and return it; fail with the last value after the deadline."""
    end_s = time.monotonic() + timeout_s
    while not (value := ready()):
        if time.monotonic() > end_s:
            last = value if shown is None else shown()
            pytest.fail(f"not within {timeout_s} s: {what} (last: {last!r})")
        time.sleep(0.02)
    return value


class Worker:
    """One worker process."""

    command: Sequence[str] = (sys.executable, str(TESTS / "fake_runner.py"))

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        self.log = log
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                env={**kept, **env},
                stdout=file,
                stderr=file,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> Worker:
        def ready() -> bool:
            assert self.process.poll() is None, self.text()
            return '"ready"' in self.text()

        wait_until("worker ready", ready)
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)


class RealWorker(Worker):
    """One with the real engine."""

    command = (sys.executable, "-c", WORKER)


def model_settings(model: Path) -> dict[str, str]:
    """Of a worker that runs a tiny model, with a Hub that is dead."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    return {
        "LORABATCH_BASE_MODEL": str(model),
        "LORABATCH_BASE_MODEL_ALIASES": "acme/tiny",
        "LORABATCH_DTYPE": "float32",
        "LORABATCH_THREADS": "1",
        "LORABATCH_ADAPTER_FETCH_ATTEMPTS": "2",
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "NO_PROXY": "127.0.0.1",
    }


class Shop:
    """A data folder with its broker and ledger, and the workers that drain it."""

    def __init__(self, home: Path, database_url: str | None = None) -> None:
        self.home = home
        self.url = ensure_valkey(home)
        self.env = {"LORABATCH_HOME": str(home), **FAST}
        if database_url is not None:
            self.env["LORABATCH_DATABASE_URL"] = database_url
            upgrade(database_url)
        self.settings = Settings.load(home=home, database_url=database_url)
        engine = open_database(self.settings) if database_url is None else connect(database_url)
        self.ledger = Ledger(engine)
        self.broker = redis.Redis.from_url(self.url)
        self.producer = make_app(self.settings, "producer")
        self.client = Celery("client", broker=self.url, backend=self.url, set_as_current=False)
        self.workers: list[Worker] = []

    def start(self, **env: str) -> Worker:
        log = self.home / f"worker-{len(self.workers)}.log"
        worker = Worker(log, {**self.env, **env})
        self.workers.append(worker)
        return worker

    def accept(self, count: int, tokens: int = 4, **fields: Any) -> list[Job]:
        """Jobs in the ledger and their messages in the queue, as our producer does it with few."""
        accepted = [
            Job(
                prompt=f"prompt number {i}",
                adapter_id=f"adapter-{i % 5}",
                tenant=f"tenant-{i % 3}",
                sampling_params={"max_new_tokens": tokens + i % 3},
                **fields,
            )
            for i in range(count)
        ]
        self.ledger.accept(accepted)
        self.send(accepted)
        return accepted

    def send(self, accepted: Sequence[Job]) -> None:
        feed = Feed(self.ledger.engine, self.settings.queue)
        messages = feed.take_these([job.job_id for job in accepted])
        send(self.producer, self.settings.queue, messages)

    def generate(self, **kwargs: Any) -> Any:
        """A plain Celery client's call on its own default queue."""
        return self.client.send_task("lorabatch.generate", kwargs=kwargs)

    def ended(self, count: int) -> bool:
        counts = self.ledger.counts()
        return (
            counts.get("queued", 0) + counts.get("running", 0) == 0
            and sum(counts.values()) == count
        )

    def wait_ended(self, count: int, timeout_s: float = 120.0) -> None:
        wait_until(f"{count} jobs ended", lambda: self.ended(count), timeout_s)

    def wait_broker_empty(self) -> None:
        """No message is queued and none is given out without acknowledgement.

        An acknowledgement that a lost connection took with it comes with the next delivery of
        that message: after the visibility timeout.
        """
        limit_s = self.settings.visibility_timeout_s + 15.0
        wait_until("broker empty", lambda: self.in_broker() == {}, limit_s, self.in_broker)

    def in_broker(self) -> dict[str, int]:
        sizes: dict[str, int] = {
            queue: sum(map(self.broker.llen, drained([queue]))) for queue in self.settings.consume
        }
        sizes["unacked"] = self.broker.hlen("unacked")
        sizes["unacked_index"] = self.broker.zcard("unacked_index")
        return {name: size for name, size in sizes.items() if size}

    def ids_in_broker(self) -> set[str]:
        names = drained(self.settings.consume)
        raw = [item for name in names for item in self.broker.lrange(name, 0, -1)]
        return {task_id_of(item) for item in [*raw, *self.broker.hvals("unacked")]}

    def rows(self, table: sa.Table) -> list[Any]:
        with self.ledger.engine.connect() as connection:
            return list(connection.execute(table.select()))

    def executions(self) -> Counter[str]:
        return Counter(row.job_id for row in self.rows(job_attempts))

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        self.broker.close()
        self.client.close()
        self.producer.close()
        self.ledger.engine.dispose()
        stop_valkey(self.home)


def check_exactly_once(shop: Shop, accepted: Sequence[Job]) -> None:
    """The oracle: accepted = terminal, one result and one usage row a job, no swap, sums agree."""
    from tests.fake_runner import fake_text

    wanted = {job.job_id: job for job in accepted}
    ended = {row.job_id: row.state for row in shop.rows(jobs)}
    stored = shop.rows(results)
    usage = shop.rows(usage_events)
    assert ended == dict.fromkeys(wanted, "succeeded")
    assert Counter(row.job_id for row in stored) == Counter(wanted.keys())
    assert Counter(row.job_id for row in usage) == Counter(wanted.keys())
    assert {row.job_id: row.text for row in stored} == {
        job_id: fake_text(job) for job_id, job in wanted.items()
    }
    assert all(
        len(row.token_ids) == wanted[row.job_id].sampling_params.max_new_tokens for row in stored
    )
    assert sum(row.output_tokens for row in usage) == sum(len(row.token_ids) for row in stored)
    assert {row.job_id: row.tenant for row in usage} == {i: j.tenant for i, j in wanted.items()}

"""What a job takes in the database and in Redis, and what a worker opens.

    python -m bench.size [--jobs 2000] [--database postgresql|sqlite]

Jobs with a prompt of 2,000 characters of random words and 64 output tokens: their rows' bytes while
they wait and when they have ended, indexes included, as the database lies and after it was packed
(VACUUM FULL, VACUUM), and the bytes of a message in the broker. Then the real worker on the bundled
model: most connections and open files that it has while it runs some jobs, and its memory.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from bench.backlog import used_bytes
from bench.record import record
from bench.service import ROOT, start_worker
from lorabatch import Job, Settings
from lorabatch.database import upgrade
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.feed import Feed
from lorabatch.queue import send
from lorabatch.tables import jobs
from lorabatch_producer import Producer
from tests.postgres import fresh_database, postgres

CHARACTERS = 2000
TOKENS = 64
REAL_JOBS = 64
WORKER = "from lorabatch_worker.main import main; main()"
SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def prompts(count: int) -> list[str]:
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(4000)]
    return [" ".join(rng.choices(words, k=CHARACTERS))[:CHARACTERS] for _ in range(count)]


def stored(engine: sa.Engine, packed: bool = True) -> int:
    """Bytes of the database."""
    sqlite = engine.dialect.name == "sqlite"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if sqlite:
            connection.exec_driver_sql("ROLLBACK")
        if packed:
            connection.exec_driver_sql("VACUUM" if sqlite else "VACUUM FULL")
        if not sqlite:
            size = sa.select(sa.func.pg_database_size(sa.func.current_database()))
            return int(connection.scalar(size) or 0)
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        path = engine.url.database
        connection.exec_driver_sql("BEGIN")
    assert path is not None
    return Path(path).stat().st_size


def wait(producer: Producer, ids: list[str], process: Any, url: str | None) -> dict[str, int]:
    """Until they have ended: the most that the worker had open."""
    most = {"to_broker": 0, "to_database": 0, "open_files": 0, "threads": 0}
    seen = psutil.Process(process.pid)
    while set(producer.ledger.states(ids).values()) & {"queued", "running"}:
        now = {"open_files": seen.num_fds(), "threads": seen.num_threads()}
        links = [c for c in seen.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
        now["to_broker"] = len(links)
        if url is not None:
            with producer.ledger.engine.connect() as connection:
                now["to_database"] = int(connection.exec_driver_sql(SESSIONS).scalar() or 0)
        most = {name: max(most[name], now.get(name, 0)) for name in most}
        time.sleep(0.05)
    return most | {"rss_mb": seen.memory_info().rss >> 20}


def run(home: Path, command: list[str], url: str | None, made: list[Job]) -> dict[str, int]:
    env = {"LORABATCH_DATABASE_URL": url} if url else {}
    seqs = {"LORABATCH_MAX_SEQS": "64", "FAKE_STEP_S": "0.001"}
    worker = start_worker(home, home / "log", [sys.executable, *command], **seqs, **env)
    try:
        with Producer(Settings.load(home=home, database_url=url)) as producer:
            ids = producer.enqueue_many(made) if made else _all(producer)
            return wait(producer, ids, worker, url)
    finally:
        worker.terminate()
        worker.wait()


def _all(producer: Producer) -> list[str]:
    with producer.ledger.engine.connect() as connection:
        return list(connection.scalars(sa.select(jobs.c.job_id)))


def measure(url: str | None, count: int, stack: ExitStack) -> dict[str, Any]:
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    broker = redis.Redis.from_url(ensure_valkey(home))
    stack.callback(stop_valkey, home)
    if url is not None:
        upgrade(url)
    with Producer(Settings.load(home=home, database_url=url)) as producer:
        engine = producer.ledger.engine
        empty, idle = stored(engine), used_bytes(broker)
        params = {"max_new_tokens": TOKENS}
        made = [Job(prompt=p, tenant="acme", sampling_params=params) for p in prompts(count)]
        for start in range(0, count, 1000):
            producer.ledger.accept(made[start : start + 1000])
        waiting = stored(engine)
        feed = Feed(engine, "lorabatch", window=count)
        while messages := feed.take():
            send(producer.app(), "lorabatch", messages)
        figures = {"message_bytes": round((used_bytes(broker) - idle) / count)}
    fake = run(home, [str(ROOT / "tests" / "fake_runner.py")], url, [])
    with Producer(Settings.load(home=home, database_url=url)) as producer:
        engine = producer.ledger.engine
        lying, ended = stored(engine, packed=False), stored(engine)
    figures |= {
        "waiting_bytes": round((waiting - empty) / count),
        "ended_bytes": round((ended - empty) / count),
        "ended_unpacked_bytes": round((lying - empty) / count),
    }
    few = {"max_new_tokens": 8}
    short = [Job(prompt=f"Count to {n}.", sampling_params=few) for n in range(REAL_JOBS)]
    return {**figures, "fake": fake, "real": run(home, ["-c", WORKER], url, short)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    args = parser.parse_args()
    with ExitStack() as stack:
        url = None
        if args.database == "postgresql":
            url = fresh_database(stack.enter_context(postgres()))
        figures = measure(url, args.jobs, stack)
    given = {"database": args.database, "jobs": args.jobs, "prompt_characters": CHARACTERS}
    record("size", **given, output_tokens=TOKENS, **figures)


if __name__ == "__main__":
    main()

"""Jobs a second through Redis and SQL, with an engine that costs nothing; against stock Celery.

    python -m bench.queue [--jobs 20000] [--database postgresql|sqlite] [--repeats 3]

Ours: a worker around the tests' fake runner drains jobs that were accepted before it started, its
feeder sends them, results, usage and states are recorded. Stock: Celery's own worker with a process
a core (prefork, acks late) drains as many messages, and its task writes the same rows of a job in
one transaction. In turns, on the same servers. CPU time is of the worker's processes, from /proc.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import sqlalchemy as sa

from bench.record import record
from bench.service import ROOT, start_worker
from lorabatch import Job, Ledger, Settings
from lorabatch.database import open_database, upgrade
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.queue import make_app
from tests.postgres import fresh_database, postgres

TENANTS = 16
SEQS = 256
LIMIT_S = 600


def jobs(count: int) -> list[Job]:
    return [
        Job(
            tenant=f"tenant-{i % TENANTS}",
            prompt=f"prompt {i}",
            sampling_params={"max_new_tokens": 1},
        )
        for i in range(count)
    ]


def cpu_s(pid: int) -> float:
    """User and system time of a process and of its children that live."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        if int(stat.parent.name) == pid or int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Round:
    """A fresh ledger and broker, with so many jobs accepted."""

    def __init__(self, url: str | None, count: int, stack: ExitStack) -> None:
        self.home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.count = count
        if url is not None:
            upgrade(url)
        self.settings = Settings.load(home=self.home, database_url=url)
        self.broker = ensure_valkey(self.home)
        stack.callback(stop_valkey, self.home)
        self.engine = open_database(self.settings)
        stack.callback(self.engine.dispose)
        self.accepted = jobs(count)
        ledger = Ledger(self.engine)
        for start in range(0, count, 1000):
            ledger.accept(self.accepted[start : start + 1000])

    def environment(self) -> dict[str, str]:
        url = self.settings.database_url
        return {"LORABATCH_DATABASE_URL": url} if url else {}

    def drained(self, process: subprocess.Popen[bytes]) -> tuple[float, float]:
        """Wall and CPU seconds from the first result on, until all have ended."""
        query = sa.text("SELECT count(*) FROM results")
        seen, begun_s, begun_cpu_s = 0, 0.0, 0.0
        end_s = time.monotonic() + LIMIT_S
        first = 0
        while seen < self.count:
            if process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit(f"{seen} of {self.count} jobs, and the worker is gone")
            time.sleep(0.05)
            with self.engine.connect() as connection:
                seen = int(connection.scalar(query) or 0)
            if seen and not begun_s:
                first, begun_s, begun_cpu_s = seen, time.monotonic(), cpu_s(process.pid)
        share = self.count / max(1, self.count - first)
        return (
            (time.monotonic() - begun_s) * share,
            (cpu_s(process.pid) - begun_cpu_s) * share,
        )


def ours(round_: Round) -> tuple[float, float]:
    command = [sys.executable, str(ROOT / "tests" / "fake_runner.py")]
    process = start_worker(
        round_.home,
        round_.home / "log",
        command,
        **round_.environment(),
        LORABATCH_MAX_SEQS=str(SEQS),
        FAKE_STEP_S="0.002",
    )
    try:
        return round_.drained(process)
    finally:
        process.terminate()
        process.wait(30)


def stock(round_: Round) -> tuple[float, float]:
    app = make_app(round_.settings)
    with app.producer_or_acquire() as producer, producer.batch(1000):
        for job in round_.accepted:
            app.send_task(
                "bench.stock",
                args=[job.job_id],
                queue="stock",
                producer=producer,
                ignore_result=True,
                argsrepr="",
            )
    app.close()
    cores = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "celery", "-A", "bench.stock_app", "worker"]
    command += ["--pool", "prefork", "--concurrency", cores, "-Q", "stock", "-l", "warning"]
    command += ["--without-gossip", "--without-mingle"]
    environment = {
        **os.environ,
        "BENCH_BROKER": round_.broker,
        "BENCH_DATABASE": round_.settings.resolved_database_url,
    }
    with (round_.home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        return round_.drained(process)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    figures: dict[str, list[float]] = {"ours": [], "ours_cpu": [], "stock": [], "stock_cpu": []}
    with ExitStack() as servers:
        server = None
        if args.database == "postgresql":
            server = servers.enter_context(postgres())
        for _ in range(args.repeats):
            for name, run, count in (
                ("ours", ours, args.jobs),
                ("stock", stock, max(500, args.jobs // 8)),
            ):
                with ExitStack() as stack:
                    url = None if server is None else fresh_database(server)
                    wall_s, used_s = run(Round(url, count, stack))
                figures[name].append(count / wall_s)
                figures[f"{name}_cpu"].append(1000 * used_s / count)
    record(
        "queue",
        jobs=args.jobs,
        database=args.database,
        repeats=args.repeats,
        ours_jobs_s=round(median(figures["ours"])),
        ours_cpu_ms_a_job=round(median(figures["ours_cpu"]), 3),
        stock_jobs_s=round(median(figures["stock"])),
        stock_cpu_ms_a_job=round(median(figures["stock_cpu"]), 3),
        ratio=round(median(figures["ours"]) / median(figures["stock"]), 2),
        turns={name: [round(v, 3) for v in values] for name, values in figures.items()},
    )


if __name__ == "__main__":
    main()

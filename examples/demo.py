"""The main job, end to end, on this machine: `make demo`.

Starts a worker on the embedded Valkey and SQLite of LORABATCH_HOME, puts jobs of three tenants
for four adapters and the base model into the queue, shows them being worked off in mixed
micro-batches, then the same prompt through each adapter, and who used what.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lorabatch import Job, Result, Settings
from lorabatch.embedded import stop_valkey, valkey_running
from lorabatch_producer import Producer
from lorabatch_producer.usage import FIGURES, usage_report

ADAPTERS = Path(__file__).parent / "adapters"
TENANTS = ("acme", "globex", "initech")
SHARED_PROMPTS = ("What is the moon?", "How many students are there?")
PROMPTS = (
    *SHARED_PROMPTS,
    "List every city of the customers.",
    "Why do people drink tea?",
    "What is a bridge?",
    "Show the orders whose total is above 90.",
    "Tell me one fact about honey.",
    "What does a lighthouse do?",
    "Count the books for each author.",
    "Why is the sky blue?",
    "What is chess?",
    "What is the average age of the players?",
    "Tell me about winter.",
)
READY_TIMEOUT_S = 300
WAIT_TIMEOUT_S = 900
console = Console()


def adapter_folders() -> dict[str, Path]:
    return {p.parent.name: p.parent for p in sorted(ADAPTERS.glob("*/adapter_config.json"))}


@contextlib.contextmanager
def worker(settings: Settings) -> Iterator[psutil.Process]:
    """`lorabatch-worker` as its own process; its log goes to worker.log in the data folder."""
    command = [str(Path(sys.executable).parent / "lorabatch-worker")]
    adapters = ",".join(f"{name}={path}" for name, path in adapter_folders().items())
    environment = {
        **os.environ,
        "LORABATCH_HOME": str(settings.home),
        "LORABATCH_ADAPTERS": adapters,
    }
    log = (settings.home / "worker.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def wait_ready(settings: Settings, process: psutil.Process) -> float:
    """Seconds until the worker consumes."""
    started = time.monotonic()
    log = settings.home / "worker.log"
    with console.status("starting a worker (the first time, the base model is unpacked) ..."):
        while time.monotonic() - started < READY_TIMEOUT_S:
            if "ready" in log.read_text(errors="replace"):
                return time.monotonic() - started
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
    console.print(log.read_text(errors="replace")[-3000:])
    raise SystemExit("the worker did not start; its log is above")


def make_jobs() -> list[Job]:
    """Neighbours differ in adapter and tenant, so that micro-batches are mixed."""
    names: list[str | None] = [*adapter_folders(), None]
    return [
        Job(
            tenant=TENANTS[(i + j) % len(TENANTS)],
            adapter_id=name,
            messages=[{"role": "user", "content": prompt}],  # type: ignore[arg-type]
            sampling_params={"max_new_tokens": 48},  # type: ignore[arg-type]
        )
        for i, prompt in enumerate(PROMPTS)
        for j, name in enumerate(names)
    ]


def run(producer: Producer, jobs: list[Job]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    tokens = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("generating", total=len(jobs), rate="")
        started = time.monotonic()
        ids = producer.enqueue_many(jobs)
        for result in producer.wait(ids, timeout_s=WAIT_TIMEOUT_S):
            results[result.job_id] = result
            tokens += result.usage.output_tokens
            rate = f"{tokens / (time.monotonic() - started):.0f} tokens/s"
            progress.update(task, advance=1, rate=rate)
    return results


def peak_rss_mb(process: psutil.Process) -> int:
    """The worker's largest resident set so far; Linux keeps it, elsewhere the current one."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) // 1024
    return int(process.memory_info().rss) >> 20


def engine_figures(producer: Producer) -> dict[str, Any]:
    """What the worker says of itself."""
    stats = producer.app().control.inspect(timeout=5).stats() or {}
    return next((s.get("pool", {}) for s in stats.values()), {})


def show_side_by_side(jobs: list[Job], results: dict[str, Result]) -> None:
    for prompt in SHARED_PROMPTS:
        table = Table(title=f"{prompt!r} through each adapter", show_lines=True)
        table.add_column("adapter", style="cyan")
        table.add_column("text")
        for job in jobs:
            if job.messages and job.messages[0].content == prompt:
                text = results[job.job_id].text or f"({results[job.job_id].error})"
                table.add_row(job.adapter_id or "(base model)", text.strip())
        console.print(table)


def show_usage(producer: Producer, since: datetime) -> None:
    rows = usage_report(producer.ledger.engine, ("tenant", "adapter"), since)
    table = Table(title="usage by tenant and adapter, from the ledger")
    for name in ("tenant", "adapter"):
        table.add_column(name)
    for name in ("jobs", "input tokens", "output tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        tenant, adapter = row.group
        figures = (row.jobs, row.input_tokens, row.output_tokens)
        table.add_row(tenant, adapter or "(base model)", *map(str, figures))
    sums = (sum(column) for column in zip(*(r.figures for r in rows), strict=True))
    by_name = dict(zip(FIGURES, sums, strict=True))
    table.add_section()
    totals = (by_name["jobs"], by_name["input_tokens"], by_name["output_tokens"])
    table.add_row("total", "", *map(str, totals))
    console.print(table)


def show_next_steps(settings: Settings) -> None:
    folders = ",".join(f"{name}=examples/adapters/{name}" for name in adapter_folders())
    console.print(
        f"""
[bold]How to go on[/bold], with the same data folder:

  export PATH="$PWD/.venv/bin:$PATH" LORABATCH_HOME={settings.home}
  export LORABATCH_ADAPTERS={folders}
  lorabatch-worker                                         # in one terminal
  lorabatch enqueue --adapter pirate --tenant acme "What is rain?" --wait      # in another
  lorabatch batch submit examples/batch.jsonl --wait --output out.jsonl
  lorabatch report usage --by tenant,adapter
  lorabatch report audit
  lorabatch doctor
""",
        soft_wrap=True,
        highlight=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The main job, end to end, on this machine.")
    parser.add_argument("--record", action="store_true", help="keep the figures in bench/results")
    arguments = parser.parse_args()
    began = time.monotonic()
    since = datetime.now(UTC) - timedelta(milliseconds=2)
    settings = Settings.load()
    settings.home.mkdir(parents=True, exist_ok=True)
    had_valkey = valkey_running(settings.home) is not None
    jobs = make_jobs()
    names = {job.adapter_id for job in jobs}
    console.print(
        f"{len(jobs)} jobs of {len(TENANTS)} tenants for {len(names) - 1} adapters and the base "
        f"model {settings.base_model}, data in {settings.home}"
    )
    try:
        with Producer(settings) as producer, worker(settings) as process:
            ready_s = wait_ready(settings, process)
            started = time.monotonic()
            results = run(producer, jobs)
            run_s = time.monotonic() - started
            engine = engine_figures(producer)
            peak_mb = peak_rss_mb(process)
            show_side_by_side(jobs, results)
            show_usage(producer, since)
    finally:
        if not had_valkey:
            stop_valkey(settings.home)
    failed = sum(r.state != "succeeded" for r in results.values())
    tokens = sum(r.usage.output_tokens for r in results.values())
    figures = {
        "jobs": len(jobs),
        "failed": failed,
        "adapters": len(names) - 1,
        "tenants": len(TENANTS),
        "worker_ready_s": round(ready_s, 1),
        "run_s": round(run_s, 1),
        "output_tokens": tokens,
        "steps": engine.get("steps"),
        "mixed_steps": engine.get("mixed_steps"),
        "occupancy": engine.get("occupancy"),
        "worker_peak_rss_mb": peak_mb,
        "total_s": round(time.monotonic() - began, 1),
    }
    console.print(
        f"{len(jobs) - failed} of {len(jobs)} jobs succeeded: {tokens} tokens in {run_s:.1f} s, "
        f"{engine.get('mixed_steps')} of {engine.get('steps')} steps mixed several adapters, "
        f"{engine.get('occupancy', 0):.0%} of {settings.max_seqs} sequences a step on average; "
        f"worker ready in {ready_s:.1f} s, peak memory {peak_mb} MB"
    )
    show_next_steps(settings)
    if arguments.record:
        sys.path.append(str(Path(__file__).parents[1]))
        from bench.record import record

        record("demo", **figures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

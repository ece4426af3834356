"""A batch by OpenAI's own client, from its file to its output: how long each part takes.

    python -m bench.openai_batch [--lines 100000] [--real] [--database sqlite] [--max-tokens 16]

With a runner that generates nothing, so that everything around the engine is what is measured;
`--real`: the real base model and the shipped adapters. Every line of the output is looked at: each
custom id once, its text of its own adapter's job (the fake runner says so in the text).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai

from bench.http import wait_ready
from bench.record import record
from bench.service import ROOT, WORKER, adapters_setting, shipped_adapters, start_worker
from lorabatch.database import upgrade
from lorabatch.embedded import ensure_valkey, stop_valkey
from tests.fake_runner import fake_text
from tests.models import bundled_folder
from tests.postgres import fresh_database, postgres

FAKE = [sys.executable, str(ROOT / "tests" / "fake_runner.py")]
QUESTIONS = ("How many books are there?", "Tell me about winter.", "What is a bridge?")


def line(number: int, adapters: list[str], max_tokens: int) -> dict[str, Any]:
    question = f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"
    body = {
        "model": adapters[number % len(adapters)],
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    return {
        "custom_id": f"line-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


def run(client: openai.OpenAI, file: Path, lines: int) -> tuple[dict[str, float], bytes]:
    """Seconds of each part, and the output."""
    begun = time.perf_counter()
    seconds = {}

    def passed(part: str) -> None:
        seconds[part] = round(time.perf_counter() - begun - sum(seconds.values()), 2)

    uploaded = client.files.create(file=file, purpose="batch")
    passed("upload")
    batch = client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status == "validating":
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    passed("validate")
    while batch.status in ("in_progress", "finalizing"):
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    passed("run")
    counts = batch.request_counts
    if batch.status != "completed" or counts is None or counts.completed != lines:
        raise SystemExit(f"wanted {lines} completed lines: {batch}")
    assert batch.output_file_id is not None
    output = client.files.content(batch.output_file_id).content
    passed("download")
    return seconds, output


def check(output: bytes, lines: int, wanted: list[dict[str, Any]] | None) -> None:
    """Raises SystemExit unless each line is there once, with a text of its own."""
    found = {row["custom_id"]: row for row in map(json.loads, output.splitlines())}
    rows = output.count(b"\n")
    if (len(found), rows) != (lines, lines):
        raise SystemExit(f"wanted {lines} lines, found {rows} of {len(found)} custom ids")
    for asked in wanted or ():
        content = found[asked["custom_id"]]["response"]["body"]["choices"][0]["message"]["content"]
        if content != fake_text(_job(asked["body"])):
            raise SystemExit(f"{asked['custom_id']}: somebody else's text: {content!r}")


def _job(body: dict[str, Any]) -> Any:
    from lorabatch import Job

    return Job(adapter_id=body["model"], messages=body["messages"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="sqlite")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=18_322)
    args = parser.parse_args()
    adapters = sorted(shipped_adapters())
    lines = [line(number, adapters, args.max_tokens) for number in range(args.lines)]
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(postgres()) if args.database == "postgresql" else None
        url = fresh_database(server) if server else f"sqlite:///{home / 'ledger.db'}"
        upgrade(url)
        env = {
            "LORABATCH_DATABASE_URL": url,
            "LORABATCH_ADAPTERS": adapters_setting(shipped_adapters()),
            "LORABATCH_HTTP_MAX_BATCH_LINES": str(args.lines),
            "LORABATCH_LOG_LEVEL": "warning",
        }
        ensure_valkey(home)
        stack.callback(stop_valkey, home)
        if args.real:
            (home / "models").symlink_to(bundled_folder().parents[0])
            worker = start_worker(home, home / "worker.log", WORKER, **env | INFO)
        else:
            more = {"FAKE_STEP_S": "0", "LORABATCH_MAX_SEQS": "128"}
            worker = start_worker(home, home / "worker.log", FAKE, **env | INFO | more)
        stack.callback(_stop, worker)
        api = _serve(home, args.port, env)
        stack.callback(_stop, api)
        wait_ready(args.port, api, home / "api.log")
        file = home / "in.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in lines))
        client = stack.enter_context(
            openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", timeout=900)
        )
        seconds, output = run(client, file, args.lines)
        check(output, args.lines, None if args.real else lines)
        total = sum(seconds.values())
        record(
            "openai_batch",
            **vars(args),
            megabytes=round(file.stat().st_size / 1e6, 1),
            seconds=seconds,
            total_s=round(total, 1),
            lines_a_second=round(args.lines / total, 1),
            openai=openai.__version__,
        )


INFO = {"LORABATCH_LOG_LEVEL": "info"}  # a worker says that it is ready


def _serve(home: Path, port: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorabatch_producer.cli", "serve", "--port", str(port)]
    with (home / "api.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "LORABATCH_HOME": str(home), **env},
            stdout=log,
            stderr=log,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)


if __name__ == "__main__":
    main()

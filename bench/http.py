"""Requests a second of `POST /jobs` on one API process, against an endpoint that inserts a row.

    python -m bench.http [--requests 6000] [--clients 32] [--database sqlite] [--repeats 3]

In turns, on fresh databases of the same server; each client has one connection and sends the next
request when the last is answered. Ours checks a job, commits it under its key, and sends a message
to a real broker for the first of each group; the other inserts one row in one transaction.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from urllib.request import urlopen

from bench.record import record
from bench.service import ROOT
from lorabatch.database import upgrade
from lorabatch.embedded import ensure_valkey, stop_valkey
from tests.postgres import fresh_database, postgres

BODY = json.dumps({"adapter_id": "sql", "prompt": "How many users?", "max_new_tokens": 32}).encode()
REQUEST = (
    b"POST /jobs HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
START_S = 60


async def client(port: int, times: list[float], left: list[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while left[0] > 0:
        left[0] -= 1
        started_s = time.perf_counter()
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 202"):
            raise SystemExit(f"refused: {head[:200]!r}")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - started_s)
    writer.close()


async def load(port: int, requests: int, clients: int) -> tuple[float, list[float]]:
    """Requests a second, and how long each took."""
    times: list[float] = []
    left = [requests]
    started_s = time.perf_counter()
    await asyncio.gather(*(client(port, times, left) for _ in range(clients)))
    return len(times) / (time.perf_counter() - started_s), times


def turn(
    command: list[str], port: int, env: dict[str, str], args: argparse.Namespace
) -> dict[str, float]:
    log = Path(env["LORABATCH_HOME"]) / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=file
        )
    try:
        wait_ready(port, process, log)
        asyncio.run(load(port, args.clients * 20, args.clients))  # warm
        rate, times = asyncio.run(load(port, args.requests, args.clients))
    finally:
        process.terminate()
        process.wait(30)
    cuts = quantiles(times, n=100)
    return {"a_second": rate, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}


def wait_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        try:
            with urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_321)
    args = parser.parse_args()
    turns: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    with ExitStack() as stack:
        server = stack.enter_context(postgres()) if args.database == "postgresql" else None
        for _ in range(args.repeats):
            for name, found in turns.items():
                found.append(_turn(name, server, args))
                print(name, {k: round(v, 2) for k, v in found[-1].items()}, file=sys.stderr)
    figures = {
        f"{name}_{what}": round(median(one[what] for one in found), 2)
        for name, found in turns.items()
        for what in found[0]
    }
    ratio = figures["ours_a_second"] / figures["bare_a_second"]
    record("http", **vars(args), **figures, ratio=round(ratio, 2))


def _turn(name: str, server: str | None, args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        url = fresh_database(server) if server else f"sqlite:///{home / 'ledger.db'}"
        upgrade(url)
        env = {
            "LORABATCH_HOME": folder,
            "LORABATCH_DATABASE_URL": url,
            "LORABATCH_LOG_LEVEL": "warning",
            "BENCH_DATABASE": url,
        }
        port = str(args.port)
        serve = [sys.executable, "-m", "lorabatch_producer.cli", "serve", "--port", port]
        bare = [sys.executable, "-m", "uvicorn", "bench.http_bare:app", "--port", port]
        bare += ["--log-level", "warning"]
        ensure_valkey(home)
        try:
            return turn(serve if name == "ours" else bare, args.port, env, args)
        finally:
            stop_valkey(home)


if __name__ == "__main__":
    main()

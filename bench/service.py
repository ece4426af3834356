"""A worker process for benchmarks, on embedded servers in a data folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "adapters"
WORKER = [str(Path(sys.executable).parent / "lorabatch-worker")]
READY_TIMEOUT_S = 120


def shipped_adapters() -> dict[str, Path]:
    """Name -> folder of the adapters in examples/."""
    return {p.parent.name: p.parent for p in sorted(SHIPPED.glob("*/adapter_config.json"))}


def adapters_setting(adapters: dict[str, Path]) -> str:
    """As LORABATCH_ADAPTERS wants them."""
    return ",".join(f"{name}={path.resolve()}" for name, path in adapters.items())


def start_worker(
    home: Path, log: Path, command: list[str] = WORKER, **environment: str
) -> subprocess.Popen[bytes]:
    """A worker that has said that it is ready."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, "LORABATCH_HOME": str(home), **environment},
            stdout=file,
            stderr=file,
        )
    deadline = time.monotonic() + READY_TIMEOUT_S
    while b"ready" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the worker did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)
    return process

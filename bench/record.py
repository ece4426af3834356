"""Where a benchmark's figures go: one JSON line on stdout and in bench/results/.

BENCH_RESULTS names another folder, for trials that should not stand among the figures.
"""

from __future__ import annotations

import json
import os
import platform
import resource
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")
PACKAGES = ("lorabatch", "torch", "transformers", "triton", "peft")


def record(question: str, **figures: Any) -> dict[str, Any]:
    """Print and append one line with the conditions it was measured under."""
    row = {
        "question": question,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **figures,
        "device": device(),
        "versions": versions(),
        "load1_at_end": round(os.getloadavg()[0], 2),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{question}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return row


def device() -> str:
    """The processor (and GPU) in words."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1].strip() for x in info.open() if x.startswith("model name")]
        flags = next((x for x in info.open() if x.startswith("flags")), "").split()
        wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
        cpu = f"{len(names)} x {names[0] if names else cpu} ({' '.join(wide)})"
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {cpu}"
    return cpu


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_mb() -> int:
    """This process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

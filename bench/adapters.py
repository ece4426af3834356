"""What adapters cost: our engine with n adapters against our engine with none, by batch.

    python -m bench.adapters [--batches 32 64] [--adapters 32] [--repeats 5] [--dtype float32]
    python -m bench.adapters --batches 1 8 32 64 256 --adapters 1 8 32 128 --repeats 2

The workload of bench.throughput, with as many requests as fill the batch twice (once from 128 on;
16 at least). Each number of adapters takes turns with the base by themselves, each engine in a
process of its own, so that two engines' memory is all that is needed. Without the prefix cache:
jobs of one adapter share a beginning more often than jobs of many, which is not what adapters cost.
`of_base` is base time / time with adapters: 1 is free.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

from bench.ours import HOME
from bench.peers.peer import Peer, ours, workload
from bench.record import record
from bench.throughput import in_turns
from bench.workload import Request, make_requests, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint
from lorabatch_worker.threads import cores

LEAST_REQUESTS = 16


def request_count(batch: int) -> int:
    """Enough to fill the batch twice; a large one fills once, or a run would take minutes."""
    return max(min(2 * batch, max(batch, 128)), LEAST_REQUESTS)


def measure(args: argparse.Namespace, folder: Path, batch: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"0": []}
    last: dict[str, dict[str, Any]] = {}
    of_base: dict[str, float] = {}
    for adapters in args.adapters:
        engines: dict[str, Peer] = {}
        try:
            for count in (0, adapters):
                engines[str(count)] = start(args, folder, batch, count)
            pair = in_turns({n: engine.run for n, engine in engines.items()}, args.repeats)
        finally:
            for engine in engines.values():
                engine.close()
        name = str(adapters)
        of_base[name] = round(
            statistics.median(b / x for b, x in zip(pair["0"], pair[name], strict=True)), 3
        )
        seconds["0"] += pair["0"]
        seconds[name] = pair[name]
        last |= {n: engine.last for n, engine in engines.items()}
    tokens = request_count(batch) * args.new
    load = {n: reply["load"] for n, reply in last.items()}
    return record(
        "adapters",
        batch=batch,
        dtype=args.dtype,
        threads=args.threads,
        repeats=args.repeats,
        requests=request_count(batch),
        new_tokens=args.new,
        output_tokens=tokens,
        tokens_per_s={n: round(tokens / statistics.median(s), 1) for n, s in seconds.items()},
        seconds={n: [round(x, 2) for x in s] for n, s in seconds.items()},
        of_base=of_base,
        seqs_a_step={n: round(x["step_seqs"] / x["steps"], 1) for n, x in load.items()},
        tokens_a_step={n: round(x["step_tokens"] / x["steps"], 1) for n, x in load.items()},
        peak_rss_mb={n: reply["peak_rss_mb"] for n, reply in last.items()},
    )


def start(args: argparse.Namespace, folder: Path, batch: int, adapters: int) -> Peer:
    """Our engine with so many adapters, ready to run this batch's requests."""
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    paths = write_adapters(config, HOME / "bench-adapters", adapters)
    requests = make_requests(tokenizer, request_count(batch), [p.name for p in paths])
    spec = workload(folder, paths, requests, args.dtype, args.new)
    settings = room(requests, batch, args.new)
    return ours(spec, threads=args.threads, prefix_cache=False, **settings)


def room(requests: list[Request], batch: int, new: int) -> dict[str, Any]:
    """Settings that let `batch` of these requests run together, none of them preempted."""
    longest = max(len(r.ids) for r in requests) + new
    blocks = longest // 16 + 2
    return {
        "max_seqs": batch,
        "max_step_tokens": max(512, 2 * batch),
        "max_context_tokens": 16 * blocks,
        "kv_cache_tokens": 16 * blocks * batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    args.threads = args.threads or cores()
    args.adapters = [count for count in dict.fromkeys(args.adapters) if count]
    if not args.adapters:
        parser.error("--adapters wants a number above 0; the base runs beside each")
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    for batch in args.batches:
        measure(args, folder, batch)


if __name__ == "__main__":
    main()

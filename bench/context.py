"""What a token costs by context: prefill and decode of a batch, base and adapters in turns.

    python -m bench.context [--contexts 128 512 2048 8000] [--batch 8] [--adapters 8]
                            [--repeats 2] [--dtype float32]

For each context length: microseconds a prompt token, the whole batch's prefill over all its
tokens; and microseconds a generated token of each sequence, a decode step of the whole batch over
its sequences. Medians. A run with an empty prefix cache times the prefill; the next one finds
the prompts there, so that all sequences decode together from its second step on. `kv_mb` is what
the KV cache holds of such a batch. One line without adapters and one with.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ours import HOME, OurEngine
from bench.record import peak_rss_mb, record
from bench.workload import Request, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint

NEW_TOKENS = 16


class DecodeClock:
    """Seconds of every step of this engine in which `batch` sequences made one token each."""

    def __init__(self, ours: OurEngine, batch: int) -> None:
        self.seconds: list[float] = []
        step = ours.engine._step

        def timed(chunks: Any) -> None:
            sizes = [c.end - c.start for c in chunks]
            started = time.perf_counter()
            step(chunks)
            if sizes == [1] * batch:
                self.seconds.append(time.perf_counter() - started)

        ours.engine._step = timed  # type: ignore[method-assign]


def make_requests(
    rng: random.Random, context: int, batch: int, names: Sequence[str | None]
) -> list[Request]:
    """`batch` prompts of `context` random tokens; no two begin alike."""
    return [
        Request(tuple(rng.choices(range(1000, 40_000), k=context)), names[i % len(names)])
        for i in range(batch)
    ]


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser()
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    paths = write_adapters(
        AutoConfig.from_pretrained(folder), HOME / "bench-adapters", args.adapters
    )
    tables = measure(args, paths)
    for adapters, table in tables.items():
        record(
            "context",
            dtype=args.dtype,
            batch=args.batch,
            adapters=adapters,
            repeats=args.repeats,
            by_context=table,
            peak_rss_mb=peak_rss_mb(),
        )


def measure(args: argparse.Namespace, paths: list[Path]) -> dict[int, dict[str, Any]]:
    """Figures by number of adapters and context."""
    longest = -(-(max(args.contexts) + NEW_TOKENS) // 16) * 16
    ours = OurEngine(
        paths,
        [],
        new=NEW_TOKENS,
        warm_up=False,
        dtype=args.dtype,
        max_seqs=args.batch,
        max_context_tokens=longest,
        kv_cache_tokens=args.batch * (longest + 16),
    )
    clock = DecodeClock(ours, args.batch)
    kinds: dict[int, Sequence[str | None]] = {0: [None]}
    if paths:
        kinds[len(paths)] = [p.name for p in paths]
    tables: dict[int, dict[str, Any]] = {adapters: {} for adapters in kinds}
    rng = random.Random(3)
    for names in kinds.values():  # loads adapters and touches memory
        ours.requests = make_requests(rng, min(args.contexts), args.batch, names)
        ours.run()
    for context in args.contexts:
        times: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in kinds}
        for _ in range(args.repeats):
            for adapters, names in kinds.items():
                prefills, decodes = times[adapters]
                ours.requests = make_requests(rng, context, args.batch, names)
                ours.engine.scheduler.blocks.forget_all()
                prefills.append(ours.run(1))
                clock.seconds.clear()
                ours.run()
                decodes += clock.seconds
        for adapters, (prefills, decodes) in times.items():
            row = {
                "prefill_us_a_token": statistics.median(prefills) / (context * args.batch) * 1e6,
                "decode_us_a_token": statistics.median(decodes) / args.batch * 1e6,
                "kv_mb": ours.engine.runner.cache.bytes_a_token * context * args.batch / 1e6,
            }
            tables[adapters][str(context)] = {n: round(x, 1) for n, x in row.items()}
            print(context, adapters, tables[adapters][str(context)], flush=True)
    ours.close()
    return tables


if __name__ == "__main__":
    main()

"""What a token costs by context: prefill and decode, one sequence and a batch.

    python -m bench.context [--contexts 128 512 2048 8000] [--batch 8] [--dtype float32]

For each context length: microseconds a prompt token while it is prefilled, and microseconds a
generated token of each sequence in a decode step of `--batch` sequences of that length. Memory is
the KV cache's share, bounded by `kv_cache_tokens`.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings

from bench.ours import HOME, OurEngine
from bench.record import peak_rss_mb, record
from bench.workload import Request, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint

NEW_TOKENS = 16


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser()
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8000])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    paths = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", 8)
    longest = max(args.contexts) + NEW_TOKENS
    ours = OurEngine(
        paths,
        [],
        new=NEW_TOKENS,
        warm_up=False,
        dtype=args.dtype,
        prefix_cache=False,
        max_seqs=args.batch,
        max_context_tokens=longest,
        kv_cache_tokens=args.batch * (longest + 16),
    )
    rng = random.Random(3)
    rows = {}
    for context in args.contexts:
        ids = [tuple(rng.choices(range(1000, 40_000), k=context)) for _ in range(args.batch)]
        ours.requests = [Request(x, paths[i % 8].name) for i, x in enumerate(ids)]
        ours.run(1)
        prefill = ours.run(1)
        step_s: list[float] = []
        forward = ours.engine.runner.forward

        def timed(chunks, forward=forward, step_s=step_s):  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            logits = forward(chunks)
            if all(c.end - c.start == 1 for c in chunks) and len(chunks) == args.batch:
                step_s.append(time.perf_counter() - started)
            return logits

        ours.engine.runner.forward = timed  # type: ignore[method-assign]
        ours.run()
        ours.engine.runner.forward = forward  # type: ignore[method-assign]
        decode = sorted(step_s)[len(step_s) // 2]
        rows[str(context)] = {
            "prefill_us_a_token": round(prefill / (context * args.batch) * 1e6, 1),
            "decode_us_a_token": round(decode / args.batch * 1e6, 1),
            "kv_mb": round(ours.engine.runner.cache.bytes_a_token * context * args.batch / 1e6, 1),
        }
        print(context, rows[str(context)], flush=True)
    ours.close()
    record(
        "context",
        dtype=args.dtype,
        batch=args.batch,
        adapters=len(paths),
        by_context=rows,
        peak_rss_mb=peak_rss_mb(),
    )


if __name__ == "__main__":
    main()

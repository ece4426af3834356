"""How long one job waits: time to its first token, and between tokens, with nothing beside it.

    python -m bench.latency [--prompts 32 128 512] [--repeats 9] [--dtype float32]

One request at a time through the engine: `first_token_ms` is a run that makes one token (the
prompt's prefill and one sample), `token_ms` what each of the 32 tokens after it adds. Medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings

from bench.ours import HOME, OurEngine
from bench.record import record
from bench.workload import Request, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint

NEW_TOKENS = 33


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    (path,) = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", 12)[-1:]
    ours = OurEngine(
        [path], [], new=NEW_TOKENS, warm_up=False, dtype=args.dtype, prefix_cache=False
    )
    rng = random.Random(5)
    found = {}
    for length in args.prompts:
        ids = tuple(rng.choices(range(1000, 40_000), k=length))
        for name in (None, path.name):
            ours.requests = [Request(ids, name)]
            ours.run()
            first = statistics.median(ours.run(1) for _ in range(args.repeats))
            whole = statistics.median(ours.run() for _ in range(args.repeats))
            found[f"{length} {'base' if name is None else 'adapter'}"] = {
                "first_token_ms": round(first * 1e3, 1),
                "token_ms": round((whole - first) / (NEW_TOKENS - 1) * 1e3, 2),
            }
    ours.close()
    record(
        "latency",
        dtype=args.dtype,
        threads=ours.engine.threads,
        repeats=args.repeats,
        adapter=path.name,
        by_prompt=found,
    )


if __name__ == "__main__":
    main()

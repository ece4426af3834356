"""What the prefix cache saves: jobs that share a long beginning, with the cache and without.

    python -m bench.prefix [--jobs 256] [--prefix 512] [--adapters 4] [--repeats 3]

All jobs of one adapter begin with the same `--prefix` tokens and go on with 24 of their own; each
makes 16 tokens. The two engines take turns; the one with a cache begins every round with an
empty one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings

from bench.ours import HOME
from bench.peers.peer import ours, workload
from bench.record import record
from bench.throughput import in_turns
from bench.workload import Request, make_requests, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint

OWN_TOKENS = 24
NEW_TOKENS = 16


def main() -> None:
    from transformers import AutoConfig, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=256)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    paths = write_adapters(
        AutoConfig.from_pretrained(folder), HOME / "bench-adapters", args.adapters
    )
    prefix = make_requests(tokenizer, 1, [], args.prefix, args.prefix)[0].ids[: args.prefix]
    rng = random.Random(1)
    own = [rng.choices(range(1000, 40_000), k=OWN_TOKENS) for _ in range(args.jobs)]
    names = [p.name for p in paths]
    requests = [Request((*prefix, *ids), names[i % len(names)]) for i, ids in enumerate(own)]
    spec = workload(folder, paths, requests, args.dtype, NEW_TOKENS)
    engines = {
        name: ours(spec, prefix_cache=name == "cached", threads=args.threads)
        for name in ("cached", "plain")
    }
    seconds = in_turns({name: engine.run for name, engine in engines.items()}, args.repeats)
    load = engines["cached"].last["load"]
    for engine in engines.values():
        engine.close()
    record(
        "prefix",
        dtype=args.dtype,
        jobs=args.jobs,
        prefix_tokens=args.prefix,
        own_tokens=OWN_TOKENS,
        new_tokens=NEW_TOKENS,
        adapters=args.adapters,
        repeats=args.repeats,
        seconds={name: [round(s, 2) for s in some] for name, some in seconds.items()},
        hit_rate=round(load["prefix_cached_tokens"] / load["prefix_queried_tokens"], 3),
        times_faster=round(
            statistics.median(
                p / c for p, c in zip(seconds["plain"], seconds["cached"], strict=True)
            ),
            2,
        ),
    )


if __name__ == "__main__":
    main()

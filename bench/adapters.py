"""What adapters cost: our engine with n adapters against our engine with none, by batch.

    python -m bench.adapters [--batches 32 64] [--adapters 32] [--repeats 5] [--dtype float32]

The workload of bench.throughput, as many requests as fill the batch twice, in turns; each engine
in a process of its own. `of_base` is base time / time with adapters: 1 is free.
"""

from __future__ import annotations

import argparse
import statistics

from bench.ours import HOME
from bench.peers.peer import ours, workload
from bench.record import record
from bench.throughput import in_turns
from bench.workload import make_requests, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint


def main() -> None:
    from transformers import AutoConfig, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for batch in args.batches:
        engines = {}
        for count in [0, *args.adapters]:
            paths = write_adapters(config, HOME / "bench-adapters", count)
            requests = make_requests(tokenizer, max(2 * batch, 64), [p.name for p in paths])
            spec = workload(folder, paths, requests, args.dtype, args.new)
            engines[str(count)] = ours(
                spec, max_seqs=batch, kv_cache_tokens=batch * 512, threads=args.threads
            )
        seconds = in_turns({n: engine.run for n, engine in engines.items()}, args.repeats)
        load = {n: engine.last["load"] for n, engine in engines.items()}
        memory = {n: engine.last["peak_rss_mb"] for n, engine in engines.items()}
        for engine in engines.values():
            engine.close()
        tokens = max(2 * batch, 64) * args.new
        record(
            "adapters",
            batch=batch,
            dtype=args.dtype,
            threads=args.threads,
            repeats=args.repeats,
            output_tokens=tokens,
            tokens_per_s={n: round(tokens / statistics.median(s), 1) for n, s in seconds.items()},
            seconds={n: [round(x, 2) for x in s] for n, s in seconds.items()},
            of_base={
                n: round(statistics.median(b / x for b, x in zip(seconds["0"], s, strict=True)), 3)
                for n, s in seconds.items()
                if n != "0"
            },
            seqs_a_step={n: round(x["step_seqs"] / x["steps"], 1) for n, x in load.items()},
            tokens_a_step={n: round(x["step_tokens"] / x["steps"], 1) for n, x in load.items()},
            peak_rss_mb=memory,
        )


if __name__ == "__main__":
    main()

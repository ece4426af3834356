"""More adapters than fit: throughput by adapters in use, slots for 32, against 8 that all fit.

    python -m bench.many [--counts 8 16 32 64 128 256 512 1000] [--slots 32] [--repeats 3]
                         [--host-bytes 8589934592] [--dtype bfloat16]

1,000 adapters of ranks 4 to 32 are registered; one engine serves requests for them in turns: those
of 8 adapters in equal shares, which are together of average size, then those of n drawn by a Zipf
law (the k-th as often as 1 / k), then of as many drawn evenly; others in every round. `of_few` is
the time of the 8 over that of the n, round by round: 1 is no loss. Every request's adapter has been
in host memory once before the clock starts, and stays there as far as `--host-bytes` go; `swaps`
are adapters put into slots in the last round. Without the prefix cache, which helps jobs of few
adapters more.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from bench.ours import HOME, OurEngine
from bench.record import peak_rss_mb, record
from bench.workload import Request, make_requests, write_adapters
from lorabatch.database import open_database
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch.settings import DEFAULT_BASE_MODEL, Settings
from lorabatch_worker.adapters.wanted import Wanted
from lorabatch_worker.adapters.weights import WEIGHTS, version_of
from lorabatch_worker.bundled import bundled_checkpoint

ADAPTERS, FEW, NEW_TOKENS = 1000, 8, 32
COUNTS = [8, 16, 32, 64, 128, 256, 512, 1000]


def registered(paths: list[Path], home: Path) -> tuple[Registry, dict[str, str]]:
    """All of them in a registry of their own: and their versions by name."""
    registry = Registry(open_database(Settings.load(home=home)))
    known = {entry.adapter_id: entry.version for entry in registry.names()}
    for path in paths:
        if path.name not in known:
            version = known[path.name] = version_of(path)
            store = home / "adapter-store"  # as `lorabatch adapters add` has it, but for the copy
            store.mkdir(exist_ok=True)
            (store / version).symlink_to(path)
            where = str(store / version)
            registry.add(Registered(SHARED, path.name, version, where, None, None, 0, created_us=0))
    return registry, known


def typical(paths: list[Path], count: int) -> list[str]:
    """So many of the first dozen, one of each rank and set of modules, that are together as large
    as adapters are on average."""
    sizes = {p.name: (p / WEIGHTS).stat().st_size for p in paths}
    wanted = statistics.mean(sizes.values())
    dozen = [p.name for p in paths[:12]]
    best = min(
        itertools.combinations(dozen, count),
        key=lambda some: abs(statistics.mean(sizes[name] for name in some) - wanted),
    )
    return list(best)


def drawn(names: list[str], requests: list[Request], law: str, rng: random.Random) -> list[Request]:
    """The requests for these adapters, the first ones the most often where the law says so."""
    if law == "equal":
        chosen = [names[i % len(names)] for i in range(len(requests))]
        rng.shuffle(chosen)
    else:
        weights = [1 / (k + 1) if law == "zipf" else 1.0 for k in range(len(names))]
        chosen = rng.choices(names, weights, k=len(requests))
    return [Request(r.ids, name) for r, name in zip(requests, chosen, strict=True)]


def a_round(
    args: argparse.Namespace, few: list[str], names: list[str], plain: list[Request], number: int
) -> dict[str, list[Request]]:
    """Other adapters and another order in every round."""
    rng = random.Random(number)
    cases = {f"{FEW} equal": drawn(few, plain, "equal", rng)}
    for law, counts in (("zipf", args.counts), ("even", args.uniform)):
        for n in counts:
            cases[f"{n} {law}"] = drawn(rng.sample(names, n), plain, law, rng)
    return cases


def load_once(ours: OurEngine, versions: dict[str, str], names: list[str]) -> None:
    """As far as host memory goes."""
    store = ours.engine.store
    for name in names:
        store.request(Wanted("default", name, versions[name])).result()


def measure(ours: OurEngine, rounds: list[dict[str, list[Request]]]) -> Any:
    seconds: dict[str, list[float]] = {name: [] for name in rounds[0]}
    swaps: dict[str, int] = {}
    for cases in rounds:
        for name, requests in cases.items():
            ours.requests = requests
            before = ours.engine.load["adapter_loads"]
            time.sleep(1.0)
            seconds[name].append(ours.run())
            swaps[name] = ours.engine.load["adapter_loads"] - before
    return seconds, swaps


def main() -> None:
    from transformers import AutoConfig, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1000]
    )
    parser.add_argument("--uniform", type=int, nargs="*", default=[64, 1000])
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--host-bytes", type=int, default=8 << 30)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    paths = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", ADAPTERS)
    registry, versions = registered(paths, HOME / "bench-many")
    names = [path.name for path in paths]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = make_requests(tokenizer, args.requests, [])
    few = typical(paths, FEW)
    rounds = [a_round(args, few, names, plain, number) for number in range(args.repeats)]
    ours = OurEngine(
        [],
        plain[:16],
        new=NEW_TOKENS,
        registry=registry,
        versions=versions,
        adapter_slots=args.slots,
        adapter_cache_bytes=args.host_bytes,
        prefix_cache=False,
        dtype=args.dtype,
    )
    asked = {str(r.adapter) for cases in rounds for some in cases.values() for r in some}
    load_once(ours, versions, sorted(asked))
    seconds, swaps = measure(ours, rounds)
    of_few = seconds[f"{FEW} equal"]
    tokens = args.requests * NEW_TOKENS
    record(
        "many",
        dtype=args.dtype,
        threads=ours.engine.threads,
        registered=len(paths),
        slots=args.slots,
        requests=args.requests,
        new_tokens=NEW_TOKENS,
        repeats=args.repeats,
        host_bytes=args.host_bytes,
        held_bytes=ours.engine.store.nbytes,
        adapters_used={n: len({r.adapter for r in some}) for n, some in rounds[-1].items()},
        seconds={name: [round(x, 2) for x in some] for name, some in seconds.items()},
        tokens_per_s={n: round(tokens / statistics.median(s), 1) for n, s in seconds.items()},
        of_few={
            name: round(statistics.median(f / x for f, x in zip(of_few, some, strict=True)), 3)
            for name, some in seconds.items()
        },
        swaps=swaps,
        peak_rss_mb=peak_rss_mb(),
    )
    ours.close()


if __name__ == "__main__":
    main()

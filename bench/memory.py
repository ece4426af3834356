"""What adapters take: resident memory per adapter against its tensors, and what stays of 200.

    python -m bench.memory [--adapters 100] [--turnover 200] [--dtype bfloat16]

Adapters of ranks 4 to 32, one job each, through the engine, so that each has been in host memory
and in a slot. `of_tensors` is how much the process grew by over the sum of their tensors' bytes in
the engine's dtype. Then the same with room for one adapter in memory: `growth_bytes` is how much
more is resident after the last `--turnover` than before them; slots hold the last ones.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from pathlib import Path
from typing import Any

from bench.many import load_once, registered
from bench.ours import HOME, OurEngine
from bench.record import record
from bench.workload import Request, make_requests, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.bundled import bundled_checkpoint

PAGE = 4096
WARM = 40


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def engine(base: list[Request], host_bytes: int, **more: Any) -> OurEngine:
    return OurEngine(
        [], base, new=2, adapter_slots=32, adapter_cache_bytes=host_bytes, max_seqs=8, **more
    )


def main() -> None:
    from transformers import AutoConfig, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--turnover", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    count = WARM + max(args.adapters, args.turnover)
    paths = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", count)
    registry, versions = registered(paths, HOME / "bench-many")
    names = [path.name for path in paths]
    (one,) = make_requests(AutoTokenizer.from_pretrained(folder), 1, [])
    known: dict[str, Any] = {"registry": registry, "versions": versions, "dtype": args.dtype}

    def use(ours: OurEngine, some: list[str]) -> None:
        for first in range(0, len(some), 8):
            ours.requests = [Request(one.ids, name) for name in some[first : first + 8]]
            ours.run()

    ours = engine([one], 16 << 30, **known)
    use(ours, names[:WARM])
    before, tensors = resident_bytes(), ours.engine.store.nbytes
    chosen = names[WARM : WARM + args.adapters]
    load_once(ours, versions, chosen)
    use(ours, chosen)
    grown, tensors = resident_bytes() - before, ours.engine.store.nbytes - tensors
    ours.close()

    ours = engine([one], 1 << 20, **known)
    use(ours, names[:WARM])
    before = resident_bytes()
    use(ours, names[WARM : WARM + args.turnover])
    use(ours, names[:WARM])  # the same ones in slots as before
    growth = resident_bytes() - before
    ours.close()
    record(
        "memory",
        dtype=args.dtype,
        adapters=args.adapters,
        tensor_bytes=tensors,
        resident_bytes=grown,
        of_tensors=round(grown / tensors, 3),
        turnover=args.turnover,
        growth_bytes=growth,
    )


if __name__ == "__main__":
    main()

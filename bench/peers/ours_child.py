"""Our engine behind two pipes, in a process of its own, as the peers are.

    PYTHON -m bench.peers.ours_child SPEC.json

SPEC: requests [[ids, adapter name or null], ...], adapters {name: folder}, new, settings {name:
value}. Prints one JSON line when all adapters are loaded, then reads lines: for each, runs all
requests with an empty prefix cache and prints {"seconds": ..., "load": ..., "peak_rss_mb": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from bench.ours import OurEngine
from bench.record import peak_rss_mb
from bench.workload import Request


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    ours = OurEngine(
        [Path(folder) for folder in spec["adapters"].values()],
        [Request(tuple(ids), name) for ids, name in spec["requests"]],
        new=spec["new"],
        **spec["settings"],
    )
    print(json.dumps({"version": version("lorabatch")}), file=replies, flush=True)
    for _ in sys.stdin:
        ours.engine.scheduler.blocks.forget_all()
        before = ours.engine.load
        seconds = ours.run()
        load = {name: value - before[name] for name, value in ours.engine.load.items()}
        answer = {"seconds": seconds, "load": load, "peak_rss_mb": peak_rss_mb()}
        print(json.dumps(answer), file=replies, flush=True)
    ours.close()


if __name__ == "__main__":
    main()

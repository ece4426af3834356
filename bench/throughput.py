"""Output tokens per second by number of adapters, against transformers + PEFT in the same run.

    python -m bench.throughput [--adapters 0 1 8 32] [--repeats 3] [--dtype float32] [--no-peft]
                               [--requests FILE --adapter-folder FOLDER]

Engine and peer take turns on the same requests, so that ratios hold on a noisy machine. Wall
time from the first submit to the last token, prefill included, adapters loaded before. The
queue and the ledger are not part of this. `--requests` runs requests that another program's
benchmark wrote, so that its figures can be set beside ours.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.record import peak_rss_mb, record
from bench.workload import Request, make_requests, read_requests, write_adapters
from lorabatch import Job, Settings
from lorabatch.ledger import Claim, Outcome
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.bundled import bundled_checkpoint
from lorabatch_worker.engine import Engine, build_engine
from lorabatch_worker.sequence import Sequence as EngineSequence

HOME = Path(__file__).parents[1] / ".lorabatch"


class FixedPrompts:
    """Stands in for the tokenizer: each job's token ids are given."""

    def __init__(self) -> None:
        self.ids: dict[str, tuple[int, ...]] = {}

    def prepare(self, claim: Claim, adapter: Adapter | None) -> EngineSequence:
        return EngineSequence(claim, list(self.ids[claim.job.job_id]), adapter)


def engine_run(engine: Engine, prompts: FixedPrompts, requests: list[Request], new: int) -> float:
    """Seconds for all requests, submitted at once."""
    done = threading.Event()
    outcomes: list[Outcome] = []

    def finished(some: Sequence[Outcome]) -> None:
        outcomes.extend(some)
        if len(outcomes) == len(requests):
            done.set()

    engine._on_finished = finished
    claims = []
    for request in requests:
        sampling: Any = {"max_new_tokens": new, "ignore_eos": True}
        job = Job(prompt="-", adapter_id=request.adapter, sampling_params=sampling)
        prompts.ids[job.job_id] = request.ids
        claims.append(Claim(job, 1, 1, 0, 0))
    started = time.perf_counter()
    engine.submit(claims)
    if not done.wait(3600):
        raise TimeoutError(str(engine.load))
    seconds = time.perf_counter() - started
    wrong = [o.result.error for o in outcomes if len(o.result.token_ids) != new]
    if wrong:
        raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
    return seconds


class PeftPeer:
    """transformers + PEFT mixed batches (`adapter_names=`), left-padded, `batch` at a time."""

    def __init__(self, folder: Path, adapters: list[Path], dtype: torch.dtype, batch: int) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.batch = batch
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for i, path in enumerate(adapters):
            if i == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=path.name)
            else:
                model.load_adapter(path, adapter_name=path.name)
        self.model = model.to(dtype).eval()
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run(self, requests: list[Request], new: int) -> float:
        started = time.perf_counter()
        for first in range(0, len(requests), self.batch):
            some = requests[first : first + self.batch]
            width = max(len(r.ids) for r in some)
            pads = [width - len(r.ids) for r in some]
            names = {"adapter_names": [r.adapter for r in some]} if some[0].adapter else {}
            self.model.generate(
                input_ids=torch.tensor(
                    [[0] * p + list(r.ids) for p, r in zip(pads, some, strict=True)]
                ),
                attention_mask=torch.tensor(
                    [[0] * p + [1] * len(r.ids) for p, r in zip(pads, some, strict=True)]
                ),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **names,
            )
        return time.perf_counter() - started


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def measure(args: argparse.Namespace, folder: Path, count: int) -> None:
    from transformers import AutoConfig, AutoTokenizer

    if args.adapter_folder:
        paths = sorted(p.parent for p in args.adapter_folder.glob("*/adapter_config.json"))[:count]
    else:
        config = AutoConfig.from_pretrained(folder)
        paths = write_adapters(config, HOME / "bench-adapters", count)
    names = [p.name for p in paths]
    if args.requests:
        requests = read_requests(args.requests, f"64/{count}")
    else:
        requests = make_requests(AutoTokenizer.from_pretrained(folder), 64, names)
    settings = Settings.load(
        home=HOME,
        adapters=",".join(f"{p.name}={p.resolve()}" for p in paths),
        dtype=args.dtype,
        threads=args.threads,
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        adapter_slots=max(count, 1),
        kv_cache_tokens=args.max_seqs * 512,
    )
    engine, prompts = build_engine(settings), FixedPrompts()
    engine.preparer = prompts  # type: ignore[assignment]
    engine.start(lambda ids: None, lambda outcomes: None)
    engine_run(engine, prompts, requests, 2)
    runs = {"lorabatch": lambda: engine_run(engine, prompts, requests, args.new)}
    if not args.no_peft:
        peer = PeftPeer(folder, paths, engine.base.dtype, args.peft_batch)
        peer.run(requests[: args.peft_batch], 2)
        runs["peft"] = lambda: peer.run(requests, args.new)
    seconds = interleaved(runs, args.repeats)
    engine.drain(0)
    tokens = len(requests) * args.new
    rates = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    ratios = {}
    if "peft" in seconds:
        pairs = zip(seconds["peft"], seconds["lorabatch"], strict=True)
        ratios["ratio_to_peft"] = round(statistics.median(p / o for p, o in pairs), 2)
    record(
        "throughput",
        adapters=count,
        dtype=args.dtype,
        threads=torch.get_num_threads(),
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        requests=len(requests),
        prompt_tokens=sum(len(r.ids) for r in requests),
        output_tokens=tokens,
        repeats=args.repeats,
        tokens_per_s={name: round(rate, 1) for name, rate in rates.items()},
        seconds={name: [round(s, 2) for s in some] for name, some in seconds.items()},
        peak_rss_mb=peak_rss_mb(),
        **ratios,
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
    parser.add_argument("--peft-batch", type=int, default=16)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--adapter-folder", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(DEFAULT_BASE_MODEL, HOME)
    for count in args.adapters:
        measure(args, folder, count)


if __name__ == "__main__":
    main()

"""Where the time of the workload goes, and how much of it is matrix products alone.

    python -m bench.breakdown [--adapters 0 32] [--dtype float32] [--max-seqs 32]

For the whole workload and for decode steps of a full batch: seconds in the base model's products,
attention, LoRA, sampling, scheduling (plan and tensors of the step) and the rest (norms,
activations, Python). Then the products are run again by themselves, with the sizes that the steps
had; where noise made that longer than they took in the run, what they took counts. `gemm_to_wall`
is that time over the wall time of the workload, `gemm_to_step` the same for a decode step. The wall
time is taken without the clocks around the parts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.ours import HOME, OurEngine
from bench.record import peak_rss_mb, record
from bench.workload import make_requests, write_adapters
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_kernels import lora
from lorabatch_worker import attention, model_runner
from lorabatch_worker.bundled import bundled_checkpoint
from lorabatch_worker.linear import Dense
from lorabatch_worker.threads import compute_with

Sizes = tuple[int, int]
"""Tokens of a step, and how many of them are sampled."""


class Clock:
    """Seconds by part, summed over a step; parts that run inside another are not counted twice."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self.seconds[part] += spent - self._inner
                self._inner = outer + spent

        return timed

    def take(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def instrument(
    ours: OurEngine, clock: Clock, steps: list[tuple[Sizes, bool, dict[str, float]]]
) -> None:
    """Put clocks around the parts of this engine's steps, and note each step's sizes."""
    engine = ours.engine
    runner: Any = engine.runner
    for module in runner.model.modules():
        group = getattr(module, "group", None)
        if isinstance(module, Dense):
            module.product = clock.around("gemm", module.product)
        elif group is not None and not hasattr(group.product, "timed"):
            group.product.timed = True
            group.product.dense.product = clock.around("gemm", group.product.dense.product)
    lora.add_lora_cpu = clock.around("lora", lora.add_lora_cpu)
    model_runner.build_step = clock.around("schedule", model_runner.build_step)
    for name in ("attend_rows", "_attend_blocks", "_attend_spans"):
        setattr(attention, name, clock.around("attention", getattr(attention, name)))
    engine.scheduler.plan = clock.around("schedule", engine.scheduler.plan)  # type: ignore[method-assign]
    engine._sample = clock.around("sample", engine._sample)  # type: ignore[method-assign]
    step = clock.around("rest", engine._step)
    inside = runner.fused.seconds = torch.zeros(4, dtype=torch.float64)  # of layers in one call

    def noted(chunks: Any) -> None:
        # Before the step: a chunk samples only until its sequence has grown.
        sizes = (sum(c.end - c.start for c in chunks), sum(c.samples for c in chunks))
        step(chunks)
        decode = all(c.end - c.start == 1 for c in chunks) and len(chunks) == ours.settings.max_seqs
        for part, seconds in zip(("gemm", "lora", "attention"), inside.tolist(), strict=False):
            clock.seconds[part] += seconds
            clock.seconds["rest"] -= seconds
        inside.zero_()
        steps.append((sizes, decode, clock.take()))

    engine._step = noted  # type: ignore[method-assign]


def products(ours: OurEngine, sizes: Sizes) -> float:
    """Seconds of all products of one step of these sizes, best of three."""
    runner: Any = ours.engine.runner
    model = runner.model
    output = model.get_output_embeddings()
    head: Dense = output.group.product.dense
    seen: dict[int, Dense] = {}
    for module in model.modules():
        group = getattr(module, "group", None)
        if group is not None and module is not output:
            seen[id(group)] = group.product.dense
    inputs: dict[int, torch.Tensor] = {}
    for dense in seen.values():
        if dense.in_features not in inputs:
            x = torch.randn(1, sizes[0], dense.in_features)
            inputs[dense.in_features] = x.to(ours.engine.base.dtype)
    sampled = torch.randn(1, max(sizes[1], 1), head.in_features).to(ours.engine.base.dtype)
    times = []
    compute_with(ours.engine.threads)
    with torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            for dense in seen.values():
                dense(inputs[dense.in_features])
            if sizes[1]:
                head(sampled)
            times.append(time.perf_counter() - started)
    return min(times)


def measure(args: argparse.Namespace, folder: Path, count: int) -> None:
    from transformers import AutoConfig, AutoTokenizer

    paths = write_adapters(AutoConfig.from_pretrained(folder), HOME / "bench-adapters", count)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = make_requests(tokenizer, 64, [p.name for p in paths])
    ours = OurEngine(
        paths,
        requests,
        new=32,
        dtype=args.dtype,
        threads=args.threads,
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        prefix_cache=False,
    )
    plain = [ours.run() for _ in range(args.repeats)]
    clock = Clock()
    steps: list[tuple[Sizes, bool, dict[str, float]]] = []
    instrument(ours, clock, steps)
    clocked = ours.run()
    ours.close()  # and with it the engine's OpenMP threads, so that these find free cores
    floors = {sizes: products(ours, sizes) for sizes in {s for s, _, _ in steps}}
    whole: Counter[str] = Counter()
    for _, _, parts in steps:
        whole.update(parts)
    full = [(sizes, parts) for sizes, decode, parts in steps if decode]
    decode: dict[str, float] = {}
    if full:
        for part in {p for _, parts in full for p in parts}:
            decode[part] = statistics.median(parts.get(part, 0.0) for _, parts in full) * 1e3
    gemm = sum(min(floors[sizes], parts["gemm"]) for sizes, _, parts in steps)
    gemm_step_ms = min(floors[full[0][0]] * 1e3, decode["gemm"]) if full else 0.0
    step_ms = statistics.median(sum(p.values()) for _, p in full) * 1e3 if full else 0.0
    record(
        "breakdown",
        adapters=count,
        dtype=args.dtype,
        threads=ours.engine.threads,
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        steps=len(steps),
        seqs_a_step=round(statistics.mean(s[1] for s, _, _ in steps), 1),
        wall_s=[round(s, 2) for s in plain],
        clocked_s=round(clocked, 2),
        seconds={part: round(s, 2) for part, s in whole.most_common()},
        gemm_alone_s=round(gemm, 2),
        gemm_to_wall=round(gemm / statistics.median(plain), 3),
        decode_step_ms={part: round(ms, 1) for part, ms in sorted(decode.items())},
        decode_step_total_ms=round(step_ms, 1),
        gemm_to_step=round(gemm_step_ms / step_ms, 3) if full else None,
        peak_rss_mb=peak_rss_mb(),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-seqs", type=int, default=32)
    parser.add_argument("--max-step-tokens", type=int, default=512)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if len(args.adapters) > 1:
        # Each in a process of its own: two pools of OpenMP threads in one slow each other down.
        for count in args.adapters:
            alone = [sys.executable, "-m", "bench.breakdown", *sys.argv[1:], "--adapters", count]
            subprocess.run([str(word) for word in alone], check=True)
        return
    measure(args, bundled_checkpoint(DEFAULT_BASE_MODEL, HOME), args.adapters[0])


if __name__ == "__main__":
    main()

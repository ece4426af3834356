"""The C kernels beside LoRA: attention over cache rows, norm, gate and rotary embedding.

Sizes of SmolLM2-135M. CPU time of one thread, best of the rounds. `gb_per_s` counts what must be
moved: of decode attention the keys and values, of the others each input and output once;
`gflop_per_s` counts the two products of causal attention. Decode reads pools of its own in every
call of a round, about 256 MB of them, so that caches do not flatter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorabatch_kernels import RowSpans, attend_rows, rms_norm, rotary_, silu_gate

HEADS, KV_HEADS, WIDTH = 9, 3, 64
HIDDEN, INNER = 576, 1536
POOL_BYTES = 2**28
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
DECODES = [(1, 2048), (32, 128), (32, 512), (32, 2048)]
PREFILLS = [(256, 0), (512, 0), (512, 1536)]
Span = tuple[int, int, int, int]
Figures = dict[str, dict[str, float]]


def best_s(calls: list[Callable[[], object]], rounds: int) -> float:
    """CPU seconds of one call: the best round's mean."""
    best = float("inf")
    for _ in range(rounds + 1):  # the first warms up
        started = time.thread_time()
        for call in calls:
            call()
        best = min(best, time.thread_time() - started)
    return best / len(calls)


def attention_call(
    spans: list[tuple[int, int, int, int]], dtype: torch.dtype
) -> Callable[[], None]:
    """One `attend_rows` over pools of its own."""
    tokens = sum(count for _, count, _, _ in spans)
    positions = max(first + past + count for _, count, past, first in spans)

    def fresh(heads: int, count: int) -> Tensor:
        return torch.randn(heads, count, WIDTH).to(dtype)

    query, key, value = fresh(HEADS, tokens), fresh(KV_HEADS, tokens), fresh(KV_HEADS, tokens)
    keys, values = fresh(KV_HEADS, positions), fresh(KV_HEADS, positions)
    index = torch.cat([torch.arange(f + past, f + past + n) for _, n, past, f in spans])
    out, table = torch.empty(tokens, HEADS, WIDTH, dtype=dtype), RowSpans.of(spans)
    return lambda: attend_rows(out, query, key, value, keys, values, index, table, WIDTH**-0.5)


def decode(batch: int, context: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    spans = [(i, 1, context - 1, i * context) for i in range(batch)]
    read = batch * context * KV_HEADS * 2 * WIDTH * dtype.itemsize
    calls = [attention_call(spans, dtype) for _ in range(max(2, POOL_BYTES // read))]
    seconds = best_s(calls, rounds)
    return {"us": round(seconds * 1e6, 1), "gb_per_s": round(read / seconds / 1e9, 1)}


def prefill(count: int, past: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    seconds = best_s([attention_call([(0, count, past, 0)], dtype)], rounds)
    seen = sum(range(past + 1, past + count + 1))
    flop = 2 * 2 * HEADS * WIDTH * seen
    return {"us": round(seconds * 1e6, 1), "gflop_per_s": round(flop / seconds / 1e9, 1)}


def attention(quick: bool) -> Iterator[tuple[str, dict[str, float]]]:
    rounds = 2 if quick else 6
    for dtype, name in NAMES.items():
        for batch, context in (
            [(32, 128)] if quick else [(1, 2048), (32, 128), (32, 512), (32, 2048)]
        ):
            figures = decode(batch, context, dtype, rounds)
            yield f"{name} decode batch {batch} context {context}", figures
        for count, past in PREFILLS[:1] if quick else PREFILLS:
            yield f"{name} prefill {count} after {past}", prefill(count, past, dtype, rounds)


def rows(quick: bool) -> Iterator[tuple[str, dict[str, float]]]:
    for dtype, name in NAMES.items():
        for tokens in (32,) if quick else (1, 32, 512):
            x, gate = (
                torch.randn(tokens, HIDDEN).to(dtype),
                torch.randn(tokens, 2 * INNER).to(dtype),
            )
            weight, angles = torch.ones(HIDDEN, dtype=dtype), torch.rand(tokens, WIDTH).to(dtype)
            calls: dict[str, tuple[Callable[[], object], int]] = {
                "rms_norm": (lambda x=x, w=weight: rms_norm(x, w, 1e-5), 2 * HIDDEN),
                "silu_gate": (lambda g=gate: silu_gate(g), 3 * INNER),
                "rotary": (lambda x=x, a=angles: rotary_(x, a, a), 2 * HIDDEN + 2 * WIDTH),
            }
            for call, (run, values) in calls.items():
                seconds = best_s([run] * 50, 2 if quick else 6)
                moved = tokens * values * dtype.itemsize
                yield (
                    f"{name} {call} {tokens} tokens",
                    {"us": round(seconds * 1e6, 1), "gb_per_s": round(moved / seconds / 1e9, 1)},
                )


def measure(quick: bool) -> dict[str, Figures]:
    """Figures by kernel and case."""
    found: dict[str, Figures] = {"attention": {}, "rows": {}}
    for kernel, some in (("attention", attention(quick)), ("rows", rows(quick))):
        for case, figures in some:
            found[kernel][case] = figures
            print(f"{kernel} {case:38s} {figures}", flush=True)
    return found

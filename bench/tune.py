"""Which plans of shrink, expand and attention are fastest on this GPU? Writes what plan.py reads.

    python -m bench.tune [--models llama-3-8b FOLDER ...] [--max-rank 64] [--dtype bfloat16]

For each size of the models (a name in MODELS, or a folder with a config.json) it starts from the
plan in force and changes one field at a time, as long as that saves more than 1%. A time is the
median of replays of one CUDA graph over LAYERS layers, each with weights or a cache of its own, so
that nothing stays in the L2 cache; LoRA is timed with its base product and what reads that next. A
candidate whose result differs from that of the plan in force is dropped. Attention is measured in
torch's own operator too, where this torch has it. The table of this generation of devices,
kernels/lorabatch_kernels/tuned/sm_90.json and so on, keeps what it has for other sizes. Tile 16 and
one token a run are decode.

Ends with one JSON line. Fails where there is no CUDA device. Does not cover: the number of pipeline
stages of expand, which must be 1, as must some of attention's on sm_90 (see plan.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import device, record, versions
from lorabatch_kernels import PagedSpans, SiteGroup, build_step_map
from lorabatch_kernels import tuned as tables
from lorabatch_kernels.paged_varlen import operator
from lorabatch_kernels.plan import AttentionPlan, Plan, attention_plan, plan_for

MODELS: dict[str, dict[str, int]] = {
    "smollm2-135m": {"hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "width": 64},
    "llama-3-8b": {"hidden": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "width": 128},
}
DEVICE = "cuda"
LAYERS, REPLAYS, GAIN, TOLERANCE = 8, 30, 0.99, 0.02
ADAPTERS, CONTEXT = 32, 1024
BLOCK_SIZE = 256  # which torch's own attention needs; ours does not care
TOKENS = {16: 64, 64: 2048}  # of a step, by tile
LORA_FIELDS: dict[str, Sequence[int]] = {
    "split_k": (1, 2, 4, 8, 16),
    "block_k": (32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_r": (16, 32, 64),
    "num_warps": (2, 4, 8),
    "shrink_stages": (2, 3, 4),
    "beside": (False, True),
    "fused": (False, True),
}
ATTENTION_FIELDS: dict[str, Sequence[int]] = {
    "block_n": (16, 32, 64, 128),
    "block_m": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "programs": (1, 2, 4, 8),
}

P = TypeVar("P", Plan, AttentionPlan)
Run = Callable[[Any], Tensor]


def improve(plan: P, fields: Mapping[str, Sequence[int]], time_us: Callable[[P], float]) -> P:
    """A plan that no change of one field makes faster by more than 1%; inf: not to be had."""
    best, best_us, seen = plan, time_us(plan), {plan}
    changed = True
    while changed:
        changed = False
        for field, values in fields.items():
            for value in values:
                other = replace(best, **{field: value})
                if other in seen:
                    continue
                seen.add(other)
                other_us = time_us(other)
                if other_us < GAIN * best_us:
                    best, best_us, changed = other, other_us, True
    return best


def sizes_of(model: str) -> dict[str, int]:
    """Of a name in MODELS or a folder with transformers' config.json."""
    if model in MODELS:
        return MODELS[model]
    path = Path(model) / "config.json"
    if not path.is_file():
        raise SystemExit(
            f"no model {model!r}: wanted one of {sorted(MODELS)}, or a folder with a config.json"
        )
    config = json.loads(path.read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return {
        "hidden": hidden,
        "inner": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "width": config.get("head_dim") or hidden // heads,
    }


def timed(run: Run, safe: Callable[[Any], bool] = lambda plan: True) -> Callable[[Any], float]:
    """Microseconds of a plan; inf where it is not safe, does not compile, does not fit, or does not
    agree with the first one."""
    wanted: list[Tensor] = []

    def time_us(plan: Any) -> float:
        from triton import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        if not safe(plan):
            return float("inf")
        try:
            made = run(plan).float()
        except (CompilationError, OutOfResources, PTXASError):
            return float("inf")
        if not wanted:
            wanted.append(made.clone())
        error = (made - wanted[0]).square().mean().sqrt() / wanted[0].square().mean().sqrt()
        return _replay_us(lambda: run(plan)) if error < TOLERANCE else float("inf")

    return time_us


def _replay_us(run: Callable[[], Tensor]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return 1000 * times[REPLAYS // 2]


def lora_run(
    inp: int,
    outs: Sequence[int],
    max_rank: int,
    tile: int,
    dtype: torch.dtype,
    what: str,
    width: int,
) -> Run:
    """LAYERS groups of sites under ADAPTERS adapters of the full rank, each after its base product
    and before what reads that, a method of `Shrinking`; `width` of a head."""
    from lorabatch_kernels.lora_triton import Shrinking

    tokens = TOKENS[tile]
    sizes = (ADAPTERS, max_rank, inp, outs, dtype, DEVICE)
    groups = [SiteGroup.allocate(*sizes, paneled=False) for _ in range(LAYERS)]
    for site in (site for group in groups for site in group.sites):
        for slot in range(ADAPTERS):
            a, b = torch.randn(max_rank, inp) / inp**0.5, torch.randn(site.out_features, max_rank)
            site.load(slot, a, b, 1.0)
    options: dict[str, Any] = {"dtype": dtype, "device": DEVICE}
    weights = [torch.randn(sum(outs), inp, **options) / inp**0.5 for _ in groups]
    x = torch.randn(tokens, inp, **options)
    turn = torch.randn(tokens, width, **options)
    tiles = build_step_map([t * ADAPTERS // tokens for t in range(tokens)], DEVICE, tile=tile).tiles

    def run(plan: Plan) -> Tensor:
        for group, weight in zip(groups, weights, strict=True):
            shrinking = Shrinking(x, group, tiles, plan)
            y = F.linear(x, weight)
            if what == "gate":
                made = shrinking.gate(y)
            elif what == "rotate":
                shrinking.rotate(made := y, turn, turn)
            else:
                shrinking.sum(made := torch.zeros_like(y), y)
        return made

    return run


def attention_run(sizes: Mapping[str, int], rows: int, dtype: torch.dtype) -> Run:
    """LAYERS caches; decode of 64 runs, or prefill of 4, at CONTEXT positions each."""
    from lorabatch_kernels.paged_triton import attend

    runs, count = (64, 1) if rows == 16 else (4, CONTEXT // 2)
    options: dict[str, Any] = {"dtype": dtype, "device": DEVICE}
    table = -(-CONTEXT // BLOCK_SIZE)
    pool = (runs * table, BLOCK_SIZE, sizes["kv_heads"], sizes["width"])
    pools = [
        [torch.randn(pool, **options).permute(2, 0, 1, 3) for _ in range(2)] for _ in range(LAYERS)
    ]
    query = torch.randn(sizes["heads"], runs * count, sizes["width"], **options)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}
    spans = PagedSpans(
        torch.arange(runs + 1, **ints) * count,
        torch.full((runs,), CONTEXT, **ints),
        torch.randperm(runs * table, device=DEVICE).view(runs, table).int(),
        count,
    )

    def run(plan: AttentionPlan) -> Tensor:
        for keys, values in pools:
            out = query.new_empty(runs * count, sizes["heads"], sizes["width"])
            attend(out, query, keys, values, spans, sizes["width"] ** -0.5, plan=plan)
        return out

    return run


def tune(models: Sequence[str], max_rank: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """{"lora": {key: fields}, "attention": {key: fields}}."""
    on = tables.generation(torch.device("cuda", torch.cuda.current_device()))
    found: dict[str, dict[str, Any]] = {"lora": {}, "attention": {}}
    known = operator() is not None
    for model in models:
        sizes = sizes_of(model)
        hidden, inner, width = sizes["hidden"], sizes["inner"], sizes["width"]
        kv = sizes["kv_heads"] * width
        layers = [
            (hidden, [sizes["heads"] * width, kv, kv], "rotate"),
            (sizes["heads"] * width, [hidden], "sum"),
            (hidden, [inner, inner], "gate"),
            (inner, [hidden], "sum"),
        ]
        for inp, outs, what in layers:
            for tile in TOKENS:
                lora = (inp, sum(outs), max_rank, tile, dtype)
                measured = timed(lora_run(inp, outs, *lora[2:], what, width))
                plan = improve(plan_for(*lora, on), LORA_FIELDS, measured)
                found["lora"][tables.key_of(*lora)] = asdict(plan)
        for rows in (16, 64):
            heads = (width, width, rows, dtype)
            run = attention_run(sizes, rows, dtype)
            measured = timed(run, lambda plan: plan.safe(on) and (known or not plan.library))
            ours = improve(
                replace(attention_plan(*heads, on), library=False), ATTENTION_FIELDS, measured
            )
            best = improve(ours, {"library": (True,)}, measured)
            found["attention"][tables.key_of(*heads)] = asdict(best)
    return found


def write(found: Mapping[str, Mapping[str, Any]], on: str) -> Path:
    """Put the plans into the table of this generation, beside what it has for other sizes."""
    path = tables.FOLDER / f"{on}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for kind, plans in found.items():
        table[kind] = {**table.get(kind, {}), **plans}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    table["measured"] = {"date": now, "device": device(), "versions": versions()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("bench.tune measures on a CUDA device, and torch finds none here")
    found = tune(given.models, given.max_rank, getattr(torch, given.dtype))
    on = tables.generation(torch.device("cuda", torch.cuda.current_device()))
    assert on is not None
    path = write(found, on)
    record("tune", models=given.models, table=path.name, **found)


if __name__ == "__main__":
    main()

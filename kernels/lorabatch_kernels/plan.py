"""Block sizes of the Triton kernels, chosen from shapes alone, never from a batch's contents.

The tests compile what `plan_for` and `attention_plan` return for sm_80, sm_90, sm_100 and gfx942
and hold it to zero spills. The sizes below are reasoned, not tuned on a GPU: a tile of 16 (decode)
reads ranks in blocks of 16, so that programs beyond an adapter's rank leave at once; larger tiles
(prefill) take the whole rank, since there reading x once matters more. fp32 has no tensor core path
at "ieee" and gets smaller blocks.

Where bench/tune.py has written a table for the device's generation (tuned.py), its plans come
first.

Raises ValueError for a table that is none.
Does not cover: autotuning while jobs run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lorabatch_kernels.tuned import tuned_plan

SPLIT_COLUMNS = 512  # columns of x one shrink program reduces, where K is split
MAX_SPLIT_K = 8
SPLIT_POSITIONS = 256  # positions one attention program has at least, where they are split
MAX_SPLITS = 32

# Said outright, because triton 3.9 warns where it is not and 3.10 changes the default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Plan:
    """Compile-time sizes of one group's shrink and expand, and where they run. `beside`: shrink on
    a stream of its own, beside the base product; `fused`: expand inside of what reads its result
    next. Neither is taken before it was measured to be faster (tuned.py)."""

    block_m: int
    block_k: int
    block_n: int
    block_r: int
    split_k: int
    num_warps: int
    shrink_stages: int
    # 1: pipelined wgmma with a register operand is miscompiled on sm_90 before ptxas 13.3
    # (triton#9433).
    expand_stages: int = 1
    beside: bool = False
    fused: bool = False


def _rank_block(max_rank: int, tile: int, dtype: torch.dtype) -> int:
    if tile == 16 or dtype == torch.float32:
        return 16
    block = 16
    while block < min(max_rank, 64):
        block *= 2
    return block


@lru_cache(maxsize=1024)
def plan_for(
    in_features: int,
    out_features: int,
    max_rank: int,
    tile: int,
    dtype: torch.dtype,
    on: str | None = None,
) -> Plan:
    """The plan for a group of sites with together `out_features` under tiles of `tile` tokens, on
    devices of the generation `on`."""
    tuned = tuned_plan("lora", Plan, on, in_features, out_features, max_rank, tile, dtype)
    if tuned is not None:
        return tuned
    full = dtype == torch.float32
    block_k = 32 if full else (128 if tile == 16 else 64)
    wanted = in_features // SPLIT_COLUMNS if tile == 16 else in_features // (4 * SPLIT_COLUMNS)
    return Plan(
        block_m=tile,
        block_k=block_k,
        block_n=64 if full or tile >= 64 else 128,
        block_r=_rank_block(max_rank, tile, dtype),
        split_k=max(1, min(MAX_SPLIT_K, wanted)),
        num_warps=8 if tile == 128 else 4,
        shrink_stages=2 if full else 3,
    )


@dataclass(frozen=True)
class AttentionPlan:
    """Compile-time sizes of one attention: rows and positions of a tile; `programs`: as many as a
    processor should have, where positions are split. `library`: torch's own operator, where it can
    be had (paged_varlen.py)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 2
    library: bool = False

    def safe(self, on: str | None) -> bool:
        """Whether no wgmma is left in flight with probabilities in registers (see `Plan`)."""
        return on != "sm_90" or self.block_m < 64 or self.num_stages == 1


@lru_cache(maxsize=1024)
def attention_plan(
    width: int, value_width: int, rows: int, dtype: torch.dtype, on: str | None = None
) -> AttentionPlan:
    """The plan for heads of these widths on devices of the generation `on`; `rows`: the most of a
    run, tokens times heads of a group."""
    rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tuned = tuned_plan("attention", AttentionPlan, on, width, value_width, rows, dtype)
    if tuned is not None:
        return tuned
    widest = max(width, value_width)
    if dtype == torch.float32:
        wide = widest > 128
        return AttentionPlan(16, 16 if wide else 32, num_warps=8, num_stages=1 if wide else 2)
    plan = AttentionPlan(
        rows,
        block_n=64 if widest <= 64 or (rows == 16 and widest <= 128) else 32,
        num_warps=8 if widest > 128 and rows == 64 else 4,
        num_stages=3 if rows == 16 and widest <= 128 else 2,
    )
    return plan if plan.safe(on) else replace(plan, num_stages=1)


def splits_for(programs: int, positions: int, wanted: int) -> int:
    """Among how many to share `positions` (the most that a table holds), a power of two, where
    `programs` would attend without and `wanted` fill the device."""
    splits = min(wanted // programs, positions // SPLIT_POSITIONS, MAX_SPLITS)
    return 1 << max(0, splits.bit_length() - 1)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of a GPU; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

"""Block sizes of the Triton kernels, chosen from shapes alone, never from a batch's contents.

The tests compile what `plan_for` returns for sm_80, sm_90, sm_100 and gfx942 and hold it to zero
spills. The sizes are reasoned, not yet tuned on a GPU: a tile of 16 (decode) reads ranks in blocks
of 16, so that programs beyond an adapter's rank leave at once; larger tiles (prefill) take the
whole rank, since there reading x once matters more. fp32 has no tensor core path at "ieee" and gets
smaller blocks.

Raises nothing.
Does not cover: autotuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

SPLIT_COLUMNS = 512  # columns of x one shrink program reduces, where K is split
MAX_SPLIT_K = 8

# Said outright, because triton 3.9 warns where it is not and 3.10 changes the default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Plan:
    """Compile-time sizes of one site's shrink and expand."""

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


def _rank_block(max_rank: int, tile: int, dtype: torch.dtype) -> int:
    if tile == 16 or dtype == torch.float32:
        return 16
    block = 16
    while block < min(max_rank, 64):
        block *= 2
    return block


@lru_cache(maxsize=1024)
def plan_for(in_features: int, max_rank: int, tile: int, dtype: torch.dtype) -> Plan:
    """The plan for a site of `in_features` and `max_rank` under tiles of `tile` tokens."""
    full = dtype == torch.float32
    block_k = 32 if full else (128 if tile == 16 else 64)
    wanted = in_features // SPLIT_COLUMNS if tile == 16 else in_features // (4 * SPLIT_COLUMNS)
    return Plan(
        block_m=tile,
        block_k=block_k,
        block_n=32 if full and tile == 16 else 64 if full or tile >= 64 else 128,
        block_r=_rank_block(max_rank, tile, dtype),
        split_k=max(1, min(MAX_SPLIT_K, wanted)),
        num_warps=8 if tile == 128 else 4,
        shrink_stages=2 if full else 3,
    )

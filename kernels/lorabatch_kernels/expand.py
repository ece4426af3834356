"""Expand: y += scale * v B for every token with an adapter, in place.

Shapes and dtypes: y [tokens, N] (bf16, fp16 or fp32, unit column stride, any row stride, so that it
may be a slice of a fused projection); the site's `b` in the same dtype; planes fp32
[split_k, tokens, max_rank] from shrink, summed here. v is rounded to the dtype of `b` for the
tensor cores; sums and scale are fp32, and y is rounded once. Rows of base tokens are not touched.

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: bf16 under TRITON_INTERPRET=1 (see shrink.py); fusion with y's consumer.

Source: as shrink.py.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabatch_kernels.plan import COMPILE_OPTIONS, Plan
from lorabatch_kernels.site import LoraSite
from lorabatch_kernels.tiles import TileMap


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    y,
    y_stride,
    planes,
    b,
    order,
    tile_slot,
    tile_start,
    tile_len,
    row0,
    rank,
    scale,
    tokens,
    N: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, column blocks): one tile times one block of columns over all rank rows."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    if length == 0:
        return
    slot = tl.load(tile_slot + tile)
    slot_rank = tl.load(rank + slot)
    if slot_rank == 0:
        return
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = m < length
    in_row = n < N
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    first_row = tl.load(row0 + slot)
    plane = tokens.to(tl.int64) * MAX_RANK

    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first_r = 0
    while first_r < slot_rank:  # not range(): triton 3.6 interprets that with numpy < 2.4 only
        r = first_r + tl.arange(0, BLOCK_R)
        in_rank = r < slot_rank
        b_row = (first_row + r).to(tl.int64)
        b_at = b + b_row[:, None] * N + n[None, :]
        b_block = tl.load(b_at, mask=in_rank[:, None] & in_row[None, :], other=0.0)
        written = in_tile[:, None] & in_rank[None, :]
        v_at = planes + token[:, None] * MAX_RANK + r[None, :]
        v = tl.load(v_at, mask=written, other=0.0)
        for part in tl.static_range(1, SPLIT_K):
            v += tl.load(v_at + part * plane, mask=written, other=0.0)
        delta = tl.dot(v.to(b_block.dtype), b_block, delta, input_precision="ieee")
        first_r += BLOCK_R

    y_at = y + token[:, None] * y_stride + n[None, :]
    in_y = in_tile[:, None] & in_row[None, :]
    total = tl.load(y_at, mask=in_y, other=0.0).to(tl.float32) + delta * tl.load(scale + slot)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=in_y)


def expand(y: Tensor, planes: Tensor, site: LoraSite, tiles: TileMap, plan: Plan) -> None:
    """Add the LoRA term of every token with an adapter to `y` in place."""
    grid = (tiles.tiles, triton.cdiv(site.out_features, plan.block_n))
    expand_kernel[grid](
        y,
        y.stride(0),
        planes,
        site.b,
        tiles.order,
        tiles.tile_slot,
        tiles.tile_start,
        tiles.tile_len,
        site.row0,
        site.rank,
        site.scale,
        planes.shape[1],
        N=site.out_features,
        MAX_RANK=site.max_rank,
        SPLIT_K=plan.split_k,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_R=plan.block_r,
        num_warps=plan.num_warps,
        num_stages=plan.expand_stages,
        **COMPILE_OPTIONS,
    )


def expand_reference(y: Tensor, v: Tensor, site: LoraSite, slots: Sequence[int]) -> Tensor:
    """fp32 [tokens, N]: y plus every token's LoRA term, one token after the other."""
    total = y.to(torch.float32, copy=True)
    for token, slot in enumerate(slots):
        if slot >= 0:
            _, b = site.rows(slot)
            delta = v[token, : len(b)].float() @ b.float()
            total[token] = total[token] + site.scales[slot] * delta
    return total

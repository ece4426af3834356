"""Shrink: v = x A^T for every token with an adapter, as fp32 planes of a split K.

Shapes and dtypes: x [tokens, K] (bf16, fp16 or fp32, unit column stride); the site's `a` in the
same dtype; planes fp32 [split_k, tokens, max_rank], whose sum over the first axis is v. Only cells
of tokens with an adapter, up to the rank of their slot, are written: the planes need no zeroing,
and no atomics; expand reads just those cells. Sums are fp32 ("ieee" for fp32 input, never tf32).

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: bf16 under TRITON_INTERPRET=1, where triton 3.6 and 3.9 multiply raw bits.

Source: the SGMV idea is Punica's, fp32 split-K planes are from SGLang's triton_v2; rank-exact rows
and tiles of length 0 are ours.
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
def shrink_kernel(
    x,
    x_stride,
    a,
    planes,
    order,
    tile_slot,
    tile_start,
    tile_len,
    row0,
    rank,
    tokens,
    K: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, rank blocks, SPLIT_K): one tile times one block of rank rows over one K part."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    if length == 0:
        return
    slot = tl.load(tile_slot + tile)
    slot_rank = tl.load(rank + slot)
    first_r = tl.program_id(1) * BLOCK_R
    if first_r >= slot_rank:
        return
    m = tl.arange(0, BLOCK_M)
    r = first_r + tl.arange(0, BLOCK_R)
    in_tile = m < length
    in_rank = r < slot_rank
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    a_row = (tl.load(row0 + slot) + r).to(tl.int64)

    part = tl.program_id(2)
    PART_K: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    k = part * PART_K + tl.arange(0, BLOCK_K)
    x_at = x + token[:, None] * x_stride
    a_at = a + a_row[None, :] * K
    v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first_k in range(0, PART_K, BLOCK_K):
        kk = first_k + k
        x_block = tl.load(x_at + kk[None, :], mask=in_tile[:, None] & (kk < K)[None, :], other=0.0)
        a_block = tl.load(a_at + kk[:, None], mask=(kk < K)[:, None] & in_rank[None, :], other=0.0)
        v = tl.dot(x_block, a_block, v, input_precision="ieee")

    cell = (part.to(tl.int64) * tokens + token)[:, None] * MAX_RANK + r[None, :]
    tl.store(planes + cell, v, mask=in_tile[:, None] & in_rank[None, :])


def shrink(
    x: Tensor, site: LoraSite, tiles: TileMap, plan: Plan, planes: Tensor | None = None
) -> Tensor:
    """The planes of `x`, written into `planes` where given."""
    tokens = x.shape[0]
    if planes is None:
        shape = (plan.split_k, tokens, site.max_rank)
        planes = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = (tiles.tiles, triton.cdiv(site.max_rank, plan.block_r), plan.split_k)
    shrink_kernel[grid](
        x,
        x.stride(0),
        site.a,
        planes,
        tiles.order,
        tiles.tile_slot,
        tiles.tile_start,
        tiles.tile_len,
        site.row0,
        site.rank,
        tokens,
        K=site.in_features,
        MAX_RANK=site.max_rank,
        SPLIT_K=plan.split_k,
        BLOCK_M=plan.block_m,
        BLOCK_K=plan.block_k,
        BLOCK_R=plan.block_r,
        num_warps=plan.num_warps,
        num_stages=plan.shrink_stages,
        **COMPILE_OPTIONS,
    )
    return planes


def shrink_reference(x: Tensor, site: LoraSite, slots: Sequence[int]) -> Tensor:
    """v fp32 [tokens, max_rank], one token after the other; zero where nothing is written."""
    v = torch.zeros(x.shape[0], site.max_rank, dtype=torch.float32, device=x.device)
    for token, slot in enumerate(slots):
        if slot >= 0:
            a, _ = site.rows(slot)
            v[token, : len(a)] = a.float() @ x[token].float()
    return v

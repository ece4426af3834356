"""Shrink: v = x A^T for every token with an adapter, as fp32 planes of a split K.

Shapes and dtypes: x [tokens, K] (bf16, fp16 or fp32, unit column stride); the pool's `a` in the
same dtype; planes fp32 [split_k, tokens, sites * max_rank], whose sum over the first axis is v, the
sites of the group side by side. Only cells of tokens with an adapter, up to the rank of their slot
at that site, are written: the planes need no zeroing, and no atomics; expand reads just those
cells. Sums are fp32 ("ieee" for fp32 input, never tf32).

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: bf16 under TRITON_INTERPRET=1, where triton 3.6 and 3.9 multiply raw bits.

Source: the SGMV idea is Punica's, fp32 split-K planes are from SGLang's triton_v2; rank-exact rows,
tiles of length 0 and sites as an axis of the grid are ours.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.plan import COMPILE_OPTIONS, Plan
from lorabatch_kernels.site import LoraSite
from lorabatch_kernels.tiles import TileMap


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    x,
    x_stride,
    a,
    a_stride,
    planes,
    order,
    tile_slot,
    tile_start,
    tile_len,
    row0,
    rank,
    slots,
    tokens,
    K: tl.constexpr,
    SITES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, sites * rank blocks, SPLIT_K): one tile times one block of a site's rank rows
    over one K part."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    slot = tl.load(tile_slot + tile)
    if length == 0 or slot < 0:
        return
    RANK_BLOCKS: tl.constexpr = (MAX_RANK + BLOCK_R - 1) // BLOCK_R
    site = tl.program_id(1) // RANK_BLOCKS
    first_r = tl.program_id(1) % RANK_BLOCKS * BLOCK_R
    slot_rank = tl.load(rank + site * slots + slot)
    if first_r >= slot_rank:
        return
    m = tl.arange(0, BLOCK_M)
    r = first_r + tl.arange(0, BLOCK_R)
    in_tile = m < length
    in_rank = r < slot_rank
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    a_row = (tl.load(row0 + site * slots + slot) + r).to(tl.int64)

    part = tl.program_id(2)
    PART_K: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    k = part * PART_K + tl.arange(0, BLOCK_K)
    x_at = x + token[:, None] * x_stride
    a_at = a + site.to(tl.int64) * a_stride + a_row[None, :] * K
    v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first_k in range(0, PART_K, BLOCK_K):
        kk = first_k + k
        x_block = tl.load(x_at + kk[None, :], mask=in_tile[:, None] & (kk < K)[None, :], other=0.0)
        a_block = tl.load(a_at + kk[:, None], mask=(kk < K)[:, None] & in_rank[None, :], other=0.0)
        v = tl.dot(x_block, a_block, v, input_precision="ieee")

    row = (part.to(tl.int64) * tokens + token)[:, None] * (SITES * MAX_RANK)
    cell = row + site * MAX_RANK + r[None, :]
    tl.store(planes + cell, v, mask=in_tile[:, None] & in_rank[None, :])


def new_planes(x: Tensor, group: SiteGroup, plan: Plan) -> Tensor:
    """Of any contents."""
    width = len(group.sites) * group.max_rank
    return torch.empty(plan.split_k, x.shape[0], width, dtype=torch.float32, device=x.device)


def shrink(planes: Tensor, x: Tensor, group: SiteGroup, tiles: TileMap, plan: Plan) -> None:
    """Write the planes of `x`."""
    pool, sites = group.pool, len(group.sites)
    assert pool is not None
    grid = (tiles.adapter_tiles, sites * triton.cdiv(group.max_rank, plan.block_r), plan.split_k)
    shrink_kernel[grid](
        x,
        x.stride(0),
        pool.a,
        pool.a.stride(0),
        planes,
        tiles.order,
        tiles.tile_slot,
        tiles.tile_start,
        tiles.tile_len,
        pool.row0,
        pool.rank,
        pool.rank.stride(0),
        x.shape[0],
        K=group.in_features,
        SITES=sites,
        MAX_RANK=group.max_rank,
        SPLIT_K=plan.split_k,
        BLOCK_M=plan.block_m,
        BLOCK_K=plan.block_k,
        BLOCK_R=plan.block_r,
        num_warps=plan.num_warps,
        num_stages=plan.shrink_stages,
        **COMPILE_OPTIONS,
    )


def shrink_reference(x: Tensor, site: LoraSite, slots: Sequence[int]) -> Tensor:
    """v fp32 [tokens, max_rank], one token after the other; zero where nothing is written."""
    v = torch.zeros(x.shape[0], site.max_rank, dtype=torch.float32, device=x.device)
    for token, slot in enumerate(slots):
        if slot >= 0:
            a, _ = site.rows(slot)
            v[token, : len(a)] = a.float() @ x[token].float()
    return v

"""Expand: y += gain * y + shift + scale * v B for every token with an adapter, in place.

Shapes and dtypes: y [tokens, columns of all sites] (bf16, fp16 or fp32, unit column stride, any row
stride); the pool's `b` in the same dtype; planes fp32 [split_k, tokens, sites * max_rank] from
shrink, summed here. Gain and shift are those of site.py. v is rounded to the dtype of `b` for the
tensor cores; sums and scale are fp32, and y is rounded once. Rows of base tokens are not touched.

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: bf16 under TRITON_INTERPRET=1 (see shrink.py). What reads y next can add the terms
itself: expand_into.py.

Source: as shrink.py.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabatch_kernels.group import MOST_SITES, SiteGroup
from lorabatch_kernels.plan import COMPILE_OPTIONS, Plan
from lorabatch_kernels.site import LoraSite
from lorabatch_kernels.tiles import TileMap


@triton.jit
def adapted(
    y,
    planes,
    b,
    b_stride,
    row0,
    rank,
    affine,
    scale,
    slots,
    tokens,
    site,
    slot,
    token,
    in_tile,
    column,
    in_columns,
    SITES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y + gain * y + shift + scale * v B of these columns, which are the site's; y and the result
    fp32 [BLOCK_M, BLOCK_N]. Slot -1: y."""
    at = site * slots + slot
    slot_rank = tl.load(rank + at, mask=slot >= 0, other=0)
    first_row = tl.load(row0 + at, mask=slot >= 0, other=0).to(tl.int64)
    plane = tokens.to(tl.int64) * (SITES * MAX_RANK)
    v_at = planes + token * (SITES * MAX_RANK) + site * MAX_RANK
    term = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first_r = 0
    while first_r < slot_rank:  # not range(): triton 3.6 interprets that with numpy < 2.4 only
        r = first_r + tl.arange(0, BLOCK_R)
        in_rank = r < slot_rank
        b_at = b + (first_row + r)[:, None] * b_stride + column[None, :]
        b_block = tl.load(b_at, mask=in_rank[:, None] & in_columns[None, :], other=0.0)
        written = in_tile[:, None] & in_rank[None, :]
        cell = v_at[:, None] + r[None, :]
        v = tl.load(cell, mask=written, other=0.0)
        for part in tl.static_range(1, SPLIT_K):
            v += tl.load(cell + part * plane, mask=written, other=0.0)
        term = tl.dot(v.to(b_block.dtype), b_block, term, input_precision="ieee")
        first_r += BLOCK_R
    if tl.load(affine + at, mask=slot >= 0, other=0) != 0:
        gain_at = b + (first_row + slot_rank) * b_stride + column
        gain = tl.load(gain_at, mask=in_columns, other=0.0).to(tl.float32)
        shift = tl.load(gain_at + b_stride, mask=in_columns, other=0.0).to(tl.float32)
        y += y * gain[None, :] + shift[None, :]
    return y + term * tl.load(scale + at, mask=slot >= 0, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    y,
    y_stride,
    planes,
    b,
    b_stride,
    order,
    tile_slot,
    tile_start,
    tile_len,
    row0,
    rank,
    affine,
    scale,
    slots,
    tokens,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SITES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, column blocks of all sites, which have N0, N1 and N2 columns): one tile times
    one block of a site's columns over all its rank rows."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    slot = tl.load(tile_slot + tile)
    if length == 0 or slot < 0:
        return
    BLOCKS0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(1)
    site = (block >= BLOCKS0).to(tl.int32) + (block >= BLOCKS0 + BLOCKS1).to(tl.int32)
    at = site * slots + slot
    if tl.load(rank + at) == 0 and tl.load(affine + at) == 0:
        return
    first_block = tl.where(site == 0, 0, tl.where(site == 1, BLOCKS0, BLOCKS0 + BLOCKS1))
    first_column = tl.where(site == 0, 0, tl.where(site == 1, N0, N0 + N1))
    columns = tl.where(site == 0, N0, tl.where(site == 1, N1, N2))
    n = (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = n < columns
    column = first_column + n

    m = tl.arange(0, BLOCK_M)
    in_tile = m < length
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    y_at = y + token[:, None] * y_stride + column[None, :]
    in_y = in_tile[:, None] & in_columns[None, :]
    total = adapted(
        tl.load(y_at, mask=in_y, other=0.0).to(tl.float32),
        planes, b, b_stride, row0, rank, affine, scale, slots, tokens,
        site, slot, token, in_tile, column, in_columns,
        SITES, MAX_RANK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    tl.store(y_at, total.to(y.dtype.element_ty), mask=in_y)


def tensors_read(group: SiteGroup, tiles: TileMap) -> tuple[Tensor | int, ...]:
    """`b` and the tables, as the kernels take them."""
    pool = group.pool
    assert pool is not None
    maps = tiles.order, tiles.tile_slot, tiles.tile_start, tiles.tile_len
    tables = pool.row0, pool.rank, pool.affine, pool.scale, pool.rank.stride(0)
    return pool.b, pool.b.stride(0), *maps, *tables


def constants(group: SiteGroup, plan: Plan) -> dict[str, int]:
    """What is compiled into each of the kernels."""
    return {
        "MAX_RANK": group.max_rank,
        "SPLIT_K": plan.split_k,
        "BLOCK_M": plan.block_m,
        "BLOCK_R": plan.block_r,
        "num_warps": plan.num_warps,
        "num_stages": plan.expand_stages,
        **COMPILE_OPTIONS,
    }


def expand(y: Tensor, planes: Tensor, group: SiteGroup, tiles: TileMap, plan: Plan) -> None:
    """Add the LoRA term of every token with an adapter to `y` in place."""
    columns = [site.out_features for site in group.sites]
    n0, n1, n2 = columns + [0] * (MOST_SITES - len(columns))
    expand_kernel[(tiles.adapter_tiles, sum(triton.cdiv(n, plan.block_n) for n in columns))](
        *(y, y.stride(0), planes),
        *tensors_read(group, tiles),
        planes.shape[1],
        N0=n0,
        N1=n1,
        N2=n2,
        SITES=len(columns),
        BLOCK_N=plan.block_n,
        **constants(group, plan),
    )


def expand_reference(y: Tensor, v: Tensor, site: LoraSite, slots: Sequence[int]) -> Tensor:
    """fp32 [tokens, N]: a site's y plus every token's LoRA term, one token after the other."""
    total = y.to(torch.float32, copy=True)
    for token, slot in enumerate(slots):
        if slot >= 0:
            _, b = site.rows(slot)
            delta = v[token, : len(b)].float() @ b.float()
            gain, shift = site.affine_rows(slot) or (0.0, 0.0)
            total[token] += gain * total[token] + shift + site.scales[slot] * delta
    return total

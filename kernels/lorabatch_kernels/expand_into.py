"""Expand inside of what reads y next, which then is read once and not written before.

    expand_gate     silu(y[:, :width] + terms) * (y[:, width:] + terms), of gate and up
    expand_rotary   y + terms, and the heads of q and k turned, in place, of q, k and v
    expand_sum      total += y + terms, of one site

Shapes and dtypes: y and planes as expand.py, the results as rows.py; cos, sin [tokens, head width].
Every token must be in a tile, base tokens in tiles of slot -1. Terms are added to y and rounded
before anything else is done, as expand does: a residual stream is too coarse for them.

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: fp32 on a GPU, for which bench/tune.py makes no plan.

Source: ours. Taken where a plan says so (`Plan.fused`).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorabatch_kernels.expand import adapted, constants, tensors_read
from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.plan import Plan
from lorabatch_kernels.tiles import TileMap


@triton.jit(do_not_specialize=["tokens"])
def expand_gate_kernel(
    out,
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
    WIDTH: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, column blocks of `out`)."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    if length == 0:
        return
    slot = tl.load(tile_slot + tile)
    m = tl.arange(0, BLOCK_M)
    in_tile = m < length
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = n < WIDTH
    inside = in_tile[:, None] & in_columns[None, :]
    at = y + token[:, None] * y_stride + n[None, :]

    gate = adapted(
        tl.load(at, mask=inside, other=0.0).to(tl.float32),
        planes, b, b_stride, row0, rank, affine, scale, slots, tokens,
        0, slot, token, in_tile, n, in_columns,
        2, MAX_RANK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    gate = gate.to(y.dtype.element_ty).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)

    up = adapted(
        tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32),
        planes, b, b_stride, row0, rank, affine, scale, slots, tokens,
        1, slot, token, in_tile, WIDTH + n, in_columns,
        2, MAX_RANK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    up = up.to(y.dtype.element_ty).to(tl.float32)
    out_at = out + token[:, None] * WIDTH + n[None, :]
    tl.store(out_at, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def expand_rotary_kernel(
    y,
    y_stride,
    cos,
    sin,
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
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, heads of q, k and v): lane d of a head pairs with lane d + HALF, which is up to
    BLOCK_N."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    if length == 0:
        return
    slot = tl.load(tile_slot + tile)
    head = tl.program_id(1)
    turned = head < Q_HEADS + K_HEADS
    if slot < 0 and not turned:
        return
    site = (head >= Q_HEADS).to(tl.int32) + (head >= Q_HEADS + K_HEADS).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    in_tile = m < length
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    d = tl.arange(0, BLOCK_N)
    in_columns = d < HALF
    inside = in_tile[:, None] & in_columns[None, :]
    column = head * (2 * HALF) + d
    at = y + token[:, None] * y_stride + column[None, :]

    first = adapted(
        tl.load(at, mask=inside, other=0.0).to(tl.float32),
        planes, b, b_stride, row0, rank, affine, scale, slots, tokens,
        site, slot, token, in_tile, column, in_columns,
        3, MAX_RANK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    first = first.to(y.dtype.element_ty).to(tl.float32)
    second = adapted(
        tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32),
        planes, b, b_stride, row0, rank, affine, scale, slots, tokens,
        site, slot, token, in_tile, column + HALF, in_columns,
        3, MAX_RANK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    second = second.to(y.dtype.element_ty).to(tl.float32)
    if turned:
        turn = token[:, None] * (2 * HALF) + d[None, :]
        cos_a = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + turn + HALF, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + turn + HALF, mask=inside, other=0.0).to(tl.float32)
        low = first * cos_a - second * sin_a
        second = second * cos_b + first * sin_b
        first = low
    tl.store(at, first.to(y.dtype.element_ty), mask=inside)
    tl.store(at + HALF, second.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def expand_sum_kernel(
    total,
    total_stride,
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
    N: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (tiles, column blocks)."""
    tile = tl.program_id(0)
    length = tl.load(tile_len + tile)
    if length == 0:
        return
    slot = tl.load(tile_slot + tile)
    m = tl.arange(0, BLOCK_M)
    in_tile = m < length
    start = tl.load(tile_start + tile)
    token = tl.load(order + start + m, mask=in_tile, other=0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = n < N
    inside = in_tile[:, None] & in_columns[None, :]
    y_at = y + token[:, None] * y_stride + n[None, :]
    made = adapted(
        tl.load(y_at, mask=inside, other=0.0).to(tl.float32),
        planes, b, b_stride, row0, rank, affine, scale, slots, tokens,
        0, slot, token, in_tile, n, in_columns,
        1, MAX_RANK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    made = made.to(y.dtype.element_ty).to(tl.float32)
    total_at = total + token[:, None] * total_stride + n[None, :]
    made += tl.load(total_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_at, made.to(total.dtype.element_ty), mask=inside)


def gate_block(plan: Plan) -> int:
    """Columns of one program, which holds as many of gate and of up."""
    return min(64, plan.block_n)


def expand_gate(y: Tensor, planes: Tensor, group: SiteGroup, tiles: TileMap, plan: Plan) -> Tensor:
    """[tokens, width] of y [tokens, 2 * width]."""
    tokens, width = y.shape[0], y.shape[1] // 2
    out, block = y.new_empty(tokens, width), gate_block(plan)
    expand_gate_kernel[(tiles.tiles, triton.cdiv(width, block))](
        *(out, y, y.stride(0), planes),
        *tensors_read(group, tiles),
        tokens,
        WIDTH=width,
        BLOCK_N=block,
        **constants(group, plan),
    )
    return out


def expand_sum(
    total: Tensor, y: Tensor, planes: Tensor, group: SiteGroup, tiles: TileMap, plan: Plan
) -> None:
    """total [tokens, N] += y [tokens, N] + terms, in place."""
    tokens, columns = y.shape
    expand_sum_kernel[(tiles.tiles, triton.cdiv(columns, plan.block_n))](
        *(total, total.stride(0), y, y.stride(0), planes),
        *tensors_read(group, tiles),
        tokens,
        N=columns,
        BLOCK_N=plan.block_n,
        **constants(group, plan),
    )


def expand_rotary(
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    planes: Tensor,
    group: SiteGroup,
    tiles: TileMap,
    plan: Plan,
) -> None:
    """y [tokens, columns of q, k and v], in place."""
    width = cos.shape[1]
    q, k, v = (site.out_features // width for site in group.sites)
    expand_rotary_kernel[(tiles.tiles, q + k + v)](
        *(y, y.stride(0), cos, sin, planes),
        *tensors_read(group, tiles),
        y.shape[0],
        Q_HEADS=q,
        K_HEADS=k,
        HALF=width // 2,
        BLOCK_N=max(16, triton.next_power_of_2(width // 2)),
        **constants(group, plan),
    )

"""The kernels of paged attention: a tile of rows over the positions that it sees, and the merge.

A program takes a tile of rows, which are the query heads of one key-value head for some tokens of
one run, over all positions that they see. Where positions are split, several programs share them
evenly and leave what they found (`partial` fp32 [SPLITS, S, Hq, Dv], normed, and `weight` fp32
[SPLITS, S, Hq], the base-2 logarithm of its softmax sum) to a merge.

Programs beyond their run or without a position return at once, and the merge leaves out what they
did not write. Only positions of the run itself are loaded: neither the weight nor the value of
another job's memory enters a sum.

Shapes and dtypes: as paged.py; probabilities are rounded to the dtype of the values for the tensor
cores.

Raises nothing of its own. Does not cover: bf16 under TRITON_INTERPRET=1 (see shrink.py).

Source: FlashAttention-2 (arXiv 2307.08691) and Flash-Decoding; heads packed into a tile's rows as
in vLLM's unified Triton kernel. Positions split by a run's own length are ours.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite, so that a row that has seen nothing yet makes no NaN


@triton.jit
def _positions_a_split(seen, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cdiv(tl.cdiv(seen, SPLITS), BLOCK_N) * BLOCK_N


@triton.jit
def _share_beside(sink, weight):
    """What a sink leaves to the positions, whose softmax sum's base-2 logarithm is `weight`."""
    return 1.0 / (1.0 + tl.exp2(sink.to(tl.float32) * LOG2_E - weight))


@triton.jit
def _over_positions(
    q,
    keys,
    values,
    table,
    own,
    begin,
    end,
    scale,
    keys_block,
    keys_at,
    values_block,
    values_at,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Each row's largest score (base 2), softmax sum and sum of values, over [begin, end)."""
    BLOCK_M: tl.constexpr = q.shape[0]
    d = tl.arange(0, q.shape[1])
    dv = tl.arange(0, BLOCK_DV)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for first in tl.range(begin, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        inside = position < end
        block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = position % BLOCK_SIZE
        k_at = keys + (block * keys_block + at * keys_at)[:, None] + d[None, :]
        k = tl.load(k_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP > 0:  # tanh(x) = 2 sigmoid(2 x) - 1
            scores = SOFTCAP * (2.0 * tl.sigmoid(scores * (2.0 / SOFTCAP)) - 1.0)
        seen = inside[None, :] & (position[None, :] <= own[:, None])
        if WINDOW:
            seen &= position[None, :] > own[:, None] - WINDOW
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(p, 1)
        v_at = values + (block * values_block + at * values_at)[:, None] + dv[None, :]
        v = tl.load(v_at, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        found = tl.dot(p.to(v.dtype), v, found * fade[:, None], input_precision="ieee")
        peak = higher
    return peak, total, found


@triton.jit(do_not_specialize=["table_width"])
def attend_kernel(
    out,
    partial,
    weight,
    query,
    keys,
    values,
    sinks,
    starts,
    lengths,
    blocks,
    scale,
    table_width,
    out_token,
    out_head,
    query_head,
    query_token,
    keys_head,
    keys_block,
    keys_at,
    values_head,
    values_block,
    values_at,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (tiles * SPLITS, key-value heads, runs). WINDOW, SOFTCAP 0: none."""
    run = tl.program_id(2)
    start = tl.load(starts + run)
    count = tl.load(starts + run + 1) - start
    first_row = tl.program_id(0) // SPLITS * BLOCK_M
    if first_row >= count * GROUP:
        return
    past = tl.load(lengths + run) - count
    row = first_row + tl.arange(0, BLOCK_M)
    in_run = row < count * GROUP
    token = (start + row // GROUP).to(tl.int64)
    own = past + row // GROUP
    group = tl.program_id(1).to(tl.int64)
    head = group * GROUP + row % GROUP

    begin = 0
    if WINDOW:
        begin = tl.maximum(past + first_row // GROUP + 1 - WINDOW, 0)
    end = past + tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, count)
    if SPLITS > 1:
        part = _positions_a_split(end - begin, SPLITS, BLOCK_N)
        begin += tl.program_id(0) % SPLITS * part
        end = tl.minimum(end, begin + part)
        if begin >= end:
            return

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_at = query + head[:, None] * query_head + token[:, None] * query_token + d[None, :]
    q = tl.load(q_at, mask=in_run[:, None] & (d < D)[None, :], other=0.0)
    peak, total, found = _over_positions(
        q,
        keys + group * keys_head,
        values + group * values_head,
        blocks + run.to(tl.int64) * table_width,
        own,
        begin,
        end,
        scale,
        keys_block,
        keys_at,
        values_block,
        values_at,
        D,
        DV,
        BLOCK_SIZE,
        WINDOW,
        SOFTCAP,
        BLOCK_N,
        BLOCK_DV,
    )
    total = tl.where(in_run, total, 1.0)
    found = found / total[:, None]
    whole = peak + tl.log2(total)
    in_out = in_run[:, None] & (dv < DV)[None, :]
    if SPLITS > 1:
        heads = tl.num_programs(1) * GROUP
        split = tl.program_id(0) % SPLITS
        cell = (split * tl.num_programs(2) + run).to(tl.int64) * heads + head
        tl.store(weight + cell, whole, mask=in_run)
        tl.store(partial + cell[:, None] * DV + dv[None, :], found, mask=in_out)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=in_run, other=0.0)
            found *= _share_beside(sink, whole)[:, None]
        out_at = out + token[:, None] * out_token + head[:, None] * out_head + dv[None, :]
        tl.store(out_at, found.to(out.dtype.element_ty), mask=in_out)


@triton.jit
def merge_kernel(
    out,
    partial,
    weight,
    sinks,
    starts,
    lengths,
    out_token,
    out_head,
    DV: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (runs, query heads), each run empty or of one token: its parts become one."""
    run, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + run)
    if tl.load(starts + run + 1) == start:
        return
    seen = tl.load(lengths + run)
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    split = tl.arange(0, SPLITS)
    written = split * _positions_a_split(seen, SPLITS, BLOCK_N) < seen
    dv = tl.arange(0, BLOCK_DV)
    cell = (split * tl.num_programs(0) + run).to(tl.int64) * tl.num_programs(1) + head
    w = tl.load(weight + cell, mask=written, other=float("-inf"))
    peak = tl.max(w, 0)
    w = tl.exp2(w - peak)
    total = tl.sum(w, 0)
    in_part = written[:, None] & (dv < DV)[None, :]
    found = tl.load(partial + cell[:, None] * DV + dv[None, :], mask=in_part, other=0.0)
    merged = tl.sum(found * w[:, None], 0) / total
    if sinks is not None:
        merged *= _share_beside(tl.load(sinks + head), peak + tl.log2(total))
    out_at = out + start.to(tl.int64) * out_token + head * out_head + dv
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=dv < DV)

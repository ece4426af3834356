"""Paged attention on a GPU: what paged.py says, in Triton.

One launch stores keys and values, and one attends. Where every run has one token (decode), there
are too few tiles of rows to fill a GPU: then a run's positions are split, and a further launch
merges. Grids, scratch and the number of splits follow from shapes alone, and nothing waits for the
GPU, so one captured CUDA graph serves other runs, lengths and blocks.

Shapes and dtypes: as paged.py. Triton launches on the current device: make the tensors' device the
current one. A first launch compiles: make it before a capture.

Raises nothing of its own. Does not cover: equal bits for other table widths or numbers of runs,
which may change the splits; more than 65,535 runs or heads.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabatch_kernels import paged_varlen
from lorabatch_kernels.attend_triton import attend_kernel, merge_kernel
from lorabatch_kernels.paged import PagedSpans
from lorabatch_kernels.plan import (
    COMPILE_OPTIONS,
    AttentionPlan,
    attention_plan,
    processors,
    splits_for,
)
from lorabatch_kernels.tuned import generation


@triton.jit(do_not_specialize=["tokens"])
def store_kernel(
    keys,
    values,
    key,
    value,
    index,
    tokens,
    keys_head,
    keys_block,
    keys_at,
    values_head,
    values_block,
    values_at,
    key_head,
    key_token,
    value_head,
    value_token,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (token blocks, key-value heads). WIDTH: the larger of D and DV, to a power of two."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    place = tl.load(index + token, mask=token < tokens, other=-1).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    block, at = (place // BLOCK_SIZE)[:, None], (place % BLOCK_SIZE)[:, None]
    row, kept = token.to(tl.int64)[:, None], (place >= 0)[:, None]
    new = tl.load(key + head * key_head + row * key_token + d, mask=kept & (d < D))
    pool = keys + head * keys_head + block * keys_block + at * keys_at + d
    tl.store(pool, new, mask=kept & (d < D))
    new = tl.load(value + head * value_head + row * value_token + d, mask=kept & (d < DV))
    pool = values + head * values_head + block * values_block + at * values_at + d
    tl.store(pool, new, mask=kept & (d < DV))


def store(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, index: Tensor) -> None:
    """`store_paged` in one launch."""
    heads, tokens, width = key.shape
    if tokens == 0:
        return
    padded = triton.next_power_of_2(max(width, value.shape[2]))
    block = max(1, 2048 // padded)
    store_kernel[(triton.cdiv(tokens, block), heads)](
        *(keys, values, key, value, index, tokens),
        *(*keys.stride()[:3], *values.stride()[:3], *key.stride()[:2], *value.stride()[:2]),
        D=width,
        DV=value.shape[2],
        WIDTH=padded,
        BLOCK_SIZE=keys.shape[2],
        BLOCK_T=block,
        **COMPILE_OPTIONS,
    )


def attend(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: PagedSpans,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> None:
    """`attend_paged` in one launch, or two where positions are split; or by torch's own operator,
    where the plan has found it faster."""
    heads, _, width = query.shape
    kv_heads, value_width = keys.shape[0], values.shape[3]
    runs, table_width = spans.blocks.shape
    rows = spans.longest_run * heads // kv_heads
    if rows == 0 or runs == 0:
        return
    device = query.device
    if plan is None:
        plan = attention_plan(width, value_width, rows, query.dtype, generation(device))
    if plan.library and paged_varlen.can_attend(query, keys, values, softcap, sinks):
        paged_varlen.attend(out, query, keys, values, spans, scale, window)
        return
    tiles = triton.cdiv(rows, plan.block_m)
    splits, partial, weight = 1, None, None
    if spans.longest_run == 1:
        wanted = plan.programs * processors(device)
        splits = splits_for(runs * kv_heads * tiles, table_width * keys.shape[2], wanted)
    if splits > 1:
        made = (splits, runs, heads)
        partial = torch.empty(*made, value_width, dtype=torch.float32, device=device)
        weight = torch.empty(made, dtype=torch.float32, device=device)
    shared = {
        "DV": value_width,
        "WINDOW": window or 0,
        "SPLITS": splits,
        "BLOCK_N": plan.block_n,
        "BLOCK_DV": max(16, triton.next_power_of_2(value_width)),
        **COMPILE_OPTIONS,
    }
    attend_kernel[(tiles * splits, kv_heads, runs)](
        *(out, partial, weight, query, keys, values, sinks),
        *(spans.starts, spans.lengths, spans.blocks, scale, spans.blocks.stride(0)),
        *(*out.stride()[:2], *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
        GROUP=heads // kv_heads,
        D=width,
        BLOCK_SIZE=keys.shape[2],
        SOFTCAP=softcap or 0.0,
        BLOCK_M=plan.block_m,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **shared,
    )
    if splits > 1:
        merge_kernel[(runs, heads)](
            *(out, partial, weight, sinks, spans.starts, spans.lengths, *out.stride()[:2]),
            **shared,
        )

"""Paged attention on a GPU by torch's own operator, where the version has it (from 2.12 on).

`torch.nn.attention.varlen` is FlashAttention with a block table. What it wants decides where it can
be taken: bf16 or fp16, keys and values of one width, a multiple of 8 up to 256; neither softcap nor
sinks; and, with the FlashAttention-2 that torch brings, blocks of a multiple of 256 tokens
(LORABATCH_BLOCK_SIZE). FlashAttention-3 or -4, where the process has activated it, takes any. It is
taken where bench.tune has found it faster than our kernel (`AttentionPlan.library`).

Shapes and dtypes: as paged.py, with pools whose memory is [N, block_size, Hkv, D] (kv_cache.py).
Positions are split, if at all, by the most that the table holds, so that one captured CUDA graph
serves other lengths. Raises nothing of its own. Does not cover: AMD.

Source: torch.nn.attention.varlen, torch 2.13; the sizes: flash_api.cpp of the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels.paged import PagedSpans

FLASH_2_BLOCK, WIDTH_STEP, MAX_WIDTH = 256, 8, 256


@lru_cache(maxsize=1)
def operator() -> Any:
    """torch's `varlen_attn_out`; None where this torch has none, or its build is not for CUDA."""
    if torch.version.cuda is None:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn_out
    except ImportError:
        return None
    return varlen_attn_out


def can_attend(
    query: Tensor, keys: Tensor, values: Tensor, softcap: float | None, sinks: Tensor | None
) -> bool:
    """Whether torch's operator computes this attention here."""
    if operator() is None or softcap or sinks is not None or query.dtype == torch.float32:
        return False
    width = query.shape[2]
    fits = width == values.shape[3] and width % WIDTH_STEP == 0 and width <= MAX_WIDTH
    return fits and (keys.shape[2] % FLASH_2_BLOCK == 0 or _takes_any_block())


def _takes_any_block() -> bool:
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl() is not None


def attend(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: PagedSpans,
    scale: float,
    window: int | None = None,
) -> None:
    """`attend_paged`, where `can_attend`. Token t of run t sees all that is stored for it: told so,
    the operator packs a group's heads into a tile, and writes zeros for an empty run."""
    each_its_own = spans.longest_run == 1 and query.shape[1] == spans.lengths.shape[0]
    all_seen = each_its_own and window is None
    seen = (-1 if window is None else window - 1, -1 if all_seen else 0)
    operator()(
        out,
        query.transpose(0, 1),
        keys.permute(1, 2, 0, 3),
        values.permute(1, 2, 0, 3),
        spans.starts,
        None,
        spans.longest_run,
        spans.blocks.shape[1] * keys.shape[2],
        scale=scale,
        window_size=seen,
        enable_gqa=True,
        seqused_k=spans.lengths,
        block_table=spans.blocks,
    )

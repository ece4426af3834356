"""LoRA on a CPU: gather tokens, two bmm calls for all short segments, a GEMM for each long one.

    y[t] += scale[s] * (x[t] @ A[s]^T) @ B[s]        s the slot of token t

No loop runs over the adapters of a decode step. The rows read end at the largest rank in use.
Shapes: y [tokens, out_features], x [tokens, in_features]; the site may hold another dtype than they
do (fp32 under a bf16 model). Small batches are computed in fp32 whatever the dtypes, since casting
the weights costs less than oneDNN's bf16 bmm does (measured below).

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: gradients; grouping adapters by rank (one large rank widens the reads of all).

Source: the padded bmm is SGLang's and vLLM's reference form; the scratch, the fp32 switch and the
long segments apart are ours, chosen by measurement; bench/kernels.py holds the whole to its rivals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabatch_kernels.padded import PaddedMap, Segment
from lorabatch_kernels.site import LoraSite

# Up to this many places a bf16 pool is computed in fp32. AMD EPYC 9004, 1 thread, torch 2.13, us a
# site, fp32 against bf16: 8 x 4 places r16 149/155, 32 x 1 r16 235/300, 4 x 8 r8 93/132, but
# 8 x 16 r16 306/237 and 32 x 8 r16 580/466.
FP32_PLACES = 64


def add_lora_cpu(y: Tensor, x: Tensor, site: LoraSite, padded: PaddedMap) -> None:
    """Add every token's LoRA term to `y` in place."""
    if padded.slots:
        _add_short(y, x, site, padded)
    for segment in padded.segments:
        _add_long(y, x, site, segment)


def _compute_dtype(dtype: torch.dtype, places: int) -> torch.dtype:
    if dtype == torch.bfloat16 and places > FP32_PLACES:
        return dtype
    return torch.float32


def _active_rows(pool: Tensor, padded: PaddedMap, rank: int, dtype: torch.dtype) -> Tensor:
    """[n, rank, features] in `dtype`: a view where that is possible, else a copy in scratch.

    Copies always go to scratch: oneDNN's bmm on a strided bf16 view is slower than copy and bmm.
    """
    _, max_rank, features = pool.shape
    if padded.slot_range is not None:
        view = pool[padded.slot_range, :rank]
        if pool.dtype == dtype == torch.float32:
            return view
        return padded.scratch(dtype, *view.shape).copy_(view)
    rows = padded.rows(max_rank, rank)
    copy = padded.scratch(pool.dtype, rows.shape[0], features)
    torch.index_select(pool.view(-1, features), 0, rows, out=copy)
    if pool.dtype != dtype:
        copy = padded.scratch(dtype, *copy.shape).copy_(copy)
    return copy.view(len(padded.slots), rank, features)


def _active_scale(site: LoraSite, padded: PaddedMap) -> Tensor:
    if padded.slot_range is not None:
        return site.scale[padded.slot_range].view(-1, 1, 1)
    return site.scale.index_select(0, padded.rows(1, 1)).view(-1, 1, 1)


def _add_short(y: Tensor, x: Tensor, site: LoraSite, padded: PaddedMap) -> None:
    rank = site.largest_rank(padded.slots)
    if rank == 0:
        return
    count, width = len(padded.slots), padded.width
    dtype = _compute_dtype(site.dtype, count * width)
    rows = x if padded.gather is None else x.index_select(0, padded.gather)
    v = torch.bmm(
        rows.to(dtype).view(count, width, -1),
        _active_rows(site.a, padded, rank, dtype).transpose(1, 2),
    )
    v.mul_(_active_scale(site, padded))
    delta = torch.bmm(v, _active_rows(site.b, padded, rank, dtype)).view(count * width, -1)
    if padded.gather is None:
        y.add_(delta)
        return
    if padded.places is not None:
        delta = delta.index_select(0, padded.places)
    y.index_add_(0, padded.tokens, delta.to(y.dtype))


def _add_long(y: Tensor, x: Tensor, site: LoraSite, segment: Segment) -> None:
    slot = segment.slot
    rank = site.ranks[slot]
    if rank == 0:
        return
    a, b = site.a[slot, :rank], site.b[slot, :rank]
    v = torch.mm(x[segment.tokens].to(a.dtype), a.t()).mul_(site.scales[slot])
    if isinstance(segment.tokens, Tensor):
        y.index_add_(0, segment.tokens, torch.mm(v, b).to(y.dtype))
    elif y.dtype == b.dtype:
        y[segment.tokens].addmm_(v, b)
    else:
        y[segment.tokens].add_(torch.mm(v, b))

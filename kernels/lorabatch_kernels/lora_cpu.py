"""LoRA on a CPU: two embedding bags for all short segments, two GEMMs for each long one.

    y[t] += scale[s] * (x[t] @ A[s]^T) @ B[s]        s the slot of token t

No loop runs over the adapters of a decode step. Of `b` exactly the rank rows in use are read, of
`a` their panels of 16: the cost follows the sum of the tokens' ranks. The sites of a group share
their input, so that one bag makes v for all of them.
Shapes: ys[i] [tokens, out_features of site i], x [tokens, in_features]; the sites may hold another
dtype than they do (fp32 under a bf16 model). Sums are fp32, v and the term are rounded to the
sites' dtype.

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: gradients.

Source: ours. Measured against a padded batch of bmm in docs/decisions/0007.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch_kernels.bags import BagMap, BagPlan, Segment, weighted_rows
from lorabatch_kernels.site import PANEL, LoraSite, SiteGroup


def add_lora_cpu(ys: Sequence[Tensor], x: Tensor, group: SiteGroup, bags: BagMap) -> None:
    """Add every token's LoRA term to `ys` in place, one y a site."""
    if bags.short:
        plan = bags.plan(group)
        if plan is not None:
            _add_short(ys, x, group, plan, bags.span)
    for segment in bags.segments:
        rows = None
        for y, site in zip(ys, group.sites, strict=True):
            if site.ranks[segment.slot]:
                rows = x[segment.tokens].to(site.dtype) if rows is None else rows
                _add_long(y, rows, site, segment)


def _add_short(
    ys: Sequence[Tensor], x: Tensor, group: SiteGroup, plan: BagPlan, span: slice | Tensor
) -> None:
    assert group.pool is not None
    weights = x.index_select(0, plan.x_rows).to(group.dtype).flatten()
    v = weighted_rows(group.pool.view(-1, PANEL), plan.a_index, plan.a_offsets, weights)
    v = v.mul_(plan.scale).flatten()
    for y, site, expand in zip(ys, group.sites, plan.expands, strict=True):
        if expand is None:
            continue
        table = site.b.view(-1, site.out_features)
        term = weighted_rows(table, expand.index, expand.offsets, v.index_select(0, expand.cells))
        if isinstance(span, slice):
            y[span].add_(term)
        else:
            y.index_add_(0, span, term.to(y.dtype))


def _add_long(y: Tensor, rows: Tensor, site: LoraSite, segment: Segment) -> None:
    slot = segment.slot
    a, b = site.rows(slot)
    v = torch.mm(rows, a.t()).mul_(site.scales[slot])
    if isinstance(segment.tokens, Tensor):
        y.index_add_(0, segment.tokens, torch.mm(v, b).to(y.dtype))
    elif y.dtype == b.dtype:
        y[segment.tokens].addmm_(v, b)
    else:
        y[segment.tokens].add_(torch.mm(v, b))

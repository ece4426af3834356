"""LoRA on a CPU: one call of the C kernel for all adapters of the sites that share an input.

    y[t] += gain[s] * y[t] + shift[s] + scale[s] * (x[t] @ A[s]^T) @ B[s]     s the slot of token t

The kernel (native/lora.c) takes tiles of up to 8 tokens of one slot. Of `b` exactly the rank rows
in use are read, of `a` as many elements: the cost follows the sum of the tokens' ranks, whatever
the number of adapters. A token's term does not depend on what else is in the step, not even in
rounding. Where there is no C kernel, or for fp16, each adapter gets two products of its own.
Shapes: y [tokens, out_features of all sites], x [tokens, in_features], all in the sites' dtype.
Sums are fp32; the term is rounded once, when it is added.

Raises nothing of its own: lora.py has checked the shapes.
Does not cover: gradients.

Source: ours. Measured against what it replaced in docs/decisions/0007 and 0008.
"""

from __future__ import annotations

from ctypes import addressof

import torch
from torch import Tensor

from lorabatch_kernels import native
from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.site import PanelSite
from lorabatch_kernels.tiles import TileMap
from lorabatch_kernels.weights import PANEL


def can_add_lora(group: SiteGroup) -> bool:
    """Whether the C kernel works on this machine for these sites."""
    return (
        isinstance(group.sites[0], PanelSite)
        and native.supports(group.dtype)
        and group.sites[0].max_rank <= native.MAX_PANELS * PANEL
        and native.library() is not None
    )


def add_lora_cpu(y: Tensor, x: Tensor, group: SiteGroup, tiles: TileMap) -> None:
    """Add every token's LoRA term to `y` in place, in which the sites' outputs lie side by side."""
    library = native.library()
    if library is None or not can_add_lora(group):
        _add_plain(y, x, group, tiles)
        return
    library.lorabatch_add_lora(
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        group.in_features,
        addressof(group.structs),
        len(group.sites),
        addressof(tiles.struct),
        native.is_half(x.dtype),
    )


def _add_plain(y: Tensor, x: Tensor, group: SiteGroup, tiles: TileMap) -> None:
    order = tiles.order.long()
    lengths: dict[int, list[int]] = {}
    for slot, start, length in zip(
        tiles.tile_slot.tolist(), tiles.tile_start.tolist(), tiles.tile_len.tolist(), strict=True
    ):
        first, count = lengths.setdefault(slot, [start, 0])
        lengths[slot] = [first, count + length]
    for slot, (start, count) in lengths.items():
        tokens = order[start : start + count]
        rows = x.index_select(0, tokens).float()
        for part, site in zip(group.split(y), group.sites, strict=True):
            if site.changes(slot):
                total = part.index_select(0, tokens).float()
                affine = site.affine_rows(slot)
                if affine is not None:
                    total += total * affine[0].float() + affine[1].float()
                a, b = site.rows(slot)
                total += torch.mm(torch.mm(rows, a.float().t()) * site.scales[slot], b.float())
                part.index_copy_(0, tokens, total.to(y.dtype))

"""The one entry to LoRA: add every token's adapter term to a linear layer's output, in place.

    y[t] += scale[s] * (x[t] @ A[s]^T) @ B[s]        s the slot of token t; nothing for slot -1

Shapes and dtypes: y [tokens, out_features (of all sites of a group)] and x [tokens, in_features] in
one dtype (bf16, fp16 or fp32) that the site has too, columns next to each other, any row stride.
Sums are fp32.

Raises ValueError, naming the value seen and the value wanted, for shapes, dtypes, devices and slots
that do not fit together.
Does not cover: gradients, dropout, DoRA, embeddings, convolutions, 3-D expert weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch_kernels.lora_cpu import add_lora_cpu
from lorabatch_kernels.site import LoraSite, SiteGroup
from lorabatch_kernels.step_map import StepMap


def add_lora(y: Tensor, x: Tensor, site: LoraSite, step_map: StepMap) -> None:
    """Add the adapters' terms of one step to `y` in place; returns at once where there are none."""
    add_lora_group(y, x, site.alone, step_map)


def add_lora_group(y: Tensor, x: Tensor, group: SiteGroup, step_map: StepMap) -> None:
    """`add_lora` for sites that share their input, whose outputs lie side by side in `y`."""
    if not step_map.active:
        return
    _check(y, x, group, step_map)
    if group.sites[0].paneled:
        add_lora_cpu(y, x, group, step_map.tiles)
    else:
        from lorabatch_kernels.lora_triton import add_lora_triton  # a CPU process needs no triton

        for part, site in zip(group.split(y), group.sites, strict=True):
            add_lora_triton(part, x, site, step_map.tiles)


def add_lora_reference(y: Tensor, x: Tensor, site: LoraSite, slots: Sequence[int]) -> Tensor:
    """fp32 [tokens, out_features]: what `add_lora` should leave in `y`, token by token."""
    total = y.to(torch.float32, copy=True)
    for token, slot in enumerate(slots):
        if slot >= 0 and site.ranks[slot] > 0:
            a, b = site.rows(slot)
            v = a.float() @ x[token].float()
            delta = v @ b.float()
            total[token] = total[token] + site.scales[slot] * delta
    return total


def _check(y: Tensor, x: Tensor, group: SiteGroup, step_map: StepMap) -> None:
    tokens, site = step_map.tokens, group.sites[0]
    if x.shape != (tokens, site.in_features):
        raise ValueError(f"x is {list(x.shape)}, wanted {[tokens, site.in_features]}")
    if y.shape != (tokens, group.out_features):
        raise ValueError(f"y is {list(y.shape)}, wanted {[tokens, group.out_features]}")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"column strides are x {x.stride(1)}, y {y.stride(1)}, wanted 1")
    if y.dtype != x.dtype:
        raise ValueError(f"y is {y.dtype}, wanted that of x, {x.dtype}")
    if site.dtype != x.dtype:
        raise ValueError(f"the site is {site.dtype}, wanted that of x, {x.dtype}")
    if not y.device.type == x.device.type == site.a.device.type == step_map.device.type:
        raise ValueError(
            f"y is on {y.device}, x on {x.device}, the site on {site.a.device}, "
            f"the step map on {step_map.device}: wanted one device"
        )
    if step_map.active[-1] >= site.slots:
        raise ValueError(f"slot is {step_map.active[-1]}, wanted below {site.slots}")

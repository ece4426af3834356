"""The one entry to LoRA: add every token's adapter term to a linear layer's output, in place.

    y[t] += gain[s] * y[t] + shift[s] + scale[s] * (x[t] @ A[s]^T) @ B[s]

s is the slot of token t; nothing happens for slot -1, and most slots have no gain and shift.

Shapes and dtypes: y [tokens, out_features (of all sites of a group)] and x [tokens, in_features] in
one dtype (bf16, fp16 or fp32) that the sites have too, columns next to each other, any row stride.
Sums are fp32. A group's sites have their outputs side by side in y.

`LoraTerms` is for layers that can begin before the base product is made, or that say what reads y
next; `add_lora` for all others.

Raises ValueError, naming the value seen and the value wanted, for shapes, dtypes, devices and slots
that do not fit together.
Does not cover: gradients, dropout, embeddings, convolutions, 3-D expert weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.lora_cpu import add_lora_cpu
from lorabatch_kernels.rows import rotary_, silu_gate
from lorabatch_kernels.site import LoraSite
from lorabatch_kernels.step_map import StepMap

if TYPE_CHECKING:
    from lorabatch_kernels.lora_triton import Shrinking


class LoraTerms:
    """The adapters' terms of one product y of `x`, of which a GPU makes a part at once. Ask for
    them once, by one of the methods. `x` must not change before."""

    def __init__(self, x: Tensor, group: SiteGroup, step_map: StepMap) -> None:
        self._x, self._group, self._step_map = x, group, step_map
        self._shrinking: Shrinking | None = None
        if step_map.active:
            _check_x(x, group, step_map)
            if group.pool is not None:
                from lorabatch_kernels.lora_triton import Shrinking  # a CPU process needs no triton

                self._shrinking = Shrinking(x, group, step_map.tiles)

    def add_to(self, y: Tensor) -> None:
        """Add them to `y` in place; returns at once where there are none."""
        if not self._step_map.active:
            return
        self._check_y(y)
        if self._shrinking is not None:
            self._shrinking.add_to(y)
        else:
            add_lora_cpu(y, self._x, self._group, self._step_map.tiles)

    def sum(self, total: Tensor, y: Tensor) -> None:
        """total [tokens, out_features] += y of one site and the terms. Do not read y again."""
        if self._shrinking is not None:
            self._check_y(y)
            self._shrinking.sum(total, y)
            return
        self.add_to(y)
        total.add_(y)

    def gate(self, y: Tensor) -> Tensor:
        """`silu_gate` of gate and up: y [tokens, 2 * width] -> [tokens, width]. Do not read y
        again."""
        if self._shrinking is not None:
            self._check_y(y)
            return self._shrinking.gate(y)
        self.add_to(y)
        return silu_gate(y)

    def rotate(self, y: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Add them to y [tokens, columns of q, k and v], then `rotary_` of q and k."""
        if self._shrinking is not None:
            self._check_y(y)
            self._shrinking.rotate(y, cos, sin)
            return
        self.add_to(y)
        q, k, _ = (site.out_features for site in self._group.sites)
        rotary_(y[:, : q + k], cos, sin)

    def _check_y(self, y: Tensor) -> None:
        tokens, out = self._step_map.tokens, self._group.out_features
        if y.shape != (tokens, out):
            raise ValueError(f"y is {list(y.shape)}, wanted {[tokens, out]}")
        if y.stride(1) != 1:
            raise ValueError(f"the column stride of y is {y.stride(1)}, wanted 1")
        if y.dtype != self._x.dtype or y.device != self._x.device:
            raise ValueError(
                f"y is {y.dtype} on {y.device}, wanted that of x, {self._x.dtype} on "
                f"{self._x.device}"
            )


def add_lora(y: Tensor, x: Tensor, group: SiteGroup, step_map: StepMap) -> None:
    """Add the adapters' terms of one step to `y` in place; returns at once where there are none."""
    LoraTerms(x, group, step_map).add_to(y)


def add_lora_reference(y: Tensor, x: Tensor, site: LoraSite, slots: Sequence[int]) -> Tensor:
    """fp32 [tokens, out_features]: what `add_lora` should leave in `y`, token by token."""
    total = y.to(torch.float32, copy=True)
    zero = torch.zeros(site.out_features, device=y.device)
    for token, slot in enumerate(slots):
        if slot >= 0 and site.changes(slot):
            a, b = site.rows(slot)
            v = a.float() @ x[token].float()
            delta = v @ b.float()
            gain, shift = site.affine_rows(slot) or (zero, zero)
            total[token] += gain * total[token] + shift + site.scales[slot] * delta
    return total


def _check_x(x: Tensor, group: SiteGroup, step_map: StepMap) -> None:
    wanted = [step_map.tokens, group.in_features]
    if list(x.shape) != wanted:
        raise ValueError(f"x is {list(x.shape)}, wanted {wanted}")
    if x.stride(1) != 1:
        raise ValueError(f"the column stride of x is {x.stride(1)}, wanted 1")
    if group.dtype != x.dtype:
        raise ValueError(f"the sites are {group.dtype}, wanted that of x, {x.dtype}")
    if not x.device.type == group.sites[0].device.type == step_map.device.type:
        raise ValueError(
            f"x is on {x.device}, the sites on {group.sites[0].device}, the step map on "
            f"{step_map.device}: wanted one device"
        )
    if step_map.active[-1] >= group.slots:
        raise ValueError(f"slot is {step_map.active[-1]}, wanted below {group.slots}")

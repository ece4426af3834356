"""A LoRA site: which adapter changes one linear layer, by slot.

On a GPU the adapters' tensors are copied into a pool of rank rows, `a` [rows, in_features] and `b`
[rows, out_features], in which each takes as many as its rank. Tables `row0`, `rank` and `affine`
int32 [slots] and `scale` fp32 [slots]: row `row0[s] + j` is rank row j of slot s. On a CPU nothing
is copied: a slot points to the adapter's own memory (weights.py), in panels.

An adapter may change the layer's own output y, too, by `gain * y + shift`, both [out_features].
Where `affine` is 1 they are the two rows of `b` behind its rank rows; nobody reads them where it is
0. Rank 0 and affine 0: the adapter in that slot, if any, leaves this layer alone.

Two promises. Of a pool nobody reads rows beyond an adapter's rank, because they may be another
slot's. Putting and clearing change contents, never shapes or addresses of a pool and its tables, so
captured CUDA graphs stay valid. `starts`, `ranks`, `affines` and `scales` mirror the tables on the
host, so a step never asks the device.

Raises ValueError for a slot, shape, rank or scale that does not fit, naming the value seen.
Does not cover: locking. Call `put` and `clear` between steps, on the stream the steps run on.
"""

from __future__ import annotations

import math
from ctypes import addressof
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels import native
from lorabatch_kernels.weights import BESIDE, Affine, LoraWeights


@dataclass(eq=False, kw_only=True)
class LoraSite:
    """The adapters of one linear layer, by slot."""

    slots: int
    max_rank: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    ranks: list[int] = field(init=False)
    affines: list[bool] = field(init=False)
    scales: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = [0] * self.slots
        self.affines = [False] * self.slots
        self.scales = [0.0] * self.slots

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        """A slot's `a` [rank, in_features] and `b` [rank, out_features]; of panels a copy."""
        raise NotImplementedError

    def affine_rows(self, slot: int) -> Affine | None:
        """A slot's gain and shift [out_features], if it has them."""
        raise NotImplementedError

    def changes(self, slot: int) -> bool:
        """Whether the adapter in this slot changes this layer."""
        return self.ranks[slot] > 0 or self.affines[slot]

    def load(
        self,
        slot: int,
        a: Tensor,
        b: Tensor,
        scale: float,
        start: int | None = None,
        affine: Affine | None = None,
    ) -> None:
        """`put` of tensors: a [rank, in_features], b [out_features, rank], gain and shift."""
        rank, least = a.shape[0] if a.dim() == 2 else -1, 0 if affine else 1
        if not least <= rank <= self.max_rank or a.shape[1] != self.in_features:
            wanted = f"[{least}..{self.max_rank}, {self.in_features}]"
            raise ValueError(f"a is {list(a.shape)}, wanted {wanted}")
        if b.shape != (self.out_features, rank):
            raise ValueError(f"b is {list(b.shape)}, wanted [{self.out_features}, {rank}]")
        paneled = isinstance(self, PanelSite)
        made = LoraWeights.pack(a.to(self.dtype), b, scale, affine, paneled)
        self.put(slot, made, start)

    def put(self, slot: int, weights: LoraWeights, start: int | None = None) -> None:
        """Put an adapter's share into `slot`. `start`: the first of the pool's rows that it takes;
        None: those of this slot where all have as many."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """Empty `slot`: its tokens get the base layer's output until the next `put`."""
        raise NotImplementedError

    def _check(self, slot: int, weights: LoraWeights | None = None) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot is {slot}, wanted 0..{self.slots - 1}")
        if weights is None:
            return
        sizes, wanted = ((w.in_features, w.out_features, w.dtype) for w in (weights, self))
        if sizes != wanted:
            raise ValueError(f"(in, out, dtype) of the weights is {sizes}, wanted {wanted}")
        if weights.rank > self.max_rank:
            raise ValueError(f"rank is {weights.rank}, wanted 0..{self.max_rank}")
        if not math.isfinite(weights.scale):
            raise ValueError(f"scale is {weights.scale}, wanted a finite number")

    def _note(self, slot: int, rank: int, scale: float, affine: bool) -> None:
        self.ranks[slot], self.scales[slot], self.affines[slot] = rank, scale, affine


@dataclass(eq=False, kw_only=True)
class PooledSite(LoraSite):
    """Of a GPU."""

    a: Tensor
    b: Tensor
    row0: Tensor
    rank: Tensor
    affine: Tensor
    scale: Tensor
    starts: list[int]

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        rank, start = self.ranks[slot], self.starts[slot]
        return self.a[start : start + rank], self.b[start : start + rank]

    def affine_rows(self, slot: int) -> Affine | None:
        if not self.affines[slot]:
            return None
        first = self.starts[slot] + self.ranks[slot]
        gain, shift = self.b[first : first + BESIDE]
        return gain, shift

    def put(self, slot: int, weights: LoraWeights, start: int | None = None) -> None:
        """As LoraSite's; a GPU is not waited for where the weights are pinned."""
        self._check(slot, weights)
        start = slot * (self.max_rank + BESIDE) if start is None else start
        last = self.a.shape[0] - weights.rows
        if not 0 <= start <= last:
            raise ValueError(f"start is {start}, wanted 0..{last}")
        self.starts[slot] = start
        with torch.inference_mode():
            self.b[start : start + weights.rows].copy_(weights.below, non_blocking=True)
            self.a[start : start + weights.rank].copy_(weights.a, non_blocking=True)
        self._note(slot, weights.rank, weights.scale, weights.is_affine)

    def clear(self, slot: int) -> None:
        self._check(slot)
        self._note(slot, 0, 0.0, False)

    def _note(self, slot: int, rank: int, scale: float, affine: bool) -> None:
        super()._note(slot, rank, scale, affine)
        with torch.inference_mode():
            self.row0.select(0, slot).fill_(self.starts[slot])
            self.rank.select(0, slot).fill_(rank)
            self.affine.select(0, slot).fill_(affine)
            self.scale.select(0, slot).fill_(scale)


@dataclass(eq=False, kw_only=True)
class PanelSite(LoraSite):
    """Of a CPU: `table` is what the C kernel reads, an entry for each slot."""

    table: Any = field(init=False)
    _held: list[LoraWeights | None] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.table = (native.Lora * self.slots)()
        self._held = [None] * self.slots

    @property
    def address(self) -> int:
        """Of the table."""
        return addressof(self.table)

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        held = self._held[slot]
        if held is None:
            none = torch.empty(0, dtype=self.dtype)
            return none.view(0, self.in_features), none.view(0, self.out_features)
        return held.a, held.b.t()

    def affine_rows(self, slot: int) -> Affine | None:
        held = self._held[slot]
        return None if held is None else held.affine

    def put(self, slot: int, weights: LoraWeights, start: int | None = None) -> None:
        self._check(slot, weights)
        if start is not None or not weights.paneled:
            raise ValueError(f"start is {start}, paneled {weights.paneled}: wanted None and True")
        self._held[slot] = weights
        sizes = (weights.rank, weights.is_affine, weights.scale)
        self.table[slot] = native.Lora(*weights.addresses, *sizes)
        self._note(slot, weights.rank, weights.scale, weights.is_affine)

    def clear(self, slot: int) -> None:
        self._check(slot)
        self._held[slot] = None
        self.table[slot] = native.Lora()
        self._note(slot, 0, 0.0, False)

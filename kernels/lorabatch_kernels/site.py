"""A LoRA site: the device tensors of one linear layer that adapters may change.

Shapes and dtypes: `a` and `b` in one floating dtype. On a GPU they are a pool of rank rows, `a`
[rows, in_features] and `b` [rows, out_features], in which an adapter takes as many as its rank. On
a CPU each slot has its own, which take memory once they are written: `b` [slots, rows,
out_features], and `a` in panels of 16 rank rows, [slots, panels * in_features, 16], where a sum
over in_features reads memory in order, whatever the rank. Tables `row0`, `rank` and `affine` int32
[slots] and `scale` fp32 [slots]: row `row0[s] + j` is rank row j of slot s.

An adapter may change the layer's own output y, too, by `gain * y + shift`, both [out_features].
Where `affine` is 1 they are the two rows of `b` behind its rank rows, on a CPU behind the most
there can be; nobody reads them where it is 0. Rank 0 and affine 0: the adapter in that slot, if
any, leaves this layer alone.

Two promises. In panels, rank rows at or beyond a slot's rank hold zeros (`load` and `clear` wipe
what a bigger adapter left behind); of a pool nobody reads them, because they may be another slot's.
Loading and clearing change contents, never shapes or addresses, so captured CUDA graphs stay valid.
`starts`, `ranks`, `affines` and `scales` mirror the tables on the host, so a step never asks the
device.

Raises ValueError for a slot, shape, rank or scale that does not fit, naming the value seen.
Does not cover: locking. Call `load` and `clear` between steps, on the stream the steps run on.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 16
BESIDE = 2  # rows of `b` for gain and shift


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in pages that take memory only once written (torch.zeros writes them all)."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(frozen=True, eq=False)
class LoraSite:
    """The pool of adapter weights of one linear layer, by slot."""

    a: Tensor
    b: Tensor
    row0: Tensor
    rank: Tensor
    affine: Tensor
    scale: Tensor
    starts: list[int]
    ranks: list[int]
    affines: list[bool]
    scales: list[float]
    slots: int
    max_rank: int
    in_features: int
    out_features: int
    paneled: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def panels(self) -> int:
        """Panels of one slot, where `a` lies in panels."""
        return -(-self.max_rank // PANEL)

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        """A slot's `a` [rank, in_features] and `b` [rank, out_features]; of panels a copy."""
        rank, start = self.ranks[slot], self.starts[slot]
        if not self.paneled:
            return self.a[start : start + rank], self.b[start : start + rank]
        panels = self.a[slot].view(self.panels, self.in_features, PANEL)
        return panels.transpose(1, 2).flatten(0, 1)[:rank], self.b[slot, :rank]

    def affine_rows(self, slot: int) -> tuple[Tensor, Tensor] | None:
        """A slot's gain and shift [out_features], if it has them."""
        if not self.affines[slot]:
            return None
        gain, shift = self._beside(slot, self.ranks[slot])
        return gain, shift

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
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Put an adapter's `a` [rank, in_features] and `b` [out_features, rank] into `slot`, and
        its gain and shift. A GPU is not waited for where they and the transpose of `b` are pinned
        and contiguous. `start`: the first of the pool's rows that it takes; None: those of this
        slot where all have as many."""
        self._check_slot(slot)
        rank, least = a.shape[0] if a.dim() == 2 else -1, 0 if affine else 1
        if not least <= rank <= self.max_rank or a.shape[1] != self.in_features:
            wanted = f"[{least}..{self.max_rank}, {self.in_features}]"
            raise ValueError(f"a is {list(a.shape)}, wanted {wanted}")
        if b.shape != (self.out_features, rank):
            raise ValueError(f"b is {list(b.shape)}, wanted [{self.out_features}, {rank}]")
        for row in affine or ():
            if row.shape != (self.out_features,):
                raise ValueError(
                    f"gain or shift is {list(row.shape)}, wanted [{self.out_features}]"
                )
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, wanted a finite number")
        own = slot * (self.max_rank + BESIDE)
        start = own if start is None else start
        taken = rank + BESIDE * bool(affine)
        first, last = (own, own) if self.paneled else (0, self.a.shape[0] - taken)
        if not first <= start <= last:
            raise ValueError(f"start is {start}, wanted {first}..{last}")
        self.starts[slot] = start
        with torch.inference_mode():
            if self.paneled:
                self.b[slot, :rank].copy_(b.t())
                self._fill(slot, a)
            else:
                self.b[start : start + rank].copy_(b.t(), non_blocking=True)
                self.a[start : start + rank].copy_(a, non_blocking=True)
            for row, value in zip(self._beside(slot, rank), affine or (), strict=False):
                row.copy_(value, non_blocking=True)
        self._set(slot, rank, scale, affine is not None)

    def clear(self, slot: int) -> None:
        """Empty `slot`: its tokens get the base layer's output until the next `load`."""
        self._check_slot(slot)
        self._set(slot, 0, 0.0, False)

    def _beside(self, slot: int, rank: int) -> Tensor:
        """Gain and shift [2, out_features] of a slot of this rank."""
        if self.paneled:
            return self.b[slot, self.max_rank :]
        first = self.starts[slot] + rank
        return self.b[first : first + BESIDE]

    def _fill(self, slot: int, a: Tensor) -> None:
        """Write `a` [rank, in_features] into a slot's panels."""
        panels = self.a[slot].view(self.panels, self.in_features, PANEL)
        for first in range(0, a.shape[0], PANEL):
            rows = a[first : first + PANEL]
            panels[first // PANEL, :, : rows.shape[0]].copy_(rows.t())

    def _set(self, slot: int, rank: int, scale: float, affine: bool) -> None:
        stale = self.ranks[slot]
        with torch.inference_mode():
            if self.paneled and stale > rank:
                self._wipe(slot, rank, stale)
            self.row0.select(0, slot).fill_(self.starts[slot])
            self.rank.select(0, slot).fill_(rank)
            self.affine.select(0, slot).fill_(affine)
            self.scale.select(0, slot).fill_(scale)
        self.ranks[slot] = rank
        self.affines[slot] = affine
        self.scales[slot] = scale

    def _wipe(self, slot: int, rank: int, stale: int) -> None:
        """Zero rank rows [rank, stale) of a slot's panels."""
        self.b[slot, rank:stale].zero_()
        panels = self.a[slot].view(self.panels, self.in_features, PANEL)
        for number in range(rank // PANEL, -(-stale // PANEL)):
            panels[number, :, max(rank - number * PANEL, 0) :].zero_()

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot is {slot}, wanted 0..{self.slots - 1}")

"""A LoRA site: the device tensors of one linear layer that adapters may change.

Shapes and dtypes: `a` and `b` in one floating dtype. On a GPU they are a pool of rank rows, `a`
[rows, in_features] and `b` [rows, out_features], in which an adapter takes as many as its rank. On
a CPU each slot has its own, which take memory once they are written: `b` [slots, max_rank,
out_features], and `a` in panels of 16 rank rows, [slots, panels * in_features, 16], where a sum
over in_features reads memory in order, whatever the rank. Tables `row0` and `rank` int32 [slots]
and `scale` fp32 [slots]: row `row0[s] + j` is rank row j of slot s. Rank 0: the adapter in that
slot, if any, leaves this layer alone.

Sites that read the same input form a `SiteGroup`. On a GPU theirs are views of a `GroupPool`, so
that one launch serves them all.

Two promises. In panels, rows at or beyond a slot's rank hold zeros (`load` and `clear` wipe what a
bigger adapter left behind); of a pool nobody reads them, because they may be another slot's.
Loading and clearing change contents, never shapes or addresses, so captured CUDA graphs stay valid.
`starts`, `ranks` and `scales` mirror the tables on the host, so a step never asks the device.

Raises ValueError for a slot, shape, rank or scale that does not fit, naming the value seen.
Does not cover: locking. Call `load` and `clear` between steps, on the stream the steps run on.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 16
MOST_SITES = 3  # of a group on a GPU: expand.py


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
    scale: Tensor
    starts: list[int]
    ranks: list[int]
    scales: list[float]
    slots: int
    max_rank: int
    in_features: int
    out_features: int
    paneled: bool

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_rank: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device | str,
        paneled: bool | None = None,
        pool_rows: int | None = None,
    ) -> LoraSite:
        """An empty site: every slot has rank 0. `paneled` None: on a CPU. `pool_rows`: rank rows of
        all slots together, where they are a pool; None: the largest rank for each slot."""
        sizes = slots, max_rank, in_features
        made = SiteGroup.allocate(*sizes, [out_features], dtype, device, pool_rows, paneled)
        return made.sites[0]

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

    @cached_property
    def alone(self) -> SiteGroup:
        """The group of this site by itself."""
        if self.paneled:
            return SiteGroup((self,))
        tables = (table[None] for table in (self.row0, self.rank, self.scale))
        return SiteGroup((self,), GroupPool(self.a[None], self.b, *tables))

    def load(self, slot: int, a: Tensor, b: Tensor, scale: float, start: int | None = None) -> None:
        """Put an adapter's `a` [rank, in_features] and `b` [out_features, rank] into `slot`. A GPU
        is not waited for where `a` and the transpose of `b` are pinned and contiguous. `start`:
        the first of the pool's rows that it takes; None: slot * max_rank."""
        self._check_slot(slot)
        rank = a.shape[0] if a.dim() == 2 else 0
        if not 1 <= rank <= self.max_rank or a.shape[1] != self.in_features:
            raise ValueError(
                f"a is {list(a.shape)}, wanted [1..{self.max_rank}, {self.in_features}]"
            )
        if b.shape != (self.out_features, rank):
            raise ValueError(f"b is {list(b.shape)}, wanted [{self.out_features}, {rank}]")
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, wanted a finite number")
        start = slot * self.max_rank if start is None else start
        own = slot * self.max_rank
        first, last = (own, own) if self.paneled else (0, self.a.shape[0] - rank)
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
        self._set(slot, rank, scale)

    def clear(self, slot: int) -> None:
        """Empty `slot`: its tokens get the base layer's output until the next `load`."""
        self._check_slot(slot)
        self._set(slot, 0, 0.0)

    def _fill(self, slot: int, a: Tensor) -> None:
        """Write `a` [rank, in_features] into a slot's panels."""
        panels = self.a[slot].view(self.panels, self.in_features, PANEL)
        for first in range(0, a.shape[0], PANEL):
            rows = a[first : first + PANEL]
            panels[first // PANEL, :, : rows.shape[0]].copy_(rows.t())

    def _set(self, slot: int, rank: int, scale: float) -> None:
        stale = self.ranks[slot]
        with torch.inference_mode():
            if self.paneled and stale > rank:
                self._wipe(slot, rank, stale)
            self.row0.select(0, slot).fill_(self.starts[slot])
            self.rank.select(0, slot).fill_(rank)
            self.scale.select(0, slot).fill_(scale)
        self.ranks[slot] = rank
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


@dataclass(frozen=True, eq=False)
class GroupPool:
    """A group's sites as the Triton kernels read them: `a` [sites, rows, in_features], `b` [rows,
    out_features of all sites], `row0` and `rank` int32 and `scale` fp32 [sites, slots]."""

    a: Tensor
    b: Tensor
    row0: Tensor
    rank: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class SiteGroup:
    """Sites of one input size that are always given the same input, such as q, k and v. `pool`: on
    a GPU."""

    sites: tuple[LoraSite, ...]
    pool: GroupPool | None = None

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_rank: int,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        pool_rows: int | None = None,
        paneled: bool | None = None,
    ) -> SiteGroup:
        """Empty sites, one for each of `out_features`; the rest as `LoraSite.allocate`."""
        sizes = (slots, max_rank, in_features, min(out_features))
        if min(sizes) < 1:
            raise ValueError(f"(slots, max_rank, in, out) is {sizes}, wanted each 1 or more")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}, wanted one of {DTYPES}")
        where, count = torch.device(device), len(out_features)
        paneled = where.type == "cpu" if paneled is None else paneled
        rows = slots * max_rank if pool_rows is None else pool_rows
        if rows < max_rank:
            raise ValueError(f"pool_rows is {rows}, wanted max_rank, which is {max_rank}, or more")
        starts = [slot * max_rank for slot in range(slots)]
        row0 = torch.tensor([starts] * count, dtype=torch.int32, device=where)
        rank = torch.zeros(count, slots, dtype=torch.int32, device=where)
        scale = torch.zeros(count, slots, dtype=torch.float32, device=where)
        pool = None
        if paneled:
            shape = (slots, -(-max_rank // PANEL) * in_features, PANEL)
            a = [lazy_zeros(shape, dtype, where) for _ in out_features]
            b = [lazy_zeros((slots, max_rank, out), dtype, where) for out in out_features]
        elif count > MOST_SITES:
            raise ValueError(f"{count} sites share an input, wanted {MOST_SITES} or fewer")
        else:
            all_a = lazy_zeros((count, rows, in_features), dtype, where)
            all_b = lazy_zeros((rows, sum(out_features)), dtype, where)
            a, b = list(all_a), list(torch.split(all_b, list(out_features), dim=1))
            pool = GroupPool(all_a, all_b, row0, rank, scale)
        sites = [
            LoraSite(
                a=a[i],
                b=b[i],
                row0=row0[i],
                rank=rank[i],
                scale=scale[i],
                starts=list(starts),
                ranks=[0] * slots,
                scales=[0.0] * slots,
                slots=slots,
                max_rank=max_rank,
                in_features=in_features,
                out_features=out,
                paneled=paneled,
            )
            for i, out in enumerate(out_features)
        ]
        return cls(tuple(sites), pool)

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def slots(self) -> int:
        return self.sites[0].slots

    @property
    def max_rank(self) -> int:
        return self.sites[0].max_rank

    @property
    def dtype(self) -> torch.dtype:
        return self.sites[0].dtype

    @cached_property
    def out_features(self) -> int:
        """Of all sites."""
        return sum(site.out_features for site in self.sites)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Views of the sites' columns of `y` [tokens, out_features]."""
        return torch.split(y, [site.out_features for site in self.sites], dim=1)

    @cached_property
    def structs(self) -> Any:
        """The sites as the C kernel reads them; addresses stay, contents change."""
        made, column = [], 0
        for s in self.sites:
            addresses = [t.data_ptr() for t in (s.a, s.b, s.rank, s.scale)]
            made.append(native.Site(*addresses, s.panels, s.max_rank, s.out_features, column))
            column += s.out_features
        return (native.Site * len(made))(*made)

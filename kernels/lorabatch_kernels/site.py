"""A LoRA site: the device tensors of one linear layer that adapters may change.

Shapes and dtypes: `a` [slots, max_rank, in_features] and `b` [slots, max_rank, out_features] in one
floating dtype, both rank-major, so that the kernels see rank rows [slots * max_rank, features];
tables `row0` and `rank` int32 [slots] and `scale` fp32 [slots]. Row `row0[s] + j` is rank row j of
slot s. Rank 0: the adapter in that slot, if any, leaves this layer alone.

On a CPU a site also holds `a` as panels of 16 rank rows, [panels, in_features, 16] a slot: there a
sum over in_features reads memory in order, whatever the rank. Sites that read the same input form a
`SiteGroup`, whose panels lie in one pool. That doubles the memory of `a`, not of `b`.

Two promises. Rows at or beyond a slot's rank hold zeros (`load` and `clear` wipe what a bigger
adapter left behind). Loading and clearing change contents, never shapes or addresses, so captured
CUDA graphs stay valid. `ranks` and `scales` mirror the tables on the host, so a step never asks the
device.

Raises ValueError for a slot, shape, rank or scale that does not fit, naming the value seen.
Does not cover: locking. Call `load` and `clear` between steps, on the stream the steps run on.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 16


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
    ranks: list[int]
    scales: list[float]
    panels: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_rank: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pool: Tensor | None = None,
    ) -> LoraSite:
        """An empty site: every slot has rank 0. `pool`: memory for its panels."""
        sizes = (slots, max_rank, in_features, out_features)
        if min(sizes) < 1:
            raise ValueError(f"(slots, max_rank, in, out) is {sizes}, wanted each 1 or more")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}, wanted one of {DTYPES}")
        where = torch.device(device)
        panels = None
        if where.type == "cpu":
            shape = (slots, -(-max_rank // PANEL), in_features, PANEL)
            panels = lazy_zeros(shape, dtype, where) if pool is None else pool.view(shape)
        return cls(
            a=lazy_zeros((slots, max_rank, in_features), dtype, where),
            b=lazy_zeros((slots, max_rank, out_features), dtype, where),
            row0=torch.arange(slots, dtype=torch.int32, device=where) * max_rank,
            rank=torch.zeros(slots, dtype=torch.int32, device=where),
            scale=torch.zeros(slots, dtype=torch.float32, device=where),
            ranks=[0] * slots,
            scales=[0.0] * slots,
            panels=panels,
        )

    @property
    def slots(self) -> int:
        return self.a.shape[0]

    @property
    def max_rank(self) -> int:
        return self.a.shape[1]

    @property
    def in_features(self) -> int:
        return self.a.shape[2]

    @property
    def out_features(self) -> int:
        return self.b.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    def rows(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views of a slot's `a` [rank, in_features] and `b` [rank, out_features]."""
        rank = self.ranks[slot]
        return self.a[slot, :rank], self.b[slot, :rank]

    @cached_property
    def alone(self) -> SiteGroup:
        """The group of this site by itself."""
        return SiteGroup((self,), self.panels)

    def load(self, slot: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Put an adapter's `a` [rank, in_features] and `b` [out_features, rank] into `slot`."""
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
        with torch.inference_mode():
            self.a[slot, :rank].copy_(a)
            self.b[slot, :rank].copy_(b.t())
        self._set(slot, rank, scale)
        if self.panels is not None:
            self._fill_panels(self.panels[slot], self.a[slot, :rank])

    def clear(self, slot: int) -> None:
        """Empty `slot`: its tokens get the base layer's output until the next `load`."""
        self._check_slot(slot)
        self._set(slot, 0, 0.0)

    def _set(self, slot: int, rank: int, scale: float) -> None:
        stale = self.ranks[slot]
        with torch.inference_mode():
            if stale > rank:
                self.a[slot, rank:stale].zero_()
                self.b[slot, rank:stale].zero_()
                if self.panels is not None:
                    self.panels[slot, : -(-stale // PANEL)].zero_()
            self.rank.select(0, slot).fill_(rank)
            self.scale.select(0, slot).fill_(scale)
        self.ranks[slot] = rank
        self.scales[slot] = scale

    @staticmethod
    def _fill_panels(panels: Tensor, a: Tensor) -> None:
        with torch.inference_mode():
            for number in range(-(-a.shape[0] // PANEL)):
                rows = a[number * PANEL : (number + 1) * PANEL]
                panels[number, :, : rows.shape[0]].copy_(rows.t())

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot is {slot}, wanted 0..{self.slots - 1}")


@dataclass(frozen=True, eq=False)
class SiteGroup:
    """Sites of one input size that are always given the same input, such as q, k and v.

    `pool` [sites, slots, panels, in_features, 16] holds all their panels on a CPU, else None.
    """

    sites: tuple[LoraSite, ...]
    pool: Tensor | None

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_rank: int,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> SiteGroup:
        """Empty sites, one for each of `out_features`."""
        where = torch.device(device)
        pool = None
        if where.type == "cpu":
            shape = (len(out_features), slots, -(-max_rank // PANEL), in_features, PANEL)
            pool = lazy_zeros(shape, dtype, where)
        sites = tuple(
            LoraSite.allocate(
                slots, max_rank, in_features, out, dtype, where, None if pool is None else pool[i]
            )
            for i, out in enumerate(out_features)
        )
        return cls(sites, pool)

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.sites[0].dtype

    @property
    def panels(self) -> int:
        """Panels of one slot of one site."""
        return -(-self.sites[0].max_rank // PANEL)

    @property
    def pool_rows(self) -> int:
        """Panel rows in the pool."""
        return len(self.sites) * self.sites[0].slots * self.panels * self.in_features

    @property
    def layout(self) -> tuple[object, ...]:
        """Equal for groups whose pools are read at the same places with the same scales."""
        parts: list[object] = [self.in_features]
        for site in self.sites:
            parts += (site.max_rank, tuple(site.ranks), tuple(site.scales))
        return tuple(parts)

"""An adapter's share of one linear layer, in the layout that its device reads.

Shapes and dtypes: of a [rank, in_features], b [out_features, rank], and gain and shift
[out_features] where it changes the layer's own output, all in one floating dtype. They lie one
behind the other, exactly as many elements as these have: A, the transpose of B, gain, shift. Where
`paneled` (a CPU), A lies in panels of 16 rank rows, [in_features, 16], the last one as narrow as
the rows that are left: a sum over in_features reads memory in order, whatever the rank.

An `Arena` holds all layers of an adapter: one piece of memory, given back as a whole when nothing
refers to it any more, pinned for a GPU (then torch's allocator keeps it for the next one).

Raises ValueError for shapes that do not fit together. Does not cover: checking values.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

PANEL = 16
BESIDE = 2  # rows of gain and shift, behind those of B
SPARE = PANEL  # elements behind the last one, which a vector may read and nobody uses

Affine = tuple[Tensor, Tensor]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in pages that take memory only once written (torch.zeros writes them all)."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class LoraWeights:
    """y += gain * y + shift + scale * (x a^T) b^T of one layer."""

    __slots__ = (
        "in_features",
        "is_affine",
        "memory",
        "offset",
        "out_features",
        "paneled",
        "rank",
        "scale",
    )

    def __init__(
        self,
        memory: Tensor,
        offset: int,
        rank: int,
        sizes: tuple[int, int],
        scale: float,
        is_affine: bool,
        paneled: bool,
    ) -> None:
        self.memory = memory
        self.offset = offset
        self.rank = rank
        self.in_features, self.out_features = sizes
        self.scale = scale
        self.is_affine = is_affine
        self.paneled = paneled

    @classmethod
    def pack(
        cls, a: Tensor, b: Tensor, scale: float, affine: Affine | None = None, paneled: bool = True
    ) -> LoraWeights:
        """In memory of its own."""
        rank, wide = a.shape
        size = elements(rank, wide, b.shape[0], affine is not None)
        return Arena([size], a.dtype, paneled=paneled).place(a, b, scale, affine)

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def rows(self) -> int:
        """Rank rows, and those of gain and shift."""
        return self.rank + BESIDE * self.is_affine

    @property
    def nbytes(self) -> int:
        sizes = (self.rank, self.in_features, self.out_features, self.is_affine)
        return elements(*sizes) * self.memory.element_size()

    @property
    def a(self) -> Tensor:
        """[rank, in_features]; of panels a copy."""
        flat = self._a()
        if not self.paneled:
            return flat.view(self.rank, self.in_features)
        panels = torch.split(flat, PANEL * self.in_features) if self.rank else ()
        parts = [panel.view(self.in_features, -1).t() for panel in panels]
        return torch.cat(parts) if parts else flat.view(0, self.in_features)

    @property
    def b(self) -> Tensor:
        """[out_features, rank], a view."""
        return self.below[: self.rank].t()

    @property
    def below(self) -> Tensor:
        """[rows, out_features]: the transpose of b, gain and shift."""
        first = self.offset + self.rank * self.in_features
        return self.memory[first : first + self.rows * self.out_features].view(
            self.rows, self.out_features
        )

    @property
    def affine(self) -> Affine | None:
        """Gain and shift [out_features]."""
        if not self.is_affine:
            return None
        gain, shift = self.below[self.rank :]
        return gain, shift

    @property
    def addresses(self) -> tuple[int, int]:
        """Of A and of what is below it."""
        size = self.memory.element_size()
        first = self.memory.data_ptr() + self.offset * size
        return first, first + self.rank * self.in_features * size

    def _a(self) -> Tensor:
        return self.memory[self.offset : self.offset + self.rank * self.in_features]

    def _fill(self, a: Tensor, b: Tensor, affine: Affine | None) -> None:
        if self.paneled and self.rank:
            flat = torch.split(self._a(), PANEL * self.in_features)
            for panel, rows in zip(flat, torch.split(a, PANEL), strict=True):
                panel.view(self.in_features, -1).copy_(rows.t())
        else:
            self._a().view_as(a).copy_(a)
        below = self.below
        below[: self.rank].copy_(b.t())
        for row, value in zip(below[self.rank :], affine or (), strict=True):
            row.copy_(value)


class Arena:
    """Memory for layers of these sizes, filled from the front."""

    def __init__(
        self,
        sizes: Iterable[int],
        dtype: torch.dtype,
        pinned: bool = False,
        paneled: bool = True,
    ) -> None:
        """`sizes`: elements of each layer that will be placed, in any order."""
        total = sum(sizes) + SPARE
        self._memory = (
            torch.empty(total, dtype=dtype, pin_memory=True)
            if pinned
            else lazy_zeros((total,), dtype, torch.device("cpu"))
        )
        self._paneled = paneled
        self._used = 0

    def place(
        self, a: Tensor, b: Tensor, scale: float, affine: Affine | None = None
    ) -> LoraWeights:
        """Copy a [rank, in_features] and b [out_features, rank], of any dtype, into it."""
        rank, wide = a.shape
        if b.shape[1:] != (rank,):
            raise ValueError(f"b is {list(b.shape)}, wanted [out_features, {rank}] as of a")
        out = b.shape[0]
        for row in affine or ():
            if row.shape != (out,):
                raise ValueError(f"gain or shift is {list(row.shape)}, wanted [{out}]")
        placed = LoraWeights(
            self._memory, self._used, rank, (wide, out), scale, affine is not None, self._paneled
        )
        placed._fill(a, b, affine)
        self._used += elements(rank, wide, out, affine is not None)
        assert self._used + SPARE <= self._memory.numel(), "an arena is too small"
        return placed


def elements(rank: int, in_features: int, out_features: int, affine: bool) -> int:
    """That a layer takes."""
    return rank * in_features + (rank + BESIDE * affine) * out_features

"""Keys and values of every layer: pools of blocks, seen as [Hkv, blocks, block_size, D].

Made on first use, when a layer's head count and width are seen, so that models whose layers
differ need no special case. Where blocks lie anywhere (a GPU), the memory is [blocks, block_size,
Hkv, D], all heads of a token side by side; in rows it is as it is seen. On a CPU, memory is taken
page by page as it is written to, and given back when a row's text is dropped. Raises nothing of its
own.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from lorabatch_worker.block_manager import Change
from lorabatch_worker.step import Span, StepContext

__all__ = ["KVCache"]

MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.12 on


class KVCache:
    """The pools of all layers. `row_blocks` 0: blocks lie anywhere (GPU); else in rows (CPU)."""

    def __init__(
        self, num_blocks: int, block_size: int, context: StepContext, row_blocks: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.row_blocks = row_blocks
        self.context = context
        self.calls = 0
        self._pools: dict[int, tuple[Pool, Pool]] = {}

    def pools(self, layer: int, key: Tensor, value: Tensor) -> tuple[Pool, Pool]:
        """The layer's pools, for keys and values [Hkv, T, D] like these."""
        pools = self._pools.get(layer)
        if pools is None:
            pools = self._pools[layer] = (self._pool(key), self._pool(value))
        return pools

    def apply(self, changes: Iterable[Change]) -> None:
        """Carry out what the rows' manager noted, in order."""
        for change in changes:
            start = change.row * self.row_blocks
            first, last = start + change.first, start + change.last
            for pool in (pool for pair in self._pools.values() for pool in pair):
                if change.kind == "copy":
                    source = change.source * self.row_blocks + change.first
                    count = last - first
                    pool.blocks[:, first:last].copy_(pool.blocks[:, source : source + count])
                else:
                    pool.free(first, last)

    @property
    def bytes_a_token(self) -> int:
        """Of all layers made so far."""
        pools = [pool for pair in self._pools.values() for pool in pair]
        return sum(p.blocks.shape[0] * p.blocks.shape[3] * p.blocks.element_size() for p in pools)

    def _pool(self, like: Tensor) -> Pool:
        return Pool(like, self.num_blocks, self.block_size, rows=self.row_blocks > 0)


class Pool:
    """One layer's keys, or its values."""

    def __init__(self, like: Tensor, num_blocks: int, block_size: int, rows: bool) -> None:
        heads, _, width = like.shape
        shape = (num_blocks, block_size, heads, width)
        if rows:
            shape = (heads, num_blocks, block_size, width)
        self._pages: mmap.mmap | None = None
        if like.device.type == "cpu" and sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self._pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags)
            memory = torch.frombuffer(self._pages, dtype=like.dtype).view(shape)
        else:
            memory = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.blocks = memory if rows else memory.permute(2, 0, 1, 3)

    @cached_property
    def tokens(self) -> Tensor:
        """[Hkv, positions, D], where there are rows."""
        return self.blocks.flatten(1, 2)

    def of_span(self, span: Span) -> Tensor:
        """[Hkv, length, D] of one sequence of a row."""
        return self.tokens[:, span.first : span.first + span.length]

    def free(self, first: int, last: int) -> None:
        """Blocks [first, last) of rows give their memory back, where that can be done."""
        if self._pages is None:
            return
        heads, blocks, size, width = self.blocks.shape
        block_bytes = size * width * self.blocks.element_size()
        for head in range(heads):
            start = (head * blocks + first) * block_bytes
            end = (head * blocks + last) * block_bytes
            inner, outer = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
            if outer > inner:
                offset = inner * mmap.PAGESIZE
                self._pages.madvise(mmap.MADV_DONTNEED, offset, (outer - inner) * mmap.PAGESIZE)

"""Keys and values of every layer: `keys[layer]` [Hkv, blocks, block_size, D].

Made on first use, when a layer's head count and width are seen, so that models whose layers
differ need no special case. On a CPU, memory is taken page by page as it is written to, and
given back when a row's text is dropped. Raises nothing of its own.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from lorabatch_worker.block_manager import Change
from lorabatch_worker.step import Span, Step, StepContext

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

    def write(self, pools: tuple[Pool, Pool], key: Tensor, value: Tensor, step: Step) -> None:
        """Store the step's key and value [Hkv, T, D]."""
        if not self.row_blocks:
            # Decode reads whole blocks. What is past a sequence's end has weight 0, but 0 * NaN is
            # NaN: what a broken adapter's job left behind must not reach the block's next owner.
            pools[1].blocks.index_fill_(1, step.fresh_blocks, 0.0)
        for pool, new in zip(pools, (key, value), strict=True):
            pool.tokens.index_copy_(1, step.kv_index, new)

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
        return sum(p.tokens.shape[0] * p.tokens.shape[2] * p.tokens.element_size() for p in pools)

    def _pool(self, like: Tensor) -> Pool:
        heads, _, width = like.shape
        return Pool((heads, self.num_blocks, self.block_size, width), like)


class Pool:
    """One layer's keys, or its values."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        heads, _, _, width = shape
        self._pages: mmap.mmap | None = None
        if like.device.type == "cpu" and sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            self._pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags)
            self.blocks = torch.frombuffer(self._pages, dtype=like.dtype).view(shape)
        else:
            self.blocks = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.tokens = self.blocks.view(heads, -1, width)

    def of_span(self, span: Span) -> Tensor:
        """[Hkv, length, D] of one sequence; a view where its blocks lie side by side."""
        if span.blocks is None:
            return self.tokens[:, span.first : span.first + span.length]
        return self.blocks.index_select(1, span.blocks).flatten(1, 2)[:, : span.length]

    def of_decodes(self, step: Step) -> Tensor:
        """[Hkv, decodes, S, D], gathered."""
        heads, _, _, width = self.blocks.shape
        gathered = self.blocks.index_select(1, step.decode_blocks.flatten())
        return gathered.view(heads, step.decodes, -1, width)

    def free(self, first: int, last: int) -> None:
        """Blocks [first, last) give their memory back, where that can be done."""
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

"""Who holds which blocks of the KV cache.

A sequence gets all the blocks that its prompt and its longest output need when it is
admitted, so that a running sequence never waits for memory. Block 0 is never given out: it is
what padded entries of block tables point at.
"""

from __future__ import annotations

from lorabatch_worker.sequence import Sequence

__all__ = ["BlockManager"]


class BlockManager:
    """A free list over `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, sequence: Sequence) -> int:
        return -(-sequence.max_length // self.block_size)

    def can_hold(self, sequence: Sequence) -> bool:
        return self.needed(sequence) <= len(self._free)

    def allocate(self, sequence: Sequence) -> None:
        assert not sequence.blocks
        assert self.can_hold(sequence)
        sequence.blocks = [self._free.pop() for _ in range(self.needed(sequence))]

    def release(self, sequence: Sequence) -> None:
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks = []

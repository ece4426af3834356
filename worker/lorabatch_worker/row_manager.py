"""The KV cache of a CPU: one row for each running sequence, in memory that is taken when written.

A row is `row_blocks` consecutive blocks, room for the longest sequence allowed: its keys lie side
by side and are read without a copy (docs/decisions/0007). Address space costs nothing; what counts
against the budget is blocks written to. A row that nobody holds keeps its text. A sequence that
begins with it takes that row over, or gets a copy of the beginning.

Changes to the memory itself are noted in order and carried out before the next step.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict

from lorabatch_worker.block_manager import BlockManager, Change
from lorabatch_worker.sequence import Sequence

__all__ = ["RowBlocks"]


class RowBlocks(BlockManager):
    """`rows` rows of `row_blocks` blocks each, of which `budget_blocks` may hold memory."""

    def __init__(
        self,
        rows: int,
        row_blocks: int,
        budget_blocks: int,
        block_size: int,
        prefix_cache: bool = True,
    ) -> None:
        super().__init__(rows * row_blocks, budget_blocks, block_size, prefix_cache)
        self.row_blocks = row_blocks
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(rows))  # oldest first
        self._held = [0] * rows  # blocks with memory
        self._used = [0] * rows  # blocks of the sequence that runs in it
        self._texts: list[list[bytes]] = [[] for _ in range(rows)]
        self._known: defaultdict[bytes, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self._changes: list[Change] = []

    @property
    def free(self) -> int:
        return self.capacity - sum(self._used)

    def take_changes(self) -> list[Change]:
        changes, self._changes = self._changes, []
        return changes

    def can_allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        return bool(self._idle) and self.needed(sequence.length) + spare <= self.free

    def grow(self, sequence: Sequence) -> bool:
        if len(sequence.blocks) * self.block_size >= sequence.length:
            return True
        if not self.free:
            return False
        sequence.blocks.append(sequence.blocks[-1] + 1)
        self._use(sequence.blocks[0] // self.row_blocks, len(sequence.blocks))
        return True

    def forget_all(self) -> None:
        for row in range(len(self._texts)):
            self._forget(row, 0)

    def _allocate(self, sequence: Sequence) -> int:
        cached = self._cached(sequence)
        row, source = self._choose(cached)
        needed = self.needed(sequence.length)
        assert needed <= self.row_blocks
        self._forget(row, len(cached) if source == row else 0)
        if cached and source != row:
            self._changes.append(Change("copy", row, 0, len(cached), source))
            for digest in sequence.digests[: len(cached)]:
                self._learn(row * self.row_blocks + len(self._texts[row]), digest)
        first = row * self.row_blocks
        sequence.blocks = list(range(first, first + needed))
        self._use(row, needed)
        return len(cached)

    def _choose(self, cached: list[int]) -> tuple[int, int]:
        """(the row to use, the row that holds the cached blocks); the same one where it is idle."""
        source = cached[-1] // self.row_blocks if cached else -1
        if source in self._idle:
            del self._idle[source]
            return source, source
        row, _ = self._idle.popitem(last=False)
        return row, source

    def _release(self, sequence: Sequence, keep: bool) -> None:
        row = sequence.blocks[0] // self.row_blocks
        self._used[row] = 0
        if not keep:
            self._forget(row, 0)
        self._idle[row] = None
        if not self._texts[row]:
            self._idle.move_to_end(row, last=False)

    def _learn(self, block: int, digest: bytes) -> None:
        row, index = divmod(block, self.row_blocks)
        if index == len(self._texts[row]):
            self._texts[row].append(digest)
            self._known[digest][row] = None

    def _block_of(self, digest: bytes) -> int | None:
        rows = self._known.get(digest)
        if not rows:
            return None
        row = next((r for r in rows if r in self._idle), next(iter(rows)))
        return row * self.row_blocks

    def _forget(self, row: int, kept: int) -> None:
        for digest in self._texts[row][kept:]:
            del self._known[digest][row]
            if not self._known[digest]:
                del self._known[digest]
        del self._texts[row][kept:]

    def _use(self, row: int, blocks: int) -> None:
        """Count a running sequence's memory. Where the budget is used up, running rows give back
        what a longer sequence has left them, then idle ones, oldest first, all they have."""
        self._used[row] = blocks
        self._held[row] = max(self._held[row], blocks)
        excess = sum(self._held) - self.capacity
        if excess <= 0:
            return
        running = [other for other, count in enumerate(self._used) if count]
        for other in [*running, *self._idle]:
            used, held = self._used[other], self._held[other]
            if held > used and excess > 0:
                self._changes.append(Change("free", other, used, held))
                self._held[other] = used
                self._forget(other, used)
                excess -= held - used

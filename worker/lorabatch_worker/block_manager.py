"""Who holds which blocks of the KV cache, and which of them hold text that was seen before.

A full block is known by a digest of everything its keys and values depend on: tenant, adapter
version and all tokens up to its end. A sequence that begins with blocks that are known does not
compute them again; nothing crosses tenants, adapters or versions. `BlockManager` is what the
scheduler sees. `PagedBlocks`, for GPUs, hands out single blocks and lets sequences share them:
one that nobody holds keeps its text until it is needed, least recently used first. Block 0 is
never given out there: padded entries of block tables point at it. For CPUs see row_manager.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lorabatch_worker.sequence import Sequence

__all__ = ["BlockManager", "Change", "PagedBlocks"]


@dataclass(frozen=True)
class Change:
    """To a CPU's cache rows. copy: blocks [first, last) of `row` come from `source`; free: they
    give their memory back."""

    kind: Literal["copy", "free"]
    row: int
    first: int
    last: int
    source: int = -1


class BlockManager(ABC):
    """Blocks of `block_size` tokens for sequences; `capacity` of them can be held at once."""

    def __init__(self, num_blocks: int, capacity: int, block_size: int, prefix_cache: bool) -> None:
        self.num_blocks = num_blocks
        self.capacity = capacity
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.queried_tokens = 0
        self.cached_tokens = 0
        self._coming: dict[bytes, Sequence] = {}

    @property
    @abstractmethod
    def free(self) -> int:
        """Blocks that running sequences can still have."""

    def take_changes(self) -> list[Change]:
        """What has to happen to the memory, in this order, before the next step writes to it."""
        return []

    def needed(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    @abstractmethod
    def can_allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        """Whether all of a sequence's tokens fit, with `spare` blocks left over."""

    @abstractmethod
    def grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's last token. False: no block is free."""

    @abstractmethod
    def forget_all(self) -> None:
        """Empty the cache: nothing that was computed until now will be reused."""

    def allocate(self, sequence: Sequence) -> None:
        """Give a sequence the blocks of all its tokens, and set how many of them are computed."""
        assert not sequence.blocks
        assert self.can_allocate(sequence)
        sequence.computed = self._allocate(sequence) * self.block_size
        if self.prefix_cache:
            self.queried_tokens += sequence.length
            self.cached_tokens += sequence.computed
            for digest in self._digests(sequence, sequence.length // self.block_size):
                self._coming.setdefault(digest, sequence)

    def computed(self, sequence: Sequence, start: int) -> None:
        """Positions [start, computed) have been written: blocks that they filled can be reused."""
        first, full = start // self.block_size, sequence.computed // self.block_size
        if not self.prefix_cache or full == first:
            return
        for i, digest in enumerate(self._digests(sequence, full)):
            if i >= first:
                self._arrived(digest, sequence)
                self._learn(sequence.blocks[i], digest)

    def will_be_shared(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing the first block that this one lacks."""
        if not (self.prefix_cache and self._coming):
            return False
        lacking = len(self._cached(sequence))
        if lacking >= (sequence.length - 1) // self.block_size:
            return False
        *_, digest = self._digests(sequence, lacking + 1)
        return digest in self._coming

    def release(self, sequence: Sequence, keep: bool) -> None:
        """Take all blocks back; `keep=False` where their text cannot be believed."""
        for digest in sequence.digests:
            self._arrived(digest, sequence)
        if sequence.blocks:
            self._release(sequence, keep)
        sequence.blocks = []

    # -- inside --------------------------------------------------------------

    @abstractmethod
    def _allocate(self, sequence: Sequence) -> int:
        """Set the sequence's blocks: how many of the first ones hold its text already."""

    @abstractmethod
    def _release(self, sequence: Sequence, keep: bool) -> None: ...

    @abstractmethod
    def _learn(self, block: int, digest: bytes) -> None:
        """This block holds the text of this digest now."""

    @abstractmethod
    def _block_of(self, digest: bytes) -> int | None:
        """A block that holds this text."""

    def _arrived(self, digest: bytes, sequence: Sequence) -> None:
        if self._coming.get(digest) is sequence:
            del self._coming[digest]

    def _cached(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's beginning; its last token is always computed anew."""
        found: list[int] = []
        if self.prefix_cache:
            for digest in self._digests(sequence, (sequence.length - 1) // self.block_size):
                block = self._block_of(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def _digests(self, sequence: Sequence, blocks: int) -> Iterator[bytes]:
        """Digests of the first full blocks, each made of the one before; kept on the sequence."""
        for i in range(blocks):
            if i == len(sequence.digests):
                before = sequence.digests[-1] if i else _salt(sequence)
                tokens = sequence.tokens(i * self.block_size, (i + 1) * self.block_size)
                text = before + array("q", tokens).tobytes()
                sequence.digests.append(hashlib.blake2b(text, digest_size=16).digest())
            yield sequence.digests[i]


class PagedBlocks(BlockManager):
    """Reference counts over `num_blocks` blocks, shared by sequences with a common beginning."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        super().__init__(num_blocks, num_blocks - 1, block_size, prefix_cache)
        self._users = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, bytes] = OrderedDict()  # nobody's, with text; oldest first
        self._known: dict[bytes, int] = {}
        self._digest: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._empty) + len(self._idle)

    def can_allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        cached = self._cached(sequence)
        fresh = self.needed(sequence.length) - len(cached)
        return fresh + spare <= self.free - sum(self._users[b] == 0 for b in cached)

    def grow(self, sequence: Sequence) -> bool:
        if len(sequence.blocks) * self.block_size >= sequence.length:
            return True
        if not self.free:
            return False
        sequence.blocks.append(self._take())
        return True

    def forget_all(self) -> None:
        for block in list(self._digest):
            self._forget(block)
        self._empty += self._idle
        self._idle.clear()

    def _allocate(self, sequence: Sequence) -> int:
        cached = self._cached(sequence)
        for block in cached:
            self._users[block] += 1
            self._idle.pop(block, None)
        fresh = self.needed(sequence.length) - len(cached)
        sequence.blocks = cached + [self._take() for _ in range(fresh)]
        return len(cached)

    def _release(self, sequence: Sequence, keep: bool) -> None:
        for block in reversed(sequence.blocks):
            self._users[block] -= 1
            if not keep:
                self._forget(block)
            if self._users[block]:
                continue
            if block in self._digest:
                self._idle[block] = self._digest[block]
            else:
                self._empty.append(block)

    def _learn(self, block: int, digest: bytes) -> None:
        if digest not in self._known and block not in self._digest:
            self._known[digest] = block
            self._digest[block] = digest

    def _block_of(self, digest: bytes) -> int | None:
        return self._known.get(digest)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._users[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest.pop(block, None)
        if digest is not None:
            del self._known[digest]


def _salt(sequence: Sequence) -> bytes:
    tenant, version = sequence.claim.job.tenant, sequence.adapter_version or ""
    return hashlib.blake2b(f"{tenant}\0{version}".encode(), digest_size=16).digest()

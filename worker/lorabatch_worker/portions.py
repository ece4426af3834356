"""How much of a step is computed at once: all of it, until the memory does not do.

A step that runs out of memory is computed again in halves, and halves of halves. What was enough
stays the measure of the steps that follow and is doubled after each GOOD of them, so that a device
that others use too is not asked for too much at every step.
"""

from __future__ import annotations

import torch

from lorabatch_worker.scheduler import Chunk

__all__ = ["Portions", "out_of_memory"]

GOOD = 16


def out_of_memory(error: Exception) -> bool:
    """Whether a smaller step may do. torch names a device's lack of memory, but not the host's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


class Portions:
    """`most_tokens` of one portion; None: there is no limit."""

    def __init__(self) -> None:
        self.most_tokens: int | None = None
        self._good = 0

    def next(self, chunks: list[Chunk]) -> list[Chunk]:
        """What is to be computed next of a step's chunks, by how far their sequences are: none once
        all are done."""
        room = self.most_tokens or sum(c.end - c.start for c in chunks)
        portion = []
        for chunk in chunks:
            start = chunk.sequence.computed
            if start < chunk.end and room > 0:
                portion.append(Chunk(chunk.sequence, start, min(chunk.end, start + room)))
                room -= portion[-1].end - start
        return portion

    def halve(self, portion: list[Chunk]) -> bool:
        """This one did not fit. False: it is a single token, and no smaller one is left to try; the
        limit was because of it and is over."""
        tokens = sum(c.end - c.start for c in portion)
        self.most_tokens = tokens // 2 or None
        self._good = 0
        return tokens > 1

    def fitted(self, step_tokens: int) -> None:
        """A portion did; steps have `step_tokens` at most."""
        if self.most_tokens is None:
            return
        self._good += 1
        if self._good >= GOOD:
            self._good = 0
            self.most_tokens *= 2
            if self.most_tokens >= step_tokens:
                self.most_tokens = None

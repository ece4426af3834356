"""How much of a step is computed at once: all of it, until the memory does not do.

A step that runs out of memory is computed again in halves, and halves of halves. What was enough
stays the measure of the steps that follow and is doubled after each GOOD of them, so that a device
that others use too is not asked for too much at every step.
"""

from __future__ import annotations

from lorabatch.errors import OutOfMemory
from lorabatch_worker.scheduler import Chunk

__all__ = ["Portions", "no_memory_for"]

GOOD = 16
ALONE = 3


def no_memory_for(chunk: Chunk) -> OutOfMemory:
    """Its job's error, once a single token of it did not fit."""
    return OutOfMemory(
        f"no memory to compute token {chunk.end}, even by itself; make it shorter, "
        "or give the KV cache fewer tokens or the device fewer adapter slots"
    )


class Portions:
    """`most_tokens` of one portion; None: there is no limit. `short_steps`: of the last ones, in
    which a token did not fit even by itself, and nobody could be blamed for it."""

    def __init__(self) -> None:
        self.most_tokens: int | None = None
        self.short_steps = 0
        self._good = 0
        self._misfits: list[Chunk] = []
        self._fitted_since = False

    def next(self, chunks: list[Chunk]) -> list[Chunk]:
        """What is to be computed next of a step's chunks, by how far their sequences are: none once
        all are done that can be."""
        out = {chunk.sequence.key for chunk in self._misfits}
        room = self.most_tokens or sum(c.end - c.start for c in chunks)
        portion = []
        for chunk in chunks:
            start = chunk.sequence.computed
            left = start < chunk.end and not chunk.sequence.family.closed
            if left and room > 0 and chunk.sequence.key not in out:
                portion.append(Chunk(chunk.sequence, start, min(chunk.end, start + room)))
                room -= portion[-1].end - start
        return portion

    def halve(self, portion: list[Chunk]) -> None:
        """This one did not fit. Of a single token no smaller one is left to try: the others have
        their turn, and `judge` says whose fault it was."""
        tokens = sum(c.end - c.start for c in portion)
        self._good = 0
        self.most_tokens = tokens // 2 or None
        if tokens == 1:
            if not self._misfits and not self.short_steps:
                self._fitted_since = False
            self._misfits.append(portion[0])

    def fitted(self, step_tokens: int) -> None:
        """A portion did; steps have `step_tokens` at most."""
        self._fitted_since = True
        if self.most_tokens is None:
            return
        self._good += 1
        if self._good >= GOOD:
            self._good = 0
            self.most_tokens *= 2
            if self.most_tokens >= step_tokens:
                self.most_tokens = None

    def judge(self, sequences: int) -> list[Chunk]:
        """After a step of so many sequences: what does not fit, because since it was tried first
        others did, or it was alone for ALONE steps. If nothing fits nobody is to blame: something
        else has the memory."""
        misfits, self._misfits = self._misfits, []
        if not misfits:
            self.short_steps = 0
        elif self._fitted_since or (sequences == 1 and self.short_steps >= ALONE):
            self.short_steps = 0
            return misfits
        else:
            self.short_steps += 1
        return []

"""How much an engine has done so far, for people and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lorabatch_worker.scheduler import Chunk

__all__ = ["Counters"]


@dataclass
class Counters:
    """`step_seqs` and `step_tokens` are summed over the steps: sequences in the micro-batch, and
    tokens computed; `mixed_steps` had more than one adapter."""

    steps: int = 0
    mixed_steps: int = 0
    generated_tokens: int = 0
    step_seqs: int = 0
    step_tokens: int = 0

    def count(self, chunks: Sequence[Chunk], generated: int) -> None:
        """A step that was computed, and how many tokens it gave."""
        self.steps += 1
        self.mixed_steps += len({c.sequence.slot for c in chunks}) > 1
        self.generated_tokens += generated
        self.step_seqs += len(chunks)
        self.step_tokens += sum(c.end - c.start for c in chunks)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

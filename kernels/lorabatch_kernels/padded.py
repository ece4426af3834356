"""One padded batch for short segments, the long ones apart: the part of a step map for the CPU.

A segment is the tokens of one adapter slot. Short ones (decode) become rows of one batch of shape
[n segments, width], so that two bmm calls serve all of them; a long one (a prefill chunk) is a GEMM
of its own, so that 256 prefill tokens of one adapter never pad the others to 256 rows. The width
that is cheapest by the cost below decides which is which.

Shapes and dtypes: `gather` int64 [n * width] is the token behind each place (a padding place
repeats the first token of its segment, and what it yields is dropped); `places` and `tokens` int64
[short tokens] pair each real place with its token.

Raises nothing: step_map.py has checked the input.
Does not cover: ranks. One adapter of a rank far above the others widens the reads of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Costs in rows of the padded batch (about 1.2 us each: 576 to 1536 features, rank 16, 1 thread of
# an AMD EPYC 9004 core, torch 2.13): the fixed cost of the batch, and of one
# segment apart (20 rows in fp32, 50 in bf16).
BATCH_ROWS = 64
SEGMENT_ROWS = 32


@dataclass(frozen=True, eq=False)
class Segment:
    """All tokens of one slot: a slice of the batch where they are neighbours, else indices."""

    slot: int
    tokens: slice | Tensor


@dataclass(frozen=True, eq=False)
class PaddedMap:
    """Places of the short segments in one [n, width] batch, and the long segments."""

    slots: tuple[int, ...]
    width: int
    gather: Tensor | None  # None: the batch itself, in order, is the padded batch
    places: Tensor | None  # None: every place holds a token
    tokens: Tensor
    segments: tuple[Segment, ...]
    _rows: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    _scratch: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @property
    def slot_range(self) -> slice | None:
        """The slots as a slice where they follow one another without a gap."""
        if self.slots and self.slots[-1] - self.slots[0] == len(self.slots) - 1:
            return slice(self.slots[0], self.slots[-1] + 1)
        return None

    def rows(self, max_rank: int, rank: int) -> Tensor:
        """int64 [n * rank]: the pool rows 0..rank-1 of each slot, in pools of `max_rank` rows."""
        found = self._rows.get((max_rank, rank))
        if found is None:
            first = torch.tensor(self.slots) * max_rank
            found = (first[:, None] + torch.arange(rank)).flatten()
            self._rows[(max_rank, rank)] = found
        return found

    def scratch(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory shared by all sites of the step; a fresh 1.5 MB a call costs twice the copy."""
        size = 1
        for extent in shape:
            size *= extent
        held = self._scratch.get(dtype)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype)
            self._scratch[dtype] = held
        return held[:size].view(shape)


def padded_width(lengths: Sequence[int]) -> int:
    """The longest segment that belongs in the padded batch; 0 sends every segment apart."""
    apart = sum(SEGMENT_ROWS + length for length in lengths)
    best, best_cost = 0, apart
    ascending = sorted(lengths)
    for count, width in enumerate(ascending, start=1):
        apart -= SEGMENT_ROWS + width
        cost = BATCH_ROWS + count * width + apart
        if cost <= best_cost:
            best, best_cost = width, cost
    return best


def build_padded(groups: Mapping[int, Sequence[int]], batch_tokens: int) -> PaddedMap:
    """Lay out `groups` (slot, ascending -> its token indices, ascending)."""
    width = padded_width([len(tokens) for tokens in groups.values()])
    short = {slot: tokens for slot, tokens in groups.items() if len(tokens) <= width}
    gather: list[int] = []
    places: list[int] = []
    flat: list[int] = []
    for tokens in short.values():
        places.extend(range(len(gather), len(gather) + len(tokens)))
        flat.extend(tokens)
        gather.extend(tokens)
        gather.extend([tokens[0]] * (width - len(tokens)))
    in_order = len(gather) == batch_tokens and flat == list(range(batch_tokens))
    return PaddedMap(
        slots=tuple(short),
        width=width,
        gather=None if in_order else torch.tensor(gather, dtype=torch.int64),
        places=None if len(places) == len(gather) else torch.tensor(places, dtype=torch.int64),
        tokens=torch.tensor(flat, dtype=torch.int64),
        segments=tuple(
            Segment(slot, _span(tokens)) for slot, tokens in groups.items() if len(tokens) > width
        ),
    )


def _span(tokens: Sequence[int]) -> slice | Tensor:
    first, last = tokens[0], tokens[-1]
    if last - first == len(tokens) - 1:
        return slice(first, last + 1)
    return torch.tensor(tokens, dtype=torch.int64)

"""One step's micro-batch as tensors: a flat list of tokens and where their KV lies.

Decode tokens come first, prefill chunks after them. `Step` is built once a step on the host
and read by the attention function and the LoRA layers through `StepContext`, because
transformers' linear layers get nothing but their input. Index tensors are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorabatch_kernels import StepMap, build_step_map
from lorabatch_worker.scheduler import Chunk

__all__ = ["PrefillSpan", "Step", "StepContext", "build_step"]


# What it costs to read any row by itself, and each one, in cached tokens read (about 0.15 us each
# with 3 key-value heads of 64 in fp32).
SCATTER_TOKENS = 700
APART_TOKENS = 150


@dataclass(frozen=True)
class PrefillSpan:
    """Tokens [start, end) of the flat batch: positions [past, past + end - start) of a sequence."""

    start: int
    end: int
    past: int
    blocks: Tensor
    first_block: int | None = None
    """Where the blocks lie side by side."""

    @property
    def length(self) -> int:
        """Positions whose keys are attended to."""
        return self.past + self.end - self.start


@dataclass(frozen=True)
class RowView:
    """Decode tokens whose cache rows are read as one tensor [rows, width], without a copy.

    `place` int64 [n]: the row, counted from `first`, of each token of `tokens` [n]; both None where
    token i is in row `first` + i. `lengths` [rows]: positions that are a row's own (all of a row
    that no token is in). `apart`: (token, row, length) of the few that are much longer.
    """

    first: int
    count: int
    width: int
    lengths: Tensor
    tokens: Tensor | None
    place: Tensor | None
    apart: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Step:
    """Tensors of one micro-batch of T tokens, D of them decode tokens.

    input_ids, position_ids, kv_index [T]: kv_index is block * block_size + offset.
    decode_blocks [D, blocks of the longest], padded with block 0; decode_lengths [D].
    fresh_blocks: those that get their first token in this step.
    sample_index: the flat positions whose logits are needed.
    """

    input_ids: Tensor
    position_ids: Tensor
    kv_index: Tensor
    decode_blocks: Tensor
    decode_lengths: Tensor
    fresh_blocks: Tensor
    prefill: tuple[PrefillSpan, ...]
    sample_index: Tensor
    step_map: StepMap
    rows: RowView | None = None
    memo: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    """Masks and indices that attention makes once a step, for all layers."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def decodes(self) -> int:
        return self.decode_lengths.shape[0]


class StepContext:
    """What the model's layers read of the step that is running. One per engine."""

    def __init__(self) -> None:
        self._step: Step | None = None

    @property
    def step(self) -> Step:
        assert self._step is not None, "the model was called outside of a step"
        return self._step

    def enter(self, step: Step | None) -> None:
        self._step = step


def build_step(
    chunks: list[Chunk], block_size: int, device: torch.device, row_blocks: int = 0
) -> Step:
    """Lay out a plan's chunks, decode chunks first, as tensors on the device. `row_blocks`: how
    many blocks a cache row has, 0 where the cache has no rows."""
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    slots: list[int] = []
    samples: list[int] = []
    tables: list[list[int]] = []
    lengths: list[int] = []
    fresh: list[int] = []
    spans: list[PrefillSpan] = []
    for chunk in chunks:
        sequence, start = chunk.sequence, len(ids)
        ids += sequence.tokens(chunk.start, chunk.end)
        positions += range(chunk.start, chunk.end)
        kv_index += [
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(chunk.start, chunk.end)
        ]
        slots += [sequence.slot] * (chunk.end - chunk.start)
        used = sequence.blocks[: -(-chunk.end // block_size)]
        fresh += used[-(-chunk.start // block_size) :]
        if chunk.end - chunk.start == 1 and not spans:
            tables.append(used)
            lengths.append(chunk.end)
        else:
            blocks = torch.tensor(used, device=device)
            in_row = used[0] if row_blocks else None
            spans.append(PrefillSpan(start, len(ids), chunk.start, blocks, in_row))
        if chunk.samples:
            samples.append(len(ids) - 1)
    widest = max((len(t) for t in tables), default=0)
    padded = [t + [0] * (widest - len(t)) for t in tables]

    def tensor(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Step(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        kv_index=tensor(kv_index),
        decode_blocks=tensor(padded),
        decode_lengths=tensor(lengths),
        fresh_blocks=tensor(fresh),
        prefill=tuple(spans),
        sample_index=tensor(samples),
        step_map=build_step_map(slots, device),
        rows=view_rows([t[0] // row_blocks for t in tables], lengths) if row_blocks else None,
    )


def view_rows(rows: list[int], lengths: list[int]) -> RowView | None:
    """How decode tokens of these cache rows and lengths are read; None without any."""
    if not rows:
        return None
    width = _shared_width(lengths)
    if max(rows) - min(rows) >= 2 * len(rows):
        width = 0  # mostly rows that no token is in
    together = [i for i, length in enumerate(lengths) if length <= width]
    apart = [(i, rows[i], lengths[i]) for i in range(len(rows)) if lengths[i] > width]
    first = min((rows[i] for i in together), default=0)
    count = max((rows[i] + 1 for i in together), default=0) - first
    own = [width] * count
    for i in together:
        own[rows[i] - first] = lengths[i]
    place = [rows[i] - first for i in together]
    in_order = place == together == list(range(len(rows))) == list(range(count))
    return RowView(
        first=first,
        count=count,
        width=width,
        lengths=torch.tensor(own, dtype=torch.int64),
        tokens=None if in_order else torch.tensor(together, dtype=torch.int64),
        place=None if in_order else torch.tensor(place, dtype=torch.int64),
        apart=tuple(apart),
    )


def _shared_width(lengths: list[int]) -> int:
    """The width at which reading rows together, padded, and the longer ones apart costs least."""
    apart = sum(lengths) + APART_TOKENS * len(lengths)
    best, best_cost = 0, SCATTER_TOKENS + apart
    for count, width in enumerate(sorted(lengths), start=1):
        apart -= width + APART_TOKENS
        cost = count * width + apart + (SCATTER_TOKENS if apart else 0)
        if cost <= best_cost:
            best, best_cost = width, cost
    return best

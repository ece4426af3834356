"""One step's micro-batch as tensors: a flat list of tokens and where their KV lies.

Decode tokens come first, prefill chunks after them; each is a run of tokens of one sequence, in
`spans` where the cache has rows (a CPU), else in `paged`. `Step` is built once a step on the host
and read by the attention function and the LoRA layers through `StepContext`, because transformers'
linear layers get nothing but their input. Index tensors are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorabatch_kernels import RowSpans, StepMap, build_step_map
from lorabatch_kernels.paged import PagedSpans
from lorabatch_worker.scheduler import Chunk

__all__ = ["Span", "Step", "StepContext", "build_step"]


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of the flat batch: positions [past, past + end - start) of a sequence.

    Their keys lie side by side from position `first` of the pools on.
    """

    start: int
    end: int
    past: int
    first: int

    @property
    def length(self) -> int:
        """Positions whose keys are attended to."""
        return self.past + self.end - self.start


@dataclass(frozen=True)
class Step:
    """Tensors of one micro-batch of T tokens.

    input_ids, position_ids, kv_index [T]: kv_index is block * block_size + offset.
    sample_index: the flat positions whose logits are needed.
    spans and row_spans: of a cache that has rows; paged: of any other.
    """

    input_ids: Tensor
    position_ids: Tensor
    kv_index: Tensor
    sample_index: Tensor
    step_map: StepMap
    spans: tuple[Span, ...] = ()
    paged: PagedSpans | None = None
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Made once a step, for all layers."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def row_spans(self) -> RowSpans:
        return RowSpans.of([(s.start, s.end - s.start, s.past, s.first) for s in self.spans])


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
    chunks: list[Chunk], block_size: int, device: torch.device, rows: bool = False
) -> Step:
    """Lay out a plan's chunks, decode chunks first, as tensors on the device. `rows`: whether each
    sequence's blocks lie side by side."""
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    slots: list[int] = []
    samples: list[int] = []
    tables: list[list[int]] = []
    lengths: list[int] = []
    starts: list[int] = [0]
    spans: list[Span] = []
    for chunk in chunks:
        sequence, start = chunk.sequence, len(ids)
        ids += sequence.tokens(chunk.start, chunk.end)
        positions += range(chunk.start, chunk.end)
        kv_index += [
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(chunk.start, chunk.end)
        ]
        slots += [sequence.slot] * (chunk.end - chunk.start)
        starts.append(len(ids))
        if rows:
            first = sequence.blocks[0] * block_size
            spans.append(Span(start, len(ids), chunk.start, first))
        else:
            tables.append(sequence.blocks[: -(-chunk.end // block_size)])
            lengths.append(chunk.end)
        if chunk.samples:
            samples.append(len(ids) - 1)

    def tensor(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    paged = None
    if not rows:
        widest = max(len(t) for t in tables)
        paged = PagedSpans(
            starts=tensor(starts, torch.int32),
            lengths=tensor(lengths, torch.int32),
            blocks=tensor([t + [0] * (widest - len(t)) for t in tables], torch.int32),
            longest_run=max(c.end - c.start for c in chunks),
        )
    return Step(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        kv_index=tensor(kv_index),
        sample_index=tensor(samples),
        step_map=build_step_map(slots, device),
        spans=tuple(spans),
        paged=paged,
    )

"""One step's micro-batch as tensors: a flat list of tokens and where their KV lies.

Decode tokens come first, prefill chunks after them; where the cache has rows (a CPU), both are
spans. `Step` is built once a step on the host and read by the attention function and the LoRA
layers through `StepContext`, because transformers' linear layers get nothing but their input. Index
tensors are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorabatch_kernels import RowSpans, StepMap, build_step_map
from lorabatch_worker.scheduler import Chunk

__all__ = ["Span", "Step", "StepContext", "build_step"]


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of the flat batch: positions [past, past + end - start) of a sequence.

    Their keys lie in `blocks` [blocks], or side by side from position `first` of the pools on.
    """

    start: int
    end: int
    past: int
    blocks: Tensor | None = None
    first: int = 0

    @property
    def length(self) -> int:
        """Positions whose keys are attended to."""
        return self.past + self.end - self.start


@dataclass(frozen=True)
class Step:
    """Tensors of one micro-batch of T tokens, D of them decode tokens that are read in blocks.

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
    spans: tuple[Span, ...]
    sample_index: Tensor
    step_map: StepMap
    masks: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    """Made once a step, for all layers."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def decodes(self) -> int:
        return self.decode_lengths.shape[0]

    @cached_property
    def row_spans(self) -> RowSpans:
        """The spans of a cache that has rows."""
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
    fresh: list[int] = []
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
        used = sequence.blocks[: -(-chunk.end // block_size)]
        if rows:
            spans.append(Span(start, len(ids), chunk.start, first=used[0] * block_size))
        else:
            fresh += used[-(-chunk.start // block_size) :]
            if chunk.end - chunk.start == 1 and not spans:
                tables.append(used)
                lengths.append(chunk.end)
            else:
                blocks = torch.tensor(used, device=device)
                spans.append(Span(start, len(ids), chunk.start, blocks))
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
        spans=tuple(spans),
        sample_index=tensor(samples),
        step_map=build_step_map(slots, device),
    )

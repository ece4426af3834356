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

from lorabatch_kernels import BASE_SLOT, PagedSpans, RowSpans, StepMap
from lorabatch_kernels.step_map import HostStepMap, lay_out_step_map
from lorabatch_worker.packing import Packed
from lorabatch_worker.scheduler import Chunk

__all__ = ["HostStep", "Padding", "Span", "Step", "StepContext", "build_step", "lay_out_step"]


@dataclass(frozen=True)
class Padding:
    """Sizes of a step of one token a sequence whose shapes must not depend on the batch: tokens,
    columns of the block table, tiles of the step map."""

    seqs: int
    table_blocks: int
    tiles: int


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
    sample_map: the step map of the sampled tokens; None where all tokens are.
    padded: some tokens may be of no sequence; they are stored nowhere and attend to nothing.
    adapter_ids [T]: input_ids with the tokens that adapters add, where there are any (ends.py).
    """

    input_ids: Tensor
    position_ids: Tensor
    kv_index: Tensor
    sample_index: Tensor
    step_map: StepMap
    spans: tuple[Span, ...] = ()
    paged: PagedSpans | None = None
    sample_map: StepMap | None = None
    padded: bool = False
    adapter_ids: Tensor | None = None
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """Made once a step, for all layers."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    def map_of(self, tokens: int) -> StepMap:
        """Of all tokens, or of the sampled ones, whichever there are so many of."""
        if tokens == self.tokens or self.sample_map is None:
            return self.step_map
        return self.sample_map

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


@dataclass(frozen=True)
class HostStep:
    """A step that is not on the device yet. `longest_run` 0: the cache has rows."""

    packed: Packed
    step_map: HostStepMap
    spans: tuple[Span, ...]
    sample_map: HostStepMap | None
    longest_run: int
    padded: bool

    def on(self, sent: Tensor) -> Step:
        """The step whose tables are, or will be, in what `packed.send` gave."""
        ids, positions, kv_index, samples, step_map, sampled, *rest = self.packed.views(sent)
        paged = None
        if self.longest_run:
            starts, lengths, blocks = rest
            paged = PagedSpans(starts, lengths, blocks, self.longest_run)
        return Step(
            input_ids=ids,
            position_ids=positions,
            kv_index=kv_index,
            sample_index=samples,
            step_map=self.step_map.on(step_map),
            spans=self.spans,
            paged=paged,
            sample_map=self.sample_map.on(sampled) if self.sample_map else None,
            padded=self.padded,
        )


def build_step(
    chunks: list[Chunk], block_size: int, device: torch.device, rows: bool = False
) -> Step:
    """`lay_out_step`, on the device, in one copy."""
    host = lay_out_step(chunks, block_size, device, rows)
    return host.on(host.packed.send(device))


def lay_out_step(
    chunks: list[Chunk],
    block_size: int,
    device: torch.device,
    rows: bool = False,
    padding: Padding | None = None,
) -> HostStep:
    """Lay out a plan's chunks, decode chunks first. `rows`: whether each sequence's blocks lie side
    by side. `padding` is for chunks of one token that all sample."""
    spare = padding.seqs - len(chunks) if padding else 0
    ids: list[int] = []
    positions: list[int] = []
    kv_index: list[int] = []
    slots: list[int] = []
    samples: list[int] = []
    starts: list[int] = [0]
    for chunk in chunks:
        sequence = chunk.sequence
        ids += sequence.tokens(chunk.start, chunk.end)
        positions += range(chunk.start, chunk.end)
        kv_index += [
            sequence.blocks[p // block_size] * block_size + p % block_size
            for p in range(chunk.start, chunk.end)
        ]
        slots += [sequence.slot] * (chunk.end - chunk.start)
        starts.append(len(ids))
        if chunk.samples:
            samples.append(len(ids) - 1)
    packed = Packed()
    packed.add(ids + [0] * spare, torch.int64)
    packed.add(positions + [0] * spare, torch.int64)
    packed.add(kv_index + [-1] * spare, torch.int64)
    packed.add(range(padding.seqs) if padding else samples, torch.int64)
    max_tiles = padding.tiles if padding else None
    step_map = lay_out_step_map(slots + [BASE_SLOT] * spare, device, max_tiles=max_tiles)
    packed.add(step_map.ints, torch.int32)
    sample_map = None
    if not padding and len(samples) < len(ids):
        sample_map = lay_out_step_map([slots[i] for i in samples], device)
    packed.add(sample_map.ints if sample_map else [], torch.int32)
    if rows:
        spans = [
            Span(start, end, c.start, c.sequence.blocks[0] * block_size)
            for c, start, end in zip(chunks, starts, starts[1:], strict=False)
        ]
        return HostStep(packed, step_map, tuple(spans), sample_map, 0, False)
    tables = [c.sequence.blocks[: -(-c.end // block_size)] for c in chunks]
    packed.add(starts + [len(ids)] * spare, torch.int32)
    packed.add([c.end for c in chunks] + [0] * spare, torch.int32)
    columns = padding.table_blocks if padding else max(map(len, tables))
    packed.add_rows([*tables, *[[]] * spare], columns)
    longest = 1 if padding else max(c.end - c.start for c in chunks)
    return HostStep(packed, step_map, (), sample_map, longest, padding is not None)

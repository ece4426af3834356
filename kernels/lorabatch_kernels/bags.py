"""Short segments as weighted sums of pool rows, long ones apart: the step map of a CPU.

A segment is the tokens of one adapter slot in this step. A long one (a prefill chunk) is two GEMMs
of its own. The tokens of short ones (decode) are cut into cells, one for each panel of rank rows
that the token's adapter has: a cell's v is a sum of `in_features` panel rows weighted by x, and
the token's term a sum of as many rows of `b` as the adapter has ranks, weighted by v. Both are an
embedding bag, so that only the panels of `a` and the rows of `b` in use are read, whatever the mix
of ranks and slots.

Shapes and dtypes: index tensors are int32 where the pool has fewer rows than 2^31, else int64.
Raises nothing: step_map.py has checked the input. Does not cover: which weights sit where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorabatch_kernels.site import PANEL, LoraSite, SiteGroup

# From this many tokens on a slot gets two GEMMs. An estimate from the cost of a call and of a bag;
# not tuned.
LONG_SEGMENT = 8


@dataclass(frozen=True, eq=False)
class Segment:
    """All tokens of one slot: a slice of the batch where they are neighbours, else indices."""

    slot: int
    tokens: slice | Tensor


@dataclass(frozen=True, eq=False)
class Expand:
    """Bags of `b` rows: bag t sums rows index[offsets[t] : offsets[t + 1]], weighted by v[cells]
    of the same range."""

    index: Tensor
    offsets: Tensor
    cells: Tensor


@dataclass(frozen=True, eq=False)
class BagPlan:
    """What the short tokens read of one group's pools.

    x_rows int64 [cells]: the token behind each cell. a_index [cells * in_features] and a_offsets
    [cells]: its panel rows. scale fp32 [cells, 1]. expands: one a site, None where no token's
    adapter changes that site.
    """

    x_rows: Tensor
    a_index: Tensor
    a_offsets: Tensor
    scale: Tensor
    expands: tuple[Expand | None, ...]


@dataclass(frozen=True, eq=False)
class BagMap:
    """One step's tokens by segment. `short` pairs tokens with slots, in batch order."""

    short: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]
    _plans: dict[object, BagPlan | None] = field(default_factory=dict, repr=False)

    @cached_property
    def span(self) -> slice | Tensor:
        """Where bags go: a slice of the batch if most tokens in it are short ones (the others'
        bags are empty), else the short tokens' indices."""
        tokens = [token for token, _ in self.short]
        width = tokens[-1] - tokens[0] + 1
        if width <= 2 * len(tokens):
            return slice(tokens[0], tokens[-1] + 1)
        return torch.tensor(tokens, dtype=torch.int64)

    def plan(self, group: SiteGroup) -> BagPlan | None:
        """What to read of this group; shared by all groups of the same shapes, ranks and scales.
        None: no short token's adapter changes any of its sites."""
        key = group.layout
        if key not in self._plans:
            self._plans[key] = self._make_plan(group)
        return self._plans[key]

    def _make_plan(self, group: SiteGroup) -> BagPlan | None:
        rows: list[int] = []
        panels: list[int] = []
        scales: list[float] = []
        expands = []
        for number, site in enumerate(group.sites):
            first = len(rows)
            starts: dict[int, int] = {}
            for token, slot in self.short:
                starts[token] = len(rows)
                count = -(-site.ranks[slot] // PANEL)
                rows += [token] * count
                panel = (number * site.slots + slot) * group.panels
                panels += range(panel, panel + count)
                scales += [site.scales[slot]] * count
            expands.append(self._expand(site, starts) if len(rows) > first else None)
        if not rows:
            return None
        dtype = torch.int64 if group.pool_rows >= 2**31 else torch.int32
        width = group.in_features
        first_row = torch.tensor(panels, dtype=torch.int64)[:, None] * width
        return BagPlan(
            x_rows=torch.tensor(rows, dtype=torch.int64),
            a_index=(first_row + torch.arange(width)).to(dtype).flatten(),
            a_offsets=torch.arange(0, len(rows) * width, width, dtype=dtype),
            scale=torch.tensor(scales, dtype=torch.float32)[:, None],
            expands=tuple(expands),
        )

    def _expand(self, site: LoraSite, starts: Mapping[int, int]) -> Expand:
        slots = dict(self.short)
        tokens = range(self.span.start, self.span.stop) if isinstance(self.span, slice) else slots
        index: list[int] = []
        offsets: list[int] = []
        cells: list[int] = []
        for token in tokens:
            offsets.append(len(index))
            if token in slots:
                slot = slots[token]
                rank = site.ranks[slot]
                index += range(slot * site.max_rank, slot * site.max_rank + rank)
                cells += range(starts[token] * PANEL, starts[token] * PANEL + rank)
        return Expand(
            index=torch.tensor(index, dtype=torch.int32),
            offsets=torch.tensor(offsets, dtype=torch.int32),
            cells=torch.tensor(cells, dtype=torch.int64),
        )


def weighted_rows(table: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """[bags, width]: the sum of weights[j] * table[index[j]] over each bag's j, in fp32.

    Bag i has j from offsets[i] up to the next one. Table, weights and result have one dtype.
    """
    mode_sum = 0
    bags: Tensor = torch.embedding_bag(
        table, index, offsets, False, mode_sum, False, weights, False
    )[0]
    return bags


def build_bags(groups: Mapping[int, Sequence[int]]) -> BagMap:
    """Sort `groups` (slot -> its token indices, ascending) into short and long segments."""
    short = [
        (token, slot)
        for slot, tokens in groups.items()
        if len(tokens) < LONG_SEGMENT
        for token in tokens
    ]
    return BagMap(
        short=tuple(sorted(short)),
        segments=tuple(
            Segment(slot, _span(tokens))
            for slot, tokens in groups.items()
            if len(tokens) >= LONG_SEGMENT
        ),
    )


def _span(tokens: Sequence[int]) -> slice | Tensor:
    first, last = tokens[0], tokens[-1]
    if last - first == len(tokens) - 1:
        return slice(first, last + 1)
    return torch.tensor(tokens, dtype=torch.int64)

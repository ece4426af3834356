"""The step map: every token with an adapter is in exactly one tile, or in one segment."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import fill

from lorabatch_kernels import SiteGroup, buffer_ints, build_step_map, tile_bound
from lorabatch_kernels.bags import LONG_SEGMENT, Segment
from lorabatch_kernels.site import PANEL
from lorabatch_kernels.step_map import group_tokens
from lorabatch_kernels.tiles import TileMap, build_tiles

CPU = torch.device("cpu")
# Short runs of one slot, so that lengths differ, in any order.
BATCHES = st.lists(st.tuples(st.integers(-1, 9), st.integers(1, 70)), max_size=14).flatmap(
    lambda runs: st.permutations([slot for slot, count in runs for _ in range(count)])
)
TILES = st.sampled_from((16, 32, 64, 128))


def tiles_of(slots: list[int], tile: int, **options: object) -> TileMap:
    return build_tiles(*group_tokens(slots), CPU, tile=tile, **options)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(slots=BATCHES, tile=TILES, spare=st.integers(0, 5))
def test_each_adapter_token_is_in_one_tile_of_its_slot(slots, tile, spare):
    bound = tile_bound(len(slots), len(set(slots) - {-1}), tile) + spare
    tiles = tiles_of(slots, tile, max_tiles=bound)
    order = tiles.order.tolist()
    assert sorted(order) == list(range(len(slots)))
    seen = []
    for slot, start, length in zip(
        tiles.tile_slot.tolist(), tiles.tile_start.tolist(), tiles.tile_len.tolist(), strict=True
    ):
        assert 0 <= length <= tile
        assert all(slots[token] == slot for token in order[start : start + length])
        seen += order[start : start + length]
    assert sorted(seen) == [token for token, slot in enumerate(slots) if slot >= 0]


@settings(max_examples=40, deadline=None)
@given(slots=BATCHES, tile=TILES)
def test_padding_tiles_come_last_and_are_empty(slots, tile):
    exact = tiles_of(slots, tile)
    assert 0 not in exact.tile_len.tolist()
    padded = tiles_of(slots, tile, max_tiles=exact.tiles + 3)
    assert padded.tile_len.tolist() == [*exact.tile_len.tolist(), 0, 0, 0]
    assert padded.buffer.dtype == torch.int32
    assert padded.buffer.numel() == buffer_ints(len(slots), exact.tiles + 3)


def test_tables_begin_at_multiples_of_16_bytes():
    tiles = tiles_of([3, 3, -1, 0, 3], 16)
    tables = (tiles.order, tiles.tile_slot, tiles.tile_start, tiles.tile_len)
    assert [table.storage_offset() % 4 for table in tables] == [0, 0, 0, 0]
    assert tiles.order.tolist() == [3, 0, 1, 4, 2]
    assert tiles.tile_slot.tolist() == [0, 3]


@settings(max_examples=80, deadline=None)
@given(slots=BATCHES)
def test_each_adapter_token_is_short_or_in_one_segment(slots):
    bags = build_step_map(slots, "cpu").bags
    token = torch.arange(len(slots))
    apart = [(part.slot, token[part.tokens].tolist()) for part in bags.segments]
    seen = [*bags.short, *((t, slot) for slot, tokens in apart for t in tokens)]
    assert sorted(seen) == [(t, slot) for t, slot in enumerate(slots) if slot >= 0]
    counts = Counter(slots)
    assert all(counts[slot] < LONG_SEGMENT for _, slot in bags.short)
    assert all(counts[part.slot] >= LONG_SEGMENT for part in bags.segments)


@settings(max_examples=60, deadline=None)
@given(slots=st.lists(st.integers(-1, 4), min_size=1, max_size=30))
def test_a_plan_names_exactly_the_rows_of_each_short_token(slots):
    bags = build_step_map(slots, "cpu").bags
    if not bags.short:
        return
    ranks = [{0: 1, 1: 17, 3: 40}, {0: 16, 4: 3}]
    group = SiteGroup.allocate(5, 40, 6, [7, 9], torch.float32, "cpu")
    for site, loaded in zip(group.sites, ranks, strict=True):
        fill(site, loaded)
    plan = bags.plan(group)
    cells = [
        (token, number, slot, panel)
        for number, site in enumerate(group.sites)
        for token, slot in bags.short
        for panel in range(-(-site.ranks[slot] // PANEL))
    ]
    if not cells:
        assert plan is None
        return
    assert plan.x_rows.tolist() == [token for token, *_ in cells]
    pool = torch.arange(group.pool_rows).view(2, 5, 3, 6)
    wanted = [row for _, n, slot, panel in cells for row in pool[n, slot, panel].tolist()]
    assert plan.a_index.tolist() == wanted
    assert plan.a_offsets.tolist() == list(range(0, 6 * len(cells), 6))
    for number, (site, expand) in enumerate(zip(group.sites, plan.expands, strict=True)):
        if expand is None:
            assert not any(site.ranks[slot] for _, slot in bags.short)
            continue
        span = bags.span
        tokens = range(span.start, span.stop) if isinstance(span, slice) else span.tolist()
        ends = [*expand.offsets.tolist()[1:], expand.index.numel()]
        for token, start, end in zip(tokens, expand.offsets.tolist(), ends, strict=True):
            slot = dict(bags.short).get(token, -1)
            rank = site.ranks[slot] if slot >= 0 else 0
            assert expand.index[start:end].tolist() == [slot * 40 + r for r in range(rank)]
            first = cells.index((token, number, slot, 0)) * PANEL if rank else 0
            assert expand.cells[start:end].tolist() == list(range(first, first + rank))


def test_plans_are_shared_by_groups_of_the_same_layout_and_no_others():
    bags = build_step_map([0, 1], "cpu").bags
    one, same, other = (SiteGroup.allocate(2, 8, 6, [7], torch.float32, "cpu") for _ in range(3))
    for group, rank in ((one, 3), (same, 3), (other, 4)):
        fill(group.sites[0], {0: rank})
    assert bags.plan(one) is bags.plan(same)
    assert bags.plan(one) is not bags.plan(other)


def test_a_prefill_chunk_is_apart_from_the_decode_tokens():
    bags = build_step_map([*range(6, 37), *[5] * 256], "cpu").bags
    assert bags.span == slice(0, 31)
    assert [(part.slot, part.tokens) for part in bags.segments] == [(5, slice(31, 287))]


def test_a_scattered_long_segment_is_held_as_indices():
    slots = [0, 1] * 100
    slots[10:14] = [2, 3, 4, 5]
    (first, second) = build_step_map([*slots, 6, 7, 8, 9], "cpu").bags.segments
    assert isinstance(first, Segment)
    assert first.tokens.tolist() == [t for t, slot in enumerate(slots) if slot == 0]
    assert second.tokens.tolist() == [t for t, slot in enumerate(slots) if slot == 1]


def test_far_apart_short_tokens_get_no_bags_between_them():
    bags = build_step_map([0, *[-1] * 50, 1], "cpu").bags
    assert bags.span.tolist() == [0, 51]


def test_a_buffer_is_written_in_place():
    slots = [1, -1, 0, 1]
    buffer = torch.full((buffer_ints(4, 3),), -7, dtype=torch.int32)
    tiles = tiles_of(slots, 16, max_tiles=3, buffer=buffer)
    assert tiles.buffer.data_ptr() == buffer.data_ptr()
    assert tiles.order.tolist() == [2, 0, 3, 1]
    assert tiles.tile_len.tolist() == [1, 2, 0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="token 1 has slot -2"):
        build_step_map([0, -2], "cpu")
    with pytest.raises(ValueError, match="tile is 24"):
        build_step_map([0], "cpu", tile=24)
    with pytest.raises(ValueError, match="needs 2 tiles of 16 tokens, max_tiles is 1"):
        tiles_of([0] * 17, 16, max_tiles=1)
    with pytest.raises(ValueError, match=r"buffer is torch.int32 \[3\], wanted torch.int32 \[16\]"):
        tiles_of([0], 16, buffer=torch.zeros(3, dtype=torch.int32))

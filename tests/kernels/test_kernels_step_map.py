"""The step map: every token with an adapter is in exactly one tile, or in one segment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import tiles_of

from lorabatch_kernels import buffer_ints, build_step_map, tile_bound

# Short runs of one slot, so that lengths differ, in any order.
BATCHES = st.lists(st.tuples(st.integers(-1, 9), st.integers(1, 70)), max_size=14).flatmap(
    lambda runs: st.permutations([slot for slot, count in runs for _ in range(count)])
)
TILES = st.sampled_from((16, 32, 64, 128))


@settings(max_examples=80, deadline=None)
@given(slots=BATCHES, tile=TILES, spare=st.integers(0, 5), base_tiles=st.booleans())
def test_each_token_is_in_one_tile_of_its_slot(slots, tile, spare, base_tiles):
    bound = tile_bound(len(slots), len(set(slots) - {-1}), tile) + spare
    tiles = tiles_of(slots, tile, max_tiles=bound, base_tiles=base_tiles)
    order = tiles.order.tolist()
    assert sorted(order) == list(range(len(slots)))
    seen = []
    for slot, start, length in zip(
        tiles.tile_slot.tolist(), tiles.tile_start.tolist(), tiles.tile_len.tolist(), strict=True
    ):
        assert 0 <= length <= tile
        assert all(slots[token] == slot for token in order[start : start + length])
        seen += order[start : start + length]
    assert sorted(seen) == [t for t, slot in enumerate(slots) if slot >= 0 or base_tiles]


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
    assert tiles.tile_slot.tolist() == [0, 3, -1]


def test_a_map_for_a_cpu_has_tiles_of_8_and_none_of_base_tokens():
    step_map = build_step_map([0] * 9 + [-1, 3], "cpu")
    assert step_map.tiles.tile_slot.tolist() == [0, 0, 3]
    assert step_map.tiles.tile_len.tolist() == [8, 1, 1]
    assert step_map.active == (0, 3)


def test_a_buffer_is_written_in_place():
    slots = [1, -1, 0, 1]
    buffer = torch.full((buffer_ints(4, 4),), -7, dtype=torch.int32)
    tiles = tiles_of(slots, 16, max_tiles=4, buffer=buffer)
    assert tiles.buffer.data_ptr() == buffer.data_ptr()
    assert tiles.order.tolist() == [2, 0, 3, 1]
    assert tiles.tile_len.tolist() == [1, 2, 1, 0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="token 1 has slot -2"):
        build_step_map([0, -2], "cpu")
    with pytest.raises(ValueError, match="tile is 24"):
        build_step_map([0], "cpu", tile=24)
    with pytest.raises(ValueError, match="needs 2 tiles of 16 tokens, max_tiles is 1"):
        tiles_of([0] * 17, 16, max_tiles=1)
    with pytest.raises(ValueError, match=r"buffer is torch.int32 \[3\], wanted torch.int32 \[16\]"):
        tiles_of([0], 16, buffer=torch.zeros(3, dtype=torch.int32))

"""The step map: every token with an adapter is in exactly one tile, or at exactly one place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch_kernels import buffer_ints, build_step_map, tile_bound
from lorabatch_kernels.padded import Segment, padded_width
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
def test_each_adapter_token_is_at_one_place_or_in_one_segment(slots):
    padded = build_step_map(slots, "cpu").padded
    token = torch.arange(len(slots))
    batch = token if padded.gather is None else token.index_select(0, padded.gather)
    assert batch.numel() == len(padded.slots) * padded.width
    places = torch.arange(batch.numel()) if padded.places is None else padded.places
    assert batch.index_select(0, places).tolist() == padded.tokens.tolist()
    for row, slot in zip(batch.view(-1, max(padded.width, 1)).tolist(), padded.slots, strict=True):
        assert {slots[token] for token in row} == {slot}
    apart = [(part.slot, token[part.tokens].tolist()) for part in padded.segments]
    assert all(slots[t] == slot for slot, tokens in apart for t in tokens)
    seen = padded.tokens.tolist() + [t for _, tokens in apart for t in tokens]
    assert sorted(seen) == [t for t, slot in enumerate(slots) if slot >= 0]


def test_a_prefill_chunk_does_not_widen_the_decode_tokens():
    slots = [5] * 256 + list(range(6, 37))
    padded = build_step_map(slots, "cpu").padded
    assert padded.width == 1
    assert len(padded.slots) == 31
    assert [(part.slot, part.tokens) for part in padded.segments] == [(5, slice(0, 256))]


def test_a_scattered_long_segment_is_held_as_indices():
    slots = [0, 1] * 100
    slots[10:14] = [2, 3, 4, 5]
    (first, second) = build_step_map([*slots, 6, 7, 8, 9], "cpu").padded.segments
    assert isinstance(first, Segment)
    assert first.tokens.tolist() == [t for t, slot in enumerate(slots) if slot == 0]
    assert second.tokens.tolist() == [t for t, slot in enumerate(slots) if slot == 1]


def test_a_sorted_batch_of_equal_segments_needs_no_gather():
    padded = build_step_map([0, 0, 1, 1, 2, 2, 3, 3], "cpu").padded
    assert (padded.gather, padded.places, padded.width) == (None, None, 2)
    assert build_step_map([0, 0, 1, 1, 2, 2, 3, 3, -1], "cpu").padded.gather is not None


@pytest.mark.parametrize(
    ("lengths", "width"),
    [([], 0), ([1], 0), ([400], 0), ([1] * 32, 1), ([4] * 8, 4), ([256] + [1] * 31, 1)],
)
def test_padded_width(lengths, width):
    assert padded_width(lengths) == width


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

"""Tiles of tokens that share an adapter: the part of a step map that the kernels read.

Shapes and dtypes: all int32. `order` [tokens] lists token indices, tokens of one slot next to each
other in batch order, base tokens last; `tile_slot`, `tile_start`, `tile_len` [tiles] say that tile
i is order[start : start + len] and belongs to adapter slot `tile_slot[i]`. On a GPU base tokens are
in tiles of slot -1 behind the first `adapter_tiles`, for kernels that do more than LoRA; on a CPU
in none. A tile of length 0 is padding. The four are views of one `buffer`, so that a GPU needs one
copy a step; each begins at a multiple of 16 bytes, so that Triton never compiles a second variant
for an odd address.

Raises ValueError for too few tiles or a buffer that does not fit.
Does not cover: grouping tokens by slot (see step_map.py).

Source: the token permutation of vLLM's and SGLang's multi-LoRA kernels; tiles of length 0 instead
of a grid over all slots are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels import native

BASE_SLOT = -1
ALIGN_INTS = 4  # 16 bytes of int32


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def tile_bound(tokens: int, slots: int, tile: int) -> int:
    """The most tiles that `tokens` tokens of the base and at most `slots` adapters can need."""
    return min(tokens, (tokens + min(slots + 1, tokens) * (tile - 1)) // tile)


def buffer_ints(tokens: int, max_tiles: int) -> int:
    """The length in int32 of the buffer that holds the tile map of one step."""
    return round_up(tokens, ALIGN_INTS) + 3 * round_up(max_tiles, ALIGN_INTS)


@dataclass(frozen=True, eq=False)
class TileMap:
    """Which tokens each program of the kernels works on."""

    tile: int
    tokens: int
    tiles: int
    adapter_tiles: int
    buffer: Tensor

    def _view(self, table: int) -> Tensor:
        start = round_up(self.tokens, ALIGN_INTS) + table * round_up(self.tiles, ALIGN_INTS)
        return self.buffer[start : start + self.tiles]

    @property
    def order(self) -> Tensor:
        return self.buffer[: self.tokens]

    @property
    def tile_slot(self) -> Tensor:
        return self._view(0)

    @property
    def tile_start(self) -> Tensor:
        return self._view(1)

    @property
    def tile_len(self) -> Tensor:
        return self._view(2)

    @cached_property
    def struct(self) -> Any:
        """The map as the C kernel reads it."""
        tables = (self.order, self.tile_slot, self.tile_start, self.tile_len)
        return native.Tiles(*(table.data_ptr() for table in tables), self.tiles)


def _cut(groups: Mapping[int, Sequence[int]], tile: int) -> tuple[list[int], list[list[int]]]:
    order: list[int] = []
    slots: list[int] = []
    starts: list[int] = []
    lens: list[int] = []
    for slot, tokens in groups.items():
        for first in range(0, len(tokens), tile):
            slots.append(slot)
            starts.append(len(order) + first)
            lens.append(min(tile, len(tokens) - first))
        order.extend(tokens)
    return order, [slots, starts, lens]


def lay_out_tiles(
    groups: Mapping[int, Sequence[int]],
    base: Sequence[int],
    tile: int,
    max_tiles: int | None = None,
    base_tiles: bool = True,
) -> tuple[list[int], int, int]:
    """Cut `groups` (slot -> its token indices) into tiles, and with `base_tiles` the `base` tokens:
    what a map's buffer is to hold, its number of tiles, and behind how many there are none of an
    adapter (with `max_tiles`, whatever the batch: all)."""
    adapter_tiles = sum(-(-len(tokens) // tile) for tokens in groups.values())
    if base and base_tiles:
        groups, base = {**groups, BASE_SLOT: base}, []
    order, tables = _cut(groups, tile)
    needed = len(tables[0])
    tiles = needed if max_tiles is None else max_tiles
    if needed > tiles:
        raise ValueError(
            f"the batch needs {needed} tiles of {tile} tokens, max_tiles is {tiles}: "
            f"size it with tile_bound(tokens, slots, tile)"
        )
    order.extend(base)
    ints = order + [0] * (round_up(len(order), ALIGN_INTS) - len(order))
    for table in tables:
        ints += table + [0] * (round_up(tiles, ALIGN_INTS) - needed)
    return ints, tiles, adapter_tiles if max_tiles is None else tiles


def to_device(ints: list[int], device: torch.device, buffer: Tensor | None) -> Tensor:
    """One copy; pinned, so that it does not wait for the GPU."""
    on_gpu = device.type == "cuda"
    host = torch.tensor(ints, dtype=torch.int32, pin_memory=on_gpu)
    if buffer is None:
        return host.to(device, non_blocking=True) if on_gpu else host
    if buffer.dtype != torch.int32 or buffer.shape != host.shape:
        raise ValueError(
            f"buffer is {buffer.dtype} {list(buffer.shape)}, wanted torch.int32 "
            f"{list(host.shape)}: size it with buffer_ints(tokens, max_tiles)"
        )
    return buffer.copy_(host, non_blocking=True)

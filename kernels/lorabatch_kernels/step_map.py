"""The step map: which tokens of a step's flat batch belong to which adapter slot.

It is built once a step on the host and shared by all layers and all sites. `slots[t]` is the slot
of token t, or -1 for the base model alone. Slots may come in any order.

`lay_out_step_map` leaves the copy to the device to the caller, who may have more to send.

For CUDA graphs pass `max_tiles` and a `buffer` of `buffer_ints(tokens, max_tiles)` int32 on the
device: shapes and addresses then stay the same from step to step and only contents change. Capture
with at least one adapter token in the map.

Raises ValueError for a slot below -1, a tile that is no power of two from 16 to 128, too few tiles,
or a buffer of the wrong size.
Does not cover: which adapter sits in which slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch_kernels.tiles import BASE_SLOT, TileMap, lay_out_tiles, to_device

TILE_SIZES = (16, 32, 64, 128)
GPU_TILE = 16
CPU_TILE = 8  # TILE in native/lora.c


def tile_for(device: torch.device) -> int:
    """Tokens of a tile, where nothing else is asked for."""
    return CPU_TILE if device.type == "cpu" else GPU_TILE


@dataclass(frozen=True, eq=False)
class StepMap:
    """Tokens of one step by adapter slot; `active` holds the slots in use, ascending. `groups`:
    their tokens, where a map is not for any batch."""

    tokens: int
    device: torch.device
    active: tuple[int, ...]
    tiles: TileMap
    groups: Mapping[int, Sequence[int]]


@dataclass(frozen=True, eq=False)
class HostStepMap:
    """A step map that is not on the device yet: `ints` belong in an int32 tensor there."""

    tokens: int
    active: tuple[int, ...]
    tile: int
    tiles: int
    adapter_tiles: int
    ints: list[int]
    groups: Mapping[int, Sequence[int]]

    def on(self, buffer: Tensor) -> StepMap:
        """The map whose `ints` are, or will be, in this tensor."""
        tiles = TileMap(self.tile, self.tokens, self.tiles, self.adapter_tiles, buffer)
        return StepMap(self.tokens, buffer.device, self.active, tiles, self.groups)


def group_tokens(slots: Sequence[int]) -> tuple[dict[int, list[int]], list[int]]:
    """Token indices by slot (slots ascending, tokens in batch order), and those of the base."""
    groups: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        groups.setdefault(slot, []).append(token)
    base = groups.pop(BASE_SLOT, [])
    ordered = {slot: groups[slot] for slot in sorted(groups)}
    if ordered and next(iter(ordered)) < BASE_SLOT:
        slot = next(iter(ordered))
        raise ValueError(f"token {ordered[slot][0]} has slot {slot}, wanted -1 (base) or above")
    return ordered, base


def lay_out_step_map(
    slots: Sequence[int],
    device: torch.device | str,
    *,
    tile: int = GPU_TILE,
    max_tiles: int | None = None,
) -> HostStepMap:
    """Map one step's tokens. `tile` and `max_tiles` are for a GPU; a CPU's tile is 8."""
    if tile not in TILE_SIZES:
        raise ValueError(f"tile is {tile}, wanted one of {TILE_SIZES}")
    groups, base = group_tokens(slots)
    on_cpu = torch.device(device).type == "cpu"
    tile = CPU_TILE if on_cpu else tile
    ints, tiles, adapter_tiles = lay_out_tiles(groups, base, tile, max_tiles, not on_cpu)
    return HostStepMap(len(slots), tuple(groups), tile, tiles, adapter_tiles, ints, groups)


def build_step_map(
    slots: Sequence[int],
    device: torch.device | str,
    *,
    tile: int = GPU_TILE,
    max_tiles: int | None = None,
    buffer: Tensor | None = None,
) -> StepMap:
    """`lay_out_step_map`, on the device."""
    host = lay_out_step_map(slots, device, tile=tile, max_tiles=max_tiles)
    return host.on(to_device(host.ints, torch.device(device), buffer))

"""Which adapter is in which device slot. A slot is free to be taken when no running sequence
uses it; the least recently used one goes first. Used from the engine's thread alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorabatch_kernels import LoraSite
from lorabatch_worker.adapters.weights import Adapter

if TYPE_CHECKING:
    from lorabatch_worker.sequence import Sequence

__all__ = ["AdapterSlots"]


class AdapterSlots:
    """A fixed number of places for adapters on the device."""

    def __init__(self, sites: Mapping[str, LoraSite], count: int) -> None:
        self._sites = sites
        self._users = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._resident: OrderedDict[str, int] = OrderedDict()  # version -> slot, oldest use first
        self.loads = 0

    @property
    def resident(self) -> int:
        return len(self._resident)

    def is_resident(self, adapter: Adapter | None) -> bool:
        return adapter is None or adapter.version in self._resident

    def acquire(self, sequence: Sequence) -> bool:
        """Give the sequence its adapter's slot, loading it if need be. False: all in use."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        slot = self._resident.get(adapter.version)
        if slot is None:
            slot = self._take_slot()
            if slot is None:
                return False
            self._load(adapter, slot)
            self._resident[adapter.version] = slot
        self._resident.move_to_end(adapter.version)
        self._users[slot] += 1
        sequence.slot = slot
        return True

    def release(self, slot: int) -> None:
        """A sequence of this slot has ended; the adapter stays until the slot is needed."""
        if slot >= 0:
            self._users[slot] -= 1

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        for version, slot in self._resident.items():
            if self._users[slot] == 0:
                del self._resident[version]
                return slot
        return None

    def _load(self, adapter: Adapter, slot: int) -> None:
        self.loads += 1
        for name, site in self._sites.items():
            weights = adapter.sites.get(name)
            if weights is not None:
                site.load(slot, weights.a, weights.b, weights.scale)
            elif site.ranks[slot]:
                site.clear(slot)

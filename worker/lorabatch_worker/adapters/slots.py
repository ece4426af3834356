"""Which adapter is in which device slot, and in which rows of the pool of rank rows.

A slot is free to be taken when no running sequence uses it; the least recently used one goes
first. On a CPU every slot has rows of its own. Used from the engine's thread alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabatch_kernels import LoraSite
from lorabatch_worker.adapters.rank_rows import RankRows, Rows
from lorabatch_worker.adapters.weights import Adapter

if TYPE_CHECKING:
    from lorabatch_worker.sequence import Sequence

__all__ = ["AdapterSlots"]


@dataclass(eq=False)
class _Resident:
    version: str
    slot: int
    rows: Rows | None
    users: int = 0


class AdapterSlots:
    """A number of places for adapters on the device, and `pool_rows` rank rows for all of them
    together; None: each place has its own."""

    def __init__(
        self, sites: Mapping[str, LoraSite], count: int, pool_rows: int | None = None
    ) -> None:
        self._sites = sites
        self._free = list(range(count - 1, -1, -1))
        self._pool = None if pool_rows is None else RankRows(pool_rows)
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # oldest use first
        self._by_slot: dict[int, _Resident] = {}
        self.loads = 0

    @property
    def resident(self) -> int:
        return len(self._resident)

    @property
    def users(self) -> int:
        """Running sequences with an adapter."""
        return sum(one.users for one in self._resident.values())

    def is_resident(self, adapter: Adapter | None) -> bool:
        return adapter is None or adapter.version in self._resident

    def acquire(self, sequence: Sequence) -> bool:
        """Give the sequence its adapter's slot, loading it if need be. False: no room beside those
        in use."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        resident = self._resident.get(adapter.version)
        if resident is None:
            if frozenset() not in self.ways_in(adapter):
                return False
            resident = self._make_room(adapter)
            self._load(adapter, resident)
        self._resident.move_to_end(adapter.version)
        resident.users += 1
        sequence.slot = resident.slot
        return True

    def release(self, slot: int) -> None:
        """A sequence of this slot has ended; the adapter stays until its place is needed."""
        if slot >= 0:
            self._by_slot[slot].users -= 1

    def ways_in(self, adapter: Adapter) -> list[frozenset[str]]:
        """Versions in use that would have to go for this adapter to fit, each way to do it; of
        nobody, if it fits beside those in use."""
        used = [one for one in self._resident.values() if one.users]
        slot_free = bool(self._free) or len(used) < len(self._resident)
        if self._pool is None:
            return [frozenset()] if slot_free else [frozenset([one.version]) for one in used]
        ways = self._ways_into(self._pool, used, adapter.rank)
        if slot_free:
            return ways
        return [way or frozenset([one.version]) for way in ways for one in used]

    @staticmethod
    def _ways_into(pool: RankRows, used: list[_Resident], rank: int) -> list[frozenset[str]]:
        """By where its rows could begin: at the pool's begin, or behind somebody's."""
        placed = [(one.version, one.rows) for one in used if one.rows is not None]
        starts = [0, *(rows.stop for _, rows in placed), *(rows.start - rank for _, rows in placed)]
        return [
            frozenset(v for v, rows in placed if rows.start < start + rank and rows.stop > start)
            for start in starts
            if 0 <= start <= pool.count - rank
        ]

    def _make_room(self, adapter: Adapter) -> _Resident:
        """A place for an adapter that fits beside those in use."""
        unused = [one for one in self._resident.values() if not one.users]
        while True:
            rows = self._pool.take(adapter.rank) if self._pool and self._free else None
            if self._free and (rows is not None or self._pool is None):
                made = _Resident(adapter.version, self._free.pop(), rows)
                self._resident[adapter.version] = self._by_slot[made.slot] = made
                return made
            self._evict(unused.pop(0))

    def _evict(self, resident: _Resident) -> None:
        del self._resident[resident.version], self._by_slot[resident.slot]
        self._free.append(resident.slot)
        if self._pool is not None and resident.rows is not None:
            self._pool.give_back(resident.rows)

    def _load(self, adapter: Adapter, resident: _Resident) -> None:
        self.loads += 1
        start = None if resident.rows is None else resident.rows.start
        for name, site in self._sites.items():
            weights = adapter.sites.get(name)
            if weights is not None:
                site.load(resident.slot, weights.a, weights.b, weights.scale, start)
            elif site.ranks[resident.slot]:
                site.clear(resident.slot)

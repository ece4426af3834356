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
from lorabatch_worker.adapters.rank_rows import NO_ROWS, RankRows, Rows, gaps
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.memory import out_of_memory

if TYPE_CHECKING:
    from lorabatch_worker.ends import ChangedEnds
    from lorabatch_worker.sequence import Sequence

__all__ = ["AdapterSlots"]


@dataclass(eq=False)
class _Resident:
    slot: int
    rows: Rows
    users: int = 0


class AdapterSlots:
    """A number of places for adapters on the device, and `pool_rows` rank rows for all of them
    together; None: each place has its own."""

    def __init__(
        self,
        sites: Mapping[str, LoraSite],
        count: int,
        pool_rows: int | None = None,
        ends: ChangedEnds | None = None,
    ) -> None:
        self._sites = sites
        self._ends = ends
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
        return adapter is None or self.has(adapter.version)

    def has(self, version: str) -> bool:
        """From any thread."""
        return version in self._resident

    def acquire(self, sequence: Sequence) -> bool:
        """Give the sequence its adapter's slot, loading it if need be. False: no room beside those
        in use. What stops the loading is raised and leaves nothing; too little memory does so only
        when no adapter holds any that nobody uses."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        resident = self._resident.get(adapter.version)
        if resident is None:
            if not self._fits(adapter.rank_rows):
                return False
            resident = self._make_room(adapter)
            self._resident[adapter.version] = self._by_slot[resident.slot] = resident
            try:
                self._load(adapter, resident)
            except Exception as error:
                self._evict(adapter.version)
                if out_of_memory(error) and self._drop_idle_ends():
                    return self.acquire(sequence)
                raise
        self._resident.move_to_end(adapter.version)
        resident.users += 1
        sequence.slot = resident.slot
        return True

    def release(self, slot: int) -> None:
        """A sequence of this slot has ended; the adapter stays until its place is needed."""
        if slot >= 0:
            self._by_slot[slot].users -= 1

    def ways_in(self, adapter: Adapter) -> list[frozenset[str]]:
        """For an adapter that does not fit: versions that would make room for it if nobody used
        them, each way to do it."""
        if self._free or not all(one.users for one in self._resident.values()):
            return self._windows(adapter.rank_rows)
        alone = [frozenset([version]) for version in self._resident]
        if self._pool is None:
            return alone
        return [way or one for way in self._windows(adapter.rank_rows) for one in alone]

    def _fits(self, rank: int) -> bool:
        """Whether there is room beside those in use."""
        used = [one for one in self._resident.values() if one.users]
        if not self._free and len(used) == len(self._resident):
            return False
        if self._pool is None:
            return True
        taken = sorted((one.rows for one in used), key=lambda rows: rows.start)
        return any(len(gap) >= rank for gap in gaps(taken, self._pool.count))

    def _windows(self, rank: int) -> list[frozenset[str]]:
        """Whose rows would be in the way, by where they could begin: first of all, or behind
        somebody's."""
        if self._pool is None:
            return [frozenset()]
        placed = [(version, one.rows) for version, one in self._resident.items()]
        return [
            frozenset(v for v, rows in placed if rows.start < start + rank and rows.stop > start)
            for start in (0, *(rows.stop for _, rows in placed))
            if start <= self._pool.count - rank
        ]

    def _make_room(self, adapter: Adapter) -> _Resident:
        """A place for an adapter that fits beside those in use, where what goes was used longest
        ago."""
        used = {version for version, one in self._resident.items() if one.users}
        age = {version: number for number, version in enumerate(self._resident)}
        idle = [way for way in self._windows(adapter.rank_rows) if not way & used]
        for version in min(idle, key=lambda way: max((age[v] for v in way), default=-1)):
            self._evict(version)
        if not self._free:
            self._evict(next(v for v in self._resident if v not in used))
        rows = NO_ROWS if self._pool is None else self._pool.take(adapter.rank_rows)
        assert rows is not None
        return _Resident(self._free.pop(), rows)

    def _drop_idle_ends(self) -> bool:
        """Evict the adapters that have memory of their own and no user; False: there are none."""
        ends = self._ends
        if ends is None:
            return False
        idle = [v for v, one in self._resident.items() if not one.users and ends.changes(one.slot)]
        for version in idle:
            self._evict(version)
        return bool(idle)

    def _evict(self, version: str) -> None:
        gone = self._resident.pop(version)
        del self._by_slot[gone.slot]
        self._free.append(gone.slot)
        if self._ends is not None:
            self._ends.drop(gone.slot)
        if self._pool is not None:
            self._pool.give_back(gone.rows)

    def _load(self, adapter: Adapter, resident: _Resident) -> None:
        self.loads += 1
        start = None if self._pool is None else resident.rows.start
        if self._ends is not None:
            self._ends.load(resident.slot, adapter.vocabulary)
        for name, site in self._sites.items():
            weights = adapter.sites.get(name)
            if weights is not None:
                site.put(resident.slot, weights, start)
            elif site.changes(resident.slot):
                site.clear(resident.slot)

"""Where an adapter is by now: "device", "memory", "disk" (where fetched ones go) or "nowhere".

For people who ask, from any thread: nothing is loaded, nobody is asked, and no adapter's source is
looked at, which may be on a network: a folder that changed is in memory until it is read anew. The
disk cache's own folder is looked at. Raises nothing.
"""

from __future__ import annotations

from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.adapters.store import AdapterStore
from lorabatch_worker.adapters.wanted import Wanted

__all__ = ["place_of"]


def place_of(wanted: Wanted, slots: AdapterSlots, store: AdapterStore) -> str:
    """The nearest one."""
    known = store.held(wanted)
    version = wanted.version if known is None else known.version
    if version is not None and slots.has(version):
        return "device"
    if known is not None:
        return "memory"
    return "disk" if store.catalog.was_fetched(wanted) else "nowhere"

"""Where an adapter is: what a worker says when it is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorabatch import Settings
from lorabatch_kernels import LoraSite
from lorabatch_worker.adapters import host_cache
from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.place import place_of
from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.adapters.store import AdapterStore
from lorabatch_worker.adapters.wanted import Wanted
from tests.bad_adapters import TARGET, write
from tests.desk import Desk, job

NO_SITES: dict[str, LoraSite] = {}


def test_from_nowhere_to_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = home / "source"
    write(source)
    store = AdapterStore(AdapterCatalog(Settings.load(home=home)), TARGET, 1 << 30)
    slots = AdapterSlots(NO_SITES, 1)

    def fill(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    version, _ = store.catalog._disk.put(None, fill, "key")
    assert place_of(Wanted("acme", "mine", version), slots, store) == "disk"
    assert place_of(Wanted("acme", "mine", "0" * 64), slots, store) == "nowhere"
    write(home / "adapters" / "here")
    here = Wanted("acme", "here")
    assert place_of(here, slots, store) == "nowhere"
    store.request(here).result(30)
    assert place_of(here, slots, store) == "memory"
    monkeypatch.setattr(
        host_cache, "signature_of", lambda folder: pytest.fail(f"looked at {folder}")
    )
    assert place_of(here, slots, store) == "memory", "its folder may be on a network"
    store.close()


def test_on_the_device(own: Desk, tiny_adapters: dict[str, Path]) -> None:
    name = next(iter(tiny_adapters))
    result = own.run(job("j", adapter=name))["j"]
    assert own.engine.place(Wanted("default", name)) == "device"
    assert own.engine.place(Wanted("default", "any name", result.adapter_version)) == "device"
    assert own.engine.place(Wanted("default", "nobody")) == "nowhere"

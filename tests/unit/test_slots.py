"""Adapter slots: least recently used goes, one in use never does, nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lorabatch import Job
from lorabatch_kernels import LoraSite, LoraWeights, SiteGroup
from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.sequence import Sequence
from tests.models import claim

SITES = ("q", "v", "up")
WIDTH = 6


def site(*sizes: Any) -> LoraSite:
    """Of (slots, max_rank, then as SiteGroup's)."""
    slots, max_rank, *rest = sizes
    group = SiteGroup.allocate(slots, max_rank, WIDTH, [WIDTH], torch.float32, "cpu", *rest)
    return group.sites[0]


@pytest.fixture
def sites() -> dict[str, LoraSite]:
    return {n: site(2, 4) for n in SITES}


def adapter(name: str, ranks: Mapping[str, int]) -> Adapter:
    torch.manual_seed(len(name))
    weights = {
        site: LoraWeights.pack(torch.randn(rank, WIDTH), torch.randn(WIDTH, rank), 0.5 * rank)
        for site, rank in ranks.items()
    }
    return Adapter(name, f"version-{name}", weights, None)


def sequence(of: Adapter | None) -> Sequence:
    return Sequence(claim(Job(prompt="-")), [1], of)


def use(slots: AdapterSlots, of: Adapter) -> int:
    """Acquire and release at once: the slot."""
    user = sequence(of)
    assert slots.acquire(user)
    slots.release(user.slot)
    return user.slot


def test_the_base_model_needs_no_slot(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 2)
    user = sequence(None)
    assert slots.acquire(user)
    assert (user.slot, slots.resident, slots.loads) == (-1, 0, 0)
    assert slots.is_resident(None)


def test_an_adapter_is_loaded_once_and_shared(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 2)
    a = adapter("a", {"q": 2})
    one, other = sequence(a), sequence(a)
    assert slots.acquire(one)
    assert slots.acquire(other)
    assert (one.slot == other.slot, slots.loads, slots.resident) == (True, 1, 1)
    assert slots.is_resident(a)


def test_the_least_recently_used_goes(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 2)
    a, b, c = (adapter(n, {"q": 1}) for n in "abc")
    place = {n.adapter_id: use(slots, n) for n in (a, b)}
    use(slots, a)
    assert use(slots, c) == place["b"]
    assert [slots.is_resident(x) for x in (a, b, c)] == [True, False, True]
    assert slots.loads == 3


def test_one_in_use_is_never_taken(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 2)
    a, b, c = (adapter(n, {"q": 1}) for n in "abc")
    users = [sequence(a), sequence(a), sequence(b)]
    assert all(slots.acquire(u) for u in users)
    waiting = sequence(c)
    assert not slots.acquire(waiting)
    assert waiting.slot == -1
    slots.release(users[0].slot)
    assert not slots.acquire(waiting)
    slots.release(users[1].slot)
    assert slots.acquire(waiting)
    assert waiting.slot == users[0].slot
    assert torch.equal(sites["q"].rows(users[2].slot)[0], b.sites["q"].a)


@pytest.mark.parametrize("pool_rows", [None, 6])
def test_one_that_cannot_be_loaded_leaves_its_place(
    pool_rows: int | None, sites: dict[str, LoraSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    if pool_rows is not None:
        sites = {n: site(1, 4, pool_rows, False) for n in SITES}
    slots = AdapterSlots(sites, 1, pool_rows)
    fits, large = adapter("fits", {"q": 4}), adapter("large", {"q": 4})
    kind = type(sites["q"])
    put = kind.put

    def no_room(self: Any, slot: int, weights: Any, *rest: Any) -> None:
        if weights is large.sites["q"]:
            raise MemoryError
        put(self, slot, weights, *rest)

    monkeypatch.setattr(kind, "put", no_room)
    for user in (sequence(large), sequence(large)):
        with pytest.raises(MemoryError):
            slots.acquire(user)
        assert (user.slot, slots.resident, slots.users) == (-1, 0, 0)
    assert use(slots, fits) == 0


def test_a_smaller_adapter_leaves_nothing_of_a_bigger_one(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 1)
    use(slots, adapter("big", {"q": 4, "v": 4, "up": 2}))
    small = adapter("small", {"q": 1})
    slot = use(slots, small)
    site = sites["q"]
    assert (site.ranks[slot], site.scales[slot]) == (1, 0.5)
    assert torch.equal(site.rows(slot)[0], small.sites["q"].a)
    assert torch.equal(site.rows(slot)[1], small.sites["q"].b.t())
    for name in ("v", "up"):
        assert not sites[name].changes(slot)
        assert not len(sites[name].rows(slot)[0])


def test_a_new_version_of_the_same_name_is_another_adapter(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 2)
    old = adapter("a", {"q": 1})
    new = Adapter("a", "another version", adapter("aa", {"q": 1}).sites, None)
    running = sequence(old)
    assert slots.acquire(running)
    assert use(slots, new) != running.slot
    assert torch.equal(sites["q"].rows(running.slot)[0], old.sites["q"].a)


def test_the_same_files_under_two_names_share_a_slot(sites: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(sites, 2)
    a = adapter("a", {"q": 1})
    assert use(slots, a) == use(slots, Adapter("alias", a.version, a.sites, None))
    assert slots.loads == 1


def test_adapter_tells_size_and_rank() -> None:
    a = adapter("a", {"q": 3, "v": 1})
    assert a.rank_rows == 3
    assert a.nbytes == (3 + 1) * 2 * WIDTH * 4


POOL_ROWS = 8


@pytest.fixture
def pool() -> dict[str, LoraSite]:
    """Sites as a GPU has them: four slots, eight rank rows together."""
    return {n: site(4, 4, POOL_ROWS, False) for n in SITES}


def test_a_pool_holds_as_many_adapters_as_their_ranks_allow(pool: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(pool, 4, POOL_ROWS)
    adapters = [adapter(n, {"q": 2, "v": 1 + i % 2}) for i, n in enumerate(["a", "bb", "ccc"])]
    users = [sequence(one) for one in adapters]
    assert all(slots.acquire(user) for user in users)
    big = sequence(adapter("dddd", {"up": 4}))
    assert not slots.acquire(big)
    assert slots.acquire(sequence(adapter("small", {"q": 2})))
    for user, one in zip(users, adapters, strict=True):
        for name, weights in one.sites.items():
            assert torch.equal(pool[name].rows(user.slot)[0], weights.a)
        assert pool["up"].ranks[user.slot] == 0


def test_nobody_is_put_out_for_an_adapter_that_does_not_fit_all_the_same(
    pool: dict[str, LoraSite],
) -> None:
    slots = AdapterSlots(pool, 4, POOL_ROWS)
    keeps, idle, late = (adapter(n, {"q": 3}) for n in ("a", "bb", "ccc"))
    use(slots, idle)
    running = sequence(keeps)
    assert slots.acquire(running)  # in the middle: 3 rows before it, 2 behind
    assert not slots.acquire(sequence(adapter("dddd", {"q": 4})))
    assert slots.is_resident(idle)
    assert use(slots, late) >= 0
    assert not slots.is_resident(idle)
    slots.release(running.slot)
    assert use(slots, adapter("dddd", {"q": 4})) >= 0


def test_ways_in_name_whom_nobody_may_use(pool: dict[str, LoraSite]) -> None:
    slots = AdapterSlots(pool, 4, POOL_ROWS)
    users = [sequence(adapter(n, {"q": 2})) for n in ("a", "bb", "ccc")]
    assert all(slots.acquire(user) for user in users)
    slots.release(users[1].slot)
    assert set(slots.ways_in(adapter("dddd", {"q": 4}))) == {
        frozenset({"version-a", "version-bb"}),
        frozenset({"version-bb", "version-ccc"}),
        frozenset({"version-ccc"}),
    }
    assert slots.acquire(sequence(adapter("bb", {"q": 2})))
    fourth = sequence(adapter("small", {"q": 2}))
    assert slots.acquire(fourth)
    everybody = {frozenset({u.adapter_version}) for u in [*users, fourth]}
    assert set(slots.ways_in(adapter("e" * 6, {"q": 1}))) == everybody


def test_what_goes_lies_together_and_was_used_longest_ago() -> None:
    slots = AdapterSlots({}, 16, 32)
    dice = random.Random(2)
    small = [adapter("x" * (i + 1), {"q": 2}) for i in range(16)]
    for one in dice.sample(small, 16):
        use(slots, one)
    use(slots, adapter("large", {"q": 8}))
    assert slots.resident == 13
    assert slots.is_resident(adapter("large", {"q": 8}))


def test_a_pool_never_gives_rows_twice(pool: dict[str, LoraSite]) -> None:
    dice = random.Random(1)
    slots = AdapterSlots(pool, 4, POOL_ROWS)
    adapters = [adapter("x" * (i + 1), {"q": 1 + i % 4, "up": 1 + i % 3}) for i in range(9)]
    running: list[Sequence] = []
    for _ in range(600):
        user = sequence(dice.choice(adapters))
        if slots.acquire(user):
            running.append(user)
        else:
            assert running
        if dice.random() < 0.6 and running:
            slots.release(running.pop(dice.randrange(len(running))).slot)
        for one in running:
            assert one.adapter is not None
            for name, weights in one.adapter.sites.items():
                assert torch.equal(pool[name].rows(one.slot)[0], weights.a)
                assert torch.equal(pool[name].rows(one.slot)[1], weights.b.t())
    assert slots.loads > 50

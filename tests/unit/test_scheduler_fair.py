"""Shares of tenants in the scheduler: floods, weights, adapters that need a slot, one tenant alone.

Steps are played without a model, each of them 10 ms on a clock that moves when told to.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch_worker.scheduler import Scheduler
from lorabatch_worker.sequence import Sequence
from tests.scheduling import play, run, scheduler, sequence

NEVER_S = 1e9  # as an age cap


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when told to."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


class Load:
    """A scheduler, its clock, and jobs of tenants that are told by their ids: `tenant-number`."""

    def __init__(self, s: Scheduler, clock: SimpleNamespace) -> None:
        self.s, self.clock = s, clock
        self.serial = 0
        self.begun_s: dict[str, float] = {}

    def submit(
        self, tenant: str, count: int = 1, new: int = 8, name: str | None = None, prompt: int = 3
    ) -> list[Sequence]:
        made = []
        for _ in range(count):
            self.serial += 1
            made.append(sequence(f"{tenant}-{self.serial}", prompt, new, name, 0, tenant))
            self.s.add(made[-1])
        return made

    def keep_waiting(self, tenant: str, name: str | None = None, new: int = 8) -> None:
        waiting = sum(s.claim.job.tenant == tenant for s in self.s.waiting.values())
        self.submit(tenant, max(0, 2 * self.s.max_seqs - waiting), new, name)

    def step(self) -> list[Sequence]:
        self.clock.s += 0.01
        chunks, admitted = self.s.plan()
        self.begun_s |= {a.job_id: self.clock.s for a in admitted}
        return play(self.s, chunks)

    def places(self, tenant: str) -> int:
        return sum(s.claim.job.tenant == tenant for s in self.s.running.values())

    def served(self, tenant: str) -> int:
        return self.s.fair_share.served().get(tenant, 0)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("waited_s", [0.0, 100.0])
def test_ten_jobs_behind_three_thousand_get_their_share_at_once(
    clock: SimpleNamespace, waited_s: float
) -> None:
    """Also where everything of the other tenant is older than the age cap."""
    load = Load(scheduler(max_seqs=8, blocks=200), clock)
    load.submit("many", 3000)
    for _ in range(50):
        load.step()
    clock.s += waited_s
    assert load.places("many") == 8
    mine = load.submit("few", 10)
    begin, before = clock.s, load.served("many")
    while any(one.finish_reason is None for one in mine):
        load.step()
    # With half of the places ten jobs of eight steps take three turns, the first of which waits
    # for the jobs that run. Behind all others they would take three thousand steps.
    assert clock.s - begin <= 0.01 * 4 * 9
    assert load.served("many") - before <= 2 * load.served("few") + 8 * 11


@pytest.mark.usefixtures("layout")
def test_tenants_that_come_together_share_the_places_from_the_first_step(
    clock: SimpleNamespace,
) -> None:
    load = Load(scheduler(max_seqs=8, step_tokens=64, blocks=200, quantum=11), clock)
    load.submit("many", 100)
    load.submit("few", 4)
    load.step()
    assert (load.places("many"), load.places("few")) == (4, 4)


@pytest.mark.usefixtures("layout")
def test_a_weight_of_three_gets_three_times_the_tokens(clock: SimpleNamespace) -> None:
    load = Load(scheduler(max_seqs=8, blocks=200, weights={"heavy": 3.0}), clock)
    for _ in range(1500):
        load.keep_waiting("heavy")
        load.keep_waiting("light", new=20)
        load.step()
    assert load.served("heavy") / load.served("light") == pytest.approx(3, rel=0.05)


def test_who_was_alone_is_owed_nothing_and_owes_nothing(clock: SimpleNamespace) -> None:
    load = Load(scheduler(max_seqs=8, blocks=200), clock)
    for _ in range(1000):
        load.keep_waiting("alone")
        load.step()
    alone = load.served("alone")
    for _ in range(500):
        load.keep_waiting("alone")
        load.keep_waiting("late")
        load.step()
    assert alone > 2 * load.served("late")
    assert load.served("late") == pytest.approx(load.served("alone") - alone, rel=0.05)


def test_three_tenants_get_a_third_each_whatever_their_jobs(clock: SimpleNamespace) -> None:
    load = Load(scheduler(max_seqs=8, blocks=200, step_tokens=32), clock)
    for _ in range(1500):
        load.keep_waiting("short", new=2)
        load.keep_waiting("long", new=40)
        load.keep_waiting("adapted", "a")
        load.step()
    shares = [load.served(tenant) for tenant in ("short", "long", "adapted")]
    assert max(shares) - min(shares) <= 32 + 43 + 8 * 43
    assert min(shares) > 2500


def test_priority_goes_before_shares(clock: SimpleNamespace) -> None:
    load = Load(scheduler(max_seqs=1, age_cap_s=NEVER_S), clock)
    for number, (tenant, priority) in enumerate([("a", 0), ("a", 1), ("b", 0), ("a", 1), ("b", 1)]):
        load.s.add(sequence(f"{tenant}{number}", priority=priority, tenant=tenant, new=30))
    assert run(load.s) == ["a1", "b4", "a3", "a0", "b2"]


@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 9),
            st.integers(1, 9),
            st.sampled_from(["a", "b", "b", None]),
            st.integers(-1, 1),
            st.booleans(),
        ),
        max_size=30,
    ),
    blocks=st.integers(5, 30),
)
@settings(max_examples=100, deadline=None)
def test_a_tenant_alone_is_served_as_if_there_were_no_shares(
    jobs: list[tuple[int, int, str | None, int, bool]], blocks: int
) -> None:
    """In the order by priority, age cap, residency and age, and no other."""
    orders = []
    for plain in (False, True):
        s: Any = scheduler(max_seqs=3, slots=1, blocks=blocks, age_cap_s=1e6)
        if plain:
            s.fair_share.in_turn = iter
            s._had_a_turn = lambda old: frozenset()
        for number, (prompt, new, name, priority, aged) in enumerate(jobs):
            one = sequence(f"j{number}", prompt, new, name, priority)
            one.waiting_since_s = number - (2e6 if aged else 0) + time.monotonic()
            s.add(one)
        orders.append(run(s))
    assert orders[0] == orders[1]


def test_tenants_in_balance_change_adapters_no_more_often_than_the_age_cap(
    clock: SimpleNamespace,
) -> None:
    """One slot, two tenants with an adapter each, and everything that waits is old."""
    load = Load(scheduler(max_seqs=8, slots=1, blocks=200, age_cap_s=2.0), clock)
    running = 0
    for _ in range(4000):
        load.keep_waiting("a", "of a")
        load.keep_waiting("b", "of b")
        load.step()
        running += len(load.s.running)
    assert load.s.slots.loads <= 40 / 2.0 + 1
    assert running / 4000 > 0.8 * 8
    assert 0.8 < load.served("a") / load.served("b") < 1.25


def test_a_turn_lasts_a_quantum_where_nobody_holds_the_slot(clock: SimpleNamespace) -> None:
    """One job at a time, so that the slot is free after each: rounds say whose turn it is, and the
    quantum how many loads that takes."""
    loads = {}
    for quantum in (20, 200):
        load = Load(scheduler(max_seqs=1, slots=1, age_cap_s=NEVER_S, quantum=quantum), clock)
        load.submit("a", 100, new=7, name="of a")
        load.submit("b", 100, new=7, name="of b")
        assert len(run(load.s)) == 200
        loads[quantum] = load.s.slots.loads
    # The adapter that is there goes first in the next round, too: two quanta of it in a row.
    assert loads == {20: 1 + 200 // 4, 200: 1 + 200 // 40}


def test_a_job_that_needs_a_slot_that_is_never_free_gets_it(clock: SimpleNamespace) -> None:
    """Two tenants could keep both slots for ever; every one of eight others gets its turn."""
    load = Load(scheduler(max_seqs=8, slots=2, blocks=200, age_cap_s=2.0), clock)
    rare: dict[str, float] = {}
    for step in range(6000):
        for tenant in ("x0", "x1"):
            load.keep_waiting(tenant, f"of {tenant}", new=20)
        if step % 100 == 0:
            tenant = f"y{step // 100 % 8}"
            (one,) = load.submit(tenant, name=f"of {tenant}")
            rare[one.job_id] = clock.s
        load.step()
    late = {j for j, s in rare.items() if s < clock.s - 5}
    assert late <= set(load.begun_s)
    assert max(load.begun_s[j] - rare[j] for j in late) < 2.0 + 1.0  # the cap, and a few jobs


def test_new_tenants_without_end_keep_nobody_from_a_slot(clock: SimpleNamespace) -> None:
    """Each of them has one job, of the adapter that is there, and is owed as much as the one that
    waits; but it is younger."""
    load = Load(scheduler(max_seqs=2, slots=1, blocks=200, age_cap_s=2.0), clock)
    load.submit("fresh", name="there")
    load.step()
    (one,) = load.submit("waits", name="elsewhere")
    begin = clock.s
    while one.job_id not in load.begun_s:
        for _ in range(2):
            load.submit(f"fresh{load.serial}", name="there")
        load.step()
        assert clock.s - begin < 2.0 + 0.5


def test_a_big_old_job_gets_its_blocks_among_other_tenants(clock: SimpleNamespace) -> None:
    load = Load(scheduler(max_seqs=4, blocks=8, step_tokens=64), clock)
    load.submit("small", 4, new=5)
    load.step()
    (big,) = load.submit("big", new=12, prompt=20)
    begin = clock.s
    while big.job_id not in load.begun_s:
        load.keep_waiting("small", new=5)
        load.step()
        assert clock.s - begin < 5.0 + 0.5


@pytest.mark.usefixtures("layout")
def test_who_loses_its_blocks_is_charged_once() -> None:
    s = scheduler(blocks=6, step_tokens=64)
    for tenant in "ab":
        s.add(sequence(tenant, 8, new=12, tenant=tenant))
    run(s)
    assert s.preemptions > 0
    assert s.fair_share.served() == {"a": 20, "b": 20}

"""What a tenant is charged for, what is shown of it, and for how long it is remembered."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from lorabatch_worker import fair_share
from lorabatch_worker.fair_share import FairShare
from tests.scheduling import sequence
from tests.shares import Machine, drained, together


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when told to."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


def test_a_round_follows_the_order_it_is_given() -> None:
    """What comes first there (an adapter that is resident, an old job) goes first within a round
    and not beyond it."""
    machine = Machine(99, quantum=30)
    for tenant in "aaaaaabbb":
        machine.submit(tenant, 5, 5, 5)
    assert "".join(machine.begin()) == "aaabbbaaa"


def test_a_job_is_charged_what_it_took_and_once() -> None:
    fair = FairShare(30)
    one = sequence("j", prompt=10, new=20, tenant="t")
    fair.waits(one)
    fair.lift()
    one.cached_tokens = one.computed = 4
    fair.begins(one)
    assert fair.served() == {"t": 0}
    one.computed, one.output = 10, [7]
    assert fair.served() == {"t": 7}
    fair.leaves(one)  # it loses its place
    one.computed = 0
    fair.waits(one)
    assert fair.served() == {"t": 7}
    fair.begins(one)
    assert fair._here[0, "t"].reserved_tokens == 30 - 4 - 7
    one.computed, one.output = 12, [7, 7, 7]
    fair.leaves(one)
    assert fair.served() == {"t": 9}


def test_one_that_lost_its_place_in_its_prompt_is_charged_as_far_as_it_got() -> None:
    fair = FairShare(30)
    one = sequence("j", prompt=10, new=5, tenant="t")
    for computed, served in [(6, 6), (3, 6), (8, 8)]:
        fair.waits(one)
        fair.begins(one)
        one.computed = computed
        fair.leaves(one)
        one.computed = 0
        assert fair.served() == {"t": served}


def tick(fair: FairShare, tenant: str, tokens: int) -> None:
    """A job of so many tokens comes, runs and ends."""
    one = sequence(f"{tenant}-job", prompt=tokens, new=1, tenant=tenant)
    fair.waits(one)
    fair.lift()
    fair.begins(one)
    one.computed = tokens
    fair.leaves(one)


def test_shares_are_those_of_the_last_minutes(clock: SimpleNamespace) -> None:
    fair = FairShare(30)
    assert fair.shares() == {}
    tick(fair, "a", 300)
    tick(fair, "b", 100)
    assert fair.shares() == {"a": 0.75, "b": 0.25}
    clock.s += 2 * fair_share.HALF_LIFE_S
    tick(fair, "b", 50)
    assert fair.shares() == {"a": 0.5, "b": 0.5}
    assert fair.served() == {"a": 300, "b": 150}
    one = sequence("now", prompt=150, new=1, tenant="c")
    fair.waits(one)
    fair.begins(one)
    one.computed = 150
    assert fair.shares() == {"a": 0.25, "b": 0.25, "c": 0.5}, "running jobs count"


def test_who_has_had_nothing_here_for_a_while_is_forgotten(clock: SimpleNamespace) -> None:
    fair = FairShare(30)
    tick(fair, "old", 5)
    clock.s += fair_share.FORGOTTEN_AFTER_S
    tick(fair, "new", 5)
    assert set(fair.served()) == {"old", "new"}
    clock.s += 1
    tick(fair, "newer", 5)
    assert set(fair.served()) == {"new", "newer"}
    for number in range(3 * fair_share.IDLE_ACCOUNTS):
        tick(fair, f"t{number}", 5)
    assert len(fair.served()) == fair_share.IDLE_ACCOUNTS


def test_one_that_was_forgotten_begins_no_better_than_others(clock: SimpleNamespace) -> None:
    machine = Machine(2, 30)
    together(machine, 300, "a", "b")
    drained(machine, "b")
    clock.s += 2 * fair_share.FORGOTTEN_AFTER_S
    together(machine, 50, "a")
    assert "b" not in machine.fair.served()
    given = together(machine, 400, "a", "b")
    assert abs(given["a"] - given["b"]) <= 2 * machine.bound("a", "b")


def test_an_endless_row_of_new_tenants_does_not_keep_one_from_its_turn() -> None:
    """Each begins level with who was given least, not below."""
    machine = Machine(1, quantum=5)
    together(machine, 50, "a")
    before = machine.given("a")
    for number in range(1000):
        machine.submit(f"fresh-{number}", 5, 10, 10)
        machine.step()
    assert machine.given("a") > before

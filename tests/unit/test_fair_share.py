"""Whose turn it is: the bound that fair_share.py states, and what an account is charged.

A machine without blocks, slots or a model: places for jobs, each of which takes its prompt and one
token at its first step, and one token at every other.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shares import Machine, drained, together

jobs = st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))


@given(
    places=st.integers(1, 6),
    quantum=st.integers(1, 200),
    weights=st.tuples(*[st.sampled_from([0.25, 1.0, 2.0, 3.0])] * 2),
    kinds=st.tuples(st.lists(jobs, min_size=1, max_size=5), st.lists(jobs, min_size=1, max_size=5)),
    third=st.lists(st.booleans(), min_size=1, max_size=20),
    preempted=st.sets(st.integers(0, 150), max_size=20),
)
@settings(max_examples=150, deadline=None)
def test_two_that_always_wait_differ_by_no_more_than_the_bound(
    places: int,
    quantum: int,
    weights: tuple[float, float],
    kinds: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]],
    third: list[bool],
    preempted: set[int],
) -> None:
    """Whatever their jobs, however early these end or lose their places, and whoever else comes."""
    machine = Machine(places, quantum, {"a": weights[0], "b": weights[1]})
    for step in range(150):
        for tenant, kind in zip("ab", kinds, strict=True):
            machine.keep_waiting(tenant, *kind[step % len(kind)])
        if third[step % len(third)]:
            machine.submit("c", 5, 5, 5)
        machine.step()
        if step in preempted and machine.running:
            machine.preempt()
        for ahead, behind in ("ab", "ba"):
            more = machine.given(ahead) - machine.given(behind)
            assert more <= machine.bound(ahead, behind)


@pytest.mark.parametrize("weights", [{"a": 3.0, "b": 1.0}, {"a": 0.75, "b": 0.25}])
def test_weights_of_three_to_one_give_three_times_the_tokens(weights: dict[str, float]) -> None:
    machine = Machine(4, 30, weights)
    for _ in range(3000):
        for tenant in "ab":
            machine.keep_waiting(tenant, 10, 20, 20)
        machine.step()
    served = machine.fair.served()
    assert served["a"] / served["b"] == pytest.approx(3, rel=0.02)


def test_jobs_that_end_early_are_not_charged_for_what_they_did_not_make() -> None:
    """Both get half of the tokens, though one asks for ten times of what it takes."""
    machine = Machine(4, 30)
    for _ in range(3000):
        machine.keep_waiting("modest", 10, 20, 20)
        machine.keep_waiting("greedy", 10, 200, 20)
        machine.step()
    served = machine.fair.served()
    assert served["greedy"] / served["modest"] == pytest.approx(1, abs=0.05)


def test_who_comes_late_catches_nothing_up_and_who_was_alone_owes_nothing() -> None:
    machine = Machine(4, 30)
    together(machine, 500, "early")
    given = together(machine, 400, "early", "late")
    assert machine.given("early") > 1.5 * machine.given("late") > 1000
    assert abs(given["early"] - given["late"]) <= 2 * machine.bound("early", "late")


def test_a_pause_saves_nothing_up() -> None:
    machine = Machine(4, 30)
    together(machine, 100, "a", "b")
    drained(machine, "b")
    together(machine, 500, "a")
    given = together(machine, 400, "a", "b")
    assert abs(given["a"] - given["b"]) <= 2 * machine.bound("a", "b")


def test_neither_does_a_trickle() -> None:
    """One small job after another uses less than a share for long; a flood of the same tenant then
    gets its share and not what it did not use."""
    machine = Machine(4, 30)
    for _ in range(100):
        machine.submit("trickle", 2, 2, 2)
        for _ in range(5):
            machine.keep_waiting("a", 5, 10, 10)
            machine.step()
    assert machine.given("a") > 4 * machine.given("trickle")
    given = together(machine, 400, "a", "trickle")
    assert abs(given["a"] - given["trickle"]) <= 2 * machine.bound("a", "trickle")


def test_after_an_idle_time_all_begin_as_equals() -> None:
    machine = Machine(1, 30)
    together(machine, 200, "a")
    drained(machine, "a")
    together(machine, 5, "new")
    given = together(machine, 400, "a", "new")
    assert abs(given["a"] - given["new"]) <= 2 * machine.bound("a", "new")


def test_who_comes_gets_every_place_until_it_has_as_many() -> None:
    machine = Machine(4, quantum=5)
    for made in (3, 6, 9, 12):
        machine.submit("a", 5, 12, made)
    machine.step()
    for _ in range(10):
        machine.submit("a", 5, 12, 12)
    for _ in range(10):
        machine.submit("b", 5, 12, 12)
    begun = [tenant for _ in range(9) for tenant in machine.step()]
    assert begun == ["b", "b", "a"]


def test_who_comes_is_lifted_to_the_least_of_those_that_wait() -> None:
    """Not to one that was given much at another priority while they waited."""
    machine = Machine(2, 30)
    machine.keep_waiting("a", 5, 10, 10)
    for _ in range(200):
        machine.submit("rich", 5, 10, 10, priority=1)
        machine.step()
    drained(machine, "rich")
    assert machine.given("rich") > 10 * machine.bound("a", "new")
    given = together(machine, 100, "a", "new")
    assert abs(given["a"] - given["new"]) <= 2 * machine.bound("a", "new")


def test_one_that_runs_and_waits_for_nothing_is_no_measure() -> None:
    """A long job of a tenant that was given little: whoever comes is owed no more for it."""
    machine = Machine(3, 30)
    machine.submit("still", 1, 2000, 2000)
    together(machine, 1000, "a")
    assert machine.given("a") > 1.5 * machine.given("still")
    given = together(machine, 300, "a", "b")
    assert abs(given["a"] - given["b"]) <= 2 * machine.bound("a", "b")


def test_who_waits_behind_a_higher_priority_is_owed_nothing_for_it() -> None:
    """Else what one tenant did at a high priority would keep it from its share at a low one, and
    newcomers, too, would go before it."""
    machine = Machine(2, 30)
    for tenant in "ab":
        for _ in range(200):
            machine.submit(tenant, 5, 10, 10)
    for _ in range(100):
        machine.submit("a", 5, 10, 10, priority=1)
    while any(s.claim.job.priority for s in [*machine.waiting.values(), *machine.running.values()]):
        machine.step()
    before = {tenant: machine.given(tenant) for tenant in "ab"}
    assert before["a"] - before["b"] > 1000
    for _ in range(300):
        machine.step()
    more = machine.given("b") - before["b"] - (machine.given("a") - before["a"])
    assert more <= machine.bound("b", "a")


@given(
    others=st.integers(1, 6),
    quantum=st.integers(1, 100),
    weight=st.sampled_from([0.1, 1.0, 5.0]),
    kinds=st.lists(jobs, min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_every_tenant_gets_its_turn(
    others: int, quantum: int, weight: float, kinds: list[tuple[int, int, int]]
) -> None:
    """Until a job begins, no other tenant is given more than the bound says, and there is always
    someone who is given something: so it begins."""
    machine = Machine(2, quantum, {"small": weight})
    job_id = machine.submit("small", 3, 3, 3)
    for _ in range(2000 * (1 + others)):
        for other in range(others):
            machine.keep_waiting(f"o{other}", *kinds[machine.serial % len(kinds)])
        machine.step()
        for other in range(others):
            if job_id in machine.waiting:
                assert machine.given(f"o{other}") <= machine.bound(f"o{other}", "small")
        if job_id not in machine.waiting:
            return
    pytest.fail("it never began")

"""Limits of tenants: what is said of them, and calls that would make more wait than may."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger
from lorabatch.errors import QueueFull
from lorabatch.feed import Feed
from lorabatch.tables import jobs
from lorabatch.tenants import ALL, EACH, Limits, Tenants


def some(count: int, tenant: str = "acme", **fields: Any) -> list[Job]:
    return [Job(prompt="x", tenant=tenant, **fields) for _ in range(count)]


def may_queue(ledger: Ledger, tenant: str, most: int | None) -> None:
    Tenants(ledger.engine).set(Limits(tenant, max_queued=most))


def waiting(ledger: Ledger) -> dict[str, int]:
    query = sa.select(jobs.c.tenant, sa.func.count()).where(jobs.c.state == "queued")
    with ledger.engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query.group_by(jobs.c.tenant))}


def test_what_is_said_last_holds_until_it_is_forgotten(ledger: Ledger) -> None:
    tenants = Tenants(ledger.engine)
    assert tenants.list() == []
    tenants.set(Limits("b", 2.5, 3, 4))
    tenants.set(Limits("a"))
    tenants.set(Limits("b", 1.5, None, 5))
    assert tenants.list() == [Limits("a", 1.0, None, None), Limits("b", 1.5, None, 5)]
    assert tenants.forget("b")
    assert not tenants.forget("b")
    assert [limits.tenant for limits in tenants.list()] == ["a"]


def test_a_refused_call_accepts_nothing(ledger: Ledger) -> None:
    may_queue(ledger, "acme", 3)
    ledger.accept(some(2))
    with pytest.raises(QueueFull, match=r"tenant 'acme': 3 jobs may wait"):
        ledger.accept([*some(1, "other"), *some(2)])
    assert waiting(ledger) == {"acme": 2}
    ledger.accept([*some(1, "other"), *some(1)])
    assert waiting(ledger) == {"acme": 3, "other": 1}


def test_what_runs_or_has_ended_leaves_room(ledger: Ledger) -> None:
    may_queue(ledger, "acme", 2)
    first, second = some(2)
    ledger.accept([first, second])
    for make_room in (
        lambda: ledger.claim([first.job_id], "me", 60),
        lambda: ledger.cancel([second.job_id]),
    ):
        with pytest.raises(QueueFull):
            ledger.accept(some(1))
        make_room()
        ledger.accept(some(1))


def test_what_was_sent_waits_too(ledger: Ledger) -> None:
    may_queue(ledger, "acme", 4)
    ledger.accept(some(2))
    assert len(Feed(ledger.engine, "lorabatch").take()) == 2
    ledger.accept(some(2))
    with pytest.raises(QueueFull):
        ledger.accept(some(1))


def test_each_is_for_those_that_say_nothing(ledger: Ledger) -> None:
    may_queue(ledger, EACH, 1)
    may_queue(ledger, "big", 3)
    Tenants(ledger.engine).set(Limits("heavy", 2.0))
    ledger.accept([*some(3, "big"), *some(1, "a"), *some(1, "b"), *some(1, "heavy")])
    for tenant in ("a", "b", "big", "heavy"):
        with pytest.raises(QueueFull, match=f"'{tenant}'"):
            ledger.accept(some(1, tenant))


def test_all_together(ledger: Ledger) -> None:
    may_queue(ledger, ALL, 3)
    ledger.accept([*some(2, "a"), *some(1, "b")])
    with pytest.raises(QueueFull, match=r"all tenants together: 3 jobs .* set --all"):
        ledger.accept(some(1, "c"))
    assert waiting(ledger) == {"a": 2, "b": 1}
    may_queue(ledger, ALL, None)
    ledger.accept(some(9, "c"))


def test_each_queue_has_its_own_room(ledger: Ledger) -> None:
    may_queue(ledger, "acme", 1)
    ledger.accept(some(1))
    ledger.accept(some(1), queue="other")
    with pytest.raises(QueueFull):
        ledger.accept(some(1), queue="other")


def test_what_came_by_a_message_is_not_refused(ledger: Ledger) -> None:
    may_queue(ledger, "acme", 1)
    ledger.accept(some(3), as_sent=True)
    assert waiting(ledger) == {"acme": 3}
    with pytest.raises(QueueFull):
        ledger.accept(some(1))


def test_what_is_known_already_needs_no_room(ledger: Ledger) -> None:
    may_queue(ledger, "acme", 1)
    (job,) = some(1, idempotency_key="k")
    ledger.accept([job])
    (again,) = some(1, idempotency_key="k")
    assert ledger.accept([again]) == {again.job_id: job.job_id}
    assert waiting(ledger) == {"acme": 1}


def test_what_is_known_already_is_found_when_more_wait_than_may(ledger: Ledger) -> None:
    (job,) = some(1, idempotency_key="k")
    ledger.accept([job, *some(2)])
    may_queue(ledger, "acme", 1)
    (again,) = some(1, idempotency_key="k")
    assert ledger.accept([again]) == {again.job_id: job.job_id}
    with pytest.raises(QueueFull):
        ledger.accept(some(1))


@pytest.mark.parametrize("limited", ["acme", EACH, ALL])
def test_no_more_wait_than_may_whoever_calls_at_the_same_time(ledger: Ledger, limited: str) -> None:
    may_queue(ledger, limited, 10)
    ready, refused = threading.Barrier(4), []

    def call() -> None:
        ready.wait(60)
        for _ in range(10):
            try:
                ledger.accept(some(1))
            except QueueFull:
                refused.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert waiting(ledger) == {"acme": 10}
    assert len(refused) == 30

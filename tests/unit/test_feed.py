"""What is fed into the queue: whose, how many, in which order, and each job once."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lorabatch import Job, Ledger, Settings
from lorabatch import feed as feed_module
from lorabatch.database import open_database
from lorabatch.feed import Feed
from lorabatch.queue import drained, lane
from lorabatch.tables import jobs, tenants
from lorabatch_worker.feeder import feeds
from tests.plans import explained

NOON = datetime(2099, 1, 1, 12, tzinfo=UTC)


def accept(ledger: Ledger, tenant: str, count: int, **fields: Any) -> list[str]:
    made = [Job(tenant=tenant, prompt="x", **fields) for _ in range(count)]
    ledger.accept(made)
    return [job.job_id for job in made]


def taken(feed: Feed) -> Counter[str]:
    return Counter(message.tenant for message in feed.take())


def limit(ledger: Ledger, tenant: str, max_running: int) -> None:
    with ledger.engine.begin() as connection:
        row = {"tenant": tenant, "weight": 1.0, "max_running": max_running, "updated_us": 0}
        connection.execute(tenants.insert(), [row])


def test_no_tenant_has_more_than_the_window(ledger: Ledger) -> None:
    accept(ledger, "big", 30)
    accept(ledger, "small", 3)
    feed = Feed(ledger.engine, "lorabatch", 10)
    messages = feed.take()
    assert Counter(m.tenant for m in messages) == {"big": 10, "small": 3}
    assert [m.tenant for m in messages[:6]] == ["big", "small"] * 3, "mixed"
    assert feed.take() == [], "the window is full"
    claims = ledger.claim([m.job_id for m in messages if m.tenant == "big"][:4], "me", 30)
    assert taken(feed) == {"big": 4}, "what runs has left it"
    ledger.release(list(claims.values()))
    assert taken(feed) == {}


def test_by_priority_then_deadline_then_age(ledger: Ledger) -> None:
    order = [
        *accept(ledger, "t", 1, priority=5),
        *accept(ledger, "t", 1, done_by=NOON),
        *accept(ledger, "t", 1, done_by=NOON + timedelta(hours=1)),
        *accept(ledger, "t", 1),
        *accept(ledger, "t", 1),
        *accept(ledger, "t", 1, priority=-1),
    ]
    with ledger.engine.begin() as connection:  # one after another by any clock
        for at, job_id in enumerate([order[4], order[0], *order[:4:-1], *order[1:4]]):
            connection.execute(
                jobs.update().where(jobs.c.job_id == job_id).values(submitted_us=100 - at)
            )
        connection.execute(
            jobs.update().where(jobs.c.job_id == order[4]).values(submitted_us=1_000)
        )
    feed = Feed(ledger.engine, "lorabatch", 2)
    found = []
    while messages := feed.take():
        found += [m.job_id for m in messages]
        ledger.claim([m.job_id for m in messages], "me", 30)
    assert found == order


def test_a_tenant_runs_no_more_than_it_may(ledger: Ledger) -> None:
    accept(ledger, "limited", 10)
    limit(ledger, "limited", 3)
    feed = Feed(ledger.engine, "lorabatch", 100)
    messages = feed.take()
    assert len(messages) == 3
    claims = ledger.claim([m.job_id for m in messages], "me", 30)
    assert feed.take() == []
    ledger.release([claims[messages[0].job_id]])
    assert feed.take() == [], "it is in the queue again"
    ledger.cancel([messages[0].job_id])
    assert len(feed.take()) == 1


def test_each_queue_has_its_own(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="there", prompt="x")], queue="other")
    accept(ledger, "t", 1)
    assert [m.job_id for m in Feed(ledger.engine, "other").take()] == ["there"]


def test_many_feeders_send_each_job_once(ledger: Ledger) -> None:
    ids = accept(ledger, "a", 60) + accept(ledger, "b", 60)
    found: list[str] = []

    def feed() -> None:
        mine = Feed(ledger.engine, "lorabatch", 7)
        while len(found) < len(ids):
            some = {m.job_id for m in mine.take()}
            found.extend(some)
            while some:  # another feeder may have a lock on one for a moment
                some -= ledger.claim(sorted(some), "me", 30).keys()

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == sorted(ids)


def test_what_was_taken_by_name_is_not_fed_and_what_is_given_back_is(ledger: Ledger) -> None:
    ids = accept(ledger, "t", 3)
    feed = Feed(ledger.engine, "lorabatch")
    asked = [ids[1], ids[0], "nobody", ids[1]]
    assert [m.job_id for m in feed.take_these(asked)] == [ids[1], ids[0]]
    assert feed.take_these(asked) == []
    ledger.claim([ids[0]], "me", 30)
    feed.give_back(ids[:2])
    assert {m.job_id for m in feed.take()} == set(ids[1:])


def test_jobs_that_come_again_later_leave_room(ledger: Ledger) -> None:
    ids = accept(ledger, "t", 4)
    feed = Feed(ledger.engine, "lorabatch", 2)
    first = [m.job_id for m in feed.take()]
    ledger.release(list(ledger.claim(first, "me", 30).values()), again_s=600)
    assert {m.job_id for m in feed.take()} == set(ids) - set(first)


def test_every_look_is_by_the_indexes_for_it(settings: Settings) -> None:
    """Or it would cost as much as there are jobs. On SQLite; PostgreSQL decides by statistics."""
    ledger = Ledger(open_database(settings))
    ids = accept(ledger, "t", 300)
    ledger.claim(ids[:100], "me", 30)
    plans = explained(ledger.engine, Feed(ledger.engine, "lorabatch", 2).take)
    assert len(plans) == 5, "tenants, twice; room; the highest priority; its jobs"
    for plan in plans:
        assert "ix_jobs_unsent" in plan or "ix_jobs_out" in plan, plan
    ledger.engine.dispose()


def test_what_is_taken_by_name_keeps_to_queue_window_and_limit(ledger: Ledger) -> None:
    ids = accept(ledger, "t", 5)
    assert Feed(ledger.engine, "other").take_these(ids) == []
    assert [m.job_id for m in Feed(ledger.engine, "lorabatch", 2).take_these(ids)] == ids[:2]
    limit(ledger, "t", 3)
    assert [m.job_id for m in Feed(ledger.engine, "lorabatch").take_these(ids)] == ids[2:3]
    assert Feed(ledger.engine, "lorabatch").take() == []


def test_one_look_takes_no_more_than_so_many(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "TAKE_MAX", 6)
    for tenant in "abc":
        accept(ledger, tenant, 5)
    feed = Feed(ledger.engine, "lorabatch")
    assert taken(feed) == {"a": 2, "b": 2, "c": 2}
    assert taken(feed) == {"a": 2, "b": 2, "c": 2}


def test_what_was_looked_at_gives_way_to_what_was_not(ledger: Ledger) -> None:
    ids = set(accept(ledger, "t", 6))
    feed = Feed(ledger.engine, "lorabatch")
    feed.take()
    seen = set[str]()
    for _ in range(3):
        some = [message.job_id for message in feed.nowhere(-1, limit=2)]
        seen.update(some)
        with ledger.engine.begin() as connection:  # as mark_sent does, later by any clock
            connection.execute(
                jobs.update().where(jobs.c.job_id.in_(some)).values(sent_us=jobs.c.sent_us + 1000)
            )
    assert seen == ids


def test_a_worker_feeds_and_sweeps_every_queue_that_it_drains(ledger: Ledger) -> None:
    settings = Settings.load(consume=("lorabatch", "gold", "celery"))
    ledger.accept([Job(job_id="there", prompt="x")], queue="gold")
    found = feeds(settings, ledger)
    assert list(found) == ["lorabatch", "gold", "celery"]
    assert [m.job_id for m in found["gold"].take()] == ["there"]


@pytest.mark.parametrize("queue", ["lorabatch", "gold", "celery"])
def test_every_lane_is_drained(queue: str) -> None:
    assert {lane(queue, f"tenant-{n}") for n in range(200)} <= set(drained([queue]))

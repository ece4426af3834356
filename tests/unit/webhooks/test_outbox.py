"""The outbox: a delivery for each outcome with a webhook, in its transaction, held by lease."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, outbox
from lorabatch.batches import Batches, again_id
from lorabatch.ledger import Outcome
from lorabatch.outbox import Outbox
from lorabatch.tables import results, webhook_deliveries
from tests.played_worker import fails, run_queued, succeeds

URL = "https://hooks.example/lorabatch"
LEASE_S = 60.0


def job(job_id: str, url: str | None = URL, **fields: Any) -> Job:
    return Job.parse({"job_id": job_id, "prompt": "hi", "webhook": url, "tenant": "acme", **fields})


@pytest.fixture
def out(ledger: Ledger) -> Outbox:
    return Outbox(ledger.engine)


def told(out: Outbox) -> dict[str, str]:
    return {row.subject: row.event for row in out.list()}


def any_room(host: str) -> int:
    return 100


def add(ledger: Ledger, *jobs: Job) -> None:
    """Accepted and ended."""
    ledger.accept(jobs)
    run_queued(ledger)


def test_each_outcome_with_a_webhook_is_in_the_outbox(ledger: Ledger, out: Outbox) -> None:
    ledger.accept([job("good"), job("silent", None), job("bad", adapter_id="broken")])
    assert out.list() == []
    run_queued(ledger, lambda claim: (fails if claim.job.adapter_id else succeeds)(claim))
    ledger.accept([job("late", done_by="2020-01-01T00:00:00Z"), job("unwanted"), job("run")])
    ledger.end_late()
    ledger.cancel(["unwanted"])
    claims = ledger.claim(["run"], "w", 60)
    ledger.cancel(["run"])
    ledger.release(list(claims.values()))
    assert told(out) == {
        "good": "job.succeeded",
        "bad": "job.failed",
        "late": "job.failed",
        "unwanted": "job.cancelled",
        "run": "job.cancelled",
    }
    (first, *_) = rows = out.list()
    assert {(row.tenant, row.url, row.host, row.state) for row in rows} == {
        ("acme", URL, "hooks.example", "waiting")
    }
    assert len({row.webhook_id for row in rows}) == 5
    assert first.happened_us == ledger.results([first.subject])[first.subject].finished_us


def test_jobs_of_a_batch_that_is_cancelled_are_told_of(ledger: Ledger, out: Outbox) -> None:
    batch = Batches(ledger.engine)
    batch.add("b", "acme", "x")
    ledger.accept([job("a", batch_id="b"), job("c", None, batch_id="b"), job("other")])
    batch.cancel("b")
    assert told(out) == {"a": "job.cancelled"}


def test_a_job_that_runs_again_tells_of_its_own_end(ledger: Ledger, out: Outbox) -> None:
    ledger.accept([job("first")])
    run_queued(ledger, fails)
    Batches(ledger.engine).run_again(["first"])
    run_queued(ledger)
    assert told(out) == {"first": "job.failed", again_id("first"): "job.succeeded"}


def test_an_outcome_that_is_not_recorded_is_not_told_of(ledger: Ledger, out: Outbox) -> None:
    ledger.accept([job("a"), job("b")])
    claims = ledger.claim(["a", "b"], "w", 60)
    stale = ledger.record([Outcome(c, succeeds(c)) for c in claims.values() if c.job.job_id == "a"])
    assert stale == {"a"}
    assert ledger.record([Outcome(claims["a"], fails(claims["a"]))]) == set()
    assert told(out) == {"a": "job.succeeded"}
    twice = succeeds(claims["b"]).model_copy(update={"job_id": "a"})
    with pytest.raises(sa.exc.IntegrityError):
        ledger.record([Outcome(claims["b"], twice)])
    assert told(out) == {"a": "job.succeeded"}
    # and the other way round: what cannot be put into the outbox is not recorded without it
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(webhook_deliveries).values(webhook_id=_id_of("b")))
    with pytest.raises(sa.exc.IntegrityError):
        ledger.record([Outcome(claims["b"], succeeds(claims["b"]))])
    with ledger.engine.begin() as connection:
        assert list(connection.scalars(sa.select(results.c.job_id))) == ["a"]


def _id_of(subject: str) -> str:
    row = outbox.delivery_row(("job", "succeeded"), subject, "acme", URL, 0, 0)
    return str(row["webhook_id"])


def test_a_url_that_nobody_can_read_stops_no_outcome(ledger: Ledger, out: Outbox) -> None:
    odd = job("odd").model_copy(update={"webhook": "https://[no"})
    add(ledger, odd, job("fine"))
    assert ledger.counts() == {"succeeded": 2}
    assert {row.subject: row.host for row in out.take(9, any_room, LEASE_S)} == {
        "odd": "",
        "fine": "hooks.example",
    }


def test_a_delivery_is_held_by_one_and_taken_over_under_the_same_id(
    ledger: Ledger, out: Outbox
) -> None:
    add(ledger, job("a"))
    (held,) = out.take(9, any_room, 0.0)
    (again,) = out.take(9, any_room, LEASE_S)
    assert out.take(9, any_room, LEASE_S) == []
    assert (held.webhook_id, held.attempts) == (again.webhook_id, again.attempts - 1)
    assert not out.end(held, "delivered", 204, None), "it is not its any more"
    assert not out.again(held, 0.0, None, "x")
    assert out.end(again, "delivered", 204, None)
    assert not out.end(again, "failed", None, "x")
    assert [row.state for row in out.list()] == ["delivered"]


def test_senders_that_take_at_once_take_different_ones(ledger: Ledger, out: Outbox) -> None:
    add(ledger, *(job(f"j{n}", f"https://h{n % 3}.example/") for n in range(60)))
    taken: list[str] = []

    def take() -> None:
        for _ in range(10):
            taken.extend(row.subject for row in out.take(5, any_room, LEASE_S))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"j{n}" for n in range(60))


def test_hosts_have_their_turn_however_much_waits_for_one(ledger: Ledger, out: Outbox) -> None:
    add(ledger, *(job(f"a{n}", "https://a.example/") for n in range(50)))
    add(ledger, *(job(name, f"https://{name}.example/") for name in ("b", "c", "d")))
    room = {"a.example": 2, "b.example": 1, "c.example": 0}
    taken = out.take(4, lambda host: room.get(host, 9), LEASE_S)
    assert [row.subject[0] for row in taken] == ["a", "a", "b", "d"]
    assert len(out.take(2, lambda host: 9 if host == "a.example" else 0, LEASE_S)) == 2


def test_what_is_not_due_is_not_taken(ledger: Ledger, out: Outbox) -> None:
    add(ledger, job("a"), job("b"))
    first, second = out.take(9, any_room, LEASE_S)
    assert out.again(first, 3600.0, 503, "the receiver answered 503")
    assert out.again(second, 0.0, None, "no answer")
    assert [row.subject for row in out.take(9, any_room, LEASE_S)] == [second.subject]


def test_what_failed_is_shown_and_tried_again_on_request(ledger: Ledger, out: Outbox) -> None:
    for each in (job("a"), job("b"), job("c", tenant="beta")):  # in turn: the oldest is told first
        add(ledger, each)
    for row in out.take(9, any_room, LEASE_S):
        out.end(row, "failed", 500, "the receiver answered 500")
    assert out.counts() == {"waiting": 0, "failed": 3}
    failed = out.list("failed", "acme")
    assert [row.subject for row in failed] == ["a", "b"]
    assert {(row.status, row.error) for row in failed} == {(500, "the receiver answered 500")}
    ids = {row.subject: row.webhook_id for row in failed}
    assert out.retry([ids["a"], "msg_unknown"]) == [ids["a"]]
    assert out.retry([ids["a"]]) == []
    assert out.counts() == {"waiting": 1, "failed": 2}
    assert len(out.retry(None)) == 2
    again = out.take(9, any_room, LEASE_S)
    assert {row.attempts for row in again} == {1}
    assert {row.subject: row.webhook_id for row in again}["b"] == ids["b"]


def test_what_ended_long_ago_is_forgotten(ledger: Ledger, out: Outbox) -> None:
    add(ledger, job("old"), job("new"), job("open"))
    old, new, _ = sorted(out.take(9, any_room, 0.0), key=lambda row: row.subject != "old")
    for row in (old, new):
        out.end(row, "delivered", 200, None)
    with ledger.engine.begin() as connection:
        mine = webhook_deliveries.c.webhook_id == old.webhook_id
        connection.execute(sa.update(webhook_deliveries).where(mine).values(ended_us=1))
    out.tidy()
    assert len(out.list()) == 2
    assert "old" not in told(out)

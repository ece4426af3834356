"""Batches in the ledger: cancelled at once, and what failed run again."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Result
from lorabatch.batches import Again, Batches
from lorabatch.errors import JobNotFound
from lorabatch.ledger import Outcome
from lorabatch.result import ErrorInfo
from lorabatch.statements import CHUNK
from lorabatch.tables import results, usage_events
from lorabatch.tenants import ALL, Limits, Tenants


def line(number: int, batch_id: str = "b") -> Job:
    return Job(job_id=f"{batch_id}{number}", prompt="x", batch_id=batch_id, custom_id=str(number))


def fail(ledger: Ledger, *job_ids: str) -> None:
    error = ErrorInfo(code="engine_fault", message="why")
    claims = ledger.claim(job_ids, "me", 30)
    ledger.record(
        [
            Outcome(
                c, Result(job_id=i, tenant="default", adapter_id=None, state="failed", error=error)
            )
            for i, c in claims.items()
        ]
    )


def keys(ledger: Ledger, table: sa.Table) -> Counter[str]:
    with ledger.engine.connect() as connection:
        return Counter(connection.scalars(sa.select(table.c.job_id)))


def test_cancelling_ends_what_waits_and_asks_what_runs(ledger: Ledger) -> None:
    ledger.accept([line(n) for n in range(6)] + [line(1, "other")])
    fail(ledger, "b0")
    running = ledger.claim(["b1"], "me", 30)
    ledger.cancel(["b2"])
    assert Batches(ledger.engine).cancel("b") == {"cancelled": 3, "asked": 1}
    assert ledger.counts("b") == {"failed": 1, "running": 1, "cancelled": 4}
    assert ledger.counts("other") == {"queued": 1}
    assert ledger.renew(list(running.values()), 30) == (set(), {"b1"})
    ended = Counter(["b0", "b2", "b3", "b4", "b5"])
    assert keys(ledger, results) == keys(ledger, usage_events) == ended
    one, same = (ledger.results([i])[i] for i in ("b2", "b3"))
    assert same.model_copy(
        update={"job_id": "b2", "custom_id": "2", "finished_us": one.finished_us}
    ) == one.model_copy(update={"submitted_us": same.submitted_us})
    assert Batches(ledger.engine).cancel("b") == {"cancelled": 0, "asked": 1}
    with pytest.raises(JobNotFound, match="'nothing'"):
        Batches(ledger.engine).cancel("nothing")


def test_what_failed_or_was_cancelled_runs_again_once(ledger: Ledger) -> None:
    batches = Batches(ledger.engine)
    ledger.accept([line(n) for n in range(4)])
    fail(ledger, "b0")
    ledger.cancel(["b1"])
    ledger.claim(["b2"], "me", 30)
    again = batches.run_again(["b0", "b1", "b2", "b3"])
    assert set(again.jobs) == {"b0", "b1"}
    assert ledger.counts("b") == {"queued": 3, "running": 1}, "each line once"
    assert batches.run_again(["b0", "b1"]) == Again({})
    new = again.jobs["b0"]
    job = ledger.claim([new], "me", 30)[new].job
    assert (job.custom_id, job.batch_id, job.prompt) == ("0", "b", "x")
    assert batches.latest(["b0", "b2"]) == {"b0": new, "b2": "b2"}
    assert ledger.states(["b0"]) == {"b0": "failed"}, "an outcome stays"


def test_a_line_may_fail_again_and_again(ledger: Ledger) -> None:
    batches = Batches(ledger.engine)
    ledger.accept([line(0)])
    seen = ["b0"]
    for _ in range(3):
        fail(ledger, seen[-1])
        seen.append(batches.run_again([batches.latest(["b0"])["b0"]]).jobs[seen[-1]])
    assert len(set(seen)) == 4
    assert batches.latest(["b0"]) == {"b0": seen[-1]}
    assert ledger.counts("b") == {"queued": 1}


def test_as_many_run_again_as_may_wait(ledger: Ledger) -> None:
    """Over two transactions; another tenant's limit, or another queue's jobs, are no hindrance."""
    batches, tenants = Batches(ledger.engine), Tenants(ledger.engine)
    lines = [line(n) for n in range(CHUNK + 3)]
    other = Job(job_id="x", prompt="x", tenant="other")
    ledger.accept([*lines, other])
    ledger.cancel([job.job_id for job in [*lines, other]])
    ledger.accept([line(n, "c") for n in range(4)])
    ledger.accept([line(9, "c")], queue="quiet")
    tenants.set(Limits("default", max_queued=6))
    asked = [*(job.job_id for job in lines), "x"]
    again = batches.run_again(asked)
    assert len(again.jobs) == 3
    assert "x" in again.jobs
    assert "6 jobs may wait and as many do; 3 run again, 501 do not" in str(again.full)
    assert ledger.counts("b") == {"queued": 2, "cancelled": CHUNK + 1}
    tenants.set(Limits("default", max_queued=7))
    tenants.set(Limits(ALL, max_queued=7))
    assert batches.run_again(asked).jobs == {}
    tenants.set(Limits(ALL, max_queued=8))
    more = batches.run_again(asked)
    assert len(more.jobs) == 1
    assert not more.jobs.keys() & again.jobs.keys()
    tenants.forget("default")
    tenants.forget(ALL)
    assert len(batches.run_again(asked).jobs) == CHUNK
    assert ledger.counts("b") == {"queued": CHUNK + 3}


def test_what_is_late_ends_and_what_runs_does_not(ledger: Ledger) -> None:
    past, future = (datetime.now(UTC) + timedelta(hours=h) for h in (-1, 1))
    ledger.accept(
        [
            Job(job_id="late", prompt="x", done_by=past),
            Job(job_id="runs", prompt="x", done_by=past),
            Job(job_id="in-time", prompt="x", done_by=future),
            Job(job_id="never", prompt="x"),
        ]
    )
    claim = ledger.claim(["runs"], "me", 30)["runs"]
    assert claim.job.done_by == past
    assert ledger.end_late() == ["late"]
    assert ledger.end_late() == []
    error = ledger.results(["late"])["late"].error
    assert error is not None
    assert error.code == "deadline_passed"
    assert f"{past:%Y-%m-%d %H:%M:%S} UTC" in error.message
    assert ledger.counts() == {"failed": 1, "running": 1, "queued": 2}

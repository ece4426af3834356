"""Why a job waits, as the ledger knows it: what is before it, shares, limits and the estimate."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger
from lorabatch.tables import jobs, usage_events
from lorabatch.tenants import EACH, Limits, Tenants
from lorabatch_producer import why
from lorabatch_producer.why_lines import lines
from tests.played_worker import run_queued

Ahead = Callable[[str], why.Ahead]


def accept(ledger: Ledger, *names: str, **fields: Any) -> None:
    ledger.accept([Job(job_id=name, prompt="x", **fields) for name in names])


def change(ledger: Ledger, job_id: str, **columns: Any) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.job_id == job_id).values(**columns))


@pytest.fixture
def ahead(database: sa.Engine) -> Ahead:
    def look(job_id: str) -> why.Ahead:
        found = why.facts(database, job_id).ahead
        assert found is not None
        return found

    return look


def test_jobs_before_it_by_priority_deadline_and_age(ledger: Ledger, ahead: Ahead) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    accept(ledger, "high", priority=1)
    accept(ledger, "late", done_by=soon + timedelta(hours=1))
    accept(ledger, "soon", done_by=soon)
    accept(ledger, "old", "young", "twin")
    accept(ledger, "low", priority=-1)
    accept(ledger, "other", tenant="other", priority=9)
    for at, name in enumerate(("old", "young", "twin", "low", "high", "soon", "late")):
        change(ledger, name, submitted_us=1000 + at - (name == "twin"))
    order = {name: ahead(name) for name in ("high", "soon", "late", "old", "young", "low")}
    assert [found.jobs for found in order.values()] == [0, 1, 2, 3, 4, 6]
    assert [found.alike for found in order.values()] == [0, 0, 0, 0, 1, 0]
    assert not any(found.more for found in order.values())
    assert ahead("other").jobs == 0
    change(ledger, "old", sent_us=1)
    assert [ahead(name).jobs for name in ("high", "old", "low")] == [1, 0, 6], "sent ones first"
    change(ledger, "high", sent_us=2)
    assert [ahead(name).jobs for name in ("high", "old", "soon")] == [0, 1, 2]
    change(ledger, "old", sent_us=2**62)
    assert ahead("low").jobs == 5, "what is to come again later is not there"


def test_other_queues_do_not_count(ledger: Ledger, ahead: Ahead) -> None:
    ledger.accept(
        [Job(prompt="x", priority=5, tenant=name) for name in ("default", "b")], queue="q"
    )
    accept(ledger, "j")
    assert (ahead("j").jobs, ahead("j").tenants) == (0, 1)


def test_there_is_an_end_to_counting(
    ledger: Ledger, ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(why, "MOST", 3)
    accept(ledger, "a", "b", "c", "d", priority=1)
    accept(ledger, "j")
    assert (ahead("j").jobs, ahead("j").more) == (3, True)
    text = "\n".join(lines(why.facts(ledger.engine, "j"), {}, {}))
    assert "more than 3 jobs of its tenant come before it" in text
    change(ledger, "a", state="cancelled")
    assert (ahead("j").jobs, ahead("j").more) == (3, False)


def test_shares_and_limits(ledger: Ledger, ahead: Ahead) -> None:
    tenants = Tenants(ledger.engine)
    tenants.set(Limits("acme", 3.0, max_running=2))
    tenants.set(Limits(EACH, 0.5, max_running=9))
    accept(ledger, "j", "sent", tenant="acme")
    accept(ledger, "b", tenant="b")
    accept(ledger, "c", tenant="c")
    accept(ledger, "d", tenant="d")
    accept(ledger, "later", tenant="acme")
    ledger.claim(["b"], "me", 60)
    change(ledger, "b", sent_us=1)
    change(ledger, "sent", sent_us=1)
    change(ledger, "later", sent_us=2**62)
    ledger.cancel(["d"])
    found = ahead("j")
    assert (found.tenants, found.weight, found.weights) == (3, 3.0, 4.0)
    assert (found.under_way, found.max_running) == (1, 2)
    assert ahead("c").max_running == 9
    tenants.forget(EACH)
    assert (ahead("c").weight, ahead("c").max_running) == (1.0, None)


def test_the_estimate_is_of_the_last_minute(ledger: Ledger, ahead: Ahead) -> None:
    accept(ledger, "a", "b", "c")
    accept(ledger, "other", tenant="other")
    run_queued(ledger)
    accept(ledger, "gone")
    ledger.cancel(["gone"])
    with ledger.engine.begin() as connection:
        old = sa.update(usage_events).where(usage_events.c.job_id == "c")
        connection.execute(old.values(occurred_us=usage_events.c.occurred_us - 61_000_000))
    accept(ledger, *map(str, range(9)), priority=1)
    accept(ledger, "j")
    assert ahead("j").ended_last_minute == 2, "what was cancelled while it waited never ran"
    assert lines(why.facts(ledger.engine, "j"), {}, {})[-2] == (
        "2 jobs of its tenant ended in the last minute: at that rate those before it take "
        "about 4.5 min"
    )


def test_the_indexes_are_used(ledger: Ledger, ahead: Ahead) -> None:
    """Or a look would cost as much as there are jobs."""
    due = datetime.now(UTC) + timedelta(hours=1)
    for tenant in "012345":
        accept(ledger, *(f"{tenant}-{n}" for n in range(80)), tenant=tenant, done_by=due)
    accept(ledger, "j", tenant="5", done_by=due)
    plans: list[str] = []
    sqlite = ledger.engine.dialect.name == "sqlite"
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if statement.startswith(("SELECT", "WITH")) and "jobs" in statement:
            if not sqlite:
                cursor.execute("SET enable_seqscan = off")
            prefix = "EXPLAIN QUERY PLAN " if sqlite else "EXPLAIN "
            cursor.execute(prefix + statement, parameters)
            plans.append("\n".join(str(row) for row in cursor.fetchall()))

    sa.event.listen(ledger.engine, "before_cursor_execute", explain)
    ahead("j")
    sa.event.remove(ledger.engine, "before_cursor_execute", explain)
    assert len(plans) >= 8
    for index in ("ix_jobs_unsent", "ix_jobs_out"):
        assert any(index in plan for plan in plans), plans
    if sqlite:  # PostgreSQL goes by statistics, and may have better ones for so few
        first, *others = plans
        assert "(job_id=?)" in first, first
        for plan in others:
            assert "ix_jobs_unsent" in plan or "ix_jobs_out" in plan, plan

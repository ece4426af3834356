"""What a batch may spend: counted with each outcome, held to whatever dies, and raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, stopping
from lorabatch.batches import Again, Batches
from lorabatch.budgets import Budget, budget_of
from lorabatch.claim import Claim, Start
from lorabatch.errors import BudgetExhausted, JobNotFound
from lorabatch.ledger import Outcome
from lorabatch.stopping import PAGE, limit, resume, stop_exhausted
from lorabatch.tables import batches, results, usage_events
from tests.played_worker import fails, run_queued, succeeds

TOKENS = 8  # of a job that the played worker runs: 5 of prompt, 3 generated


@pytest.fixture
def batch(ledger: Ledger) -> str:
    """Ten jobs."""
    Batches(ledger.engine).add("b", "default", "x")
    lines = [Job(job_id=f"b{n}", prompt="x", batch_id="b") for n in range(10)]
    ledger.accept(lines)
    return "b"


def account(ledger: Ledger) -> Budget:
    with ledger.engine.connect() as connection:
        return budget_of(connection.execute(sa.select(batches)).one())


def end(ledger: Ledger, claims: dict[str, Claim], *job_ids: str) -> set[str]:
    return ledger.record([Outcome(claims[i], succeeds(claims[i])) for i in job_ids])


def error_codes(ledger: Ledger) -> Counter[str | None]:
    with ledger.engine.connect() as connection:
        return Counter(connection.scalars(sa.select(results.c.error_code)))


def test_the_rest_is_cancelled_and_what_runs_ends(ledger: Ledger, batch: str) -> None:
    """It overshoots by what a worker holds and has begun, and by no more."""
    limit(ledger.engine, batch, max_tokens=2 * TOKENS)
    claims = ledger.claim([f"b{n}" for n in range(5)], "me", 60)
    ledger.mark_started([Start(claims[f"b{n}"], 0.0) for n in range(4)])
    end(ledger, claims, "b0")
    assert stop_exhausted(ledger.engine) == {}
    end(ledger, claims, "b1")
    assert ledger.claim(["b5"], "other", 60) == {}, "no job begins any more"
    assert ledger.states(["b5"]) == {"b5": "cancelled"}
    assert stop_exhausted(ledger.engine) == {"b": {"cancelled": 4, "asked": 1}}
    assert stop_exhausted(ledger.engine) == {}, "once"
    assert ledger.renew(list(claims.values()), 60)[1] == {"b4"}, "held, not begun"
    end(ledger, claims, "b2", "b3")
    ledger.release([claims["b4"]])
    assert ledger.counts(batch) == {"succeeded": 4, "cancelled": 6}
    assert error_codes(ledger) == {None: 4, "budget_exhausted": 6}
    for job_id, spent in (("b4", 32), ("b5", 16), ("b9", 16)):
        error = ledger.results([job_id])[job_id].error
        assert error is not None
        assert error.message == f"batch b: {spent} tokens are spent, and 16 may be"
    assert account(ledger).spent_tokens == 4 * TOKENS
    with ledger.engine.connect() as connection:
        events = Counter(connection.scalars(sa.select(usage_events.c.job_id)))
    assert events == {f"b{n}": 1 for n in range(10)}, "one outcome each"


def test_a_batch_stops_at_so_many_failures(ledger: Ledger, batch: str) -> None:
    limit(ledger.engine, batch, max_failures=2)
    claims = ledger.claim(["b0", "b1", "b2"], "me", 60)
    ledger.record([Outcome(claims["b0"], fails(claims["b0"]))])
    end(ledger, claims, "b1")
    assert stop_exhausted(ledger.engine) == {}
    ledger.record([Outcome(claims["b2"], fails(claims["b2"]))])
    assert stop_exhausted(ledger.engine) == {"b": {"cancelled": 7, "asked": 0}}
    found = ledger.results(["b7"])["b7"].error
    assert found is not None
    assert found.message == "batch b: 2 jobs have failed, and it stops at 2"


def test_a_lost_job_of_a_stopped_batch_does_not_run_again(ledger: Ledger, batch: str) -> None:
    limit(ledger.engine, batch, max_tokens=TOKENS)
    ledger.claim(["b0"], "dies", -1)  # its lease has run out
    end(ledger, ledger.claim(["b1"], "me", 60), "b1")
    assert ledger.claim(["b0"], "me", 60) == {}
    assert ledger.states(["b0"]) == {"b0": "cancelled"}


def test_a_batch_goes_on_when_it_may_spend_more(ledger: Ledger, batch: str) -> None:
    limit(ledger.engine, batch, max_tokens=3 * TOKENS)
    claims = ledger.claim(["b0", "b1", "b2"], "me", 60)
    ledger.record([Outcome(claims["b0"], fails(claims["b0"]))])
    end(ledger, claims, "b1", "b2")
    assert stop_exhausted(ledger.engine) == {}, "22 of 24"
    end(ledger, ledger.claim(["b3"], "me", 60), "b3")
    stop_exhausted(ledger.engine)
    before = account(ledger)
    with pytest.raises(BudgetExhausted, match="30 tokens are spent, and 24 may be; go on with a"):
        resume(ledger.engine, batch)
    with pytest.raises(BudgetExhausted, match="30 tokens are spent, and 30 may be"):
        resume(ledger.engine, batch, max_tokens=30)
    assert account(ledger) == before
    assert ledger.counts(batch) == {"succeeded": 3, "failed": 1, "cancelled": 6}
    again = resume(ledger.engine, batch, max_tokens=1000)
    assert (len(again.jobs), again.full) == (7, None)
    run_queued(ledger)
    assert ledger.counts(batch) == {"succeeded": 10}
    assert account(ledger).spent_tokens == 30 + 7 * TOKENS
    assert resume(ledger.engine, batch).jobs == {}


def test_a_limit_that_comes_late_counts_what_was_before(ledger: Ledger, batch: str) -> None:
    end(ledger, ledger.claim(["b0"], "me", 60), "b0")
    assert account(ledger) == Budget()
    with pytest.raises(BudgetExhausted):
        limit(ledger.engine, batch, max_tokens=TOKENS)
    assert account(ledger) == Budget(), "refused, it changes nothing"
    limit(ledger.engine, batch, max_tokens=TOKENS + 1)
    assert account(ledger) == Budget(TOKENS + 1, None, TOKENS, 0)
    with pytest.raises(JobNotFound, match="'nothing'"):
        limit(ledger.engine, "nothing", max_tokens=1)


def test_what_fails_while_it_is_resumed_waits_for_the_next_time(
    ledger: Ledger, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_queued(ledger, fails)
    monkeypatch.setattr(stopping, "PAGE", 1)
    run_again = Batches.run_again

    def failing(self: Batches, job_ids: Sequence[str]) -> Again:
        again = run_again(self, job_ids)
        run_queued(ledger, fails)
        return again

    monkeypatch.setattr(Batches, "run_again", failing)
    assert len(resume(ledger.engine, batch).jobs) == 10
    with ledger.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(usage_events)) == 20


def test_failures_before_their_limit_count(ledger: Ledger, batch: str) -> None:
    """A share is told when the files were read, and jobs run before that."""
    claims = ledger.claim(["b0", "b1"], "me", 60)
    ledger.record([Outcome(claim, fails(claim)) for claim in claims.values()])
    with pytest.raises(BudgetExhausted, match="2 jobs have failed, and it stops at 2"):
        limit(ledger.engine, batch, max_failures=2)
    limit(ledger.engine, batch, max_failures=3)
    assert account(ledger).failures == 2
    claims = ledger.claim(["b2"], "me", 60)
    ledger.record([Outcome(claims["b2"], fails(claims["b2"]))])
    assert stop_exhausted(ledger.engine) == {"b": {"cancelled": 7, "asked": 0}}


def test_more_than_a_page_is_resumed(ledger: Ledger) -> None:
    Batches(ledger.engine).add("big", "default", "x")
    many = PAGE + 5
    ledger.accept([Job(job_id=f"j{n}", prompt="x", batch_id="big") for n in range(many)])
    Batches(ledger.engine).cancel("big")
    assert len(resume(ledger.engine, "big").jobs) == many
    assert ledger.counts("big") == {"queued": many}

"""The ledger on both databases: accepted once, claimed once, recorded once."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Result, Settings, Usage
from lorabatch.database import open_database
from lorabatch.errors import IdempotencyConflict, JobNotFound
from lorabatch.feed import Feed
from lorabatch.ledger import Claim, Outcome, Start
from lorabatch.result import ErrorInfo
from lorabatch.tables import job_attempts, jobs, results, usage_events
from tests.plans import explained


def job(**fields: object) -> Job:
    return Job.model_validate({"prompt": "hello", "tenant": "acme", "adapter_id": "sql", **fields})


def outcome(claim: Claim, text: str = "hi") -> Outcome:
    return Outcome(
        claim,
        Result(
            job_id=claim.job.job_id,
            tenant=claim.job.tenant,
            adapter_id=claim.job.adapter_id,
            adapter_version="v1",
            state="succeeded",
            text=text,
            token_ids=(1, 2, 3),
            finish_reason="length",
            seed=claim.job.seed,
            usage=Usage(prompt_tokens=5, output_tokens=3),
            attempt=claim.attempt,
        ),
    )


def rows(ledger: Ledger, table: sa.Table) -> list[sa.Row[tuple[object, ...]]]:
    with ledger.engine.connect() as connection:
        return list(connection.execute(table.select()))


def test_the_same_key_is_accepted_once(ledger: Ledger) -> None:
    first, again = job(idempotency_key="k"), job(idempotency_key="k")
    assert ledger.accept([first]) == {first.job_id: first.job_id}
    assert ledger.accept([again]) == {again.job_id: first.job_id}
    assert ledger.counts() == {"queued": 1}


def test_the_same_key_with_another_prompt_is_refused_and_accepts_nothing(ledger: Ledger) -> None:
    ledger.accept([job(idempotency_key="k")])
    with pytest.raises(IdempotencyConflict, match=r"idempotency key 'k' of tenant 'acme'"):
        ledger.accept([job(), job(idempotency_key="k", prompt="other")])
    assert ledger.counts() == {"queued": 1}


def test_the_same_key_of_two_tenants_is_two_jobs(ledger: Ledger) -> None:
    ledger.accept([job(idempotency_key="k"), job(idempotency_key="k", tenant="other")])
    assert ledger.counts() == {"queued": 2}


def test_a_job_id_taken_by_another_tenant_is_refused(ledger: Ledger) -> None:
    ledger.accept([job(job_id="a")])
    with pytest.raises(IdempotencyConflict, match="taken by a job of another tenant"):
        ledger.accept([job(job_id="a", tenant="other")])


def test_a_claim_brings_the_whole_job_back(ledger: Ledger) -> None:
    sent = job(
        prompt=None,
        messages=[{"role": "user", "content": "naïve 🦜"}],
        sampling_params={"temperature": 0.7, "stop": ["x"], "seed": 2**63 - 1},
        priority=-3,
        batch_id="b",
        custom_id="line-1",
    )
    ledger.accept([sent])
    claim = ledger.claim([sent.job_id], "me", 30)[sent.job_id]
    assert claim.job.model_dump(exclude={"idempotency_key"}) == sent.model_dump(
        exclude={"idempotency_key"}
    )
    assert (claim.attempt, claim.lease_token) == (1, 1)


def test_a_leased_job_cannot_be_claimed_until_the_lease_runs_out(ledger: Ledger) -> None:
    one = job()
    ledger.accept([one])
    first = ledger.claim([one.job_id], "first", 30)[one.job_id]
    assert ledger.claim([one.job_id], "second", 30) == {}
    ledger.renew([first], -1)
    second = ledger.claim([one.job_id], "second", 30)[one.job_id]
    assert (second.lease_token, second.attempt) == (2, 1)


def test_only_runs_count_as_attempts(ledger: Ledger) -> None:
    one = job()
    ledger.accept([one])
    stale = ledger.claim([one.job_id], "first", -1)[one.job_id]
    ledger.mark_started([Start(stale)])
    fresh = ledger.claim([one.job_id], "second", -1)[one.job_id]
    assert fresh.attempt == 2
    ledger.mark_started([Start(stale)])
    assert ledger.claim([one.job_id], "third", 30)[one.job_id].attempt == 2


def test_a_stale_worker_cannot_record(ledger: Ledger) -> None:
    one = job()
    ledger.accept([one])
    stale = ledger.claim([one.job_id], "first", -1)[one.job_id]
    fresh = ledger.claim([one.job_id], "second", 30)[one.job_id]
    assert ledger.renew([stale], 30) == ({one.job_id}, set())
    assert ledger.record([outcome(stale, "stale")]) == set()
    assert ledger.record([outcome(fresh, "fresh")]) == {one.job_id}
    assert ledger.record([outcome(fresh, "again")]) == set()
    assert ledger.results([one.job_id])[one.job_id].text == "fresh"
    assert len(rows(ledger, results)) == len(rows(ledger, usage_events)) == 1
    assert sorted(str(r.outcome) for r in rows(ledger, job_attempts)) == ["None", "succeeded"]


def test_a_result_reads_back_as_it_was_written(ledger: Ledger) -> None:
    one = job(batch_id="b", custom_id="c")
    ledger.accept([one])
    written = outcome(ledger.claim([one.job_id], "me", 30)[one.job_id], "a\x00b 🦜")
    ledger.record([written])
    read = ledger.results([one.job_id])[one.job_id]
    assert read.text == "a\ufffdb 🦜"
    times = {"submitted_us", "started_us", "finished_us", "text", "batch_id", "custom_id"}
    assert read.model_dump(exclude=times) == written.result.model_dump(exclude=times)
    assert (read.batch_id, read.custom_id) == ("b", "c")
    assert read.submitted_us is not None
    assert read.started_us is not None
    assert read.finished_us is not None
    assert read.submitted_us <= read.started_us <= read.finished_us


def test_usage_is_written_with_the_result(ledger: Ledger) -> None:
    one = job(batch_id="b")
    ledger.accept([one])
    ledger.record([outcome(ledger.claim([one.job_id], "me", 30)[one.job_id])])
    (event,) = rows(ledger, usage_events)
    assert (event.tenant, event.adapter_id, event.adapter_version) == ("acme", "sql", "v1")
    assert (event.input_tokens, event.output_tokens, event.billable) == (5, 3, True)
    assert event.batch_id == "b"
    assert event.queue_us >= 0
    assert event.run_us >= 0


def test_times_are_those_of_the_run_not_of_the_transaction(ledger: Ledger) -> None:
    one = job()
    ledger.accept([one])
    with ledger.engine.begin() as connection:
        connection.execute(jobs.update().values(submitted_us=jobs.c.submitted_us - 60_000_000))
    claim = ledger.claim([one.job_id], "me", 30)[one.job_id]
    now_s = time.monotonic()
    ended = Outcome(claim, outcome(claim).result, at_s=now_s - 10)
    ledger.record([ended], [Start(claim, at_s=now_s - 30)])
    (event,) = rows(ledger, usage_events)
    assert event.run_us == pytest.approx(20e6, abs=1e6)
    assert event.queue_us == pytest.approx(30e6, rel=0.2)
    assert event.recorded_us - event.occurred_us == pytest.approx(10e6, rel=0.2)
    (row,) = rows(ledger, jobs)
    assert row.attempts == 1
    assert row.finished_us - row.started_us == event.run_us


def test_a_start_and_an_outcome_of_a_lost_lease_are_left_out_together(ledger: Ledger) -> None:
    one, two = job(), job()
    ledger.accept([one, two])
    stale = ledger.claim([one.job_id], "first", -1)[one.job_id]
    ledger.claim([one.job_id], "second", 30)
    mine = ledger.claim([two.job_id], "first", 30)[two.job_id]
    starts = [Start(stale), Start(mine)]
    assert ledger.record([outcome(stale), outcome(mine)], starts) == {two.job_id}
    attempts = {row.job_id: row.attempts for row in rows(ledger, jobs)}
    assert attempts == {one.job_id: 0, two.job_id: 1}


def test_a_failing_usage_row_takes_the_result_with_it(ledger: Ledger) -> None:
    one, two = job(), job()
    ledger.accept([one, two])
    claims = ledger.claim([one.job_id, two.job_id], "me", 30)
    with ledger.engine.begin() as connection:
        event = {c.name: 0 for c in usage_events.c if not c.nullable and not c.primary_key}
        key = {"event_key": f"{two.job_id}/generation", "job_id": "x", "tenant": "t", "kind": "k"}
        connection.execute(usage_events.insert(), [{**event, **key, "billable": False}])
    with pytest.raises(sa.exc.IntegrityError):
        ledger.record([outcome(claim) for claim in claims.values()])
    assert rows(ledger, results) == []
    assert ledger.counts() == {"running": 2}


def test_released_jobs_can_be_claimed_at_once(ledger: Ledger) -> None:
    one = job()
    ledger.accept([one])
    ledger.release(list(ledger.claim([one.job_id], "me", 30).values()))
    assert ledger.counts() == {"queued": 1}
    again = ledger.claim([one.job_id], "you", 30)[one.job_id]
    assert (again.attempt, again.lease_token) == (1, 2)


def test_cancel_ends_a_queued_job_and_asks_for_a_running_one(ledger: Ledger) -> None:
    queued, running = job(), job()
    ledger.accept([queued, running])
    claim = ledger.claim([running.job_id], "me", 30)[running.job_id]
    states = ledger.cancel([queued.job_id, running.job_id])
    assert states == {queued.job_id: "cancelled", running.job_id: "running"}
    assert ledger.renew([claim], 30) == (set(), {running.job_id})
    assert ledger.results([queued.job_id])[queued.job_id].state == "cancelled"
    assert ledger.claim([queued.job_id], "me", 30) == {}
    with pytest.raises(JobNotFound, match="'nobody'"):
        ledger.cancel(["nobody"])


def test_a_message_that_is_no_job_is_recorded_as_failed_once(ledger: Ledger) -> None:
    error = ErrorInfo(code="invalid_job", message="no prompt")
    ledger.reject("bad", "acme", error)
    ledger.reject("bad", "acme", error)
    assert ledger.results(["bad"])["bad"].error == error
    assert ledger.counts() == {"failed": 1}
    good = job()
    ledger.accept([good])
    ledger.reject(good.job_id, "acme", error)
    assert ledger.counts() == {"failed": 1, "queued": 1}


def test_open_jobs_without_a_message_are_found(ledger: Ledger) -> None:
    unsent, sent, expired, leased = job(), job(), job(), job()
    ledger.accept([unsent, sent, expired, leased])
    feed = Feed(ledger.engine, "lorabatch")
    feed.mark_sent([sent.job_id])
    ledger.claim([expired.job_id], "me", -1)
    ledger.claim([leased.job_id], "me", 30)
    assert {m.job_id for m in feed.nowhere(-1)} == {sent.job_id, expired.job_id}
    assert [m.job_id for m in feed.nowhere(3600)] == [expired.job_id]
    assert Feed(ledger.engine, "other").nowhere(-1) == []


def test_many_threads_claim_each_job_once(ledger: Ledger) -> None:
    ids = [job(job_id=f"j{i}") for i in range(200)]
    ledger.accept(ids)
    claimed: list[str] = []

    def work(worker: int) -> None:
        for start in range(0, 200, 20):
            some = [f"j{(start + i + 10 * worker) % 200}" for i in range(20)]
            claimed.extend(ledger.claim(some, f"w{worker}", 30))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 200


def test_a_request_of_before_sampling_fields_stayed_out_is_known(ledger: Ledger) -> None:
    job = Job(prompt="hi", idempotency_key="k", sampling_params={"max_new_tokens": 4})
    ledger.accept([job])
    whole = {  # all fields that there were then
        **{"max_new_tokens": 4, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        **{"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
        **{"stop": [], "ignore_eos": False},
    }
    earlier = job.request_hash({**job.body(), "sampling_params": whole})
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(jobs).values(request_hash=earlier))
    again = job.model_copy(update={"job_id": "another"})
    assert ledger.accept([again]) == {"another": job.job_id}
    other = Job(prompt="hi", idempotency_key="k", sampling_params={"max_new_tokens": 5})
    with pytest.raises(IdempotencyConflict):
        ledger.accept([other])


def test_a_claim_looks_at_its_own_rows_however_many_wait(settings: Settings) -> None:
    """On SQLite; PostgreSQL decides by statistics, which a small table has none of."""
    ledger = Ledger(open_database(settings))
    ids = [f"j{i}" for i in range(300)]
    ledger.accept([job(job_id=job_id) for job_id in ids])
    plans = explained(ledger.engine, lambda: ledger.claim(ids[:100], "me", 30))
    assert any("job_id=?" in plan for plan in plans), plans
    assert not any("ix_jobs_state" in plan for plan in plans), plans
    ledger.engine.dispose()

"""How batches end before their time, cancelled, too late or without their file; and who waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.ledger import Claim, Outcome
from lorabatch.tables import jobs, openai_batches
from lorabatch.tenants import Limits, Tenants
from lorabatch_producer.server import batch_steps
from lorabatch_producer.server import openai_batches as routes
from tests.openai_client import batch_of, ended, line, lines_in
from tests.played_worker import succeeds, working


def wait_until(ready: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end_s, "not within 60 s"
        time.sleep(0.02)


def claimed(ledger: Ledger) -> list[Claim]:
    """One of the jobs, by a worker that runs it."""
    with ledger.engine.connect() as connection:
        first = connection.scalar(sa.select(sa.func.min(jobs.c.job_id)))
    return list(ledger.claim([first], "me", 60).values())


def under_way(client: openai.OpenAI, batch: Any, ledger: Ledger, lines: int) -> None:
    """Once all lines are jobs."""
    query = sa.select(openai_batches.c.accepted_us).where(
        openai_batches.c.batch_id == batch.id.removeprefix("batch_")
    )

    def accepted() -> object:
        with ledger.engine.connect() as connection:
            return connection.scalar(query)

    wait_until(accepted)
    now = client.batches.retrieve(batch.id)
    assert now.status == "in_progress"
    assert counts(now) == {"total": lines, "completed": 0, "failed": 0}


def counts(batch: Any) -> dict[str, int]:
    found: dict[str, int] = batch.request_counts.model_dump()
    return found


def test_a_batch_is_cancelled(client: openai.OpenAI, ledger: Ledger) -> None:
    made = batch_of(client, [line(n) for n in range(5)])
    under_way(client, made, ledger, 5)
    (claim,) = claimed(ledger)
    asked = client.batches.cancel(made.id)
    assert (asked.status, asked.cancelling_at is not None) == ("cancelling", True)
    assert client.batches.cancel(made.id).status == "cancelling"
    ledger.record([Outcome(claim, succeeds(claim))])
    done = ended(client, made)
    assert (done.status, done.cancelled_at is not None) == ("cancelled", True)
    good, bad = lines_in(client, done.output_file_id), lines_in(client, done.error_file_id)
    assert len(good) == 1
    assert [one["error"]["code"] for one in bad] == ["batch_cancelled"] * 4
    assert counts(done) == {"total": 5, "completed": 1, "failed": 0}
    assert ledger.counts() == {"succeeded": 1, "cancelled": 4}
    assert client.batches.cancel(made.id).status == "cancelled"


def test_lines_that_were_never_accepted_are_cancelled_too(
    client: openai.OpenAI, ledger: Ledger
) -> None:
    Tenants(ledger.engine).set(Limits(tenant="default", max_queued=2))
    made = batch_of(client, [line(n) for n in range(5)])
    wait_until(ledger.counts)
    client.batches.cancel(made.id)
    done = ended(client, made)
    errors = [one["error"]["code"] for one in lines_in(client, done.error_file_id)]
    assert (done.status, errors) == ("cancelled", ["batch_cancelled"] * 5)
    assert counts(done) == {"total": 5, "completed": 0, "failed": 0}
    assert ledger.counts() == {"cancelled": 2}


def test_what_has_ended_is_not_cancelled(client: openai.OpenAI, ledger: Ledger) -> None:
    made = batch_of(client, [line(0)])
    with working(ledger):
        ended(client, made)
    with pytest.raises(openai.ConflictError) as refused:
        client.batches.cancel(made.id)
    assert "it is completed" in refused.value.response.text


def test_a_batch_that_is_too_late_expires(
    client: openai.OpenAI, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(routes.WINDOWS_S, "24h", 2.0)
    made = batch_of(client, [line(n) for n in range(4)])
    under_way(client, made, ledger, 4)
    ledger.record([Outcome(claim, succeeds(claim)) for claim in claimed(ledger)])
    done = ended(client, made)
    assert (done.status, done.expired_at is not None) == ("expired", True)
    assert len(lines_in(client, done.output_file_id)) == 1
    errors = [one["error"]["code"] for one in lines_in(client, done.error_file_id)]
    assert errors == ["batch_expired"] * 3
    assert counts(done) == {"total": 4, "completed": 1, "failed": 0}
    assert ledger.counts().keys() == {"succeeded", "cancelled"}


def test_a_full_queue_is_waited_for(
    client: openai.OpenAI, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_steps, "FULL_S", 0.05)
    Tenants(ledger.engine).set(Limits(tenant="default", max_queued=2))
    made = batch_of(client, [line(n) for n in range(7)])
    with working(ledger):
        done = ended(client, made)
    assert [one["custom_id"] for one in lines_in(client, done.output_file_id)] == list("0123456")
    assert ledger.counts() == {"succeeded": 7}


def test_a_file_of_an_open_batch_is_kept(client: openai.OpenAI, ledger: Ledger) -> None:
    made = batch_of(client, [line(0)])
    with pytest.raises(openai.ConflictError):
        client.files.delete(made.input_file_id)
    with working(ledger):
        ended(client, made)
    assert client.files.delete(made.input_file_id).deleted


def test_a_file_that_vanished_fails_its_batch(
    client: openai.OpenAI, ledger: Ledger, http_settings: Settings
) -> None:
    made = batch_of(client, [line(n) for n in range(3)])
    under_way(client, made, ledger, 3)
    (http_settings.files_folder / made.input_file_id).unlink()
    with working(ledger):
        done = ended(client, made)
    assert done.status == "failed"
    assert done.errors is not None
    assert [error.code for error in done.errors.data or ()] == ["file_missing"]

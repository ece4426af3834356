"""What past jobs tell about jobs to come, in both databases."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Usage
from lorabatch.job import ChatMessage
from lorabatch.ledger import Claim
from lorabatch.result import Result
from lorabatch.tables import jobs, usage_events
from lorabatch_producer import past
from lorabatch_producer.past import Past, asked_chars, past_of
from lorabatch_producer.speed import busy_us
from tests.played_worker import fails, run_queued, succeeds

SECOND_US = 1_000_000


def ran(ledger: Ledger, *spans_s: tuple[int, int]) -> None:
    """Say when jobs ran: their beginnings and ends, by their ids."""
    with ledger.engine.begin() as connection:
        ids = list(connection.scalars(sa.select(jobs.c.job_id).order_by(jobs.c.job_id)))
        for job_id, (begun, ended) in zip(ids, spans_s, strict=True):
            when = {
                "occurred_us": ended * SECOND_US,
                "run_us": (ended - begun) * SECOND_US,
            }
            mine = sa.update(usage_events).where(usage_events.c.job_id == job_id)
            connection.execute(mine.values(**when))


def by_prompt(claim: Claim) -> Result:
    """A token for two characters, and as many generated as the adapter's name is long."""
    if claim.job.prompt == "fails":
        return fails(claim)
    usage = Usage(
        prompt_tokens=asked_chars(claim.job) // 2, output_tokens=len(claim.job.adapter_id or "")
    )
    return succeeds(claim, usage=usage, token_ids=tuple(range(usage.output_tokens)))


def test_means_of_what_succeeded(ledger: Ledger) -> None:
    said = (ChatMessage(role="system", content="abcd"), ChatMessage(role="user", content="efgh"))
    ledger.accept(
        [
            Job(job_id="a", adapter_id="sql", prompt="p" * 12),
            Job(job_id="b", adapter_id="poems", messages=said),
            Job(job_id="c", prompt="fails"),
        ]
    )
    run_queued(ledger, by_prompt)
    ran(ledger, (0, 2), (10, 14), (20, 90))
    found = past_of(ledger.engine, "tiny")
    assert (found.jobs, found.latest_us) == (2, 14 * SECOND_US)
    assert found.chars_per_token == 2.0
    assert found.output_tokens == {"sql": 3.0, "poems": 5.0}
    assert found.tokens_per_s == pytest.approx((6 + 3 + 4 + 5) / 6)


def test_of_another_base_model_nothing_is_known(ledger: Ledger) -> None:
    ledger.accept([Job(prompt="p")])
    run_queued(ledger)
    assert past_of(ledger.engine, "other") == Past()


def test_the_latest_jobs_count(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "LATEST", 1)
    ledger.accept([Job(job_id=name, adapter_id=name, prompt="p") for name in ("new", "old")])
    run_queued(ledger)
    ran(ledger, (5, 9), (1, 2))
    assert set(past_of(ledger.engine, "tiny").output_tokens) == {"new"}


def test_a_message_may_have_calls_and_no_content(ledger: Ledger) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "12345"}, {"role": "assistant", "tool_calls": [call]}]
    job = Job.parse({"messages": messages})
    ledger.accept([job])
    run_queued(ledger)
    assert asked_chars(job) == 5 + len(json.dumps([call]))
    assert past_of(ledger.engine, "tiny").chars_per_token == asked_chars(job) / 5


def test_prompts_that_were_erased_say_nothing(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="a", prompt="p" * 20), Job(job_id="b", prompt="p" * 20)])
    run_queued(ledger)
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.job_id == "a").values(body={}))
    assert past_of(ledger.engine, "tiny").chars_per_token == 4.0


@pytest.mark.parametrize(
    ("spans", "busy"),
    [([], 0), ([(0, 5), (2, 4)], 5), ([(8, 9), (0, 3), (2, 5)], 6), ([(1, 1)], 0)],
)
def test_time_that_overlaps_counts_once(spans: list[tuple[int, int]], busy: int) -> None:
    assert busy_us(spans) == busy

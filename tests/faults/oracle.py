"""The oracle: what must hold of the jobs of a try, whatever was done to the workers.

Every accepted job ended as it may; it has one result and one usage row, billable if it succeeded;
the usage agrees with the tokens that are stored; its text is its own; the broker holds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from lorabatch.tables import job_attempts, jobs, results, usage_events
from tests.fake_runner import fake_text
from tests.faults.batch import Batch
from tests.faults.shop import Shop

__all__ = ["Verdict", "judge"]


@dataclass
class Verdict:
    """Counts. `lost`: accepted and not ended as it should. All but the last two must be 0."""

    lost: int = 0
    duplicated: int = 0
    usage_difference: int = 0
    swapped: int = 0
    unpublished: int = 0
    left_in_broker: int = 0
    claims: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def faultless(self) -> bool:
        wrong = (self.lost, self.duplicated, self.usage_difference, self.swapped)
        return not any((*wrong, self.unpublished, self.left_in_broker))

    def add(self, other: Verdict) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def say(self, what: str) -> None:
        if len(self.examples) < 5:
            self.examples.append(what)


def judge(shop: Shop, batch: Batch, published: bool = True) -> Verdict:
    """Look at a try's jobs after its end. `published`: plain clients' results must be there."""
    ids = batch.ids
    states = {r.job_id: r.state for r in shop.rows(sa.select(jobs), jobs.c.job_id, ids)}
    stored = shop.rows(sa.select(results), results.c.job_id, ids)
    usage = shop.rows(sa.select(usage_events), usage_events.c.job_id, ids)
    verdict = Verdict(left_in_broker=sum(shop.in_broker().values()))
    verdict.claims = len(shop.rows(sa.select(job_attempts), job_attempts.c.job_id, ids))
    _endings(verdict, batch, states, stored)
    _usage(verdict, states, stored, usage)
    _texts(verdict, batch, stored)
    if published:
        _published(verdict, shop, batch)
    return verdict


def _endings(verdict: Verdict, batch: Batch, states: dict[str, str], stored: Sequence[Any]) -> None:
    ends = {row.job_id: row.state for row in stored}
    for job_id in batch.ids:
        state = states.get(job_id, "nowhere")
        if state not in batch.may_end_as(job_id) or ends.get(job_id) != state:
            verdict.lost += 1
            verdict.say(f"{job_id} is {state}, its result says {ends.get(job_id)}")


def _usage(
    verdict: Verdict, states: dict[str, str], stored: Sequence[Any], usage: Sequence[Any]
) -> None:
    events = Counter(row.job_id for row in usage)
    for job_id, count in events.items():
        if count > 1:
            verdict.duplicated += count - 1
            verdict.say(f"{job_id} has {count} usage rows")
    verdict.duplicated += len(stored) - len({row.job_id for row in stored})
    billed = {row.job_id: row for row in usage}
    for row in stored:
        event = billed.get(row.job_id)
        tokens = row.prompt_tokens + len(row.token_ids)
        seen = event.input_tokens + event.output_tokens if event else 0
        billable = states.get(row.job_id) == "succeeded"
        verdict.usage_difference += abs(tokens - seen)
        if event is None or tokens != seen or event.billable != billable:
            verdict.usage_difference += tokens == seen
            verdict.say(f"{row.job_id} has {tokens} tokens, {seen} in usage")
    summed = sum(row.input_tokens + row.output_tokens for row in usage)
    recounted = sum(row.prompt_tokens + len(row.token_ids) for row in stored)
    verdict.usage_difference = max(verdict.usage_difference, abs(summed - recounted))


def _texts(verdict: Verdict, batch: Batch, stored: Sequence[Any]) -> None:
    for row in stored:
        job = batch.jobs[row.job_id]
        whole = len(row.token_ids) == job.sampling_params.max_new_tokens
        own = row.text == fake_text(job) and whole
        if row.state == "succeeded" and not own:
            verdict.swapped += 1
            verdict.say(f"{row.job_id} has the output of another")


def _published(verdict: Verdict, shop: Shop, batch: Batch) -> None:
    for job_id in batch.plain:
        if not shop.broker.client.exists(f"celery-task-meta-{job_id}"):
            verdict.unpublished += 1
            verdict.say(f"{job_id}'s result is not in the result backend")

"""What past jobs of a base model tell about jobs to come: characters a token, tokens that adapters
generate, tokens a second. Looks at the latest jobs that succeeded, so that it takes no longer with
a large ledger. Raises nothing of its own; database errors pass through.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from lorabatch import Job
from lorabatch.tables import jobs, usage_events
from lorabatch_producer.speed import measured

__all__ = ["Past", "asked_chars", "past_of"]

LATEST = 10_000  # jobs whose outputs are averaged
SPEED_JOBS = 1000
PROMPTS = 500  # requests that are read to count their characters
SHOWN = [
    usage_events.c[name]
    for name in ("job_id", "adapter_id", "input_tokens", "output_tokens", "run_us", "occurred_us")
]


@dataclass(frozen=True)
class Past:
    """Of `jobs` past jobs, the last of which ended at `latest_us` UTC. None, or an adapter that is
    not there: nothing is known. `output_tokens`: the mean of each adapter's jobs."""

    jobs: int = 0
    latest_us: int | None = None
    chars_per_token: float | None = None
    tokens_per_s: float | None = None
    output_tokens: dict[str | None, float] = field(default_factory=dict)


def past_of(engine: sa.Engine, base_model: str) -> Past:
    """Of the jobs that workers with this base model did last."""
    query = sa.select(*SHOWN).where(
        usage_events.c.base_model == base_model, usage_events.c.billable
    )
    with engine.execution_options(read_only=True).begin() as connection:
        rows = connection.execute(
            query.order_by(usage_events.c.occurred_us.desc()).limit(LATEST)
        ).all()
        chars = _chars_per_token(connection, rows[:PROMPTS])
    generated = defaultdict[str | None, list[int]](list)
    for row in rows:
        generated[row.adapter_id].append(row.output_tokens)
    return Past(
        len(rows),
        rows[0].occurred_us if rows else None,
        chars,
        measured(rows[:SPEED_JOBS]),
        {name: sum(counts) / len(counts) for name, counts in generated.items()},
    )


def asked_chars(job: Job) -> int:
    """Characters of all that a job has the model read; its template's own are not known."""
    return _chars(job.body())


def _chars_per_token(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> float | None:
    read = {row.job_id: row.input_tokens for row in rows}
    query = sa.select(jobs.c.job_id, jobs.c.body).where(jobs.c.job_id.in_(read))
    counts = {job_id: _chars(body) for job_id, body in connection.execute(query)}
    known = [job_id for job_id, count in counts.items() if count]  # not those that are erased
    tokens = sum(read[job_id] for job_id in known)
    return sum(counts[job_id] for job_id in known) / tokens if tokens else None


def _chars(body: dict[str, Any]) -> int:
    messages = body.get("messages") or ()
    said = sum(len(message.get("content") or "") for message in messages)
    other = [body.get("tools"), *(message.get("tool_calls") for message in messages)]
    return len(body.get("prompt") or "") + said + sum(len(json.dumps(one)) for one in other if one)

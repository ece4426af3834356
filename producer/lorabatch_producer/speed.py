"""How fast a batch moves, and the workers did lately, as the ledger has it. Raises nothing of its
own; database errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.tables import jobs, usage_events

__all__ = ["AdapterCount", "adapter_counts", "busy_us", "measured", "recent_speed"]

WINDOW_US = 30_000_000
TOKENS = usage_events.c.input_tokens + usage_events.c.output_tokens


@dataclass(frozen=True)
class AdapterCount:
    """Lines of a batch for one adapter; None: the base model."""

    adapter_id: str | None
    ended: int
    total: int


def adapter_counts(engine: sa.Engine, batch_id: str) -> list[AdapterCount]:
    """Each adapter of a batch, by name."""
    open_one = sa.case((jobs.c.state.in_(("queued", "running")), 0), else_=1)
    query = sa.select(jobs.c.adapter_id, sa.func.sum(open_one), sa.func.count())
    query = query.where(jobs.c.batch_id == batch_id, sa.not_(jobs.c.superseded))
    with engine.execution_options(read_only=True).begin() as connection:
        rows = connection.execute(query.group_by(jobs.c.adapter_id))
        found = [AdapterCount(row[0], int(row[1]), int(row[2])) for row in rows]
    return sorted(found, key=lambda one: one.adapter_id or "")


def recent_speed(engine: sa.Engine, batch_id: str, since_us: int) -> float:
    """Tokens a second, read and generated, of a batch's jobs that ended in the last 30 s."""
    with engine.execution_options(read_only=True).begin() as connection:
        now = int(connection.scalar(sa.select(now_us())) or 0)
        first = max(now - WINDOW_US, since_us)
        query = sa.select(sa.func.sum(TOKENS)).where(
            usage_events.c.occurred_us > first, usage_events.c.batch_id == batch_id
        )
        tokens = connection.scalar(query) or 0
    return float(tokens) / max(1.0, (now - first) / 1e6)


def measured(past: Sequence[sa.Row[Any]]) -> float | None:
    """Tokens a second, read and generated, of all workers together while any of these usage events
    lasted; None: none took any time."""
    spent = busy_us((row.occurred_us - row.run_us, row.occurred_us) for row in past)
    tokens = sum(row.input_tokens + row.output_tokens for row in past)
    return tokens / (spent / 1e6) if spent else None


def busy_us(spans: Iterable[tuple[int, int]]) -> int:
    """How long at least one of these spans lasted; what lies between them does not count."""
    total, reached = 0, 0
    for begun, ended in sorted(spans):
        total += max(0, ended - max(begun, reached))
        reached = max(reached, ended)
    return total

"""A tenant's billed usage in buckets of time: minutes, hours or days of UTC.

Of those jobs that succeeded, at the time when they ended: what the usage report calls billable.
Times are seconds since 1970, a bucket's end is not in it. Reads SQLite and PostgreSQL; database
errors pass through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import sqlalchemy as sa

from lorabatch.tables import usage_events

__all__ = ["Kind", "Used", "edges", "usage_buckets"]

MICROS = 10**6


class Kind(NamedTuple):
    """What was used. `batch`: as a line of one."""

    adapter_id: str | None
    base_model: str | None
    batch: bool


@dataclass(frozen=True)
class Used:
    """`cached_tokens` are a part of the input."""

    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )


def edges(start_s: int, end_s: int, width_s: int, most: int) -> list[int]:
    """Where buckets begin and the last one ends, at most so many of them: the first and the last
    may be narrower than those of the clock."""
    inner = range(start_s - start_s % width_s + width_s, end_s, width_s)
    return [start_s, *inner[:most], end_s][: most + 1]


def usage_buckets(
    engine: sa.Engine, tenant: str, at: Sequence[int], width_s: int
) -> list[dict[Kind, Used]]:
    """For each of the buckets between these edges, what was used of each kind."""
    event = usage_events.c
    width = sa.literal_column(str(width_s * MICROS), sa.BigInteger)
    number = (event.occurred_us // width).label("number")
    kind = (event.adapter_id, event.base_model, event.batch_id.is_not(None).label("batch"))
    query = (
        sa.select(
            number,
            *kind,
            sa.func.count(),
            *map(sa.func.sum, (event.input_tokens, event.cached_tokens, event.output_tokens)),
        )
        .where(
            event.tenant == tenant,
            event.billable,
            event.occurred_us >= at[0] * MICROS,
            event.occurred_us < at[-1] * MICROS,
        )
        .group_by(number, *kind)
    )
    found: dict[int, dict[Kind, Used]] = defaultdict(dict)
    with engine.execution_options(read_only=True).begin() as connection:
        for row in connection.execute(query):
            adapter_id, base_model, batch = row[1:4]
            used = Used(*(int(value) for value in row[4:]))
            found[row.number][Kind(adapter_id, base_model, bool(batch))] = used
    return [found.get(first // width_s, {}) for first, _ in pairwise(at)]

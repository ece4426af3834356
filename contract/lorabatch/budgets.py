"""What batches may spend: tokens of their jobs, read and generated, and jobs that fail.

Outcomes are charged in the transaction that records them, so a batch's account is what the ledger
has. Who claims looks at it: of a batch that has reached its limit no job begins any more. Raises
nothing of its own; database errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lorabatch.result import Result
from lorabatch.tables import batches

__all__ = ["CAPPED", "Budget", "budget_of", "charge", "reasons"]

CAPPED = sa.or_(batches.c.max_tokens.is_not(None), batches.c.max_failures.is_not(None))
ACCOUNT = [batches.c[name] for name in ("max_tokens", "max_failures", "spent_tokens", "failures")]


@dataclass(frozen=True)
class Budget:
    """Of one batch. None: no limit. What was spent is counted while there is a limit."""

    max_tokens: int | None = None
    max_failures: int | None = None
    spent_tokens: int = 0
    failures: int = 0

    @property
    def exhausted(self) -> str | None:
        """Why no more of its jobs may begin; None: they may."""
        if self.max_tokens is not None and self.spent_tokens >= self.max_tokens:
            return f"{self.spent_tokens} tokens are spent, and {self.max_tokens} may be"
        if self.max_failures is not None and self.failures >= self.max_failures:
            return f"{self.failures} jobs have failed, and it stops at {self.max_failures}"
        return None


def budget_of(row: Any) -> Budget:
    """Of a row of `batches`."""
    return Budget(*(getattr(row, column.name) for column in ACCOUNT))


def charge(connection: sa.Connection, ended: Iterable[tuple[str | None, Result]]) -> None:
    """Add these outcomes to the accounts of their batches, if those have limits."""
    sums: dict[str, tuple[int, int]] = {}
    for batch_id, result in ended:
        tokens, failed = result.usage.total_tokens, int(result.state == "failed")
        if batch_id is not None and (tokens or failed):
            before = sums.get(batch_id, (0, 0))
            sums[batch_id] = before[0] + tokens, before[1] + failed
    for batch_id, (tokens, failed) in sorted(sums.items()):  # no deadlocks
        mine = sa.update(batches).where(batches.c.batch_id == batch_id, CAPPED)
        spent = batches.c.spent_tokens + tokens
        connection.execute(mine.values(spent_tokens=spent, failures=batches.c.failures + failed))


def reasons(connection: sa.Connection, batch_ids: Iterable[str | None]) -> dict[str | None, str]:
    """Of these batches those that may spend no more, and why."""
    asked = sorted({batch_id for batch_id in batch_ids if batch_id is not None})
    if not asked:
        return {}
    query = sa.select(batches.c.batch_id, *ACCOUNT).where(batches.c.batch_id.in_(asked), CAPPED)
    found = {row.batch_id: budget_of(row).exhausted for row in connection.execute(query)}
    return {key: f"batch {key}: {why}" for key, why in found.items() if why is not None}

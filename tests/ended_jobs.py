"""A few jobs of two tenants with known tokens, for sums by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from lorabatch import ErrorInfo, Usage
from lorabatch.ledger import Claim, Outcome
from tests.played_worker import succeeds

DAY_1 = datetime(2026, 1, 30, tzinfo=UTC)
DAY_2 = datetime(2026, 1, 31, tzinfo=UTC)

# job id, tenant, adapter, batch, ends as, prompt, cached, output tokens, when
JOBS: list[tuple[str, str, str | None, str | None, str, int, int, int, datetime]] = [
    ("a1", "acme", "sql", "b1", "succeeded", 10, 4, 3, DAY_1),
    ("a2", "acme", "sql", "b1", "succeeded", 20, 0, 5, DAY_1 + timedelta(hours=23)),
    ("a3", "acme", "sql", None, "failed", 7, 0, 1, DAY_2),
    ("a4", "acme", None, None, "succeeded", 2, 0, 1, DAY_2),
    ("b1", "beta", "sql", None, "succeeded", 100, 50, 8, DAY_2 - timedelta(microseconds=1)),
    ("b2", "beta", "pirate", None, "cancelled", 0, 0, 0, DAY_2 + timedelta(hours=1)),
]


def ended(claim: Claim) -> Outcome:
    _, _, adapter, _, state, prompt, cached, output, _ = next(
        row for row in JOBS if row[0] == claim.job.job_id
    )
    good = state == "succeeded"
    result = succeeds(
        claim,
        state=state,
        text="x" if good else None,
        token_ids=tuple(range(output)),
        usage=Usage(prompt_tokens=prompt, cached_tokens=cached, output_tokens=output),
        error=None if good else ErrorInfo(code="x", message="x"),
        adapter_version=f"{adapter}-v1" if adapter else None,
    )
    return Outcome(claim, result)

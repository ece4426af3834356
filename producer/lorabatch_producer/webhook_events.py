"""What a webhook says: a JSON document of a job or a batch that has ended, the same each time.

Made when it is sent, of what the ledger has: no text is kept twice. Database errors pass through.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lorabatch import Ledger, Result
from lorabatch.openai_batches import OpenAIBatches
from lorabatch.rows import moment

__all__ = ["bodies"]

RESULT_FIELDS = {
    *("job_id", "tenant", "adapter_id", "adapter_version", "custom_id", "batch_id"),
    *("state", "text", "finish_reason", "usage", "error", "submitted_us", "finished_us"),
}
PREFIX = "batch_"


def bodies(ledger: Ledger, rows: Sequence[Any]) -> dict[str, bytes]:
    """Of deliveries, by webhook_id; what cannot be said any more is left out."""
    of_jobs = [row.subject for row in rows if row.event.startswith("job.")]
    results = ledger.results(of_jobs) if of_jobs else {}
    found: dict[str, bytes] = {}
    for row in rows:
        if row.subject in results:
            found[row.webhook_id] = _document(row, _of_job(results[row.subject]))
        elif row.event.startswith("batch."):
            batch = OpenAIBatches(ledger.engine).find(row.subject, row.tenant)
            if batch is not None:
                found[row.webhook_id] = _document(row, _of_batch(batch))
    return found


def _document(row: Any, data: dict[str, Any]) -> bytes:
    at = moment(row.happened_us).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": row.event, "timestamp": at, "data": data}).encode()


def _of_job(result: Result) -> dict[str, Any]:
    return result.model_dump(mode="json", include=RESULT_FIELDS)


def _of_batch(row: Any) -> dict[str, Any]:
    counts = {name: getattr(row, name) for name in ("total", "completed", "failed")}
    return {
        "id": PREFIX + row.batch_id,
        "tenant": row.tenant,
        "status": row.status,
        "request_counts": counts,
        "output_file_id": row.output_file_id,
        "error_file_id": row.error_file_id,
        "metadata": row.metadata,
    }

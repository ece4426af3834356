"""Rows of the ledger's tables, from the contract's models and back.

A job's row holds its routing fields as columns and the rest of the request as `body`; NUL, which
PostgreSQL does not store, becomes U+FFFD. Times are microseconds since the epoch by the database's
clock, except `queue_us` and `run_us`, which are durations. Raises what the models raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from lorabatch.errors import DeadlinePassed, JobCancelled
from lorabatch.job import Job
from lorabatch.result import ErrorInfo, Result, Usage
from lorabatch.tables import NEVER_US

__all__ = [
    "bare_result",
    "cancelled",
    "job_row",
    "micros",
    "moment",
    "names_of",
    "output_tokens",
    "result_row",
    "stored_job",
    "stored_result",
    "too_late",
    "usage_row",
]


EPOCH = datetime.fromtimestamp(0, UTC)
Versions = Mapping[tuple[str, str], str]


def micros(at: datetime) -> int:
    return (at - EPOCH) // timedelta(microseconds=1)


def moment(at_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=at_us)


def names_of(job: Job) -> list[tuple[str, str]]:
    """The adapters that a job asks for, each with its tenant."""
    ids = job.merged_adapters.ids if job.merged_adapters else (job.adapter_id,)
    return [(job.tenant, adapter_id) for adapter_id in ids if adapter_id is not None]


def job_row(job: Job, now: int, versions: Versions) -> dict[str, Any]:
    """`versions`: of the adapters' names, as far as they are registered."""
    body = job.body()
    bound = {name[1]: versions[name] for name in names_of(job) if name in versions}
    return {
        "job_id": job.job_id,
        "tenant": job.tenant,
        "adapter_id": job.adapter_name,
        "batch_id": job.batch_id,
        "custom_id": job.custom_id,
        "idempotency_key": job.key,
        "request_hash": job.request_hash(body),
        "body": body,
        "priority": job.priority,
        "done_by_us": NEVER_US if job.done_by is None else micros(job.done_by),
        "adapter_versions": bound or sa.null(),
        "webhook": job.webhook,
        "submitted_us": now,
    }


def stored_job(row: Any) -> Job:
    """Without its webhook, which no worker needs: a URL that a later version would refuse stops no
    job."""
    return Job.model_validate(
        {
            **row.body,
            "job_id": row.job_id,
            "tenant": row.tenant,
            "adapter_id": None if "merged_adapters" in row.body else row.adapter_id,
            "batch_id": row.batch_id,
            "custom_id": row.custom_id,
            "idempotency_key": row.idempotency_key,
            "priority": row.priority,
            "done_by": None if row.done_by_us == NEVER_US else moment(row.done_by_us),
        }
    )


def bare_result(row: Any, error: ErrorInfo) -> Result:
    """A failed result of a job that no engine has seen."""
    return Result(
        job_id=row.job_id,
        tenant=row.tenant,
        adapter_id=row.adapter_id,
        state="failed",
        error=error,
        attempt=row.attempts,
    )


def cancelled(row: Any) -> Result:
    """Of a job that was cancelled before an engine saw it."""
    result = bare_result(row, ErrorInfo(code=JobCancelled.code, message="cancelled"))
    return result.model_copy(update={"state": "cancelled"})


def stored_result(row: Any) -> Result:
    error = None
    if row.results_error_code is not None:
        error = ErrorInfo(code=row.results_error_code, message=row.results_error_message)
    return Result(
        job_id=row.jobs_job_id,
        tenant=row.jobs_tenant,
        adapter_id=row.jobs_adapter_id,
        adapter_version=row.results_adapter_version,
        base_model=row.results_base_model,
        custom_id=row.jobs_custom_id,
        batch_id=row.jobs_batch_id,
        state=row.results_state,
        text=row.results_text,
        token_ids=tuple(row.results_token_ids),
        finish_reason=row.results_finish_reason,
        seed=row.results_seed,
        **(row.results_choices or {}),
        usage=Usage(
            prompt_tokens=row.results_prompt_tokens,
            output_tokens=output_tokens(row.results_token_ids, row.results_choices),
            cached_tokens=row.results_cached_tokens,
        ),
        error=error,
        attempt=row.results_attempt,
        submitted_us=row.jobs_submitted_us,
        started_us=row.jobs_started_us,
        finished_us=row.jobs_finished_us,
    )


def too_late(row: Any) -> Result:
    """A failed result of a job that waited beyond its deadline."""
    message = f"job {row.job_id!r}: not done by {moment(row.done_by_us):%Y-%m-%d %H:%M:%S} UTC"
    return bare_result(row, ErrorInfo(code=DeadlinePassed.code, message=message))


def result_row(result: Result, now: int) -> dict[str, Any]:
    error = result.error
    text = result.text
    return {
        "job_id": result.job_id,
        "state": result.state,
        "text": None if text is None else text.replace("\x00", "\ufffd"),
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "choices": _choices(result),
        "prompt_tokens": result.usage.prompt_tokens,
        "cached_tokens": result.usage.cached_tokens,
        "adapter_version": result.adapter_version,
        "base_model": result.base_model,
        "seed": result.seed,
        "attempt": result.attempt,
        "error_code": error.code if error else None,
        "error_message": error.message.replace("\x00", "\ufffd") if error else None,
        "recorded_us": now,
    }


def output_tokens(token_ids: Sequence[int], choices: Mapping[str, Any] | None) -> int:
    """Tokens that a stored result was generated with: those of `token_ids`, or of all choices, and
    of what was discarded."""
    stored = choices or {}
    texts = [choice["token_ids"] for choice in stored.get("choices") or ()] or [token_ids]
    return sum(map(len, [*texts, *(stored.get("discarded") or ())]))


def _choices(result: Result) -> Any:
    if result.choices is None and result.discarded is None:
        return sa.null()
    found = result.model_dump(mode="json", include={"choices", "discarded"}, exclude_defaults=True)
    for choice in found.get("choices", ()):
        choice["text"] = choice["text"].replace("\x00", "\ufffd")
    return found


def usage_row(row: Any, result: Result, started: int, finished: int, now: int) -> dict[str, Any]:
    return {
        "event_key": f"{row.job_id}/generation",
        "job_id": row.job_id,
        "tenant": row.tenant,
        "adapter_id": row.adapter_id,
        "adapter_version": result.adapter_version,
        "base_model": result.base_model,
        "batch_id": row.batch_id,
        "attempt": result.attempt,
        "kind": "generation",
        "input_tokens": result.usage.prompt_tokens,
        "cached_tokens": result.usage.cached_tokens,
        "output_tokens": result.usage.output_tokens,
        "queue_us": max(0, started - row.submitted_us),
        "run_us": max(0, finished - started),
        "billable": result.state == "succeeded",
        "occurred_us": finished,
        "recorded_us": now,
    }

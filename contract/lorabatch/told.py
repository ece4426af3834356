"""What a Celery client is told of a job that has ended: a state, and the value or the exception.

The same by whichever road it comes: from Redis, where the worker publishes it, from the ledger,
which a client's result backend reads, and to a link that is called with it. Raises nothing.
"""

from __future__ import annotations

from typing import Any

from celery import states
from celery.exceptions import TaskRevokedError

from lorabatch.errors import JobFailed
from lorabatch.result import ErrorInfo, Result

__all__ = ["failure", "told"]


def told(result: Result) -> tuple[str, dict[str, Any] | Exception]:
    """Celery's state of the task, and what `get()` returns, or raises."""
    if result.state == "succeeded":
        return states.SUCCESS, result.model_dump(mode="json")
    if result.state == "cancelled":
        return states.REVOKED, TaskRevokedError("cancelled")
    return states.FAILURE, failure(result)


def failure(result: Result) -> JobFailed:
    """Readable without our package, with the stable code."""
    error = result.error or ErrorInfo(code="error", message="no reason was recorded")
    return JobFailed(f"{error.code}: {error.message}")

"""A delivery: one message in this worker's hands, from the broker to its acknowledgement.

Also how a message is read. Our own producer sends a pointer (schema_version, tenant,
adapter_id) to a row that is in the ledger already; a plain Celery client sends the job's fields
as keyword arguments, and its task id is the job id. `read` raises InvalidJob, whose text names
the job and the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.utils.time import maybe_iso8601

from lorabatch.errors import InvalidJob, shown
from lorabatch.job import SCHEMA_VERSION, Job, is_identifier
from lorabatch.result import ErrorInfo, Result
from lorabatch_worker.links import refused_links

__all__ = [
    "AGAIN_S",
    "Delivery",
    "failed_result",
    "newer_pointer",
    "read",
    "tenant_of",
    "unreadable",
]

AGAIN_S = 10.0
"""After how long a message that went back comes again, if nothing says otherwise."""

POINTER_FIELDS = frozenset({"schema_version", "tenant", "adapter_id"})
WHOLE_FIELDS = frozenset({"prompt", "messages"})
VERSIONS = range(1, SCHEMA_VERSION + 1)


@dataclass(eq=False)
class Delivery:
    """A message and what to do at its end. What is `on_` runs on the hub's thread. `on_ended`
    acknowledges, so it may only be called once the ledger has the outcome. `on_postponed` has the
    broker give the message out again after so many seconds, and says why the job was put off; None
    if it has ended and only its end is not told."""

    task_id: str
    on_ended: Callable[[Result], None]
    on_started: Callable[[], None] = lambda: None
    on_postponed: Callable[[float, str | None], None] | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    publish: bool = True
    links: Context | None = None
    """The request, if it has tasks to be called with the outcome."""
    time_limit_s: float | None = None
    expires_s: float | None = None
    """When, by the monotonic clock, it is too late to begin."""
    revoked: bool = False
    refusal: str | None = None
    job_id: str | None = None
    """The job it turned out to be for; not the task id if an idempotency key was known."""

    @property
    def tells(self) -> bool:
        """Somebody is told the result."""
        return self.publish or self.links is not None


def read(delivery: Delivery) -> Job | None:
    """The job that a message carries; None for a pointer to a row of the ledger."""
    name = shown(delivery.task_id)
    if delivery.refusal is not None:
        raise InvalidJob(f"job {name}: {delivery.refusal}")
    if not is_identifier(delivery.task_id):
        raise InvalidJob(
            f"job {name}: the task id is the job id, so it must be 1 to 64 letters, digits, "
            "'_', '.', ':', '@' or '-'"
        )
    if delivery.args:
        raise InvalidJob(
            f"job {name}: {len(delivery.args)} positional arguments; give keyword arguments only"
        )
    fields = dict(delivery.kwargs)
    if fields.keys() <= POINTER_FIELDS and fields.get("schema_version") in VERSIONS:
        return None
    if fields.get("job_id", delivery.task_id) != delivery.task_id:
        raise InvalidJob(
            f"job {name}: job_id {shown(fields['job_id'])} is not the task id; leave it out"
        )
    return Job.parse({**fields, "job_id": delivery.task_id})


def unreadable(message: Any, app: Celery) -> str | None:
    """Why a message of ours cannot even be taken apart, or its links not be called; None if all is
    well.

    Celery and kombu raise on these, and a raise there either drops the message or stops the
    worker, so it is looked at first.
    """
    try:
        payload = _payload(message)
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, it is the message's fault
        return f"the body cannot be read ({type(error).__name__}); send JSON"
    if not isinstance(payload, list | tuple) or len(payload) != 3:
        return "the body is not [args, kwargs, options]"
    args, kwargs, options = payload
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        return "the body is not [args, kwargs, options] with a list and an object"
    if isinstance(options, dict) and (why := refused_links(options, app)):
        return why
    return _bad_header(message.headers)


def newer_pointer(message: Any) -> str | None:
    """Why a message that can be read is for newer workers; None if it is not. A whole job is not:
    it is refused, and who sent it is told; what a pointer leads to was accepted."""
    fields = _payload(message)[1]
    version = fields.get("schema_version")
    if WHOLE_FIELDS & fields.keys() or not isinstance(version, int) or version < VERSIONS.stop:
        return None
    return f"schema_version {version} is newer than {VERSIONS[-1]}; upgrade this worker"


def _payload(message: Any) -> Any:
    payload = message.payload
    if isinstance(payload, dict) and "args" in payload:  # protocol 1
        return payload["args"], payload.get("kwargs", {}), payload
    return payload


def _bad_header(headers: Mapping[str, Any]) -> str | None:
    if not isinstance(headers.get("id"), str):
        return "the header id is not a text"
    limits = headers.get("timelimit") or (None, None)
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        return "the header timelimit is not a pair"
    if not all(limit is None or isinstance(limit, int | float) for limit in limits):
        return "the header timelimit is not a pair of numbers"
    for name in ("eta", "expires"):
        try:
            maybe_iso8601(headers.get(name))
        except (AttributeError, ValueError, TypeError):
            return f"the header {name} is not an ISO 8601 time: {shown(headers.get(name))}"
    return None


def tenant_of(delivery: Delivery) -> str:
    """Whom to count a message to that is no job."""
    tenant = delivery.kwargs.get("tenant")
    return str(tenant) if is_identifier(tenant) else "default"


def failed_result(job_id: str, tenant: str, code: str, message: str) -> Result:
    """The outcome of a message that never became a job."""
    error = ErrorInfo(code=code, message=message)
    return Result(job_id=job_id, tenant=tenant, adapter_id=None, state="failed", error=error)

"""Every error that lorabatch raises on purpose, in one tree.

    LoraBatchError
    ├── SettingsError            a setting has a value that cannot be used
    ├── JobError                 this job cannot be run as it is; a retry gets the same answer
    │   ├── InvalidJob           a field is missing, of the wrong type or out of range
    │   ├── PromptTooLong        prompt + max_new_tokens do not fit the context
    │   ├── UnknownAdapter       no adapter of that id is configured
    │   ├── InvalidAdapter       the adapter's files are broken or do not fit the base model
    │   │   └── UnsupportedAdapter   valid PEFT, but not (yet) something we compute right
    │   ├── AdapterSetAside      the adapter failed before and is not tried again yet
    │   ├── AttemptsExhausted    the job was started too often without an outcome
    │   ├── DeadlinePassed       the job had not ended by its `done_by`
    │   └── EngineFault          the engine failed while it ran this job
    │       └── OutOfMemory      not enough memory to run it, even alone
    ├── AdapterUnavailable       the adapter's source did not answer in time
    ├── IdempotencyConflict      same tenant and key, another request
    ├── UnsupportedModel         the base model is one that the engine would get wrong
    ├── DatabaseNotReady         not reachable, or its schema is not at this version
    ├── QueueNotReady            the broker is not reachable or would lose messages
    ├── QueueFull                as many jobs wait as may: none was accepted, come again
    ├── RateLimited              a tenant asked for more in this minute than it may: come again
    ├── KeyRefused               the HTTP API wants a key, and this is none, or holds no longer
    ├── NotAllowed               the key is not for this, or not for that tenant
    ├── NotVerified              raised to who receives: this webhook is not ours, or not of now
    ├── BudgetExhausted          a batch has spent or failed as much as it may
    ├── JobNotFound              no job of that id
    ├── JobFailed                raised to who waits: the job ended as failed
    ├── JobCancelled             raised to who waits: the job was cancelled
    ├── TextChanged              raised to who follows: the job was run again, and not alike
    ├── ServerStops              raised to who waits: this server stops, the job goes on
    └── WaitTimeout              raised to who waits: no outcome within the time given

Each has a stable `code`, which is what results and tables hold, and a sentence that names
the id, the value seen, the value wanted and the fix.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ValidationError

__all__ = [
    "AdapterSetAside",
    "AdapterUnavailable",
    "AttemptsExhausted",
    "BudgetExhausted",
    "DatabaseNotReady",
    "DeadlinePassed",
    "EngineFault",
    "IdempotencyConflict",
    "InvalidAdapter",
    "InvalidJob",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobNotFound",
    "KeyRefused",
    "LoraBatchError",
    "NotAllowed",
    "NotVerified",
    "OutOfMemory",
    "PromptTooLong",
    "QueueFull",
    "QueueNotReady",
    "RateLimited",
    "ServerStops",
    "SettingsError",
    "TextChanged",
    "UnknownAdapter",
    "UnsupportedAdapter",
    "UnsupportedModel",
    "WaitTimeout",
    "explain",
]

SHOWN_VALUE_CHARS = 80
MANY = 1000
PROMPTS = ("prompt", "content")


class LoraBatchError(Exception):
    """Base of the tree. `code` is stable; the text is for people, those who run the service.
    `public`: what everybody else may be told; the same text, unless that names a place."""

    code: ClassVar[str] = "error"

    def __init__(self, text: str = "", public: str | None = None) -> None:
        super().__init__(text)
        self.public = text if public is None else public


class SettingsError(LoraBatchError):
    code = "settings"


class JobError(LoraBatchError):
    code = "job"


class InvalidJob(JobError):
    code = "invalid_job"


class PromptTooLong(JobError):
    code = "prompt_too_long"


class UnknownAdapter(JobError):
    code = "unknown_adapter"


class InvalidAdapter(JobError):
    code = "invalid_adapter"


class UnsupportedAdapter(InvalidAdapter):
    code = "unsupported_adapter"


class AdapterSetAside(JobError):
    code = "adapter_set_aside"


class AttemptsExhausted(JobError):
    code = "attempts_exhausted"


class DeadlinePassed(JobError):
    code = "deadline_passed"


class EngineFault(JobError):
    code = "engine_fault"


class OutOfMemory(EngineFault):
    code = "oom"


class AdapterUnavailable(LoraBatchError):
    code = "adapter_unavailable"


class IdempotencyConflict(LoraBatchError):
    code = "idempotency_conflict"


class UnsupportedModel(LoraBatchError):
    code = "unsupported_model"


class DatabaseNotReady(LoraBatchError):
    code = "database_not_ready"


class QueueFull(LoraBatchError):
    code = "queue_full"


class QueueNotReady(LoraBatchError):
    code = "queue_not_ready"


class RateLimited(LoraBatchError):
    code = "rate_limited"


class KeyRefused(LoraBatchError):
    code = "invalid_api_key"


class NotAllowed(LoraBatchError):
    code = "not_allowed"


class NotVerified(LoraBatchError):
    code = "not_verified"


class BudgetExhausted(LoraBatchError):
    code = "budget_exhausted"


class JobNotFound(LoraBatchError):
    code = "job_not_found"


class JobFailed(LoraBatchError):
    code = "job_failed"


class JobCancelled(LoraBatchError):
    code = "job_cancelled"


class TextChanged(LoraBatchError):
    code = "text_changed"


class ServerStops(LoraBatchError):
    code = "server_stops"


class WaitTimeout(LoraBatchError):
    code = "wait_timeout"


def shown(value: object) -> str:
    """A value as an error shows it: short, on one line; of a collection only its kind and size,
    because it may hold a prompt."""
    if isinstance(value, (dict, list, tuple)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    text = repr(value)
    if len(text) <= SHOWN_VALUE_CHARS:
        return text
    return f"{text[:SHOWN_VALUE_CHARS]}... ({len(text)} characters)"


def explain(error: ValidationError, prefix: str = "") -> str:
    """One line for a pydantic error: each field, what is wanted, and the value seen. Of more than
    MANY, which nobody sends by mistake, only how many they are: to name them costs 10 us each."""
    if error.error_count() > MANY:
        return f"{error.error_count():,} fields or items are wrong, too many to name; send fewer"
    items = error.errors(include_url=False, include_context=False)
    inner = {item["loc"][:n] for item in items for n in range(1, len(item["loc"]))}
    parts = []
    for item in items:
        if item["loc"] in inner:
            continue  # it is only wrong because of what is wrong inside it
        field = prefix + ".".join(str(x)[:SHOWN_VALUE_CHARS] for x in item["loc"])
        where = f"{field}: " if field else ""
        wanted = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            parts.append(f"{field}: missing")
        elif item["type"] == "extra_forbidden":
            parts.append(f"{field}: no such field; remove it or check its spelling")
        elif item["type"] == "value_error" and isinstance(item["input"], dict):
            parts.append(where + wanted)
        else:
            parts.append(f"{where}{wanted} (got {_seen(item['loc'], item['input'])})")
    return "; ".join(parts)


def _seen(loc: tuple[int | str, ...], value: object) -> str:
    """Errors are kept and logged, and prompts are not for either."""
    if loc and loc[-1] in PROMPTS and isinstance(value, str):
        return f"a text of {len(value)} characters"
    return shown(value)

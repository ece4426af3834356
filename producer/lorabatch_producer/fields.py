"""Jobs from keyword arguments or mappings, where sampling fields may be given flat, and what all
foreign shapes of a request share.

`{"prompt": "hi", "temperature": 0.7}` is the same as
`{"prompt": "hi", "sampling_params": {"temperature": 0.7}}`. Raises InvalidJob.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from lorabatch import Job, SamplingParams
from lorabatch.errors import InvalidJob, explain, shown
from lorabatch_producer.console import printable

__all__ = [
    "SAMPLING_FIELDS",
    "SHORT_FIELDS",
    "called",
    "make_job",
    "nest_sampling",
    "only_these",
    "without_nulls",
]

SAMPLING_FIELDS = frozenset(SamplingParams.model_fields)
# Of a line of a bulk file that says all that a job needs.
SHORT_FIELDS = SAMPLING_FIELDS | {
    *("adapter_id", "prompt", "messages", "custom_id", "tenant", "sampling_params", "priority"),
    *("tools", "tool_choice", "parallel_tool_calls", "merged_adapters", "webhook"),
}


def make_job(job: Job | Mapping[str, Any] | None = None, /, **fields: Any) -> Job:
    """A checked job from a Job, a mapping, keywords, or a mapping with keywords on top."""
    if isinstance(job, Job):
        if fields:
            raise InvalidJob(
                f"job {job.job_id!r}: give a Job or fields ({', '.join(sorted(fields))}), not both"
            )
        return job
    if job is not None and not isinstance(job, Mapping):
        raise InvalidJob(f"a job must be a Job or a mapping of its fields, got {shown(job)}")
    return Job.parse(nest_sampling({**(job or {}), **fields}))


def nest_sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields with the flat sampling ones moved into `sampling_params`."""
    flat = {name: value for name, value in fields.items() if name in SAMPLING_FIELDS}
    if not flat:
        return dict(fields)
    nested = fields.get("sampling_params")
    nested = {} if nested is None else nested
    if isinstance(nested, SamplingParams):
        nested = nested.model_dump(exclude_unset=True)
    if not isinstance(nested, Mapping):
        raise InvalidJob(f"sampling_params: must be an object (got {shown(nested)})")
    twice = sorted(set(flat) & set(nested))
    if twice:
        raise InvalidJob(
            f"{', '.join(twice)}: given flat and in sampling_params; give it in one place"
        )
    rest = {name: value for name, value in fields.items() if name not in SAMPLING_FIELDS}
    return {**rest, "sampling_params": {**nested, **flat}}


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A foreign request's fields; one that is null is as if it were not there."""
    return {name: value for name, value in fields.items() if value is not None}


def called(name: str, field: str, value: object) -> Any:
    """A sampling field's value, checked here because a foreign request calls it otherwise."""
    try:
        return getattr(SamplingParams.model_validate({field: value}), field)
    except ValidationError as error:
        raise InvalidJob(explain(error).replace(f"{field}: ", f"{name}: ", 1)) from None


def only_these(
    given: Mapping[str, Any],
    known: Collection[str],
    neutral: Mapping[str, tuple[object, ...]],
    where: str,
) -> None:
    """Refuse what would change the outcome and is not computed: all that is neither known nor has
    a value that asks for nothing beyond what we do."""
    for name, value in given.items():
        # compared with their types: 1 == True in Python, not in JSON
        same = (type(value) is type(ours) and value == ours for ours in neutral.get(name, ()))
        if name not in known and not any(same):
            raise InvalidJob(
                f"{where}{printable(name)[:80]}: not supported, or no field at all (got "
                f"{shown(value)}); nothing is ignored, so remove it"
            )

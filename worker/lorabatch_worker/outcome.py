"""Outcomes: what the ledger is told of a job that the engine is done with."""

from __future__ import annotations

from typing import Literal

import structlog

from lorabatch.errors import EngineFault, InvalidJob, JobCancelled, LoraBatchError
from lorabatch.ledger import Claim, Outcome
from lorabatch.result import Choice, ErrorInfo, Result, Usage
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.choices import choice_of, ranked
from lorabatch_worker.sequence import Family, Sequence

__all__ = ["CANCELLED", "GRAMMAR", "aborted", "explained", "failed", "finished"]

log = structlog.get_logger(__name__)

CANCELLED = "cancelled"
GRAMMAR = "grammar"


def finished(sequence: Sequence, base: BaseModel, reason: str | None = None) -> Outcome:
    """The job of a sequence: all of its own ended by themselves, or were ended for `reason`.

    What was generated until then is counted in any case; texts are kept only on success. Whatever
    keeps a result from being made fails its job alone.
    """
    try:
        return _finished(sequence, base, reason)
    except Exception as error:  # noqa: BLE001 - or all that ended with it would have no outcome
        what = f"job {sequence.job_id!r}: its result could not be made"
        return failed(sequence.claim, explained(error, what), base.name)


def _finished(sequence: Sequence, base: BaseModel, reason: str | None) -> Outcome:
    job, params, members = sequence.claim.job, sequence.params, sequence.family.members
    texts: list[Choice] = []
    kept = 1
    if reason is None:
        members, kept = ranked(members), params.n
        tokenizer = base.tokenizer_for(sequence.adapter)
        texts = [choice_of(one, tokenizer) for one in members[:kept]]
    first, discarded = members[0], members[kept:]
    error = None if reason is None else _ended(reason)
    result = Result(
        job_id=job.job_id,
        tenant=job.tenant,
        adapter_id=job.adapter_name,
        adapter_version=sequence.adapter_version,
        base_model=base.name,
        custom_id=job.custom_id,
        batch_id=job.batch_id,
        state="succeeded" if reason is None else _state(reason),
        text=texts[0].text if texts else None,
        token_ids=tuple(first.output),
        finish_reason=first.finish_reason,
        seed=first.seed,
        choices=tuple(texts) if texts and (params.n > 1 or params.logprobs) else None,
        discarded=tuple(tuple(one.output) for one in discarded) or None,
        usage=_usage(sequence.family),
        error=error,
        attempt=sequence.claim.attempt,
        submitted_us=sequence.claim.submitted_us,
        started_us=sequence.claim.started_us,
    )
    return Outcome(sequence.claim, result)


def _usage(family: Family) -> Usage:
    """The prompt once, unless the job was ended before it began, and all that was generated."""
    members = family.members
    return Usage(
        prompt_tokens=len(members[0].prompt) if family.begun else 0,
        output_tokens=sum(len(one.output) for one in members),
        cached_tokens=members[0].cached_tokens,
    )


def failed(claim: Claim, error: ErrorInfo, base_model: str) -> Outcome:
    """A job that ended without a sequence to show for it."""
    job = claim.job
    result = Result(
        job_id=job.job_id,
        tenant=job.tenant,
        adapter_id=job.adapter_name,
        base_model=base_model,
        custom_id=job.custom_id,
        batch_id=job.batch_id,
        state=_state(error.code),
        seed=job.seed,
        error=error,
        attempt=claim.attempt,
        submitted_us=claim.submitted_us,
        started_us=claim.started_us,
    )
    return Outcome(claim, result)


def aborted(claim: Claim, reason: str, base_model: str) -> Outcome:
    """A job that was ended for `reason` before it had a sequence."""
    return failed(claim, _ended(reason), base_model)


def explained(error: BaseException, what: str) -> ErrorInfo:
    """The error as the job's owner is told it; one that is not of our tree goes to the log."""
    if isinstance(error, LoraBatchError):
        return ErrorInfo(code=error.code, message=error.public)
    log.error(what, exc_info=error)
    return ErrorInfo(
        code=EngineFault.code, message=f"{what} ({type(error).__name__}); see the worker's log"
    )


def _ended(reason: str) -> ErrorInfo:
    if reason == CANCELLED:
        return ErrorInfo(code=JobCancelled.code, message="cancelled")
    if reason == GRAMMAR:
        message = (
            "structured_outputs or tools: what may come next got too complex to compute, or no "
            "token could go on; make the schema or regex simpler"
        )
        return ErrorInfo(code=InvalidJob.code, message=message)
    return ErrorInfo(code=reason, message=f"ended by the worker: {reason}")


def _state(reason: str) -> Literal["failed", "cancelled"]:
    return "cancelled" if reason in (CANCELLED, JobCancelled.code) else "failed"

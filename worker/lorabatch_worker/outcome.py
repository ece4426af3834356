"""Outcomes: what the ledger is told of a job that the engine is done with."""

from __future__ import annotations

from typing import Literal

import structlog

from lorabatch.errors import EngineFault, JobCancelled, LoraBatchError
from lorabatch.ledger import Claim, Outcome
from lorabatch.result import ErrorInfo, Result, Usage
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.sequence import Sequence
from lorabatch_worker.stop import decode, trim

__all__ = ["CANCELLED", "aborted", "explained", "failed", "finished"]

log = structlog.get_logger(__name__)

CANCELLED = "cancelled"


def finished(sequence: Sequence, base: BaseModel, reason: str | None = None) -> Outcome:
    """A sequence that ended by itself, or that was ended for `reason`.

    What was generated until then is counted in any case; the text is kept only on success.
    """
    job = sequence.claim.job
    text = None
    if reason is None:
        text = decode(base.tokenizer_for(sequence.adapter), sequence.output)
        if sequence.finish_reason == "stop_sequence":
            text = trim(text, sequence.params.stop)
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
        text=text,
        token_ids=tuple(sequence.output),
        finish_reason=sequence.finish_reason,
        seed=job.seed,
        usage=Usage(
            prompt_tokens=len(sequence.prompt),
            output_tokens=len(sequence.output),
            cached_tokens=sequence.cached_tokens,
        ),
        error=error,
        attempt=sequence.claim.attempt,
        submitted_us=sequence.claim.submitted_us,
        started_us=sequence.claim.started_us,
    )
    return Outcome(sequence.claim, result)


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
        return ErrorInfo(code=error.code, message=str(error))
    log.error(what, exc_info=error)
    return ErrorInfo(
        code=EngineFault.code, message=f"{what} ({type(error).__name__}); see the worker's log"
    )


def _ended(reason: str) -> ErrorInfo:
    if reason == CANCELLED:
        return ErrorInfo(code=JobCancelled.code, message="cancelled")
    return ErrorInfo(code=reason, message=f"ended by the worker: {reason}")


def _state(reason: str) -> Literal["failed", "cancelled"]:
    return "cancelled" if reason in (CANCELLED, JobCancelled.code) else "failed"

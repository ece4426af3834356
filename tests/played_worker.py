"""A worker played by the ledger's own methods: it claims and records, and generates nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import sqlalchemy as sa

from lorabatch import ErrorInfo, Ledger, Result, Usage
from lorabatch.ledger import Claim, Outcome
from lorabatch.tables import jobs

Play = Callable[[Claim], Result]


def succeeds(claim: Claim, **fields: object) -> Result:
    """A result that names what it was made from, so that a swap would show."""
    job = claim.job
    asked = job.prompt or (job.messages or ())[-1].content
    result = Result(
        job_id=job.job_id,
        tenant=job.tenant,
        adapter_id=job.adapter_id,
        adapter_version=f"{job.adapter_id}-v1" if job.adapter_id else None,
        base_model="tiny",
        state="succeeded",
        text=f"{job.adapter_id}: {asked}",
        token_ids=(1, 2, 3),
        finish_reason="eos_token",
        seed=job.seed,
        usage=Usage(prompt_tokens=5, output_tokens=3, cached_tokens=2),
        attempt=claim.attempt,
    )
    return result.model_copy(update=fields)


def fails(claim: Claim) -> Result:
    """A failed result that has burnt one token."""
    return succeeds(
        claim,
        state="failed",
        text=None,
        finish_reason=None,
        token_ids=(1,),
        usage=Usage(prompt_tokens=5, output_tokens=1),
        error=ErrorInfo(code="unknown_adapter", message="no adapter of that id"),
    )


def by_adapter(claim: Claim) -> Result:
    """Fails jobs of the adapter `broken`, runs all others."""
    return fails(claim) if claim.job.adapter_id == "broken" else succeeds(claim)


def run_queued(ledger: Ledger, play: Play = succeeds) -> set[str]:
    """Claim and end everything that is queued: the ids."""
    with ledger.engine.execution_options(read_only=True).begin() as connection:
        query = sa.select(jobs.c.job_id).where(jobs.c.state == "queued")
        queued = list(connection.scalars(query))
    claims = ledger.claim(queued, "played", 60)
    return ledger.record([Outcome(claim, play(claim)) for claim in claims.values()])


@contextlib.contextmanager
def working(ledger: Ledger, play: Play = succeeds) -> Iterator[None]:
    """A thread that ends whatever is queued until the block is left."""
    over = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not over.wait(0.01):
                run_queued(ledger, play)
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]

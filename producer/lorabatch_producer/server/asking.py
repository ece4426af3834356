"""A request that waits for its job: accepted, waited for, and answered with how it ended.

Whoever stops waiting, because it is gone or because `http_wait_s` is over, has its job cancelled:
nobody could ask for the text again. With an `Idempotency-Key` the job goes on, and the same
request with the same key waits for it again. Raises what accepting raises, JobCancelled,
WaitTimeout, and for a job that failed the error of its code.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from lorabatch import Job, Result
from lorabatch.errors import JobFailed, LoraBatchError, WaitTimeout
from lorabatch_producer.fields import make_job
from lorabatch_producer.server.caller import Caller, caller_of
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.server.models import Model, Models
from lorabatch_producer.waiting import succeeded

__all__ = ["Asking", "TheAsking", "succeeded_or_raised"]

LOOK_S = 0.5  # how often it is asked whether the client is still there


@dataclass(frozen=True)
class Asking:
    """One request: who asks whom for what."""

    request: Request
    desk: Desk
    caller: Caller
    key: str | None

    @property
    def models(self) -> Models:
        return Models(self.desk.ledger.engine, self.desk.settings)

    async def model(self, name: object, field: str = "model") -> Model:
        """Raises UnknownAdapter, which names the field."""
        return await self.desk.call(self.models.find, self.caller.tenant, name, field)

    async def accepted(self, model: Model, fields: Mapping[str, Any]) -> tuple[Job, str]:
        """A job of these fields, and the id that it is known by."""
        mine = {"tenant": self.caller.tenant, "idempotency_key": self.key}
        job = make_job({**fields, **mine, "adapter_id": model.adapter_id})
        job_id = await self.desk.accept(self.request, job, model.queue)
        return job, job_id

    async def result(self, model: Model, fields: Mapping[str, Any]) -> Result:
        """Of a job of these fields, once it has succeeded."""
        return succeeded_or_raised(await self._ended(*await self.accepted(model, fields)))

    async def _ended(self, job: Job, job_id: str) -> Result:
        wait_s = self.desk.settings.http_wait_s
        end_s = time.monotonic() + wait_s
        why = f"not ended after {wait_s:g} s"
        while (left_s := end_s - time.monotonic()) > 0:
            result = await self.desk.outcome(job_id, min(LOOK_S, left_s))
            if result is not None:
                return result
            if await self.request.is_disconnected():
                why = "whoever asked is gone"
                break
        if job.idempotency_key is not None:
            again = "it goes on, and the same request with its Idempotency-Key waits for it again"
            raise WaitTimeout(f"job {job_id!r}: {why}; {again}")
        await self.desk.cancel(job_id)
        ended = await self.desk.result(job_id)
        if ended is not None and ended.state != "cancelled":  # since the last look
            return ended
        again = "it was cancelled; ask with an Idempotency-Key to have it go on"
        raise WaitTimeout(f"job {job_id!r}: {why}; {again}")


async def _asking(
    request: Request,
    desk: Annotated[Desk, Depends(desk_of)],
    caller: Annotated[Caller, Depends(caller_of)],
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Asking:
    return Asking(request, desk, caller, idempotency_key or None)


TheAsking = Annotated[Asking, Depends(_asking)]


def succeeded_or_raised(result: Result) -> Result:
    """The same result, or the error of its code."""
    if result.state == "failed" and result.error and (kind := KINDS.get(result.error.code)):
        raise kind(result.error.message)
    return succeeded(result)


def _kinds(kind: type[LoraBatchError]) -> Iterator[type[LoraBatchError]]:
    yield kind
    for more in kind.__subclasses__():
        yield from _kinds(more)


KINDS = {kind.code: kind for kind in _kinds(LoraBatchError) if kind is not JobFailed}

"""Our own API: `POST /jobs` answers at once, `GET /jobs/{id}` says how it went.

A job's fields are those of `lorabatch.Job`, sampling fields flat or in `sampling_params`; its
tenant is the caller's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from lorabatch import Result
from lorabatch.errors import InvalidJob, ServerStops
from lorabatch.fields import QUEUE_PATTERN
from lorabatch.location import public_name
from lorabatch.result import JobState
from lorabatch_producer.fields import make_job
from lorabatch_producer.server import bodies
from lorabatch_producer.server.caller import TENANT_HEADER, Caller, caller_of
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.server.webhooks import check_webhook

__all__ = ["router"]

router = APIRouter(prefix="/jobs", tags=["jobs"])
LONGEST_WAIT_S = 60.0
KEY_HEADER = "Idempotency-Key"
EXAMPLE = {"prompt": "How many users?", "adapter_id": "sql", "max_new_tokens": 32}

TheDesk = Annotated[Desk, Depends(desk_of)]
TheCaller = Annotated[Caller, Depends(caller_of)]


async def state_of(job_id: str, desk: TheDesk, caller: TheCaller) -> JobState:
    """For `Depends`. Raises JobNotFound before the answer begins."""
    return await desk.state(job_id, caller.tenant)


TheState = Annotated[JobState, Depends(state_of)]


class JobStatus(BaseModel):
    """Where a job is; with its result once it has ended."""

    job_id: str
    state: JobState
    result: Result | None = None


@router.post("", summary="Accept a job", status_code=202, response_model_exclude_none=True)
async def enqueue(
    request: Request,
    desk: TheDesk,
    caller: TheCaller,
    response: Response,
    fields: Annotated[dict[str, Any], Body(examples=[EXAMPLE], json_schema_extra=bodies.JOB)],
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    queue: Annotated[str | None, Query(pattern=QUEUE_PATTERN)] = None,
) -> JobStatus:
    """Accept a job: it is committed when this answers, and `Location` says where it is.

    The same `Idempotency-Key` with the same job answers with the first one's id; with another job
    it is refused as 409. `webhook`: a URL that hears of its end, signed with the tenant's secret.
    """
    job = make_job(_mine(fields, caller, idempotency_key))
    await check_webhook(desk, caller.tenant, job.webhook)
    job_id = await desk.accept(request, job, queue)
    response.headers["Location"] = f"/jobs/{job_id}"
    state = await desk.state(job_id, caller.tenant) if job.idempotency_key else "queued"
    return JobStatus(job_id=job_id, state=state)


@router.get("/{job_id}", summary="Show a job", response_model_exclude_none=True)
async def show(
    job_id: str,
    state: TheState,
    desk: TheDesk,
    caller: TheCaller,
    wait_s: Annotated[float, Query(ge=0, le=LONGEST_WAIT_S)] = 0.0,
) -> JobStatus:
    """A job's state, and its result once it has ended; `wait_s`: for which to wait if need be."""
    result = await (desk.outcome(job_id, wait_s) if wait_s else desk.result(job_id))
    if result is not None:
        return ended(result)
    now = await desk.state(job_id, caller.tenant) if wait_s else state
    return JobStatus(job_id=job_id, state=now)


@router.get("/{job_id}/events", summary="Follow a job", response_class=EventSourceResponse)
async def events(
    job_id: str,
    state: TheState,
    desk: TheDesk,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """A job as it goes, by server-sent events: `state`, then `text` of a job with `stream` as it
    grows, then `ended` with the result. An event's id is the number of characters up to there:
    who comes again with it as `Last-Event-ID` gets the rest. A `text` whose `at` is 0 begins anew:
    the job was run again and had another text. `stopped` is the last event of a server that stops:
    come again.
    """
    yield ServerSentEvent(event="state", data={"state": state})
    try:
        async for item in desk.follow(job_id, last_event_id):
            if isinstance(item, Result):
                yield ServerSentEvent(event="ended", data=ended(item))
            elif item.text:
                data = {"at": item.at, "text": item.text}
                yield ServerSentEvent(event="text", id=str(item.at + len(item.text)), data=data)
    except ServerStops as error:
        yield ServerSentEvent(event="stopped", data={"code": error.code, "detail": error.public})


@router.delete("/{job_id}", summary="Cancel a job", response_model_exclude_none=True)
async def cancel(job_id: str, state: TheState, desk: TheDesk) -> JobStatus:
    """Cancel a job: the state it is in now. One that runs ends at its next step."""
    return JobStatus(job_id=job_id, state=await desk.cancel(job_id))


def ended(result: Result) -> JobStatus:
    """Where the base model's files are is no business of a client's."""
    if result.base_model is not None:
        result = result.model_copy(update={"base_model": public_name(result.base_model)})
    return JobStatus(job_id=result.job_id, state=result.state, result=result)


def _mine(fields: dict[str, Any], caller: Caller, key: str | None) -> dict[str, Any]:
    """The fields with the caller's tenant and the header's key; what they say against it is
    refused. So is a batch: whoever knew its id would keep another's open, and spend its budget."""
    if fields.get("batch_id") is not None:
        raise InvalidJob(
            "batch_id: batches are made with POST /v1/batches; leave it out of the job"
        )
    headers = (("tenant", TENANT_HEADER, caller.tenant), ("idempotency_key", KEY_HEADER, key))
    for name, header, ours in headers:
        if ours is not None and fields.get(name, ours) != ours:
            raise InvalidJob(
                f"{name}: the request's own is {ours!r}; leave it out of the job, or say it in "
                f"the header {header}"
            )
    return {**fields, "tenant": caller.tenant} | ({"idempotency_key": key} if key else {})

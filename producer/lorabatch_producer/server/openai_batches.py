"""OpenAI's batches: made from a file of lines, worked on by `batch_work.py`, read from files.

Another tenant's batch is one that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from lorabatch.errors import shown
from lorabatch.fields import storable
from lorabatch.file_tables import OPEN, TIMED
from lorabatch.openai_batches import OpenAIBatches
from lorabatch.outgoing import OutgoingUrl
from lorabatch.queues import Queues
from lorabatch_producer.bulk import base_names
from lorabatch_producer.server.batch_work import BatchWork
from lorabatch_producer.server.caller import Caller, caller_of
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.server.paging import Page, page_of
from lorabatch_producer.server.webhooks import check_webhook

__all__ = ["BATCHES_PATH", "NEW_BATCH_BYTES", "router"]

BATCHES_PATH = "/v1/batches"
NEW_BATCH_BYTES = 1 << 17  # twice what the longest may have; FastAPI names each of a million errors
router = APIRouter(prefix=BATCHES_PATH, tags=["batches"])
WINDOWS_S = {"24h": 86_400.0}
PREFIX = "batch_"
EXAMPLE: dict[str, Any] = {
    "input_file_id": "file-...",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}

TheDesk = Annotated[Desk, Depends(desk_of)]
TheCaller = Annotated[Caller, Depends(caller_of)]
Key = Annotated[str, StringConstraints(max_length=64), AfterValidator(storable)]
Value = Annotated[str, StringConstraints(max_length=512), AfterValidator(storable)]


def work_of(request: Request) -> BatchWork:
    work: BatchWork = request.app.state.batch_work
    return work


TheWork = Annotated[BatchWork, Depends(work_of)]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(strict=True, ge=3600, le=2_592_000)


class NewBatch(BaseModel):
    """What to make. All lines of the file must be requests to `endpoint`. `webhook`, which is ours:
    a URL that hears of its end."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: dict[Key, Value] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiresAfter | None = None
    webhook: OutgoingUrl | None = None


class BatchError(BaseModel):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines that were cancelled or expired are in `total` alone."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch as it stands. Times: seconds UTC."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


@router.post("", summary="Make a batch of a file")
async def create(
    desk: TheDesk,
    caller: TheCaller,
    work: TheWork,
    asked: NewBatch,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> BatchObject:
    """Make a batch of an uploaded file. Its lines are checked first: if one is bad, the batch fails
    and none is accepted. The same `Idempotency-Key` with the same batch answers with the first."""
    await check_webhook(desk, caller.tenant, asked.webhook)
    row = await desk.call(_add, desk, caller.tenant, asked, idempotency_key)
    if row is None:
        raise HTTPException(
            404, f"input_file_id {shown(asked.input_file_id)}: no such file of purpose batch"
        )
    if any(getattr(row, name) != value for name, value in _fields(asked).items()):
        raise HTTPException(
            409, f"Idempotency-Key {shown(idempotency_key)}: it made another batch; give a new one"
        )
    work.wake()
    (made,) = await _objects(desk, [row])
    return made


@router.get("", summary="List batches")
async def list_batches(
    desk: TheDesk,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> Page[BatchObject]:
    """Your batches, the newest first."""
    last = None if after is None else await _row(desk, caller, after)
    rows = await desk.call(_batches(desk).list, caller.tenant, limit + 1, last)
    return page_of(await _objects(desk, rows), limit)


@router.get("/{batch_id}", summary="Show a batch")
async def show(batch_id: str, desk: TheDesk, caller: TheCaller) -> BatchObject:
    """How far it is, and the files that came of it."""
    (shown_,) = await _objects(desk, [await _row(desk, caller, batch_id)])
    return shown_


@router.post("/{batch_id}/cancel", summary="Cancel a batch")
async def cancel(batch_id: str, desk: TheDesk, caller: TheCaller, work: TheWork) -> BatchObject:
    """Cancel what has not run: what has is in the output all the same."""
    row = await _row(desk, caller, batch_id)
    asked = await desk.call(_batches(desk).cancel, row.batch_id)
    row = await _row(desk, caller, batch_id)
    if not asked and row.status != "cancelled":
        raise HTTPException(409, f"batch {batch_id}: it is {row.status}; nothing to cancel")
    work.wake()
    (cancelled,) = await _objects(desk, [row])
    return cancelled


def _fields(asked: NewBatch) -> dict[str, Any]:
    """As they are stored."""
    expires = asked.output_expires_after
    return {
        "input_file_id": asked.input_file_id,
        "endpoint": asked.endpoint,
        "completion_window": asked.completion_window,
        "metadata": asked.metadata,
        "output_expires_after_s": expires.seconds if expires else None,
        "webhook": asked.webhook,
    }


def _add(desk: Desk, tenant: str, asked: NewBatch, key: str | None) -> Any | None:
    queue = desk.settings.queue
    theirs = Queues(desk.ledger.engine).list().get(queue)
    return _batches(desk).add(
        tenant=tenant,
        window_s=WINDOWS_S[asked.completion_window],
        key=key,
        queue=queue,
        base_names=sorted(base_names(desk.settings, theirs)),
        **_fields(asked),
    )


def _batches(desk: Desk) -> OpenAIBatches:
    return OpenAIBatches(desk.ledger.engine)


async def _row(desk: Desk, caller: Caller, batch_id: str) -> Any:
    known = batch_id.startswith(PREFIX)
    inner = batch_id.removeprefix(PREFIX)
    row = await desk.call(_batches(desk).find, inner, caller.tenant) if known else None
    if row is None:
        raise HTTPException(404, f"batch {shown(batch_id)}: no such batch")
    return row


async def _objects(desk: Desk, rows: Sequence[Any]) -> list[BatchObject]:
    running = [row.batch_id for row in rows if row.status in OPEN]
    counts = await desk.call(_batches(desk).counts, running) if running else {}
    return [_object(row, counts.get(row.batch_id, {})) for row in rows]


def _object(row: Any, states: Mapping[str, int]) -> BatchObject:
    """`states`: its jobs, while it is open."""
    counts = RequestCounts(
        total=row.total,
        completed=states.get("succeeded", row.completed),
        failed=states.get("failed", 0) if states else row.failed,
    )
    at = {name: getattr(row, f"{name}_us") for name in ("created", *TIMED)}
    return BatchObject(
        id=PREFIX + row.batch_id,
        endpoint=row.endpoint,
        errors=None if row.errors is None else BatchErrors(data=row.errors),
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        status=row.status,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        expires_at=row.done_by_us // 10**6,
        request_counts=counts,
        metadata=row.metadata,
        **{f"{name}_at": us and us // 10**6 for name, us in at.items()},
    )

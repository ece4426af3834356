"""TGI's routes: generate, in its own shape and in that of the root, info and health.

`parameters.adapter_id` is an adapter's id; an unknown one is an error, not the base model.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response
from fastapi.responses import StreamingResponse

import lorabatch
from lorabatch.candidates import MAX_CANDIDATES
from lorabatch_producer.chunks import tgi_chunks
from lorabatch_producer.server import bodies
from lorabatch_producer.server.asking import Asking, TheAsking
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.server.models import Model
from lorabatch_producer.server.streaming import event_stream, followed
from lorabatch_producer.tgi_body import adapter_of, generate_answer, generate_fields

__all__ = ["router"]

router = APIRouter(tags=["tgi"])
EXAMPLE = {"inputs": "How many users?", "parameters": {"adapter_id": "sql", "max_new_tokens": 32}}
EVENTS: dict[str, Any] = {"text/event-stream": {}}
EITHER = {"application/json": {"schema": {"type": "array"}}, **EVENTS}
TheBody = Annotated[dict[str, Any], Body(examples=[EXAMPLE], json_schema_extra=bodies.GENERATE)]


@router.post("/generate", summary="Continue a text")
async def generate(asking: TheAsking, body: TheBody) -> dict[str, Any]:
    """A text's continuation, once its job has ended. A client that goes away cancels its job,
    unless the request has an `Idempotency-Key`."""
    fields = generate_fields(body)
    return generate_answer(body, await asking.result(await _model(asking, body), fields))


@router.post(
    "/generate_stream",
    summary="Continue a text, piece by piece",
    response_class=StreamingResponse,
    responses={200: {"content": EVENTS}},
)
async def generate_stream(asking: TheAsking, body: TheBody) -> StreamingResponse:
    """The same as it grows: an event for each piece of text, which may be of several tokens, and
    the whole text in the last one."""
    fields = generate_fields({**body, "stream": None}, streamed=True)
    job, job_id = await asking.accepted(await _model(asking, body), {**fields, "stream": True})
    return event_stream("/generate_stream", tgi_chunks(followed(asking, job, job_id), body))


@router.post(
    "/", summary="Either of both", response_model=None, responses={200: {"content": EITHER}}
)
async def compatible(asking: TheAsking, body: TheBody) -> list[dict[str, Any]] | StreamingResponse:
    """Either of them, as `stream` says; the whole text as a list of one. The prompt is not repeated
    unless `return_full_text` says so."""
    if body.get("stream") is True:
        return await generate_stream(asking, body)
    return [await generate(asking, body)]


async def _model(asking: Asking, body: dict[str, Any]) -> Model:
    adapter_id = adapter_of(body)
    if adapter_id is None:
        return await asking.desk.call(asking.models.base)
    return await asking.model(adapter_id, "adapter_id")


@router.get("/info", summary="What is served")
async def info(asking: TheAsking) -> dict[str, Any]:
    """What is served. What only workers know, such as the longest context, is not told."""
    base = await asking.desk.call(asking.models.base)
    return {
        "model_id": base.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_best_of": MAX_CANDIDATES,
        "max_stop_sequences": 16,
        "max_client_batch_size": 1,
        "router": "lorabatch",
        "version": lorabatch.__version__,
    }


@router.get("/health", summary="Whether jobs can be accepted", response_class=Response)
async def health(desk: Annotated[Desk, Depends(desk_of)]) -> Response:
    """Nothing, if jobs can be accepted; 503 otherwise."""
    await desk.check()
    return Response()

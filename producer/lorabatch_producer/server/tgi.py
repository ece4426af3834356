"""TGI's routes: generate, in its own shape and in that of the root, info and health.

`parameters.adapter_id` is an adapter's id; an unknown one is an error, not the base model.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response

import lorabatch
from lorabatch_producer.server.asking import TheAsking
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.tgi_body import adapter_of, generate_answer, generate_fields

__all__ = ["router"]

router = APIRouter(tags=["tgi"])
EXAMPLE = {"inputs": "How many users?", "parameters": {"adapter_id": "sql", "max_new_tokens": 32}}
TheBody = Annotated[dict[str, Any], Body(examples=[EXAMPLE])]


@router.post("/generate")
async def generate(asking: TheAsking, body: TheBody) -> dict[str, Any]:
    """A text's continuation, once its job has ended. A client that goes away cancels its job,
    unless the request has an `Idempotency-Key`."""
    fields = generate_fields(body)
    adapter_id = adapter_of(body)
    if adapter_id is None:
        model = await asking.desk.call(asking.models.base)
    else:
        model = await asking.model(adapter_id)
    return generate_answer(body, await asking.result(model, fields))


@router.post("/")
async def compatible(asking: TheAsking, body: TheBody) -> list[dict[str, Any]]:
    """The same, as a list of one; the prompt is not repeated unless `return_full_text` says so."""
    return [await generate(asking, body)]


@router.get("/info")
async def info(asking: TheAsking) -> dict[str, Any]:
    """What is served. What only workers know, such as the longest context, is not told."""
    base = await asking.desk.call(asking.models.base)
    return {
        "model_id": base.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_best_of": 1,
        "max_stop_sequences": 16,
        "max_client_batch_size": 1,
        "router": "lorabatch",
        "version": lorabatch.__version__,
    }


@router.get("/health")
async def health(desk: Annotated[Desk, Depends(desk_of)]) -> Response:
    """Nothing, if jobs can be accepted; 503 otherwise."""
    await desk.check()
    return Response()

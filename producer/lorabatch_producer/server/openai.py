"""OpenAI's routes: models, chat completions and completions, each answer at once or as it grows.

`model` is an adapter's id or a base model's name; one that is neither is refused as
`model_not_found`. `service_tier` `flex` is a priority of -10, `priority` one of 10.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.responses import StreamingResponse

from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.chunks import openai_chunks
from lorabatch_producer.fields import only_these, without_nulls
from lorabatch_producer.openai_body import CHAT_URL, COMPLETIONS_URL, answer_body, body_fields
from lorabatch_producer.openai_choices import only_one_streams
from lorabatch_producer.server import bodies
from lorabatch_producer.server.asking import Asking, TheAsking
from lorabatch_producer.server.models import Model
from lorabatch_producer.server.streaming import event_stream, followed

__all__ = ["router"]

router = APIRouter(tags=["openai"])
TIERS = {"auto": None, "default": None, "flex": -10, "priority": 10}
EITHER: dict[str, Any] = {
    "application/json": {"schema": {"type": "object", "required": ["id", "choices", "usage"]}},
    "text/event-stream": {},
}
CHAT = {"model": "sql", "messages": [{"role": "user", "content": "How many users?"}]}
COMPLETION = {"model": "sql", "prompt": "How many users?", "max_tokens": 32}


@router.post(
    CHAT_URL, summary="Answer a chat", response_model=None, responses={200: {"content": EITHER}}
)
async def chat(
    asking: TheAsking,
    body: Annotated[dict[str, Any], Body(examples=[CHAT], json_schema_extra=bodies.CHAT)],
) -> dict[str, Any] | StreamingResponse:
    """A chat message, once its job has ended, or as it grows if `stream` is true. A client that
    goes away cancels its job, unless the request has an `Idempotency-Key`."""
    return await _complete(asking, body, CHAT_URL)


@router.post(
    COMPLETIONS_URL,
    summary="Complete a prompt",
    response_model=None,
    responses={200: {"content": EITHER}},
)
async def completion(
    asking: TheAsking,
    body: Annotated[
        dict[str, Any], Body(examples=[COMPLETION], json_schema_extra=bodies.COMPLETION)
    ],
) -> dict[str, Any] | StreamingResponse:
    """A prompt's continuation, once its job has ended, or as it grows if `stream` is true."""
    return await _complete(asking, body, COMPLETIONS_URL)


@router.get("/v1/models", summary="List models")
async def models(asking: TheAsking) -> dict[str, Any]:
    """The base models, and the adapters that the caller may use."""
    found = await asking.desk.call(asking.models.names, asking.caller.tenant)
    return {"object": "list", "data": [_shown(model) for model in found]}


@router.get("/v1/models/{name:path}", summary="Show a model")
async def model(asking: TheAsking, name: str) -> dict[str, Any]:
    """One of them."""
    return _shown(await asking.model(name))


async def _complete(
    asking: Asking, body: dict[str, Any], url: str
) -> dict[str, Any] | StreamingResponse:
    name, chat = body.get("model"), url == CHAT_URL
    streamed = body.get("stream") is True
    fields = body_fields({**body, "stream": None} if streamed else body, url) | _priority(body)
    model, tools = await asking.model(name), "tools" in fields
    if not streamed:
        result = await asking.result(model, fields)
        return answer_body(chat, str(name), result, tools)
    only_one_streams(fields["sampling_params"])
    with_usage = _with_usage(body)
    job, job_id = await asking.accepted(model, {**fields, "stream": True})
    grown = followed(asking, job, job_id)
    return event_stream(
        url, openai_chunks(grown, job_id, chat, str(name), with_usage, tools), "[DONE]"
    )


def _with_usage(body: dict[str, Any]) -> bool:
    given = body.get("stream_options")
    options = without_nulls(given) if isinstance(given, dict) else {}
    wanted = options.get("include_usage", False)
    if not isinstance(given, dict | None) or not isinstance(wanted, bool):
        raise InvalidJob(
            f"stream_options: wanted an object with include_usage, true or false "
            f"(got {shown(given)})"
        )
    only_these(options, {"include_usage"}, {"include_obfuscation": (False,)}, "stream_options.")
    return wanted


def _priority(body: dict[str, Any]) -> dict[str, int]:
    tier = body.get("service_tier") or "auto"
    if not isinstance(tier, str) or tier not in TIERS:
        raise InvalidJob(f"service_tier: wanted {', '.join(TIERS)} (got {shown(tier)})")
    priority = TIERS[tier]
    if priority is None:
        return {}
    if body.get("priority") is not None:
        raise InvalidJob(f"service_tier: {tier!r} is a priority too; leave out one of both")
    return {"priority": priority}


def _shown(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": model.owner,
        "parent": model.base_model if model.adapter_id else None,
    }

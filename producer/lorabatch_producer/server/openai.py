"""OpenAI's routes: models, chat completions and completions, one answer each.

`model` is an adapter's id or a base model's name; one that is neither is refused as
`model_not_found`. `service_tier` `flex` is a priority of -10, `priority` one of 10.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.openai_body import CHAT_URL, COMPLETIONS_URL, answer_body, body_fields
from lorabatch_producer.server.asking import Asking, TheAsking
from lorabatch_producer.server.models import Model

__all__ = ["router"]

router = APIRouter(tags=["openai"])
TIERS = {"auto": None, "default": None, "flex": -10, "priority": 10}
CHAT = {"model": "sql", "messages": [{"role": "user", "content": "How many users?"}]}
COMPLETION = {"model": "sql", "prompt": "How many users?", "max_tokens": 32}


@router.post(CHAT_URL)
async def chat(
    asking: TheAsking, body: Annotated[dict[str, Any], Body(examples=[CHAT])]
) -> dict[str, Any]:
    """A chat message, once its job has ended. A client that goes away cancels its job, unless the
    request has an `Idempotency-Key`."""
    return await _complete(asking, body, CHAT_URL)


@router.post(COMPLETIONS_URL)
async def completion(
    asking: TheAsking, body: Annotated[dict[str, Any], Body(examples=[COMPLETION])]
) -> dict[str, Any]:
    """A prompt's continuation, once its job has ended."""
    return await _complete(asking, body, COMPLETIONS_URL)


@router.get("/v1/models")
async def models(asking: TheAsking) -> dict[str, Any]:
    """The base models, and the adapters that the caller may use."""
    found = await asking.desk.call(asking.models.names, asking.caller.tenant)
    return {"object": "list", "data": [_shown(model) for model in found]}


@router.get("/v1/models/{name:path}")
async def model(asking: TheAsking, name: str) -> dict[str, Any]:
    """One of them."""
    return _shown(await asking.model(name))


async def _complete(asking: Asking, body: dict[str, Any], url: str) -> dict[str, Any]:
    name = body.get("model")
    fields = {**body_fields(body, url), **_priority(body)}
    result = await asking.result(await asking.model(name), fields)
    return answer_body(url == CHAT_URL, str(name), result)


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

"""A text that grows as OpenAI's and TGI's streams have it: their events, one for each piece.

TGI sends an event for each token. A piece of ours may be of several, so `token` has its text, and
an `id` of -1 and a `logprob` of 0, which clients want to be numbers; the last event has an empty
one, where TGI has the end token.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from lorabatch import Result
from lorabatch.streams import Piece
from lorabatch_producer.openai_body import answer_body
from lorabatch_producer.tgi_body import generate_answer
from lorabatch_producer.tool_calls import BeforeCalls

__all__ = ["Chunks", "Grown", "openai_chunks", "tgi_chunks"]

Grown = AsyncIterator[Piece | Result | None]
"""Pieces, at last the result; None now and then, to be passed on."""
Chunks = AsyncIterator[dict[str, Any] | None]

NO_TOKEN = {"id": -1, "logprob": 0.0}


async def openai_chunks(
    items: Grown, job_id: str, chat: bool, model: str, with_usage: bool, tools: bool = False
) -> Chunks:
    """`with_usage`: as `stream_options.include_usage` asks for, a last one with the usage. `tools`:
    whether the text may call some; a call is told at the end, in one event."""
    head: dict[str, Any] = {
        "id": ("chatcmpl-" if chat else "cmpl-") + job_id,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    usage = {"usage": None} if with_usage else {}

    def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
        what = {"delta": delta} if chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **what, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice], **usage}

    if chat:
        yield chunk(role="assistant", content="")
    before = BeforeCalls()
    async for item in items:
        if isinstance(item, Result):
            answer = answer_body(chat, model, item, tools)
            choice = answer["choices"][0]
            head["system_fingerprint"] = answer["system_fingerprint"]
            for delta in before.rest(choice["message"]) if tools else ():
                yield chunk(**delta)
            yield chunk(choice["finish_reason"])
            if with_usage:
                yield {**head, "choices": [], "usage": answer["usage"]}
        elif item is None:
            yield None
        elif text := before.more(item.text) if tools else item.text:
            yield chunk(content=text)


async def tgi_chunks(items: Grown, body: Mapping[str, Any]) -> Chunks:
    """`body`: the request's."""
    index = 0
    async for item in items:
        index += item is not None
        if isinstance(item, Result):
            answer = generate_answer(body, item)
            token = {**NO_TOKEN, "text": "", "special": True}
            yield {"index": index, "token": token, "details": None, **answer}
        elif item is None:
            yield None
        else:
            token = {**NO_TOKEN, "text": item.text, "special": False}
            yield {"index": index, "token": token, "generated_text": None, "details": None}

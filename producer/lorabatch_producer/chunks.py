"""A text that grows as OpenAI's and TGI's streams have it: their events.

OpenAI's are one for each piece, with the log probabilities of its tokens if they were asked for.
TGI's are one for each token; where a piece is of several, the last one has its text, so that the
texts of all events make up the text, and that of special tokens is empty. The last event has the
end token, or an empty one with an `id` of -1 where the text ended otherwise.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from itertools import count
from typing import Any

from lorabatch import Result
from lorabatch.result import Token
from lorabatch.streams import Piece
from lorabatch_producer.openai_body import answer_body
from lorabatch_producer.openai_choices import Logprobs
from lorabatch_producer.tgi_body import generate_answer, token_events
from lorabatch_producer.tool_calls import BeforeCalls

__all__ = ["Chunks", "Grown", "openai_chunks", "tgi_chunks"]

Grown = AsyncIterator[Piece | Result | None]
"""Pieces, at last the result; None now and then, to be passed on."""
Chunks = AsyncIterator[dict[str, Any] | None]

NO_TOKEN = {"id": -1, "text": "", "logprob": 0.0, "special": True}


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

    logprobs = Logprobs(chat)

    def chunk(
        finish_reason: str | None = None, tokens: tuple[Token, ...] = (), **delta: Any
    ) -> dict[str, Any]:
        what = {"delta": delta} if chat else {"text": delta.get("content", "")}
        scores = {"logprobs": logprobs.told(tokens or None), "finish_reason": finish_reason}
        return {**head, "choices": [{"index": 0, **what, **scores}], **usage}

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
        else:
            text = before.more(item.text) if tools else item.text
            if text or item.tokens:
                yield chunk(tokens=item.tokens, content=text)


async def tgi_chunks(items: Grown, body: Mapping[str, Any]) -> Chunks:
    """`body`: the request's."""
    numbers = count(1)
    held: list[dict[str, Any]] = []  # a special token, which has no text and may be the end

    def told(event: dict[str, Any]) -> dict[str, Any]:
        return {"index": next(numbers), "generated_text": None, "details": None, **event}

    async for item in items:
        if isinstance(item, Result):
            last = held[0] if held else {"token": NO_TOKEN}
            yield told({**last, **generate_answer(body, item, streamed=True)})
        elif item is None:
            yield None
        else:
            for event in token_events(body, item):
                if held:
                    yield told(held.pop())
                if event["token"]["special"]:
                    held.append(event)
                else:
                    yield told(event)

"""openai, async."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.clients.service import Service

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me about winter."}]


@pytest.fixture
async def client(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=service.openai_url, api_key=service.key, max_retries=0
    ) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    """Many at once, each with its own adapter."""
    names = ["sql", "pirate", "json", "html"] * 4
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(
                model=name, messages=MESSAGES, max_completion_tokens=12, temperature=0
            )
            for name in names
        )
    )
    assert [answer.model for answer in answers] == names
    texts = {n: {a.choices[0].message.content for a in answers if a.model == n} for n in names}
    assert [len(found) for found in texts.values()] == [1, 1, 1, 1], "greedy: the same for the same"
    assert len(set.union(*texts.values())) == 4, "and another for each adapter"


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="pirate", messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert {"sql", "pirate"} <= {model.id async for model in client.models.list()}


async def test_unknown_adapter(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="nobody", messages=MESSAGES)

"""LangChain (langchain-openai)."""

from __future__ import annotations

import itertools
from typing import Literal

import openai
import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

from lorabatch.settings import DEFAULT_BASE_MODEL as BASE_MODEL
from tests.clients.service import Service

ASK = "How many books are there?"


class Weather(BaseModel):
    """The weather in a town."""

    town: Literal["Bern", "Rome"]


def model_of(service: Service, name: str = "sql") -> ChatOpenAI:
    return ChatOpenAI(
        model=name,
        base_url=service.openai_url,
        api_key=SecretStr(service.key),
        temperature=0,
        max_completion_tokens=24,
        max_retries=0,
    )


def test_chat(service: Service) -> None:
    answer = model_of(service).invoke(ASK)
    assert "SELECT" in str(answer.content)
    assert answer.usage_metadata
    assert answer.usage_metadata["output_tokens"] > 0


def test_completion(service: Service) -> None:
    """LangChain sends a list of one prompt."""
    model = OpenAI(
        model=BASE_MODEL,
        base_url=service.openai_url,
        api_key=SecretStr(service.key),
        temperature=0,
        max_tokens=8,
        max_retries=0,
    )
    told = model.invoke("Once upon a time")
    assert len(told) > 8
    assert "".join(model.stream("Once upon a time")) == told


def test_chat_stream(service: Service) -> None:
    pieces = [str(chunk.content) for chunk in model_of(service).stream(ASK)]
    assert "SELECT" in "".join(pieces)


def test_chain(service: Service) -> None:
    prompt = ChatPromptTemplate.from_messages([("user", "{question}")])
    answers = (prompt | model_of(service)).batch(
        [{"question": ASK}, {"question": "Count the cars."}]
    )
    assert all("SELECT" in str(answer.content) for answer in answers)


def test_structured_output(service: Service) -> None:
    class Count(BaseModel):
        books: Literal[1, 2, 3]

    asked = model_of(service, "pirate").with_structured_output(Count, method="json_schema")
    assert isinstance(asked.invoke(ASK), Count)


def test_tools(service: Service) -> None:
    """As an object, which it asks for by a tool that has to be called; and by tools."""
    model, longer = model_of(service, "caller"), {"max_completion_tokens": 64}
    asked = model.with_structured_output(Weather, method="function_calling")
    assert isinstance(asked.invoke("Cold in Bern?", **longer), Weather)
    caller = model.bind_tools([Weather], tool_choice="any", strict=True, parallel_tool_calls=False)
    (call,) = caller.invoke("Cold?", **longer).tool_calls
    assert (call["name"], set(call["args"])) == ("Weather", {"town"})


def test_tools_stream(service: Service) -> None:
    model = model_of(service, "caller").bind_tools([Weather], tool_choice="Weather")
    *_, last = itertools.accumulate(model.stream("Cold in Bern?", max_completion_tokens=64))
    (call,) = last.tool_calls
    assert call["args"]["town"] in ("Bern", "Rome")


async def test_async_chat(service: Service) -> None:
    assert "SELECT" in str((await model_of(service).ainvoke(ASK)).content)


def test_unknown_adapter(service: Service) -> None:
    with pytest.raises(openai.NotFoundError):
        model_of(service, "nobody").invoke(ASK)

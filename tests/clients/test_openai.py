"""openai."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from lorabatch.settings import DEFAULT_BASE_MODEL as BASE_MODEL
from tests.clients.service import Service
from tests.openai_client import batch_of, ended, line, lines_in

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "How many books are there?"}
]

SCHEMA = {
    "type": "object",
    "properties": {"books": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["books"],
    "additionalProperties": False,
}


class Weather(BaseModel):
    town: Literal["Bern", "Rome"]


TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": Weather.model_json_schema()},
    }
]


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    keys = {"api_key": service.key, "admin_api_key": service.key}
    with openai.OpenAI(base_url=service.openai_url, max_retries=0, **keys) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="sql", messages=MESSAGES, max_completion_tokens=24, temperature=0
    )
    assert "SELECT" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 24


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="sql",
            messages=MESSAGES,
            max_completion_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "SELECT" in text
    assert chunks[-1].usage is not None


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=BASE_MODEL, prompt="Once upon a time", max_tokens=8, temperature=0
    )
    assert (answer.choices[0].finish_reason, answer.usage and answer.usage.completion_tokens) == (
        "length",
        8,
    )
    assert len(answer.choices[0].text) > 8


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = client.completions.create(
        model=BASE_MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, stream=True
    )
    assert len("".join(c.choices[0].text for c in chunks)) > 8


def test_structured_output(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="pirate",
        messages=MESSAGES,
        max_completion_tokens=32,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "count", "schema": SCHEMA, "strict": True},
        },
    )
    assert 0 <= json.loads(answer.choices[0].message.content or "")["books"] <= 9


def test_tools(client: openai.OpenAI) -> None:
    """Which have to be called: the call is valid, and its answer is read."""
    asked: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Cold in Bern?"}]
    fields: dict[str, Any] = {"model": "caller", "max_completion_tokens": 64, "tools": TOOLS}
    message = client.chat.completions.create(
        messages=asked, tool_choice="required", parallel_tool_calls=False, **fields
    ).choices[0]
    assert (message.finish_reason, message.message.content) == ("tool_calls", None)
    (call,) = message.message.tool_calls or ()
    assert call.type == "function"
    assert json.loads(call.function.arguments)["town"] in ("Bern", "Rome")
    answered: list[Any] = [
        *(*asked, message.message),
        {"role": "tool", "tool_call_id": call.id, "content": "-3 degrees"},
    ]
    told = client.chat.completions.create(messages=answered, temperature=0, **fields)
    assert told.choices[0].message.content


def test_tools_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="caller",
        messages=[{"role": "user", "content": "Cold in Bern?"}],
        max_completion_tokens=64,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
    ) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)


def test_several_texts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="pirate", messages=MESSAGES, max_completion_tokens=8, n=3, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="sql",
        messages=MESSAGES,
        max_completion_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    found = answer.choices[0].logprobs
    assert found is not None
    for token in found.content or ():
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_logprobs_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "sql", "messages": MESSAGES, "max_completion_tokens": 4}
    asked |= {"temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    found = [c.choices[0].logprobs for c in client.chat.completions.create(**asked, stream=True)]
    tokens = [token for one in found if one for token in one.content or ()]
    assert [token.token for token in tokens] == [token.token for token in whole.content or ()]
    assert len(tokens) == 4


def test_logit_bias(client: openai.OpenAI) -> None:
    ask = {"model": BASE_MODEL, "prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}
    usual = client.completions.create(logprobs=1, **ask).choices[0].text
    answer = client.completions.create(logit_bias={"260": 100}, **ask)
    assert answer.choices[0].text != usual


def test_usage(client: openai.OpenAI) -> None:
    client.completions.create(model=BASE_MODEL, prompt="Once upon a time", max_tokens=4)
    hour_ago = int(time.time()) - 3600
    found = client.admin.organization.usage.completions(start_time=hour_ago, bucket_width="1h")
    assert sum(result.input_tokens for bucket in found.data for result in bucket.results) > 0


def test_models(client: openai.OpenAI) -> None:
    known = {model.id for model in client.models.list()}
    assert known >= {"html", "json", "pirate", "sql"}
    assert client.models.retrieve("sql").id == "sql"


def test_unknown_adapter(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert error.value.code == "model_not_found"


def test_wrong_key(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="lb-nobody").models.list()


def test_files(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(line("a"))
    assert client.files.content(file.id).content == line("a")
    assert file.id in {one.id for one in client.files.list()}
    assert client.files.delete(file.id).deleted


def test_batch(client: openai.OpenAI) -> None:
    ask = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    lines = [
        line(f"{name}-{number}", body={"model": name, **ask})
        for number in range(3)
        for name in ("sql", "pirate", "json", "html")
    ]
    batch = ended(client, batch_of(client, [*lines, line("bad", model="nobody")]))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (12, 1)
    found = lines_in(client, batch.output_file_id)
    assert {one["custom_id"].rsplit("-", 1)[0] for one in found} == {
        "sql",
        "pirate",
        "json",
        "html",
    }
    assert [one["custom_id"] for one in lines_in(client, batch.error_file_id)] == ["bad"]


def test_batch_cancelled(client: openai.OpenAI) -> None:
    ask = {"messages": MESSAGES, "max_tokens": 400, "temperature": 0}
    batch = batch_of(client, [line(n, body={"model": "sql", **ask}) for n in range(400)])
    client.batches.cancel(batch.id)
    assert ended(client, batch).status == "cancelled"


def test_another_tenants(client: openai.OpenAI, service: Service) -> None:
    file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")
    other = client.with_options(api_key=service.other_key)
    with pytest.raises(openai.NotFoundError):
        other.files.retrieve(file.id)


def test_timeout_and_disconnect(client: openai.OpenAI) -> None:
    """A client that goes away has its job cancelled: the next one is answered at once."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(
            model="html",
            prompt="Go",
            max_tokens=1500,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    time.sleep(0.1)
    assert client.completions.create(model="html", prompt="Go", max_tokens=4, temperature=0).id

"""OpenAI's and TGI's streams with their own clients, unmodified."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from openai.types.chat import ChatCompletionMessageParam

from lorabatch import Ledger, Settings
from lorabatch.queue import resolve_broker
from lorabatch.streams import Piece
from lorabatch.tables import jobs
from lorabatch_producer.server import streaming
from lorabatch_worker.text_sender import TextSender
from tests.played_worker import fails, run_queued, working

pytestmark = pytest.mark.usefixtures("sql_adapter")
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How many users?"}]
TEXT = "sql: How many users?"


@pytest.fixture
def send(http_settings: Settings, ledger: Ledger) -> Iterator[Callable[[int, int], None]]:
    """Characters of the text of the one job that there is, as a worker sends them."""
    sender = TextSender(resolve_broker(http_settings))

    def some(start: int, end: int, text: str = TEXT) -> None:
        with ledger.engine.connect() as connection:
            job_id = connection.execute(jobs.select()).one().job_id
        sender.send([Piece(job_id, start, text[start:end])])

    yield some
    sender.close()


def test_a_chat_grows(client: openai.OpenAI, ledger: Ledger, send: Any) -> None:
    stream = client.chat.completions.create(
        model="sql", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    first = next(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    for start in (0, 4):
        send(start, start + 4)
        chunk = next(stream)
        assert chunk.choices[0].delta.content == TEXT[start : start + 4]
        assert (chunk.object, chunk.model, chunk.id) == (
            *("chat.completion.chunk", "sql", first.id),
        )
    run_queued(ledger)
    *rest, end, usage = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == TEXT[8:]
    assert end.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage and usage.usage.completion_tokens) == ([], 3)


def test_a_completion_grows(client: openai.OpenAI, ledger: Ledger, send: Any) -> None:
    stream = client.completions.create(model="sql", prompt="How many users?", stream=True)
    send(0, 4)
    assert next(stream).choices[0].text == TEXT[:4]
    run_queued(ledger)
    rest = list(stream)
    assert "".join(chunk.choices[0].text for chunk in rest) == TEXT[4:]
    assert rest[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in rest)


async def test_the_awaitable_client_too(url: str, ledger: Ledger) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with working(ledger):
            stream = await client.chat.completions.create(
                model="sql", messages=MESSAGES, stream=True
            )
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(text) == TEXT


def test_the_hubs_client_gets_pieces(url: str, ledger: Ledger, send: Any) -> None:
    with InferenceClient(url) as client:
        stream = iter(
            client.text_generation(
                "How many users?", adapter_id="sql", stream=True, details=True, max_new_tokens=8
            )
        )
        with working(ledger):
            *pieces, last = list(stream)
        assert "".join(piece.token.text for piece in pieces) == TEXT
        assert last.generated_text == TEXT
        assert last.details
        assert last.details.finish_reason == "eos_token"
        with working(ledger):
            plain = client.text_generation("How many users?", adapter_id="sql", stream=True)
            assert "".join(plain) == TEXT
        with working(ledger):
            chat = client.chat_completion(
                [{"role": "user", "content": "How many users?"}], model="sql", stream=True
            )
            assert "".join(c.choices[0].delta.content or "" for c in chat) == TEXT


def test_tgis_own_path_streams(http: httpx.Client, ledger: Ledger) -> None:
    body = {"inputs": "How many users?", "parameters": {"adapter_id": "sql"}}
    with working(ledger):
        answer = http.post("/generate_stream", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["generated_text"] == TEXT


def test_what_is_refused_is_refused_before_it_begins(client: openai.OpenAI, http: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="none", messages=MESSAGES, stream=True)
    for options in ({"include_usage": 3}, {"include_usage": True, "continuous": True}, []):
        with pytest.raises(openai.BadRequestError, match="stream_options"):
            client.chat.completions.create(
                model="sql",
                messages=MESSAGES,
                stream=True,
                stream_options=options,  # type: ignore[call-overload]
            )
    body = {"inputs": "x", "parameters": {"adapter_id": "none"}}
    assert http.post("/generate_stream", json=body).status_code == 422


def test_a_job_that_fails_is_told_in_the_stream(
    client: openai.OpenAI, http: httpx.Client, ledger: Ledger
) -> None:
    with working(ledger, fails):
        stream = client.chat.completions.create(model="sql", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="no adapter of that id"):
            list(stream)
        body = {"inputs": "x", "parameters": {"adapter_id": "sql"}, "stream": True}
        (event,) = [line for line in http.post("/", json=body).text.split("\n") if line]
    assert json.loads(event[6:])["error"] == "no adapter of that id"


def test_another_text_is_told_in_the_stream(
    client: openai.OpenAI, ledger: Ledger, send: Any
) -> None:
    stream = client.completions.create(model="sql", prompt="How many users?", stream=True)
    send(0, 4, "other")
    assert next(stream).choices[0].text == "othe"
    run_queued(ledger)
    with pytest.raises(openai.APIError, match="has another text"):
        list(stream)


def wait_until(ready: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end_s, "not within 20 s"
        time.sleep(0.01)


@pytest.mark.parametrize("key", [None, "order 7"])
def test_who_goes_away_has_the_job_cancelled_unless_it_has_a_key(
    client: openai.OpenAI, ledger: Ledger, send: Any, key: str | None
) -> None:
    headers = {"Idempotency-Key": key} if key else {}
    stream = client.completions.create(
        model="sql", prompt="How many users?", stream=True, extra_headers=headers
    )
    send(0, 4)
    next(stream)
    stream.close()
    if key is None:
        wait_until(lambda: ledger.counts() == {"cancelled": 1})
    else:
        again = client.completions.create(
            model="sql", prompt="How many users?", stream=True, extra_headers=headers
        )
        with working(ledger):
            assert "".join(chunk.choices[0].text for chunk in again) == TEXT
        assert ledger.counts() == {"succeeded": 1}


def test_a_quiet_stream_is_kept_open(
    http: httpx.Client, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_S", 0.02)
    body = {"model": "sql", "prompt": "How many users?", "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines) == streaming.PING.strip()
        with working(ledger):
            assert list(lines)[-2] == "data: [DONE]"

"""Tools as OpenAI's client gives them, and the calls that it reads, unmodified."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from lorabatch import Ledger, Settings
from lorabatch.ledger import Claim
from lorabatch.result import Choice, Result
from lorabatch.tables import jobs
from tests.openai_client import batch_of, ended, line, lines_in
from tests.played_worker import succeeds, working

pytestmark = pytest.mark.usefixtures("sql_adapter")
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
PARAMETERS = {"type": "object", "properties": {"town": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Now", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
KEPT = {**FUNCTION, "parameters": json.dumps(PARAMETERS, separators=(",", ":"))}
USER = {"role": "user", "content": "Is it cold in Bern?"}
ASKED: dict[str, Any] = {"model": "sql", "messages": [USER], "tools": TOOLS}
CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Bern"}}</tool_call>'


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    return http_settings.model_copy(update={"base_model": "acme/tiny", "http_wait_s": 20.0})


def calls(claim: Claim) -> Result:
    return succeeds(claim, text=CALL)


def bodies(ledger: Ledger) -> list[Any]:
    """Of the jobs that were accepted, oldest first."""
    with ledger.engine.connect() as connection:
        return [row.body for row in connection.execute(jobs.select().order_by(jobs.c.submitted_us))]


def test_a_conversation_with_a_tool(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger, calls):
        first = client.chat.completions.create(**ASKED)
    (choice,) = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"town": "Bern"}')
    assert first.id.removeprefix("chatcmpl-") in call.id
    answered = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "-3"}
    with working(ledger):
        second = client.chat.completions.create(
            **{**ASKED, "messages": [USER, choice.message, answered]}
        )
    assert (second.choices[0].finish_reason, second.choices[0].message.content) == (
        "stop",
        "sql: -3",
    )
    before, after = bodies(ledger)
    assert before["tools"] == after["tools"] == [{"type": "function", "function": KEPT}]
    assert after["messages"][1]["tool_calls"] == [call.model_dump()]
    assert after["messages"][2] == answered


@on_sqlite
def test_only_those_who_have_tools_call_them(client: openai.OpenAI, ledger: Ledger) -> None:
    asked = ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"})
    with working(ledger, calls):
        for tools in asked:
            made: Any = {"model": "sql", "messages": [USER], **tools}
            (choice,) = client.chat.completions.create(**made).choices
            assert (choice.finish_reason, choice.message.content) == ("stop", CALL)
            assert choice.message.tool_calls is None
    assert not any("tools" in body for body in bodies(ledger))


@on_sqlite
def test_how_they_are_to_be_called_is_for_the_job_to_say(
    client: openai.OpenAI, ledger: Ledger
) -> None:
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    named = {"type": "function", "function": {"name": "weather"}}
    ways: tuple[dict[str, Any], ...] = (
        {"tool_choice": "required"},
        {"tool_choice": named, "parallel_tool_calls": False},
        {"tool_choice": {"function": {"name": "weather"}}},  # as TGI's clients say it
        {"tools": [strict]},
        {"tool_choice": "auto", "parallel_tool_calls": True},
    )
    with working(ledger, calls):
        for way in ways:
            (choice,) = client.chat.completions.create(**{**ASKED, **way}).choices
            assert choice.finish_reason == "tool_calls"
    required, one, tgis, held, plain = bodies(ledger)
    assert tgis["tool_choice"] == named
    assert required["tool_choice"] == "required"
    assert (one["tool_choice"], one["parallel_tool_calls"]) == (named, False)
    assert held["tools"] == [{"type": "function", "function": {**KEPT, "strict": True}}]
    assert not {"tool_choice", "parallel_tool_calls"} & set(plain)


@on_sqlite
def test_a_stream_tells_calls_at_its_end(client: openai.OpenAI, ledger: Ledger) -> None:
    def looks(claim: Claim) -> Result:
        return succeeds(claim, text=f"I look.\n{CALL}")

    with working(ledger, looks), client.chat.completions.stream(**ASKED) as stream:
        seen = [event for event in stream if event.type == "chunk"]
        message = stream.get_final_completion().choices[0].message
    assert message.content == "I look."
    (call,) = message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("weather", '{"town": "Bern"}')
    assert call.id == f"call_{seen[0].chunk.id.removeprefix('chatcmpl-')}_0_0"
    assert seen[-1].chunk.choices[0].finish_reason == "tool_calls"
    assert not any("<tool" in (e.chunk.choices[0].delta.content or "") for e in seen)


@on_sqlite
def test_each_of_several_texts_calls_for_itself(client: openai.OpenAI, ledger: Ledger) -> None:
    def several(claim: Claim) -> Result:
        ends: tuple[tuple[str, Any], ...] = (
            (CALL, "eos_token"),
            ("Yes", "eos_token"),
            (f"Hm. {CALL}", "length"),
        )
        choices = tuple(Choice(text=t, token_ids=(1,), finish_reason=end) for t, end in ends)
        return succeeds(claim, text=CALL, choices=choices)

    with working(ledger, several):
        made = client.chat.completions.create(**ASKED, n=3)
    found = [(c.finish_reason, c.message.content) for c in made.choices]
    assert found == [("tool_calls", None), ("stop", "Yes"), ("length", "Hm.")]
    ids = [call.id for choice in made.choices for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == 2


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tool_choice": "any"}, "tool_choice: wanted none, auto, required or a function"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice: wanted none"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice: there is no"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice: only with tools"),
    ({"parallel_tool_calls": 0}, "parallel_tool_calls: wanted true or false"),
    ({"tools": {"a": 1}}, "tools: wanted a list"),
    ({"tools": [{"type": "function"}]}, "tools.0: wanted an object with a function"),
    ({"tools": [{"type": "function", "function": {**FUNCTION, "strict": 1}}]}, "tools.0.function"),
    ({"tools": TOOLS * 129}, "tools: "),
    ({"response_format": {"type": "json_object"}}, "tools: not with structured_outputs"),
    ({"messages": [{**USER, "function_call": {"name": "f"}}]}, "messages.0.function_call"),
    ({"messages": [{**USER, "tool_calls": [1]}]}, "messages.0.tool_calls.0"),
)


@on_sqlite
def test_others_are_refused_by_name(client: openai.OpenAI, ledger: Ledger) -> None:
    for more, name in REFUSED:
        with pytest.raises(openai.BadRequestError, match=name.replace(".", r"\.")):
            client.chat.completions.create(**{**ASKED, **more})
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        client.completions.create(model="sql", prompt="Go", extra_body={"tools": TOOLS})
    assert bodies(ledger) == []


@on_sqlite
def test_lines_of_batches_have_them_too(client: openai.OpenAI, ledger: Ledger) -> None:
    lines = [line(1, body=ASKED), line(2)]
    with working(ledger, calls):
        done = ended(client, batch_of(client, lines))
    first, second = (
        answered["response"]["body"]["choices"][0]
        for answered in lines_in(client, done.output_file_id)
    )
    assert first["finish_reason"] == "tool_calls"
    assert first["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert (second["finish_reason"], second["message"]["content"]) == ("stop", CALL)

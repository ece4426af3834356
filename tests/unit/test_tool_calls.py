"""Calls of tools in a text: what is one, and what stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorabatch_producer.tool_calls import BeforeCalls, assistant

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>'
TIME = '<tool_call>{"arguments": {}, "name": "time.now"}</tool_call>'
BOTH = """<tool_call>[
    {"name": "weather", "arguments": {"town": "Köln"}}, {"name": "time.now", "arguments": {}}
]</tool_call>"""
TOLD = [("weather", '{"town": "Köln"}'), ("time.now", "{}")]


def calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    found = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in found]


@pytest.mark.parametrize(
    ("text", "content", "wanted"),
    [
        (WEATHER, None, TOLD[:1]),
        (f" I look.\n{WEATHER}\n", " I look.", TOLD[:1]),
        (f"{WEATHER}\n{TIME}", None, TOLD),
        (BOTH, None, TOLD),
    ],
    ids=["one", "after a text", "two", "a list"],
)
def test_blocks_are_calls(text: str, content: str | None, wanted: list[Any]) -> None:
    message = assistant(text, "j", 1)
    assert (message["role"], message["content"]) == ("assistant", content)
    assert calls(message) == wanted
    ids = [call["id"] for call in message["tool_calls"]]
    assert ids == [f"call_j_1_{n}" for n in range(len(wanted))]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is 3 degrees. \n",
        "a < b <tool_cat>\n\n <tool",
        WEATHER,
        f" I look.\n {WEATHER}{TIME}\n",
        f"I look. {WEATHER} Done.",
        "<tool_call>{}",
        "<tool_call>" * 3,
    ],
    ids=range(8),
)
def test_a_stream_tells_the_same_and_no_part_of_a_call(text: str) -> None:
    whole = assistant(text, "j", 0)
    for size in (1, 2, 5, 1000):
        before = BeforeCalls()
        said = [before.more(text[i : i + size]) for i in range(0, len(text), size)]
        deltas = list(before.rest(whole))
        content = "".join(said) + "".join(delta.get("content", "") for delta in deltas)
        assert content == (whole["content"] or "")
        told = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call.pop("index") for call in told] == list(range(len(told)))
        assert told == whole.get("tool_calls", [])
        if size == 1 and len(text) > 1 and not text.startswith("<"):
            assert said[0] == text[0].strip(), "it comes as it grows"


def test_a_text_may_hold_the_end_of_a_block() -> None:
    code = {"code": 'print("</tool_call><tool_call>")'}
    text = f"<tool_call>{json.dumps({'name': 'run', 'arguments': code})}</tool_call>"
    (call,) = assistant(text, "j", 0)["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is 3 degrees.",
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>[]</tool_call>",
        f"{WEATHER} That is all.",
        f"{WEATHER} and {TIME}",
        WEATHER.removesuffix("</tool_call>"),
        f"{WEATHER}<tool_call>{{'name': 'f'}}</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "id": 1}</tool_call>',
        '<tool_call>{"name": "not a name", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000,
    ],
    ids=range(17),
)
def test_what_is_not_quite_that_stays_text(text: str) -> None:
    assert assistant(text, "j", 0) == {"role": "assistant", "content": text}

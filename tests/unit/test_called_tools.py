"""Calls of tools that a job wants to be of a given form: all are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lorabatch import Job
from lorabatch_producer.tool_calls import assistant
from lorabatch_worker.grammar_text import grammar_text
from lorabatch_worker.grammars import Grammars
from tests.desk import Desk, start

TOWN = {
    "type": "object",
    "properties": {"town": {"$ref": "#/$defs/town"}},
    "required": ["town"],
    "additionalProperties": False,
    "$defs": {"town": {"enum": ["Bern", 'a "b"\\', "ü</tool_call>"]}},
}
DAYS = {
    "type": "object",
    "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["days"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": TOWN, "wait": DAYS, "now": {"type": "object", "maxProperties": 0}}


def tool(name: str, **more: Any) -> dict[str, Any]:
    schema = {} if name == "now" else {"parameters": SCHEMAS[name]}
    return {"function": {"name": name, **schema, **more}}


TOOLS = [tool("weather"), tool("wait"), tool("now")]
STRICT = [tool("weather", strict=True), tool("wait")]
NAMED = {"type": "function", "function": {"name": "wait"}}
KINDS: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required"},
    "one": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tool_choice": NAMED},
    "may be one": {"parallel_tool_calls": False},
    "strict": {"tools": STRICT},
}


def calling(job_id: str, **fields: Any) -> Job:
    messages = [{"role": "user", "content": "Cold?"}]
    return Job.parse({"job_id": job_id, "messages": messages, "tools": TOOLS, **fields})


def block(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


WEATHER = block("weather", '{"town": "Bern"}')
WAIT = block("wait", '{"days": 12}')
NOW = block("now", "{}")
# which kinds of KINDS allow it
TEXTS: tuple[tuple[str, set[str]], ...] = (
    ("It is cold.", {"may be one", "strict"}),
    ("", {"may be one", "strict"}),
    ("a <tool_cat> < b\n", {"may be one", "strict"}),
    (WEATHER, {"required", "one", "may be one", "strict"}),
    (WAIT, {"required", "one", "named", "may be one", "strict"}),
    (NOW, {"required", "one", "may be one"}),
    (f"{WEATHER}\n{WAIT}", {"required", "strict"}),
    (f"{WEATHER}\n{WAIT}\n{WEATHER}", {"required", "strict"}),
    (f"I look.\n\n{WEATHER}", {"may be one", "strict"}),
    (f"{WEATHER} Done.", set()),
    (WEATHER.removesuffix("</tool_call>"), set()),
    (block("weather", '{"town": "Rome"}'), {"may be one"}),
    (block("weather", "{}"), {"may be one"}),
    (block("wait", '{"hours": 1}'), {"may be one", "strict"}),
    (block("wait", "[]"), set()),
    (block("sleep", "{}"), set()),
)


@pytest.mark.parametrize(("text", "kinds"), TEXTS, ids=range(len(TEXTS)))
def test_what_each_choice_allows(text: str, kinds: set[str], tokenizer: Any) -> None:
    grammars = Grammars()
    ids = tokenizer(text)["input_ids"]
    allowed = set()
    for kind, fields in KINDS.items():
        wanted = grammar_text(calling("j", **fields))
        assert wanted is not None
        grammar = grammars.grammar_of("j", wanted, tokenizer, frozenset({2}))
        for token in ids:
            grammar.take(token)
        if not grammar.failed and grammar._matcher.is_accepting():
            allowed.add(kind)
    grammars.close()
    assert allowed == kinds


def test_nothing_is_held_that_need_not_be() -> None:
    assert grammar_text(calling("j")) is None
    assert grammar_text(calling("j", tools=[tool("weather", strict=False)])) is None


@pytest.fixture
def calling_desk(tiny_folder: Path, tiny_adapters: dict[str, Path], home: Path) -> Any:
    """Its adapters' template tells of tools."""
    for name, folder in tiny_adapters.items():
        shutil.copytree(folder, home / "adapters" / name)
        template = "{{ tools[0].function.name if tools }} {{ messages[0].content }}"
        (home / "adapters" / name / "chat_template.jinja").write_text(template)
    made = start(tiny_folder, home)
    yield made
    made.engine.drain(0)


def test_in_one_batch_all_calls_are_valid(
    calling_desk: Desk, tiny_adapters: dict[str, Path]
) -> None:
    ends = {2: 8.0}  # the end token, or a random model calls on and on
    params = {"max_new_tokens": 200, "temperature": 1.0, "logit_bias": ends}
    wanted = {
        f"{kind}-{name}": calling(
            f"{kind}-{name}", adapter_id=name, sampling_params=params, **KINDS[kind]
        )
        for kind in ("required", "one", "named")
        for name in tiny_adapters
    }
    results = calling_desk.run(*wanted.values())
    for job_id, result in results.items():
        assert result.finish_reason == "eos_token", result
        message = assistant(result.text or "", job_id, 0)
        assert message["content"] is None
        calls = [call["function"] for call in message["tool_calls"]]
        for call in calls:
            jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])
        assert job_id.startswith("required") or len(calls) == 1
        assert not job_id.startswith("named") or calls[0]["name"] == "wait"
    assert len({result.text for result in results.values()}) > 10, "not all alike"


def test_a_schema_that_cannot_be_fails_its_job_and_names_the_tools(calling_desk: Desk) -> None:
    odd = {"function": {"name": "odd", "parameters": {"uniqueItems": True}}}
    params = {"max_new_tokens": 8}
    fields: dict[str, Any] = {"tool_choice": "required", "sampling_params": params}
    one = calling("odd", tools=[odd], adapter_id="all", **fields)
    error = calling_desk.run(one)["odd"].error
    assert error is not None
    assert error.code == "invalid_job"
    assert error.message.startswith("job 'odd': tools: ")
    assert "uniqueItems" in error.message

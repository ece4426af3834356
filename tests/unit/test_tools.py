"""Tools of a job: what may be given, and that a chat template is told of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lorabatch import Job, Ledger
from lorabatch.errors import InvalidJob
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.prompt import Preparer
from tests.models import as_base, claim, tiny_config, tiny_model
from tests.templates import CHATML

SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}, "at": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"at": 1}'}}
USER = {"role": "user", "content": "Late?"}
TALK: tuple[dict[str, Any], ...] = (
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes", "tool_call_id": "c1", "name": "clock"},
)
TOLD = (
    "{% for t in tools or [] %}{{ t.function | tojson }};{% endfor %}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}{{ m.tool_call_id }}{{ m.name }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.arguments.at + 1 }}{% endfor %}"
    ",{% endfor %}"
)
WANTED = (
    '{"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}, '
    '"at": {"type": "integer"}}}};user:Late?,assistant:c12,tool:yesc1clock,'
)


def parsed(**fields: Any) -> Job:
    short = {"sampling_params": {"max_new_tokens": 8}}
    return Job.parse({"job_id": "j", "messages": TALK, **short, **fields})


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"function": {"name": "f", **fields}}]}


def call(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{**CALL, **fields}]}]}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tools": []}, "tools: "),
    ({"tools": [TOOL] * 129}, "tools: "),
    (function(name="a b"), r"tools\.0\.function\.name: "),
    (function(name="a" * 65), r"tools\.0\.function\.name: "),
    (function(colour="red"), r"tools\.0\.function\.colour: no such field"),
    (function(parameters=[1]), r"tools\.0\.function\.parameters: wanted a JSON schema"),
    (function(parameters={"enum": ["x" * 262_144]}), r"tools\.0\.function\.parameters: the schema"),
    (function(description="\x00"), r"tools\.0\.function\.description: must not contain the NUL"),
    (
        {"tools": [{"function": {"name": f"f{n}", "description": "x" * 70_000}} for n in range(4)]},
        "tools: wanted 262144 bytes of JSON at most",
    ),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, r"tools\.0\.type: "),
    ({"tools": [TOOL], "messages": None, "prompt": "Go"}, "tools: not with a prompt"),
    (
        {"tools": [TOOL], "sampling_params": {"structured_outputs": {"regex": "a"}}},
        "tools: not with structured_outputs",
    ),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "none"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": named("cloak")}, "tool_choice: there is no tool 'cloak'"),
    ({"tool_choice": "required"}, "tool_choice: only with tools"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls: only with tools"),
    ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls: "),
    (function(strict="yes"), r"tools\.0\.function\.strict: "),
    (
        {
            "tools": [TOOL],
            "tool_choice": "required",
            "sampling_params": {"ignore_eos": True},
        },
        "ignore_eos: not with calls",
    ),
    (call(id=""), r"messages\.0\.tool_calls\.0\.id: "),
    (call(function={"name": "f"}), r"messages\.0\.tool_calls\.0\.function\.arguments: "),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, "tool_calls: only an assistant has them"),
    ({"messages": [{**USER, "tool_call_id": "c1"}]}, "tool_call_id: only role 'tool' has one"),
    ({"messages": [{"role": "assistant"}]}, "content: missing"),
)


@pytest.mark.parametrize(("fields", "why"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidJob, match=f"job 'j': .*{why}"):
        parsed(**fields)


def test_they_are_kept_as_they_were_given(ledger: Ledger) -> None:
    """A database's JSON has another order; a template writes what it is given."""
    job = parsed(tools=[TOOL])
    ledger.accept([job])
    claimed = ledger.claim(["j"], "me", 60)["j"].job
    assert (claimed.tools, claimed.messages) == (job.tools, job.messages)
    (tool,) = claimed.tools or ()
    assert json.dumps(tool.for_template()) == json.dumps(TOOL)
    assert parsed().request_hash() != job.request_hash()
    assert not {"tool_choice", "parallel_tool_calls"} & set(job.body()), "old workers know neither"


def test_how_they_are_to_be_called_is_kept(ledger: Ledger) -> None:
    job = parsed(tools=[TOOL], tool_choice=named("clock"), parallel_tool_calls=False)
    ledger.accept([job])
    claimed = ledger.claim(["j"], "me", 60)["j"].job
    assert (claimed.tool_choice, claimed.parallel_tool_calls) == (job.tool_choice, False)
    assert claimed.constrained
    others = (parsed(tools=[TOOL]), parsed(tools=[TOOL], parallel_tool_calls=False))
    assert len({one.request_hash() for one in (job, *others)}) == 3


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> BaseModel:
    return as_base(tiny_model(tiny_config("llama")), tokenizer)


def prompt_of(base: BaseModel, own: str | None, **fields: Any) -> str:
    preparer = Preparer(base)
    try:
        adapter = Adapter("a", "version", {}, own)
        return str(base.tokenizer.decode(preparer.prepare(claim(parsed(**fields)), adapter).prompt))
    finally:
        preparer.close()


def with_template(base: BaseModel, template: str) -> BaseModel:
    import copy

    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    return replace(base, tokenizer=tokenizer)


def test_the_base_models_template_is_told(base: BaseModel) -> None:
    assert prompt_of(with_template(base, TOLD), None, tools=[TOOL]) == WANTED


def test_an_adapters_template_is_told(base: BaseModel) -> None:
    assert prompt_of(base, TOLD, tools=[TOOL]) == WANTED


@pytest.mark.parametrize("owner", ["base model", "adapter"])
def test_a_template_that_knows_no_tools_is_named(base: BaseModel, owner: str) -> None:
    own = CHATML if owner == "adapter" else None
    model = base if own else with_template(base, CHATML)
    with pytest.raises(InvalidJob, match=f"job 'j': tools: the {owner}'s chat template"):
        prompt_of(model, own, tools=[TOOL])
    assert "Late?" in prompt_of(model, own)

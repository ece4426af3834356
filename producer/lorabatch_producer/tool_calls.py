"""Tools of an OpenAI request, and the calls of them in a text.

A text calls tools as Hermes, Qwen and SmolLM2 were trained to: by one or several blocks

    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>

at its end, or a list of such objects in a block. Whatever is not quite that stays text. A
`tool_choice` of `none` keeps tools from the model; those of `required` and of one function are
refused, because nothing makes a model call. Raises InvalidJob.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from lorabatch.errors import InvalidJob, shown
from lorabatch.tools import ToolCall

__all__ = ["ASKED", "assistant", "only_text_streams", "tools_of"]

ASKED = {"tools", "tool_choice"}
BEGIN, END = "<tool_call>", "</tool_call>"
KEYS = {"name", "arguments"}


def tools_of(given: Mapping[str, Any]) -> list[Any] | None:
    """For a Job; None where the model is not to know of any."""
    choice, tools = given.get("tool_choice", "auto"), given.get("tools", [])
    if choice not in ("none", "auto"):
        raise InvalidJob(f"body.tool_choice: wanted none or auto (got {shown(choice)})")
    if not isinstance(tools, list):
        raise InvalidJob(f"body.tools: wanted a list (got {shown(tools)})")
    if tools and given.get("parallel_tool_calls") is False:
        raise InvalidJob("body.parallel_tool_calls: only true is supported with tools; remove it")
    found = [_tool(tool, f"body.tools.{number}") for number, tool in enumerate(tools)]
    return found if found and choice == "auto" else None


def _tool(tool: object, where: str) -> object:
    """Without what asks for nothing; the rest is for the Job to check."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        raise InvalidJob(f"{where}: wanted an object with a function (got {shown(tool)})")
    function = dict(tool["function"])
    if function.pop("strict", None) not in (None, False):
        raise InvalidJob(f"{where}.function.strict: only false is supported; remove it")
    return {**tool, "function": function}


def only_text_streams(fields: Mapping[str, Any]) -> None:
    """Refuse what a stream cannot tell."""
    if fields.get("tools"):
        raise InvalidJob("tools: not supported with stream; leave out either")


def assistant(text: str, job_id: str, index: int) -> dict[str, Any]:
    """The message of a job that had tools; `index`: of the text, among those of the job."""
    before, begin, rest = text.partition(BEGIN)
    try:
        calls = [
            ToolCall.model_validate({"id": f"call_{job_id}_{index}_{number}", "function": function})
            for number, function in enumerate(_called(begin + rest))
        ]
    except (ValueError, RecursionError):  # pydantic's is a ValueError
        calls = []
    if not calls:
        return {"role": "assistant", "content": text}
    told = [call.model_dump() for call in calls]
    return {"role": "assistant", "content": before.strip() or None, "tool_calls": told}


def _called(text: str) -> Iterator[dict[str, Any]]:
    """Functions and their arguments, of a text that is nothing but blocks. Raises ValueError."""
    decoder = json.JSONDecoder(parse_constant=_not_json)
    text = text.strip()
    while text:
        if not text.startswith(BEGIN):
            raise ValueError("more than calls")
        block = text.removeprefix(BEGIN).lstrip()
        found, end = decoder.raw_decode(block)
        block = block[end:].lstrip()
        if not block.startswith(END):
            raise ValueError("not closed")
        text = block.removeprefix(END).lstrip()
        for one in found if isinstance(found, list) else [found]:
            if not isinstance(one, dict) or set(one) != KEYS or type(one["arguments"]) is not dict:
                raise ValueError("not a call")
            arguments = json.dumps(one["arguments"], ensure_ascii=False, allow_nan=False)
            yield {"name": one["name"], "arguments": arguments}


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)

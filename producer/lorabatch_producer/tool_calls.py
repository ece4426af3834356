"""Tools of an OpenAI request, and the calls of them in a text.

Calls are one or several blocks at a text's end (lorabatch/tools.py), or a list of calls in a block.
Whatever is not quite that stays text. A `tool_choice` of `none` keeps tools from the model. Raises
InvalidJob.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from lorabatch.errors import InvalidJob, shown
from lorabatch.tools import CALL_BEGINS, CALL_ENDS, ToolCall

__all__ = ["ASKED", "BeforeCalls", "assistant", "tools_of"]

ASKED = {"tools", "tool_choice", "parallel_tool_calls"}
KEYS = {"name", "arguments"}


def tools_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Job; none where the model is not to know of tools."""
    tools, choice = given.get("tools", []), given.get("tool_choice", "auto")
    parallel = given.get("parallel_tool_calls", True)
    if not isinstance(tools, list):
        raise InvalidJob(f"body.tools: wanted a list (got {shown(tools)})")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise InvalidJob(
                f"body.tools.{number}: wanted an object with a function (got {shown(tool)})"
            )
    named = isinstance(choice, dict) and choice.get("type", "function") == "function"
    if not named and choice not in ("none", "auto", "required"):
        raise InvalidJob(
            f"body.tool_choice: wanted none, auto, required or a function (got {shown(choice)})"
        )
    if type(parallel) is not bool:
        raise InvalidJob(f"body.parallel_tool_calls: wanted true or false (got {shown(parallel)})")
    if choice == "none" or (choice == "auto" and not tools):
        return {}
    return {"tools": tools or None, "tool_choice": choice, "parallel_tool_calls": parallel}


def assistant(text: str, job_id: str, index: int) -> dict[str, Any]:
    """The message of a job that had tools; `index`: of the text, among those of the job."""
    before, begin, rest = text.partition(CALL_BEGINS)
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
    return {"role": "assistant", "content": before.rstrip() or None, "tool_calls": told}


class BeforeCalls:
    """What a growing text says before it calls tools: held back is what may be part of a call."""

    def __init__(self) -> None:
        self._given = 0
        self._open = ""

    def more(self, new: str) -> str:
        """What is certainly said, when the text has grown by this."""
        self._open += new
        plain, begins, _ = self._open.partition(CALL_BEGINS)
        if not begins:
            half = (
                n for n in range(len(CALL_BEGINS) - 1, 0, -1) if plain.endswith(CALL_BEGINS[:n])
            )
            plain = plain[: len(plain) - next(half, 0)]
        said = plain.rstrip()
        self._given += len(said)
        self._open = self._open[len(said) :]
        return said

    def rest(self, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What was held back, from the whole message of `assistant`: as OpenAI's deltas."""
        if left := (message["content"] or "")[self._given :]:
            yield {"content": left}
        for index, call in enumerate(message.get("tool_calls", ())):
            yield {"tool_calls": [{"index": index, **call}]}


def _called(text: str) -> Iterator[dict[str, Any]]:
    """Functions and their arguments, of a text that is nothing but blocks. Raises ValueError."""
    decoder = json.JSONDecoder(parse_constant=_not_json)
    text = text.strip()
    while text:
        if not text.startswith(CALL_BEGINS):
            raise ValueError("more than calls")
        block = text.removeprefix(CALL_BEGINS).lstrip()
        found, end = decoder.raw_decode(block)
        block = block[end:].lstrip()
        if not block.startswith(CALL_ENDS):
            raise ValueError("not closed")
        text = block.removeprefix(CALL_ENDS).lstrip()
        for one in found if isinstance(found, list) else [found]:
            if not isinstance(one, dict) or set(one) != KEYS or type(one["arguments"]) is not dict:
                raise ValueError("not a call")
            arguments = json.dumps(one["arguments"], ensure_ascii=False, allow_nan=False)
            yield {"name": one["name"], "arguments": arguments}


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)

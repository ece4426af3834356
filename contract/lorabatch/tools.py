"""Tools that a conversation may call, the calls in it, and how a text makes them.

A text calls tools as Hermes, Qwen and SmolLM2 were trained to: by blocks

    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>

Parameters of a tool are kept as text, like schemas of texts: a database's JSON has another order,
and a template writes what it is given. Raises what pydantic raises.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints

from lorabatch.fields import Model, Text, storable
from lorabatch.structured import Schema

__all__ = [
    "CALL_BEGINS",
    "CALL_ENDS",
    "MAX_TOOLS",
    "NamedTool",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "check_tools",
    "tools_bytes",
]

CALL_BEGINS: Final = "<tool_call>"
CALL_ENDS: Final = "</tool_call>"
MAX_TOOLS: Final = 128
MAX_BYTES: Final = 1 << 18
NAME = r"^[A-Za-z0-9_.-]+$"

FunctionName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NAME)]
Storable = Annotated[Text, AfterValidator(storable)]


class Function(Model):
    """`parameters`: the JSON schema of its arguments; without it there are none. `strict`: no call
    of it has others."""

    name: FunctionName
    description: Storable | None = None
    parameters: Schema | None = None
    strict: bool | None = Field(default=None, strict=True)


class Tool(Model):
    """One that the model may call."""

    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        given = self.function.model_dump(exclude_none=True, exclude={"strict"})
        if self.function.parameters is not None:
            given["parameters"] = json.loads(self.function.parameters)
        return {"type": self.type, "function": given}


class NamedFunction(Model):
    name: FunctionName


class NamedTool(Model):
    """The one that is to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["auto", "required"] | NamedTool
"""`auto`: the model may call tools; `required`: it has to; or the one that it has to call."""


class CalledFunction(Model):
    """`arguments`: JSON as the model wrote it."""

    name: FunctionName
    arguments: Storable


class ToolCall(Model):
    """One that the model made."""

    id: Annotated[Storable, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: with arguments as an object, if they are one."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


def check_tools(tools: tuple[Tool, ...], choice: ToolChoice) -> None:
    """Whether all together are small enough, and the chosen one is there."""
    if tools_bytes(tools) > MAX_BYTES:
        raise ValueError(f"tools: wanted {MAX_BYTES} bytes of JSON at most, all together")
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ValueError(
            f"tool_choice: there is no tool {choice.function.name!r}; wanted one of "
            f"{', '.join(names)}"
        )


def tools_bytes(tools: tuple[Tool, ...]) -> int:
    """Of all of them, as JSON."""
    return sum(len(tool.model_dump_json(exclude_none=True).encode()) for tool in tools)

"""Tools that a conversation may call, and the calls in it, as chat templates know them.

Parameters of a tool are kept as text, like schemas of texts: a database's JSON has another order,
and a template writes what it is given. Raises what pydantic raises.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints

from lorabatch.fields import Model, Text, storable
from lorabatch.structured import Schema

__all__ = ["MAX_TOOLS", "MAX_TOOLS_BYTES", "Tool", "ToolCall", "tools_bytes"]

MAX_TOOLS: Final = 128
MAX_TOOLS_BYTES: Final = 1 << 18
NAME = r"^[A-Za-z0-9_.-]+$"

FunctionName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=NAME)]
Storable = Annotated[Text, AfterValidator(storable)]


class Function(Model):
    """`parameters`: the JSON schema of its arguments."""

    name: FunctionName
    description: Storable | None = None
    parameters: Schema | None = None


class Tool(Model):
    """One that the model may call."""

    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        given = self.function.model_dump(exclude_none=True)
        if self.function.parameters is not None:
            given["parameters"] = json.loads(self.function.parameters)
        return {"type": self.type, "function": given}


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


def tools_bytes(tools: tuple[Tool, ...]) -> int:
    """Of all of them, as JSON."""
    return sum(len(tool.model_dump_json(exclude_none=True).encode()) for tool in tools)

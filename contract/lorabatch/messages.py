"""One turn of a conversation. Raises what pydantic raises."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorabatch.fields import Model, Text, storable
from lorabatch.tools import MAX_TOOLS, ToolCall

__all__ = ["ChatMessage"]

Short = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(storable)]


class ChatMessage(Model):
    """One turn of a conversation, rendered by the adapter's or the base model's template.

    `content` may be left out where an assistant has `tool_calls`. A tool's answer says by
    `tool_call_id` which call it answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    name: Short | None = None
    tool_calls: tuple[ToolCall, ...] | None = Field(
        default=None, min_length=1, max_length=MAX_TOOLS
    )
    tool_call_id: Short | None = None
    content: Annotated[Text, AfterValidator(storable)] | None = Field(
        default=None, validate_default=True
    )

    @field_validator("content")
    @classmethod
    def _content_or_calls(cls, content: str | None, info: ValidationInfo) -> str | None:
        if content is None and info.data.get("tool_calls") is None:
            raise ValueError("missing")
        return content

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> Self:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"tool_calls: only an assistant has them, not role {self.role!r}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id: only role 'tool' has one, not {self.role!r}")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        given = self.model_dump(exclude_none=True)
        if self.tool_calls is not None:
            given["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return {**given, "content": self.content or ""}

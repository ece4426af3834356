"""The messages of an OpenAI chat as a job's. Raises InvalidJob."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.console import printable

__all__ = ["messages_of"]

FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


def messages_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of an OpenAI body."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidJob(f"body.messages: wanted a list of messages (got {shown(messages)})")
    return [_message(message, f"body.messages.{i}") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidJob(f"{where}: must be an object (got {shown(message)})")
    given = {name: value for name, value in message.items() if value is not None}
    extra = sorted(set(given) - set(FIELDS))
    if extra:
        raise InvalidJob(f"{where}.{printable(extra[0])[:80]}: not supported; remove it")
    if given.get("tool_calls") == []:
        del given["tool_calls"]
    role = message.get("role")
    content = _content(message.get("content"), where)
    return {**given, "role": "system" if role == "developer" else role, "content": content}


def _content(content: object, where: str) -> object:
    """A text, or OpenAI's list of parts when all of them are text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidJob(f"{where}.content: only text parts are supported (got {shown(part)})")
        texts.append(text)
    return "".join(texts)

"""The chat template that an adapter ships, if it does, and its tokenizer's settings.

Raises InvalidAdapter, UnsupportedAdapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown

__all__ = ["TEMPLATE", "TOKENIZER", "is_unicode", "read_length", "read_object", "read_template"]

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 1 << 18
MAX_OBJECT_BYTES = 1 << 25
NO_LENGTH = 10**9  # transformers writes some 1e30 where there is none


def read_template(folder: Path) -> str | None:
    """Of the adapter in this folder."""
    path = folder / TEMPLATE
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise InvalidAdapter(f"{TEMPLATE} is over {MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidAdapter(f"{TEMPLATE} is not UTF-8 text: {error}") from None
    template = read_object(folder / TOKENIZER).get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UnsupportedAdapter(f"chat_template is {shown(template)}, wanted one string")
    if template is not None and len(template) > MAX_TEMPLATE_BYTES:
        raise InvalidAdapter(f"{TOKENIZER}: chat_template is over {MAX_TEMPLATE_BYTES} characters")
    return template


def read_length(folder: Path) -> int | None:
    """Tokens of the longest text that the adapter in this folder is meant for, if it says so."""
    length = read_object(folder / TOKENIZER).get("model_max_length")
    return length if type(length) is int and 0 < length < NO_LENGTH else None


def read_object(path: Path) -> dict[str, Any]:
    """A file with a JSON object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_OBJECT_BYTES:
            raise InvalidAdapter(f"{path.name} is over {MAX_OBJECT_BYTES} bytes")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidAdapter(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidAdapter(f"{path.name} is not a valid JSON object")
    return found


def is_unicode(text: str) -> bool:
    """JSON can name halves of characters, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)

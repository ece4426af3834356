"""The chat template that an adapter ships, if it does.

Raises InvalidAdapter, UnsupportedAdapter.
"""

from __future__ import annotations

import json
from pathlib import Path

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown

__all__ = ["TEMPLATE", "TOKENIZER", "read_template"]

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 1 << 18


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
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text("utf-8")).get("chat_template")
    except (ValueError, RecursionError, AttributeError):
        raise InvalidAdapter(f"{TOKENIZER} is not a valid JSON object") from None
    if template is not None and not isinstance(template, str):
        raise UnsupportedAdapter(f"chat_template is {shown(template)}, wanted one string")
    return template

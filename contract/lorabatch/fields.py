"""Kinds of fields that jobs are made of: names, texts, and what every database can store."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from lorabatch.errors import shown

__all__ = [
    "ADAPTER_PATTERN",
    "MAX_PROMPT_CHARS",
    "MERGED",
    "QUEUE_PATTERN",
    "AdapterName",
    "Identifier",
    "Model",
    "Stop",
    "Text",
    "Weight",
    "is_identifier",
    "queue_name",
    "storable",
]

MAX_PROMPT_CHARS = 4_000_000
ADAPTER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$"
_ADAPTER = re.compile(ADAPTER_PATTERN)
_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.:@-]*$")
QUEUE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$"
_QUEUE = re.compile(QUEUE_PATTERN)
MERGED: Final = "merged"  # the owner in the names of merges


def _identifier(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError("wanted letters, digits and _ . : @ -, the first one a letter or digit")
    return text


def _adapter_name(text: str) -> str:
    if not _ADAPTER.fullmatch(text):
        raise ValueError("wanted NAME or OWNER/NAME of letters, digits and _ . -, no path")
    if text.startswith(f"{MERGED}/"):
        raise ValueError(f"the owner {MERGED!r} stands for merges; use merged_adapters to have one")
    return text


Identifier = Annotated[
    str, StringConstraints(min_length=1, max_length=64), AfterValidator(_identifier)
]
AdapterName = Annotated[
    str, StringConstraints(min_length=1, max_length=128), AfterValidator(_adapter_name)
]
Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Weight = Annotated[float, Field(strict=True)]


class Model(BaseModel):
    """Strict about unknown fields, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)


def storable(text: str) -> str:
    """Text that every database and JSON parser takes: no NUL, no lone surrogates."""
    if "\x00" in text:
        raise ValueError("must not contain the NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode at character {error.start}") from None
    return text


def is_identifier(text: object) -> bool:
    """Whether text can be a job id or a tenant."""
    return isinstance(text, str) and len(text) <= 64 and bool(_ID.fullmatch(text))


def queue_name(name: str) -> str:
    """The name of a queue as it is given. Raises ValueError."""
    if not _QUEUE.fullmatch(name):
        raise ValueError(
            f"queue {shown(name)}: wanted letters, digits and _ . : -, the first one a letter or "
            "digit, at most 64"
        )
    return name

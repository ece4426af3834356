"""What a text must be like: JSON of a schema, any JSON object, a regular expression, a choice.

A schema is kept as text: the order of its properties decides the order in the answer, and a
database's JSON forgets it. Checked here are sizes, types and that a schema is JSON; whether it
can be computed only the worker knows. Raises what pydantic raises.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from lorabatch.errors import shown
from lorabatch.fields import Model, storable

__all__ = ["StructuredOutputs"]

MAX_SCHEMA_BYTES = 1 << 18
MAX_DEPTH = 64  # of a schema's objects and lists in each other
MAX_REGEX_CHARS = 8192
MAX_CHOICES = 1000
KINDS = "json, json_object, regex and choice"


def _schema_text(value: object) -> object:
    """An object, or its text, as text."""
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        schema, text = None, ""
    if not isinstance(schema, dict):
        raise ValueError("wanted a JSON schema that is an object, or its text")
    if len(storable(text).encode()) > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema has {len(text.encode())} bytes, allowed {MAX_SCHEMA_BYTES}")
    if _depth(schema) > MAX_DEPTH:
        raise ValueError(f"the schema is over {MAX_DEPTH} objects and lists deep; flatten it")
    return text


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [x for one in level for x in (one.values() if isinstance(one, dict) else one)]
    return depth


def _storable_text(value: object) -> object:
    return storable(value) if isinstance(value, str) else value


Schema = Annotated[str, BeforeValidator(_schema_text)]
Choice = Annotated[
    str, StringConstraints(min_length=1, max_length=1024), BeforeValidator(_storable_text)
]
Regex = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_REGEX_CHARS),
    BeforeValidator(_storable_text),
]


class StructuredOutputs(Model):
    """Exactly one of four. `json`: the text is JSON that fits this schema, an object or its text;
    `json_object`: it is any JSON object; `regex`: it matches the whole of a regular expression, of
    Rust's syntax, without looking around or back; `choice`: it is one of these texts.

    A text that is cut off by max_new_tokens or a stop string may be none of it. The names are
    vLLM's.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    json_schema: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = Field(default=None, strict=True)
    regex: Regex | None = None
    choice: tuple[Choice, ...] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if self.json_object is False:
            raise ValueError("json_object is false; wanted true, or another kind")
        given = [name for name, value in self.model_dump().items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {KINDS}, not {' and '.join(given) or 'none'}")
        if self.choice is not None and len(set(self.choice)) != len(self.choice):
            twice = next(one for one in self.choice if self.choice.count(one) > 1)
            raise ValueError(f"choice: wanted different texts, {shown(twice)} is there twice")
        return self

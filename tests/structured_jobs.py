"""Jobs whose texts must be like something."""

from __future__ import annotations

from typing import Any

from lorabatch import Job
from lorabatch_worker.grammar_text import grammar_text
from tests.desk import job

__all__ = ["REGEX", "SCHEMAS", "constraint", "wants"]

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "list": {
        "type": "array",
        "items": {"enum": ["red", "green", 3, None]},
        "minItems": 2,
        "maxItems": 4,
    },
    "either": {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "boolean"}, {"const": "ü€"}]},
            "b": {"type": "string", "pattern": "^[a-z]{2,6}$"},
        },
        "required": ["b", "a"],
        "additionalProperties": False,
    },
}
REGEX = r"(yes|no), [0-9]{3}"


def wants(job_id: str, adapter: str | None = None, **wanted: Any) -> Job:
    """A job whose text must be like something; other fields are sampling parameters."""
    kinds = ("json", "json_object", "regex", "choice")
    structured = {kind: wanted.pop(kind) for kind in kinds if kind in wanted}
    params = {"max_new_tokens": 100, "ignore_eos": False, "structured_outputs": structured}
    return job(job_id, adapter=adapter, **{**params, **wanted})


def constraint(**kinds: Any) -> tuple[str, str]:
    """What its text must be like, as Grammars takes it."""
    found = grammar_text(wants("j", **kinds))
    assert found is not None
    return found

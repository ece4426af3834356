"""What OpenAI's, vLLM's and TGI's requests say a text must be like, as our `structured_outputs`.

    response_format      OpenAI's: text, json_object, json_schema; or TGI's grammar, which Hugging
                         Face's client makes of it
    structured_outputs   vLLM's, which is ours: json, json_object, regex, choice
    grammar              TGI's: json, json_schema, regex
    parameters.response_format   LoRAX's: json_object, with a schema or without

A schema is always held to, whatever `strict` says. Raises InvalidJob, which names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.console import printable

__all__ = ["openai_structured", "tgi_structured"]

GRAMMAR = ("type", "value")
NAMED = ("name", "description", "schema", "strict")


def openai_structured(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of an OpenAI body without nulls, as fields of sampling parameters."""
    wanted = _response_format(given["response_format"]) if "response_format" in given else None
    ours = given.get("structured_outputs")
    if wanted is not None and ours is not None:
        raise InvalidJob("body.response_format: not with structured_outputs; leave out one of both")
    found = ours if wanted is None else wanted
    return {} if found is None else {"structured_outputs": found}


def tgi_structured(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same of TGI's parameters."""
    if "grammar" in given:
        where = "parameters.grammar"
        return {"structured_outputs": _grammar(_object(given["grammar"], where, GRAMMAR), where)}
    if "response_format" in given:
        return {"structured_outputs": _of_lorax(given["response_format"])}
    return {}


def _of_lorax(value: object) -> dict[str, Any]:
    where = "parameters.response_format"
    wanted = _object(value, where, ("type", "schema"))
    if wanted.get("type") != "json_object":
        raise InvalidJob(f"{where}.type: wanted json_object (got {shown(wanted.get('type'))})")
    schema = wanted.get("schema")
    return {"json_object": True} if schema is None else {"json": schema}


def _grammar(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind, value = given.get("type"), given.get("value")
    if kind in ("json", "json_object"):
        return {"json": value}
    if kind == "json_schema":
        return {"json": _schema(value, f"{where}.value")}
    if kind == "regex":
        return {"regex": value}
    raise InvalidJob(f"{where}: wanted a type json, json_schema or regex (got {shown(kind)})")


def _response_format(value: object) -> dict[str, Any] | None:
    where = "body.response_format"
    if isinstance(value, Mapping) and "value" in value:
        return _grammar(_object(value, where, GRAMMAR), where)
    wanted = _object(value, where, ("type", "json_schema"))
    kind = wanted.get("type")
    if kind == "json_schema":
        return {"json": _schema(wanted.get("json_schema"), f"{where}.json_schema")}
    if "json_schema" in wanted:
        raise InvalidJob(f"{where}.json_schema: only with type json_schema (got {shown(kind)})")
    if kind == "json_object":
        return {"json_object": True}
    if kind == "text":
        return None
    raise InvalidJob(f"{where}.type: wanted text, json_object or json_schema (got {shown(kind)})")


def _schema(value: object, where: str) -> object:
    """Of an object that names it."""
    schema = _object(value, where, NAMED).get("schema")
    if schema is None:
        raise InvalidJob(f"{where}.schema: missing; wanted a JSON schema")
    return schema


def _object(value: object, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidJob(f"{where}: wanted an object (got {shown(value)})")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise InvalidJob(f"{where}.{printable(unknown[0])[:80]}: not supported; remove it")
    return value

"""What an adapter wants of a job that leaves it out: sampling, stop strings, end tokens.

From generation_config.json as transformers writes it, and `eos_token` of tokenizer_config.json. As
in transformers, without `do_sample` the text is greedy whatever `temperature` says, and with it
temperature is 1.0 and top_k 50 unless the file has its own. A null is a field left out; fields
that are not listed here are not read. Lengths are in tokens. Raises InvalidAdapter. Not covered:
whether `eos_token` is a token, which prompt.py asks the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorabatch.errors import InvalidAdapter, explain, shown
from lorabatch.job import SamplingParams
from lorabatch_worker.adapters.template import TOKENIZER, is_unicode, read_object

__all__ = ["GENERATION", "GenerationDefaults", "read_defaults"]

GENERATION = "generation_config.json"
OURS = {  # the file's name of a field: ours
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "typical_p")},
    **{name: name for name in ("repetition_penalty", "max_new_tokens")},
    "stop_strings": "stop",
}
SAMPLED = {"temperature": 1.0, "top_k": 50}  # transformers', with do_sample


@dataclass(frozen=True)
class GenerationDefaults:
    """`params` by their names in SamplingParams, checked. `end_token` is a text."""

    params: Mapping[str, Any] = field(default_factory=dict)
    end_ids: frozenset[int] = frozenset()
    end_token: str | None = None

    def complete(self, given: SamplingParams, room: int) -> SamplingParams:
        """The job's own parameters with these where it has none; `room` tokens fit beside the
        prompt, and a job that says nothing does not fail because of a larger default."""
        params = {n: v for n, v in self.params.items() if n not in given.model_fields_set}
        if "max_new_tokens" in params:
            most = room if given.most_tokens is None else min(room, given.most_tokens)
            params["max_new_tokens"] = max(1, min(params["max_new_tokens"], most))
        return given.model_copy(update=params)


def read_defaults(folder: Path, vocabulary: int | None) -> GenerationDefaults | None:
    """Of the adapter in this folder, None if it has none. `vocabulary`: token ids of it."""
    raw = read_object(folder / GENERATION)
    found = GenerationDefaults(
        _params(raw), _end_ids(raw.get("eos_token_id"), vocabulary), _end_token(folder)
    )
    return None if found == GenerationDefaults() else found


def _params(raw: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name, ours in OURS.items():
        if raw.get(name) is not None:
            params[ours] = _checked(name, ours, raw[name])
    sampled = raw.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise InvalidAdapter(f"{GENERATION}: do_sample is {shown(sampled)}, wanted true or false")
    if sampled:
        return {**SAMPLED, **params}
    params.pop("temperature", None)
    return params


def _checked(name: str, ours: str, value: object) -> object:
    try:
        return getattr(SamplingParams.model_validate({ours: value}), ours)
    except ValidationError as error:
        why = explain(error).removeprefix(ours).lstrip(".: ")
        raise InvalidAdapter(f"{GENERATION}: {name}: {why}") from None


def _end_ids(value: object, vocabulary: int | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    found = set[int]()
    for token in value if isinstance(value, list) else [value]:
        if type(token) is not int or token < 0 or (vocabulary and token >= vocabulary):
            limit = f" below {vocabulary}, which it has rows for" if vocabulary else ""
            raise InvalidAdapter(
                f"{GENERATION}: eos_token_id holds {shown(token)}, wanted token ids from 0{limit}"
            )
        found.add(token)
    return frozenset(found)


def _end_token(folder: Path) -> str | None:
    value = read_object(folder / TOKENIZER).get("eos_token")
    text = value.get("content") if isinstance(value, dict) else value
    if value is None:
        return None
    if not isinstance(text, str) or not is_unicode(text):
        raise InvalidAdapter(
            f"{TOKENIZER}: eos_token is {shown(value)}, wanted a text or an object with its content"
        )
    return text

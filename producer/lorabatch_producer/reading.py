"""What rows mean that do not say all that a job needs: which columns, and what holds for all rows.

Columns that have the name of a field of the short form (`bulk.py`) mean that field; all others are
the user's own; lines in OpenAI's form say it all. A template takes columns by name,
`"Summarize: {text}"`, and nothing else, so that no text in a file can reach into the program; `{{`
is a brace. Raises InvalidJob.
"""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorabatch import SamplingParams
from lorabatch.errors import InvalidJob, explain, shown
from lorabatch_producer.fields import SAMPLING_FIELDS, SHORT_FIELDS
from lorabatch_producer.openai_body import CHAT_URL, COMPLETIONS_URL

__all__ = ["ROW_OPTIONS", "Format", "Reading"]

Format = Literal["jsonl", "csv", "parquet"]
ROW_OPTIONS = ("prompt_column", "prompt_template", "system", "adapter_column", "custom_id_column")
TEXTS = {"prompt", "adapter_id", "custom_id", "tenant"}


class Reading(BaseModel):
    """How the rows of a batch are jobs. `format` None: told by each file's name. `base`: rows that
    name no adapter are for the base model. `sampling`: for rows that say nothing of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format | None = None
    prompt_column: str | None = None
    prompt_template: str | None = None
    system: str | None = None
    adapter_column: str | None = None
    custom_id_column: str | None = None
    adapter: str | None = None
    base: bool = False
    sampling: dict[str, Any] = Field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether nothing is said but the format: lines of JSONL say it all."""
        return self.model_copy(update={"format": None}) == Reading()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Those that it names."""
        named = (self.prompt_column, self.adapter_column, self.custom_id_column)
        return tuple(dict.fromkeys([*filter(None, named), *_names(self.prompt_template or "")]))

    def needs(self, column: str) -> bool:
        """Whether jobs are made of it."""
        return column in SHORT_FIELDS or column in self.columns

    def check(self) -> None:
        """Raise InvalidJob for what no row could be read by."""
        if self.prompt_column and self.prompt_template:
            raise InvalidJob("prompt_column and prompt_template are both given; give one of them")
        if self.adapter and self.base:
            raise InvalidJob(f"adapter {self.adapter!r} and base are both given; give one of them")
        if self.prompt_template is not None and not _names(self.prompt_template):
            raise InvalidJob(
                f"prompt_template: names no column (got {shown(self.prompt_template)}), so that "
                "all rows would ask the same; name one, as {text}"
            )
        try:
            SamplingParams.model_validate(self.sampling)
        except ValidationError as error:
            raise InvalidJob(explain(error)) from None

    def check_columns(self, there: Collection[str], file: str) -> None:
        """Raise InvalidJob if a table has not what every row needs."""
        needed = list(self.columns)
        if not (self.prompt_column or self.prompt_template or "messages" in there):
            needed.append("prompt")
        missing = [name for name in needed if name not in there]
        if missing:
            raise InvalidJob(
                f"{file}: no column {shown(missing[0])}; it has {_listed(there)}: name the right "
                "one with --prompt-column, --prompt-template, --adapter-column or "
                "--custom-id-column"
            )
        named = self.adapter_column or self.adapter or self.base
        if not named and not {"adapter_id", "merged_adapters"} & set(there):
            raise InvalidJob(
                f"{file}: no row would name an adapter; give --adapter NAME, --adapter-column "
                f"COLUMN (it has {_listed(there)}), or --base for the base model"
            )

    def fields(self, row: Mapping[str, Any], base_names: frozenset[str] | None) -> dict[str, Any]:
        """Of a job in the short form, from a row by its columns; a line in OpenAI's as it is."""
        if row.get("url") in (CHAT_URL, COMPLETIONS_URL) and isinstance(row.get("body"), Mapping):
            self._check_says_all()
            return dict(row)
        own = {name: row[name] for name in SHORT_FIELDS & row.keys() if row[name] not in (None, "")}
        fields: dict[str, Any] = {
            **{name: value for name, value in self.sampling.items() if not _says(own, name)},
            **{name: _typed(name, value) for name, value in own.items()},
        }
        if self.custom_id_column:
            fields["custom_id"] = _text(row, self.custom_id_column)
        elif "custom_id" in fields:
            fields["custom_id"] = _text(fields, "custom_id")
        if "merged_adapters" not in fields:
            fields["adapter_id"] = self._adapter(row, base_names)
        if self.prompt_template is not None:
            fields["prompt"] = _filled(self.prompt_template, row)
        elif self.prompt_column is not None:
            fields["prompt"] = _text(row, self.prompt_column)
        if self.system is not None:
            if fields.get("messages") is not None or "prompt" not in fields:
                raise InvalidJob("system: is for rows with a prompt, not with messages")
            user = {"role": "user", "content": fields.pop("prompt")}
            fields["messages"] = [{"role": "system", "content": self.system}, user]
        return fields

    def _check_says_all(self) -> None:
        for name in (*ROW_OPTIONS, "sampling"):
            if getattr(self, name):
                said = ", ".join(self.sampling) if name == "sampling" else name
                raise InvalidJob(f"{said}: a line in OpenAI's form says all itself; leave it out")

    def _adapter(self, row: Mapping[str, Any], base_names: frozenset[str] | None) -> str | None:
        column = self.adapter_column or "adapter_id"
        if row.get(column) in (None, ""):
            if self.adapter is None and not self.base:
                raise InvalidJob(
                    f"{column}: empty, and neither --adapter nor --base says what that means"
                )
            return self.adapter
        name = _text(row, column)
        return None if name in (base_names or ()) else name


def _says(own: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a sampling field of its own."""
    nested = own.get("sampling_params")
    return name in own or (isinstance(nested, Mapping) and name in nested)


def _names(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name in _parts(template) if name is not None))


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """Text and the column after it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidJob(
            f"prompt_template: {error} (got {shown(template)}); a brace that is text is written "
            "twice"
        ) from None
    for text, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise InvalidJob(
                "prompt_template: wanted columns by name alone, as {text} "
                f"(got {shown(template)})"
            )
        yield text, name


def _filled(template: str, row: Mapping[str, Any]) -> str:
    """A column that is there and empty is empty text; one that is not there is an error."""
    texts = []
    for text, name in _parts(template):
        texts.append(text)
        if name is not None:
            texts.append(_text(row, name))
    return "".join(texts)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if column not in row:
        raise InvalidJob(f"{shown(column)}: no such column here; there are {_listed(row)}")
    raise InvalidJob(f"{shown(column)}: wanted text or a number (got {shown(value)})")


def _typed(name: str, value: Any) -> Any:
    """What text in a cell stands for where the field is none: CSV knows nothing but text."""
    if not isinstance(value, str) or name in TEXTS:
        return value
    if name in SAMPLING_FIELDS and name == "stop" and not value.startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _listed(names: Collection[str]) -> str:
    some = ", ".join(shown(name) for name in list(names)[:20])
    return some + (f" and {len(names) - 20} more" if len(names) > 20 else "")

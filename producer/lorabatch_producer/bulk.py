"""Rows of bulk files as checked jobs, one by one: each a job, or a reason why it is none.

Lines of JSONL that say it all have two forms, which may be mixed: OpenAI's batch line
(`openai_line.py`), and the short form `{"adapter_id", "prompt"|"messages", "custom_id"?,
"tenant"?, "priority"?, ...}` with sampling fields flat or in `sampling_params` and with our greedy
defaults; `adapter_id` null is the base model. Of all other rows a `Reading` says what they mean. A
bad row stops nothing else. Memory: a row, and about 100 bytes for each custom_id. Raises nothing
for bad content.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from lorabatch import Job, Settings
from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.console import printable
from lorabatch_producer.fields import SHORT_FIELDS, nest_sampling
from lorabatch_producer.jsonl import MAX_LINE_BYTES, Refused, Rows, json_rows
from lorabatch_producer.openai_line import openai_fields
from lorabatch_producer.reading import Reading

__all__ = [
    "MAX_LINE_BYTES",
    "BadLine",
    "GoodLine",
    "LineReader",
    "base_names",
    "read_lines",
]

LABEL_MAX_CHARS = 400  # of a file's name in a custom_id


@dataclass(frozen=True)
class GoodLine:
    """A line that is a job. `model` is OpenAI's `body.model` as it was written; `row` what stood
    there, and `file` in which, if it is not the only one."""

    number: int
    form: Literal["chat", "completion", "short"]
    job: Job
    model: str | None = None
    file: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class BadLine:
    """A line that is no job, and why."""

    number: int
    custom_id: str | None
    code: str
    message: str
    file: str | None = None

    def as_json(self) -> str:
        where = {} if self.file is None else {"file": self.file}
        fields = {**where, "line": self.number, "custom_id": self.custom_id}
        return json.dumps({**fields, "code": self.code, "message": self.message})


def base_names(settings: Settings, base_model: str | None = None) -> frozenset[str]:
    """What `body.model` may call the base model, unless an adapter has that name. `base_model`: of
    the queue's workers, if it is known; settings may be of another."""
    if base_model not in (None, settings.base_model, *settings.base_model_aliases):
        settings = settings.model_copy(update={"base_model": base_model, "base_model_aliases": ()})
    full = settings.base_model
    plain = full.partition("@")[0] if not full.startswith(("/", "./", "../", "~")) else full
    names = {full, plain, plain.rstrip("/").rpartition("/")[2], *settings.base_model_aliases}
    return frozenset(names - {adapter.name for adapter in settings.adapters} - {""})


def read_lines(
    file: BinaryIO, batch_id: str, tenant: str, base: frozenset[str] | None
) -> Iterator[GoodLine | BadLine]:
    """Every line of a JSONL file that is not blank, in order, from line 1."""
    return LineReader(batch_id, tenant, base).lines(json_rows(file))


class LineReader:
    """Makes the rows of one batch's files jobs. `tenant` is for rows without one. `base`: the base
    model's names; None: what a row's model means is not asked."""

    def __init__(self, batch_id: str, tenant: str, base: frozenset[str] | None) -> None:
        self._batch_id, self._tenant, self._base = batch_id, tenant, base
        self._seen = set[bytes]()

    def lines(
        self, rows: Rows, reading: Reading | None = None, file: str | None = None, place: str = ""
    ) -> Iterator[GoodLine | BadLine]:
        """Of one file's rows. `place`: what tells it from the batch's other files."""
        for number, row in rows:
            fields: dict[str, Any] = {}
            try:
                if isinstance(row, Refused):
                    raise row
                fields.update(row if reading is None else reading.fields(row, self._base))
                job_id = _job_id(self._batch_id, fields, f"{place}line {number}")
                if reading is not None and file is not None:
                    fields.setdefault("custom_id", f"{file[-LABEL_MAX_CHARS:]}:{number}")
                line = self._line(fields, number, job_id)
                if line.job.custom_id is not None:
                    self._once(line.job.custom_id)
            except (Refused, InvalidJob) as error:
                message = re.sub(r"^job '[-0-9a-f]{36}': ", "", str(error))
                yield BadLine(number, _shown_id(fields), error.code, message, file)
            else:
                yield GoodLine(number, line.form, line.job, line.model, file, row)

    def _line(self, fields: Mapping[str, Any], number: int, job_id: str) -> GoodLine:
        identity = {"batch_id": self._batch_id, "job_id": job_id}
        if fields.keys() & {"body", "url", "method"}:
            given = openai_fields(fields, self._base)
            job = Job.parse({**given, **identity, "tenant": self._tenant})
            form: Literal["chat", "completion"] = "completion" if job.messages is None else "chat"
            return GoodLine(number, form, job, fields["body"]["model"])
        unknown = sorted(set(fields) - SHORT_FIELDS)
        if unknown:
            name = printable(unknown[0])
            raise InvalidJob(f"{name}: no such field; remove it or check its spelling")
        if not fields.keys() & {"adapter_id", "merged_adapters"}:
            raise InvalidJob(
                "adapter_id: missing; give an adapter's id, or null for the base model"
            )
        job = Job.parse({"tenant": self._tenant, **nest_sampling(fields), **identity})
        return GoodLine(number, "short", job)

    def _once(self, custom_id: str) -> None:
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            raise Refused(
                "duplicate_custom_id",
                f"custom_id {shown(custom_id)} was given on an earlier line; it must be unique",
            )
        self._seen.add(digest)


def _job_id(batch_id: str, fields: Mapping[str, Any], place: str) -> str:
    """The same line of the same batch is the same job, however often it is submitted."""
    custom_id = fields.get("custom_id")
    name = place if custom_id is None else f"custom_id {json.dumps(custom_id)}"
    return str(uuid.uuid5(uuid.UUID(batch_id), name))


def _shown_id(fields: Mapping[str, Any]) -> str | None:
    custom_id = fields.get("custom_id")
    return custom_id if isinstance(custom_id, str) else None

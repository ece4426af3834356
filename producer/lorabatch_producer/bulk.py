"""Bulk JSONL files, read line by line: each line a checked job, or a reason why it is none.

Two forms, which may be mixed: OpenAI's batch line (`openai_line.py`), and the short form
`{"adapter_id", "prompt"|"messages", "custom_id"?, "tenant"?, "priority"?, ...}` with sampling
fields flat or in `sampling_params` and with our greedy defaults; `adapter_id` null is the base
model. A bad line stops nothing else. Blank lines are skipped, a byte order mark is tolerated.
Memory: one line of at most MAX_LINE_BYTES, and about 100 bytes for each custom_id. Raises
nothing for bad content.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any, BinaryIO, Literal

from lorabatch import Job, Settings
from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.console import printable
from lorabatch_producer.fields import SAMPLING_FIELDS, nest_sampling
from lorabatch_producer.openai_line import openai_fields

__all__ = ["MAX_LINE_BYTES", "BadLine", "GoodLine", "base_names", "read_lines"]

MAX_LINE_BYTES = 8 * 1024 * 1024
SKIP_BYTES = 1024 * 1024
BOM = b"\xef\xbb\xbf"
SHORT_FIELDS = SAMPLING_FIELDS | {
    *("adapter_id", "prompt", "messages", "custom_id", "tenant", "sampling_params", "priority"),
    *("merged_adapters", "webhook"),
}


@dataclass(frozen=True)
class GoodLine:
    """A line that is a job. `model` is OpenAI's `body.model` as it was written."""

    number: int
    form: Literal["chat", "completion", "short"]
    job: Job
    model: str | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that is no job, and why."""

    number: int
    custom_id: str | None
    code: str
    message: str

    def as_json(self) -> str:
        fields = {"line": self.number, "custom_id": self.custom_id}
        return json.dumps({**fields, "code": self.code, "message": self.message})


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


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
    """Every line that is not blank, in order, from line 1. `tenant` is for lines without one.
    `base`: the base model's names; None: what `body.model` means is not asked."""
    seen = set[bytes]()
    for number, raw, whole in _raw_lines(file):
        fields: dict[str, Any] = {}
        try:
            fields.update(_decode(raw, whole))
            line = _job_line(fields, number, batch_id, tenant, base)
            if line.job.custom_id is not None:
                _once(line.job.custom_id, seen)
            yield line
        except (_Refused, InvalidJob) as error:
            message = re.sub(r"^job '[-0-9a-f]{36}': ", "", str(error))
            yield BadLine(number, _shown_id(fields), error.code, message)


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """(number, bytes without the line end, whether it had one and was not cut at the limit)."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        whole = raw.endswith(b"\n")
        if not whole and len(raw) > MAX_LINE_BYTES:
            while (more := file.readline(SKIP_BYTES)) and not more.endswith(b"\n"):
                pass
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip(b" \t\r\n"):
            yield number, raw, whole


def _decode(raw: bytes, whole: bool) -> dict[str, Any]:
    if len(raw.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise _Refused("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    if b"\x00" in raw:
        raise _Refused("nul", f"NUL byte at byte {raw.index(0) + 1} of the line; remove it")
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode(), object_pairs_hook=_no_field_twice)
    except UnicodeDecodeError as error:
        raise _Refused("not_utf8", f"not UTF-8 at byte {error.start + 1} of the line") from None
    except RecursionError:
        raise _Refused("not_json", "not valid JSON: nested too deeply") from None
    except ValueError as error:
        why = (
            f"{error.msg} at {error.pos + 1}" if isinstance(error, JSONDecodeError) else str(error)
        )
        cut = "" if whole else "; the file ends in the middle of this line"
        raise _Refused("not_json", f"not valid JSON: {why}{cut}") from None
    if not isinstance(value, dict):
        raise _Refused("not_object", f"a line must be a JSON object (got {shown(value)})")
    return value


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} is given twice")
    return fields


def _job_line(
    fields: Mapping[str, Any], number: int, batch_id: str, tenant: str, base: frozenset[str] | None
) -> GoodLine:
    identity = {"batch_id": batch_id, "job_id": _job_id(batch_id, fields, number)}
    if fields.keys() & {"body", "url", "method"}:
        job = Job.parse({**openai_fields(fields, base), **identity, "tenant": tenant})
        form: Literal["chat", "completion"] = "completion" if job.messages is None else "chat"
        return GoodLine(number, form, job, fields["body"]["model"])
    unknown = sorted(set(fields) - SHORT_FIELDS)
    if unknown:
        raise InvalidJob(f"{printable(unknown[0])}: no such field; remove it or check its spelling")
    if not fields.keys() & {"adapter_id", "merged_adapters"}:
        raise InvalidJob("adapter_id: missing; give an adapter's id, or null for the base model")
    job = Job.parse({"tenant": tenant, **nest_sampling(fields), **identity})
    return GoodLine(number, "short", job)


def _job_id(batch_id: str, fields: Mapping[str, Any], number: int) -> str:
    """The same line of the same batch is the same job, however often it is submitted."""
    custom_id = fields.get("custom_id")
    name = f"line {number}" if custom_id is None else f"custom_id {json.dumps(custom_id)}"
    return str(uuid.uuid5(uuid.UUID(batch_id), name))


def _once(custom_id: str, seen: set[bytes]) -> None:
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if digest in seen:
        raise _Refused(
            "duplicate_custom_id",
            f"custom_id {shown(custom_id)} was given on an earlier line; it must be unique",
        )
    seen.add(digest)


def _shown_id(fields: Mapping[str, Any]) -> str | None:
    custom_id = fields.get("custom_id")
    return custom_id if isinstance(custom_id, str) else None

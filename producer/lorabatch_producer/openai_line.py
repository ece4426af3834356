"""One line of an OpenAI batch file as a job: `{"custom_id", "method", "url", "body"}`.

The adapter is `body.model`; the base model's own name means no adapter. The rest of a body:
`openai_body.py`. Raises InvalidJob.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorabatch.errors import InvalidJob, shown
from lorabatch.fields import ADAPTER_PATTERN
from lorabatch.location import public_name
from lorabatch_producer.openai_body import CHAT_URL, COMPLETIONS_URL, body_fields

__all__ = ["CHAT_URL", "COMPLETIONS_URL", "openai_fields"]

LINE_FIELDS = {"custom_id", "method", "url", "body"}


def openai_fields(line: Mapping[str, Any], base_names: frozenset[str] | None) -> dict[str, Any]:
    """The line as fields of a Job, sampling nested. Without names no `model` is an adapter."""
    unknown = sorted(set(line) - LINE_FIELDS)
    if unknown:
        raise InvalidJob(f"{unknown[0]}: no such field in a batch line; remove it")
    url, body = line.get("url"), line.get("body")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise InvalidJob(f"url: wanted {CHAT_URL} or {COMPLETIONS_URL} (got {shown(url)})")
    if line.get("method", "POST") != "POST":
        raise InvalidJob(f"method: wanted POST (got {shown(line['method'])})")
    if line.get("custom_id") is None:
        raise InvalidJob("custom_id: missing; results are matched by it")
    if not isinstance(body, dict):
        raise InvalidJob(f"body: must be an object (got {shown(body)})")
    fields = body_fields(body, url)
    adapter_id = _adapter(body.get("model"), base_names)
    return {"custom_id": line["custom_id"], "adapter_id": adapter_id, **fields}


def _adapter(model: object, base_names: frozenset[str] | None) -> str | None:
    if isinstance(model, str) and model:
        if base_names is None or model in base_names:
            return None
        if re.fullmatch(ADAPTER_PATTERN, model):
            return model
    names = " or ".join(sorted(set(map(public_name, base_names or ())))) or "none"
    raise InvalidJob(
        f"body.model: wanted an adapter id or the base model's name, here {names} (what the "
        f"queue's workers have; before the first one LORABATCH_BASE_MODEL) (got {shown(model)})"
    )

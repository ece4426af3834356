"""Errors in the bodies that OpenAI's and TGI's clients read, with the statuses they expect.

A field is named as the request names it; `param` is the first one that a text names.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["foreign_error"]

TGI_PATHS = {"/", "/generate", "/generate_stream", "/info", "/health"}
OPENAI_CODES = {
    "unknown_adapter": "model_not_found",
    "prompt_too_long": "context_length_exceeded",
    "queue_full": "rate_limit_exceeded",
}
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
TGI_STATUSES = {400: 422, 404: 422, 409: 422, 410: 424, 500: 424}
TGI_TYPES = {
    401: "authentication",
    403: "permission",
    424: "generation",
    429: "overloaded",
    503: "overloaded",
    504: "incomplete_generation",
}
WHERE = re.compile(r"^job: |\b(?:body|query|header|path|sampling_params|parameters)\.(?=\w)")
INPUTS = re.compile(r"^prompt(?=: )")
PARAM = re.compile(r"([a-z][\w.]*): ")


def foreign_error(path: str, status: int, code: str, text: str) -> tuple[int, Any] | None:
    """Status and body for who asks at that path; None where our own API is."""
    plain = WHERE.sub("", text)
    if path.startswith("/v1/"):
        return _openai(status, code, plain)
    if path in TGI_PATHS:
        plain = INPUTS.sub("inputs", plain)
        status = TGI_STATUSES.get(status, status)
        return status, {"error": plain, "error_type": TGI_TYPES.get(status, "validation")}
    return None


def _openai(status: int, code: str, text: str) -> tuple[int, Any]:
    named = PARAM.match(text)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {
        "message": text,
        "type": OPENAI_TYPES.get(status, kind),
        "param": named and named.group(1),
        "code": OPENAI_CODES.get(code, code),
    }
    return 400 if status == 422 else status, {"error": error}

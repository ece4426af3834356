"""The OpenAPI document: what FastAPI cannot know of the routes, which is how errors are answered.

An operation's errors follow from its path's dialect, its method and what it does: each has its
status and its body. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lorabatch_producer.server.dialects import foreign_error
from lorabatch_producer.server.keyed import OPEN
from lorabatch_producer.server.problems import CODES

__all__ = ["ABOUT", "TAGS", "document"]

ABOUT = """Batch text generation with one base model and any number of LoRA adapters. A job that was
accepted ends in exactly one outcome; its usage is counted once.

Three dialects ask for the same jobs: our own **jobs**, answered when they are accepted and asked
for later; **OpenAI**'s chat, completions, files and batches; and **TGI**'s generate. Each answers
errors in its own shape. Send an `Idempotency-Key` with whatever you may have to send again: the
same key and the same request are one job.

Where keys are wanted, send `Authorization: Bearer lb-...`, made by `lorabatch keys create`.
"""
TAGS = {
    "jobs": "Our own API: accept at once, ask later, or follow the text as it grows.",
    "openai": "What OpenAI's clients send; `model` is an adapter's id or the base model's name.",
    "files": "OpenAI's files: what batches are made from, and what comes out of them.",
    "batches": "OpenAI's batches: a file of requests, done within 24 hours.",
    "tgi": "What the clients of Text Generation Inference send.",
    "webhooks": "The secrets that webhooks are signed with.",
    "health": "Whether the server is there, and can accept jobs.",
}
WHY = {
    400: "The request is not what it should be; the text names the field and what was wanted.",
    401: "No key, or none that is valid.",
    403: "The key is not for this, or not for that tenant.",
    404: "There is none of that id, or it is another tenant's.",
    408: "The body did not come in time.",
    409: "The same `Idempotency-Key` made something else, or it is in use.",
    410: "The job was cancelled.",
    413: "The body is too large.",
    415: "The body is compressed, or of another kind.",
    422: "The request is not what it should be; the text names the field and what was wanted.",
    424: "The job failed, or was cancelled.",
    429: "Too much in this minute, or too much waits: come again after `Retry-After`.",
    500: "The job failed by a fault of the service, or the server has one; its log says which.",
    503: "The database is away, the server stops, or the adapter cannot be had now: come again "
    "after `Retry-After`. `Location` is there if a job may have been accepted.",
    504: "The job had not ended in time; the text says whether it goes on.",
}
PROBLEM = {
    "type": "object",
    "required": ["title", "status", "code", "detail"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "stable, for programs"},
        "detail": {"type": "string", "description": "for people"},
    },
}
OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
TGI_ERROR = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
}
KEY: dict[str, list[str]] = {"HTTPBearer": []}
WRITES = ("post", "put", "patch", "delete")
GENERATES = ("/jobs", "/v1/chat/completions", "/v1/completions", *("/", "/generate"))
PAGED = ("/v1/files", "/v1/batches")  # after an id
WAITS = (*GENERATES[1:], "/generate_stream")


def document(app: FastAPI, keys: bool) -> dict[str, Any]:
    """Made once for an app that has all its routes. `keys`: whether they may be wanted."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=[{"name": name, "description": text} for name, text in TAGS.items()],
        )
        for path, operations in made["paths"].items():
            for method, operation in operations.items():
                _tell_errors(path, method, operation)
                operation["security"] = [KEY] if keys and path not in OPEN else []
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas.update(Problem=PROBLEM, OpenAIError=OPENAI_ERROR, TGIError=TGI_ERROR)
        app.openapi_schema = made
    return app.openapi_schema


def _tell_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    for ours in _statuses(path, method, operation):
        code = CODES.get(ours, HTTPStatus(ours).name.lower())
        status, kind, media = _dialect(path, ours, code)
        schema = {"schema": {"$ref": f"#/components/schemas/{kind}"}}
        answers[str(status)] = {"description": WHY[status], "content": {media: schema}}
    operation["responses"] = dict(sorted(answers.items()))


def _dialect(path: str, status: int, code: str) -> tuple[int, str, str]:
    """As a client of that path gets the error: status, schema, media type."""
    foreign = foreign_error(path, status, code, "")
    if foreign is None:
        return status, "Problem", "application/problem+json"
    kind = "OpenAIError" if path.startswith("/v1/") else "TGIError"
    return foreign[0], kind, "application/json"


def _statuses(path: str, method: str, operation: dict[str, Any]) -> Iterator[int]:
    """Our own, before the dialect."""
    if path in OPEN:
        return
    yield from (401, 403, 422, 500, 503)  # 422: LoraBatch-Tenant, if nothing else
    writes = method in WRITES
    if "{" in path or path in WAITS or path in PAGED or (path.startswith("/v1/") and writes):
        yield 404
    if "requestBody" in operation:
        yield from (400, 408, 413, 415)
    if writes and not (path.startswith("/jobs/")):
        yield 409
    if path in (*GENERATES, "/generate_stream"):
        yield 429
    if path in WAITS:
        yield from (410, 504)

"""Errors as answers: which status each has, and its body.

The own API answers as RFC 9457 says (`application/problem+json`), with `code` of the error tree
beside. OpenAI's and TGI's paths have bodies and statuses of their own (`dialects.py`). No answer
holds a path, an address or a prompt: the texts are ours, and an error that is not ours is told by
its kind alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import redis
import sqlalchemy as sa
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from lorabatch.errors import (
    AdapterSetAside,
    AdapterUnavailable,
    AttemptsExhausted,
    DatabaseNotReady,
    EngineFault,
    IdempotencyConflict,
    JobCancelled,
    JobError,
    JobFailed,
    JobNotFound,
    KeyRefused,
    LoraBatchError,
    NotAllowed,
    QueueFull,
    QueueNotReady,
    RateLimited,
    ServerStops,
    TextChanged,
    UnknownAdapter,
    WaitTimeout,
)
from lorabatch.logs import trace
from lorabatch_producer.server.dialects import foreign_error

__all__ = ["Told", "answer", "answer_errors", "problem", "status_of", "told"]

log = structlog.get_logger(__name__)

STATUSES: dict[type[LoraBatchError], int] = {  # the first that fits
    KeyRefused: 401,
    NotAllowed: 403,
    JobNotFound: 404,
    UnknownAdapter: 404,
    IdempotencyConflict: 409,
    QueueFull: 429,
    RateLimited: 429,
    AdapterUnavailable: 503,
    AdapterSetAside: 503,
    ServerStops: 503,
    WaitTimeout: 504,
    JobCancelled: 410,
    AttemptsExhausted: 500,
    EngineFault: 500,
    JobError: 422,
    JobFailed: 500,
    TextChanged: 500,
}
CODES = {413: "body_too_large"}  # http's own name for it has changed
COME_AGAIN_S = 5
SHOWN_ERRORS = 100
AWAY = "the {} did not answer, or is not ready; come again later"
Told = tuple[int, str, str]
"""Status, code and text of an error."""


def status_of(error: LoraBatchError) -> int | None:
    """None: what went wrong is no business of a client's."""
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), None)


def told(error: Exception) -> Told:
    """What a client hears of any error."""
    if isinstance(error, DatabaseNotReady | sa.exc.DBAPIError | sa.exc.TimeoutError):
        return 503, DatabaseNotReady.code, AWAY.format("database")
    if isinstance(error, QueueNotReady | redis.RedisError):
        return 503, QueueNotReady.code, AWAY.format("broker")
    if isinstance(error, LoraBatchError) and (status := status_of(error)):
        return status, error.code, error.public
    if isinstance(error, RequestValidationError):
        return 422, "invalid_request", _explained(error)
    if isinstance(error, HTTPException):
        code = HTTPStatus(error.status_code).name.lower()
        return error.status_code, CODES.get(error.status_code, code), str(error.detail)
    return 500, "internal", "an error that is ours; it is in the server's log"


def with_job(said: Told, request: Request) -> tuple[Told, dict[str, str]]:
    """The same of a request whose job was accepted, or may have been: where to ask for it. While it
    goes on, the same request without a key would make another, and OpenAI's clients ask again by
    themselves."""
    status, code, text = said
    job: tuple[str, str | None] | None = getattr(request.state, "job", None)
    if job is None or status < 500:
        return said, {}
    job_id, key = job
    headers = {"Location": f"/jobs/{job_id}"}
    if code == DatabaseNotReady.code:
        text = f"{text}, and look at GET /jobs/{job_id}: it may have been accepted"
    if key is None and code in (DatabaseNotReady.code, ServerStops.code):
        headers["X-Should-Retry"] = "false"
        text = f"{text}; the same request without an Idempotency-Key is another job"
    return (status, code, text), headers


def headers_of(status: int) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": str(COME_AGAIN_S)} if status in (429, 503) else {}


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    body = {"title": HTTPStatus(status).phrase, "status": status, "code": code, "detail": detail}
    return JSONResponse(
        body,
        status,
        headers={**headers_of(status), **(headers or {})},
        media_type="application/problem+json",
    )


def answer(path: str, told: Told, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error, in the dialect of who asks at that path."""
    status, code, text = told
    text = text.encode(errors="backslashreplace").decode()  # a field may be named by half a letter
    foreign = foreign_error(path, status, code, text)
    if foreign is None:
        return problem(status, code, text, headers)
    status, body = foreign
    return JSONResponse(body, status, headers={**headers_of(status), **(headers or {})})


def answer_errors(app: FastAPI) -> None:
    """Every error of a route becomes the body that callers of its path expect."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        said = told(error)
        if said[0] >= 500:
            log.warning("request failed", path=request.url.path, code=said[1], trace=trace(error))
        headers = dict(getattr(error, "headers", None) or {})
        if isinstance(error, JobError) and said[0] != 503:
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would, and get the same answer
        if said[0] == 405:
            headers["Allow"] = ", ".join(_methods(app, request.url.path))
        said, more = with_job(said, request)
        return answer(request.url.path, said, {**headers, **more})

    kinds: tuple[type[Exception], ...] = (
        *(LoraBatchError, sa.exc.DBAPIError, sa.exc.TimeoutError, redis.RedisError),
        *(RequestValidationError, HTTPException, Exception),
    )
    for kind in kinds:
        app.add_exception_handler(kind, on_error)


def _methods(app: FastAPI, path: str) -> list[str]:
    """All that the path knows; Starlette names those of its first route."""
    routes = ((route.path or "", route.methods or ()) for route in iter_route_contexts(app.routes))
    return sorted({m for known, some in routes if compile_path(known)[0].match(path) for m in some})


def _explained(error: RequestValidationError) -> str:
    if isinstance(error.body, bytes):
        return "body: wanted JSON, and the header content-type: application/json"
    parts = []
    for item in error.errors()[:SHOWN_ERRORS]:
        where = ".".join(str(part) for part in item["loc"])
        parts.append(f"{where}: {item['msg']}")
    return "; ".join(parts)

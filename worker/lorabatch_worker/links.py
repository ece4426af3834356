"""Links: the tasks that a plain Celery client wants called when its job has ended.

`link` and the next task of a chain are sent with what `AsyncResult.get()` would give; `link_error`
is called as Celery calls it: an errback that this worker knows, and that takes more than one
argument, here with (request, exception, None), any other as a task with the job's id. A cancelled
job calls none.

They come after the commit and before the acknowledgement, so at least once: what is delivered again
calls them again, and a message whose links the broker does not take is delivered again. They are in
the message alone. A job that a pointer of the sweeper brought to its
end calls them when its own message comes again; with a message that the broker lost they are lost.

Refused by name: a chord, because its parts are counted in the result backend, where one that is
delivered twice counts twice; and a task that this worker would send to its own queue, where nobody
knows it. Calls raise what Celery raises; OUTAGES of it may pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import redis
from celery import Celery
from celery.app.task import Context
from celery.canvas import maybe_signature
from kombu.exceptions import OperationalError

from lorabatch.errors import shown

__all__ = ["OUTAGES", "after_failure", "after_success", "links_in", "links_of", "refused_links"]

OUTAGES = (OperationalError, redis.RedisError, OSError)
NAMES = {"callbacks": "link", "errbacks": "link_error", "chain": "chain"}
ROUTES = ("queue", "routing_key", "exchange")


def refused_links(options: Mapping[str, Any], app: Celery) -> str | None:
    """Why the links among a message's options cannot be called; None if they can."""
    if options.get("chord"):
        return (
            "a chord is not supported: its parts are counted in the result backend, where a part "
            "that is delivered twice counts twice; use link or chain, or wait for the jobs"
        )
    for field, name in NAMES.items():
        found = options.get(field) or []
        if not isinstance(found, list) or not all(_is_signature(item) for item in found):
            return f"{name} is not a list of task signatures"
        for signature in found[-1:] if field == "chain" else found:
            if _nobodys(signature, app):
                return (
                    f"{name}: this worker has no task {shown(signature['task'])} and would "
                    "send it to a queue of its own; name the queue with .set(queue=...)"
                )
    return None


def _is_signature(item: object) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("task"), str):
        return False
    return isinstance(item.get("options") or {}, dict)


def _nobodys(signature: Mapping[str, Any], app: Celery) -> bool:
    if signature["task"] in app.tasks or app.conf.task_routes:
        return False
    return not any((signature.get("options") or {}).get(name) for name in ROUTES)


def links_in(options: object) -> dict[str, list[Any]]:
    """The links among a message's options, which nobody may have checked."""
    found = options if isinstance(options, dict) else {}
    return {
        name: found[name] for name in NAMES if found.get(name) and isinstance(found[name], list)
    }


def links_of(request: Mapping[str, Any]) -> Context | None:
    """A request with its links, as Celery hands it on; None for one without."""
    return Context(request) if links_in(request) else None


def after_success(app: Celery, request: Context, value: Any) -> Iterator[Callable[[], None]]:
    """One call for each link, and one for the next task of the chain."""
    for signature in request.callbacks or ():
        yield partial(_send, app, request, signature, value)
    if request.chain:
        *rest, following = request.chain
        yield partial(_send, app, request, following, value, chain=rest)


def _send(app: Celery, request: Context, signature: Any, value: Any, **options: Any) -> None:
    options["parent_id"] = request.id
    options["root_id"] = request.root_id or request.id
    sent = maybe_signature(signature, app=app).apply_async((value,), **options)
    request.children.append(sent)


def after_failure(app: Celery, request: Context, error: Exception) -> Iterator[Callable[[], None]]:
    """One call for all errbacks; the rest of a chain fails where the result is stored."""
    if request.errbacks:
        yield lambda: app.backend._call_task_errbacks(request, error, None)

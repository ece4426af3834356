"""`GET /metrics`: what this server does, and what waits in the ledger, for Prometheus.

Requests are counted around everything else, by route and never by path, so that there are few
names; no tenant is one. The ledger is looked at once in LOOK_S at most, however often it is asked.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import lorabatch
from lorabatch.outbox import Outbox, State
from lorabatch.tables import jobs
from lorabatch_producer.server.caller import Caller, needs
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.server.exposition import CONTENT_TYPE, Metric, Sample, exposed

__all__ = ["Counted", "Numbers", "router"]

router = APIRouter(tags=["health"])
LOOK_S = 5.0
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
NO_ROUTE = "none"  # refused before a route was looked for, or there is none
BROKEN_OFF = "499"  # no answer began: who asked had gone
Jobs = Mapping[tuple[str, str], int]
Webhooks = Mapping[State, int]


class Numbers:
    """Of one process, used from its event loop."""

    def __init__(self) -> None:
        self.under_way = 0
        self._requests = Counter[tuple[str, str, str]]()
        self._buckets = Counter[tuple[str, int]]()
        self._seconds = defaultdict[str, float](float)
        self._looking = asyncio.Lock()
        self._looked_s = float("-inf")
        self._found: tuple[Jobs, Webhooks] = ({}, {})

    def count(self, method: str, route: str, status: str, seconds: float) -> None:
        self._requests[method, route, status] += 1
        self._buckets[route, bisect_left(BOUNDS_S, seconds)] += 1
        self._seconds[route] += seconds

    async def look(self, desk: Desk) -> tuple[Jobs, Webhooks]:
        """Open jobs by queue and state, and webhooks by state."""
        async with self._looking:
            if time.monotonic() - self._looked_s > LOOK_S:
                engine = desk.ledger.engine
                webhooks = await desk.call(Outbox(engine).counts)
                self._found = await desk.call(_open_jobs, engine), webhooks
                self._looked_s = time.monotonic()
        return self._found

    def metrics(self) -> Iterator[Metric]:
        requests = [
            Sample(number, {"method": method, "route": route, "status": status})
            for (method, route, status), number in sorted(self._requests.items())
        ]
        name = "lorabatch_http_requests"
        yield Metric(f"{name}_total", "counter", "Requests that ended.", requests)
        text = "Seconds from a request to the end of its answer."
        yield Metric("lorabatch_http_request_seconds", "histogram", text, self._histogram())
        under_way = [Sample(self.under_way, {})]
        yield Metric(f"{name}_under_way", "gauge", "Requests that have not ended.", under_way)

    def _histogram(self) -> Iterator[Sample]:
        for route, seconds in sorted(self._seconds.items()):
            total = 0
            for place, bound in enumerate([*map(str, BOUNDS_S), "+Inf"]):
                total += self._buckets[route, place]
                yield Sample(total, {"route": route, "le": bound}, "_bucket")
            yield Sample(seconds, {"route": route}, "_sum")
            yield Sample(total, {"route": route}, "_count")


class Counted:
    """Around an app, and around all else that is."""

    def __init__(self, app: ASGIApp, numbers: Numbers) -> None:
        self._app = app
        self._numbers = numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = BROKEN_OFF

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        began_s = time.monotonic()
        self._numbers.under_way += 1
        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = "500"
            raise
        finally:
            self._numbers.under_way -= 1
            method = scope["method"] if scope["method"] in METHODS else "other"
            took_s = time.monotonic() - began_s
            self._numbers.count(method, _route(scope), status, took_s)


@router.get("/metrics", response_class=Response)
async def metrics(
    request: Request,
    desk: Annotated[Desk, Depends(desk_of)],
    caller: Annotated[Caller, Depends(needs("metrics"))],
) -> Response:
    """Numbers for Prometheus, in its text form, of this process and of the ledger."""
    numbers: Numbers = request.app.state.numbers
    open_jobs, webhooks = await numbers.look(desk)
    texts = exposed([*_of_server(desk), *numbers.metrics(), *_of_ledger(open_jobs, webhooks)])
    return Response(texts, media_type=CONTENT_TYPE)


def _of_server(desk: Desk) -> Iterator[Metric]:
    version = [Sample(1, {"version": lorabatch.__version__})]
    yield Metric("lorabatch_info", "gauge", "1, with the version.", version)
    accepted = [Sample(desk.accepted, {})]
    text = "Jobs that requests to this server brought and that were accepted; a batch's are not."
    yield Metric("lorabatch_jobs_accepted_total", "counter", text, accepted)
    waiting = [Sample(desk.waiting, {})]
    yield Metric("lorabatch_requests_waiting", "gauge", "Requests that wait for a job.", waiting)


def _of_ledger(open_jobs: Jobs, webhooks: Webhooks) -> Iterator[Metric]:
    by_queue = [
        Sample(number, {"queue": queue, "state": state})
        for (queue, state), number in sorted(open_jobs.items())
    ]
    yield Metric("lorabatch_jobs", "gauge", "Jobs that have not ended, in the ledger.", by_queue)
    for name, text in (("waiting", "to be delivered"), ("failed", "that were given up")):
        number = [Sample(count, {}) for state, count in webhooks.items() if state == name]
        yield Metric(f"lorabatch_webhooks_{name}", "gauge", f"Webhooks {text}.", number)


def _open_jobs(engine: sa.Engine) -> Jobs:
    found = Counter[tuple[str, str]]()
    with engine.execution_options(read_only=True).begin() as connection:
        for where in (  # as the indexes have it
            "state = 'queued' AND sent_us IS NULL",
            "state IN ('queued', 'running') AND sent_us IS NOT NULL",
            "state = 'running' AND sent_us IS NULL",
        ):
            query = sa.select(jobs.c.queue, jobs.c.state, sa.func.count()).where(sa.text(where))
            for row in connection.execute(query.group_by(jobs.c.queue, jobs.c.state)):
                found[row[0], row[1]] += row[2]
    for queue in {queue for queue, _ in found}:
        for state in ("queued", "running"):
            found[queue, state] += 0
    return found


def _route(scope: Mapping[str, Any]) -> str:
    return str(getattr(scope.get("route"), "path", None) or NO_ROUTE)

"""How much each tenant may ask for in a minute: counted before a job is accepted, told in headers.

Every answer to a request whose tenant has a limit carries OpenAI's `x-ratelimit-*`, and one that
was refused `Retry-After`. Limits are read again every LIMITS_S. Raises RateLimited.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from contextvars import ContextVar

import sqlalchemy as sa
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorabatch import Job
from lorabatch.rates import Minute, Rate, Rates, estimated_tokens, rate_of

__all__ = ["RateGate", "RateHeaders"]

LIMITS_S = 5.0
_headers: ContextVar[dict[str, str] | None] = ContextVar("rate_headers", default=None)


class RateGate:
    """Used from one event loop."""

    def __init__(self) -> None:
        self._limits: Mapping[str, Rate] = {}
        self._read_s = float("-inf")
        self._reading = asyncio.Lock()

    async def take(self, engine: sa.Engine, job: Job) -> None:
        """Count a job that is about to be accepted."""
        rates = Rates(engine)
        async with self._reading:
            if time.monotonic() - self._read_s > LIMITS_S:
                self._limits = await asyncio.to_thread(rates.limits)
                self._read_s = time.monotonic()
        rate = rate_of(job.tenant, self._limits)
        if rate == Rate():
            return
        minute = await asyncio.to_thread(rates.take, job.tenant, rate, estimated_tokens(job))
        if (headers := _headers.get()) is not None:
            headers.update(_told(minute))
        if not minute.granted:
            raise minute.refusal()


class RateHeaders:
    """Around an app: puts what `take` says into the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        token = _headers.set(headers)
        try:
            await self._app(scope, receive, sending)
        finally:
            _headers.reset(token)


def _told(minute: Minute) -> dict[str, str]:
    left_s = str(math.ceil(minute.left_s))
    told = {} if minute.granted else {"Retry-After": left_s}
    for what, most, taken in (
        ("requests", minute.rate.requests, minute.requests),
        ("tokens", minute.rate.tokens, minute.tokens),
    ):
        if most is not None:
            told[f"x-ratelimit-limit-{what}"] = str(most)
            told[f"x-ratelimit-remaining-{what}"] = str(max(0, most - taken))
            told[f"x-ratelimit-reset-{what}"] = f"{left_s}s"
    return told

"""No request but `/healthz` without a key, where keys are wanted.

Pure ASGI, around all routes, those that nobody thought of included: a key is asked for before a
route is looked for and before any of the body is read. Keys that are right are remembered for
CACHE_S, and so is that none is wanted yet: a key that is revoked or has expired works on for that
long at most. Raises nothing: who is refused is answered.
"""

from __future__ import annotations

import time
from hashlib import sha256

import sqlalchemy as sa
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lorabatch import Settings
from lorabatch.errors import InvalidJob, KeyRefused, LoraBatchError, NotAllowed, shown
from lorabatch.job import is_identifier
from lorabatch.keys import Key, Keys, keys_wanted
from lorabatch_producer.server.caller import TENANT_HEADER, Caller
from lorabatch_producer.server.desk import Desk, desk_of

__all__ = ["CACHE_S", "Keyed"]

CACHE_S = 5.0
REMEMBERED = 10_000
OPEN = ("/healthz",)
REFUSED = KeyRefused(
    "wanted a key that is valid, as `Authorization: Bearer lb-...` or `api-key: lb-...`; "
    "`lorabatch keys create` makes one"
)


class Keyed:
    """Around an app whose `state.desk` is open; leaves the caller in a request's state."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._wanted = keys_wanted(settings)
        self._asked_s = float("-inf")
        self._known: dict[bytes, tuple[Key, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            request = Request(scope)
            try:
                request.state.caller = await self._caller(request)
            except (LoraBatchError, sa.exc.DBAPIError) as error:
                answer = await scope["app"].exception_handlers[LoraBatchError](request, error)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _caller(self, request: Request) -> Caller:
        desk = desk_of(request)
        if not await self._are_wanted(desk):
            return Caller(_tenant(request) or "default")
        key = await self._key(desk, _text(request))
        if key is None:  # before anything else: who has none learns nothing
            raise REFUSED
        tenant = _tenant(request)
        caller = Caller(key.tenant, key.scopes, key.key_id)
        if tenant in (None, key.tenant):
            return caller
        if not caller.may("admin"):
            raise NotAllowed(
                f"key {key.key_id!r} is for tenant {key.tenant!r}, and {TENANT_HEADER} says "
                f"{tenant!r}: leave it out, or make a key with "
                "`lorabatch keys create --scope admin`"
            )
        return Caller(tenant, key.scopes, key.key_id)

    async def _are_wanted(self, desk: Desk) -> bool:
        if self._wanted is None and time.monotonic() - self._asked_s > CACHE_S:
            if await desk.call(Keys(desk.ledger.engine).known):
                self._wanted = True
            self._asked_s = time.monotonic()
        return self._wanted is True

    async def _key(self, desk: Desk, text: str) -> Key | None:
        digest = sha256(text.encode()).digest()
        key, until_s = self._known.get(digest, (None, 0.0))
        if key is not None and time.monotonic() < until_s:
            return key
        self._known.pop(digest, None)
        asked_s = time.monotonic()
        key = await desk.call(Keys(desk.ledger.engine).check, text)
        if key is not None:
            self._known[digest] = key, asked_s + CACHE_S
            if len(self._known) > REMEMBERED:
                self._known.pop(next(iter(self._known)))
        return key


def _tenant(request: Request) -> str | None:
    """For whom the caller says that it asks. Raises InvalidJob."""
    tenant = request.headers.get(TENANT_HEADER)
    if tenant is not None and not is_identifier(tenant):
        raise InvalidJob(
            f"{TENANT_HEADER}: wanted letters, digits and _ . : @ -, at most 64 "
            f"(got {shown(tenant)})"
        )
    return tenant


def _text(request: Request) -> str:
    kind, _, text = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return text.strip()
    return request.headers.get("api-key") or request.headers.get("x-api-key") or ""

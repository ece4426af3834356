"""Who asks: the tenant that a request is for, and what its key is for.

`Keyed` has found the caller before a route is looked for; a route says what the key must be for, or
leaves it to its method: reading wants `read`, all else `generate`. Raises NotAllowed.

    @router.get("/usage")
    async def usage(caller: Annotated[Caller, Depends(needs("usage"))]) -> ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from lorabatch.errors import NotAllowed
from lorabatch.keys import SCOPES

__all__ = ["TENANT_HEADER", "Caller", "caller_of", "needs"]

TENANT_HEADER = "LoraBatch-Tenant"

READING = ("GET", "HEAD")
# For the OpenAPI document, which has only what a route asks for; Keyed reads both.
InDocument = Annotated[
    HTTPAuthorizationCredentials | None, Depends(HTTPBearer(bearerFormat="lb-", auto_error=False))
]
TenantInDocument = Annotated[
    str | None,
    Header(
        alias=TENANT_HEADER,
        description="whose, if the key is for `admin` or none is wanted",
        json_schema_extra={"pattern": "^[A-Za-z0-9][A-Za-z0-9_.:@-]*$", "maxLength": 64},
    ),
]


@dataclass(frozen=True)
class Caller:
    """`key_id` None: no keys are wanted, and everything is allowed."""

    tenant: str
    scopes: tuple[str, ...] = SCOPES
    key_id: str | None = None

    def may(self, scope: str) -> bool:
        """`admin` has all scopes in it, `generate` has `read`."""
        enough = {scope, "admin", "generate"} if scope == "read" else {scope, "admin"}
        return not enough.isdisjoint(self.scopes)


@lru_cache
def needs(scope: str | None = None) -> Callable[..., Awaitable[Caller]]:
    """For `Depends`: the caller, whose key must be for this. None: as the method says."""

    async def caller(request: Request, _: InDocument = None, __: TenantInDocument = None) -> Caller:
        found: Caller = request.state.caller
        wanted = scope or ("read" if request.method in READING else "generate")
        if not found.may(wanted):
            raise NotAllowed(
                f"key {found.key_id!r} is for {', '.join(found.scopes)}, and this wants {wanted}: "
                f"make one with `lorabatch keys create --scope {wanted}`"
            )
        return found

    return caller


caller_of = needs()

"""Who asks: the tenant that a request is for.

Without keys that is what the request says, `LoraBatch-Tenant`, or `default`: such a server is for
people who trust each other, and listens on the loopback address only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Header

from lorabatch.errors import InvalidJob, shown
from lorabatch.job import is_identifier

__all__ = ["Caller", "caller_of"]


@dataclass(frozen=True)
class Caller:
    tenant: str


async def caller_of(
    lorabatch_tenant: Annotated[str, Header(alias="LoraBatch-Tenant")] = "default",
) -> Caller:
    """For `Depends`. Raises InvalidJob."""
    if not is_identifier(lorabatch_tenant):
        raise InvalidJob(
            f"LoraBatch-Tenant: wanted letters, digits and _ . : @ -, at most 64 "
            f"(got {shown(lorabatch_tenant)})"
        )
    return Caller(lorabatch_tenant)

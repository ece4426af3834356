"""The secrets that a tenant's webhooks are signed with, for its administrators; and whether a
webhook may be asked for. Raises InvalidJob."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from lorabatch.errors import InvalidJob
from lorabatch.outgoing import check_target, parse_url
from lorabatch.webhook_secrets import Secret, Secrets
from lorabatch_producer.server.caller import Caller, needs
from lorabatch_producer.server.desk import Desk, desk_of

__all__ = ["check_webhook", "router"]

router = APIRouter(prefix="/webhooks", tags=["webhooks"])

TheDesk = Annotated[Desk, Depends(desk_of)]
Admin = Annotated[Caller, Depends(needs("admin"))]


class WebhookSecret(BaseModel):
    """Times: seconds UTC. `expires_at`: it signs until then, beside the one that follows it."""

    secret_id: str
    secret: str
    created_at: int
    expires_at: int | None


@router.get("/secrets")
async def secrets(desk: TheDesk, caller: Admin) -> list[WebhookSecret]:
    """Your tenant's, the newest first, as far as they sign."""
    found = await desk.call(Secrets(desk.ledger.engine).list, caller.tenant)
    return [_shown(one) for one in found if one.valid]


@router.post("/secrets", status_code=201)
async def rotate(desk: TheDesk, caller: Admin) -> WebhookSecret:
    """A new one. Those before it sign for another day beside it."""
    return _shown(await desk.call(Secrets(desk.ledger.engine).rotate, caller.tenant))


async def check_webhook(desk: Desk, tenant: str, url: str | None) -> None:
    """Refuse what could not be delivered as things are: a URL against the rules, or no secret."""
    if url is None:
        return
    try:
        check_target(parse_url(url), desk.settings.outgoing_rules)
    except ValueError as error:
        raise InvalidJob(f"webhook: {error}") from None
    known = await desk.call(Secrets(desk.ledger.engine).list, tenant)
    if not any(one.valid for one in known):
        raise InvalidJob(
            f"webhook: tenant {tenant!r} has no secret to sign it with; make one with POST "
            f"/webhooks/secrets, or `lorabatch webhooks secret create --tenant {tenant}`"
        )


def _shown(secret: Secret) -> WebhookSecret:
    expires_us = secret.expires_us
    return WebhookSecret(
        secret_id=secret.secret_id,
        secret=secret.secret,
        created_at=secret.created_us // 10**6,
        expires_at=None if expires_us is None else expires_us // 10**6,
    )

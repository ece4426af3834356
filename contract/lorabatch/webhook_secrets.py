"""Secrets that a tenant's webhooks are signed with: kept as they are, because they sign.

    Secrets(engine).create("acme").secret   # whsec_..., for whoever receives

After `rotate` both sign for a while, so that receivers may change when they like. Raises
IdempotencyConflict; database errors pass through.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.errors import IdempotencyConflict
from lorabatch.webhook_tables import webhook_secrets

__all__ = ["OVERLAP_S", "Secret", "Secrets"]

OVERLAP_S = 86_400.0
PREFIX = "whsec_"


@dataclass(frozen=True)
class Secret:
    """Times are UTC microseconds. `valid`: it signs, by the database's clock."""

    secret_id: str
    tenant: str
    secret: str = field(repr=False)
    created_us: int
    expires_us: int | None
    valid: bool


class Secrets:
    """Safe for many processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(self, tenant: str) -> Secret:
        """The first one. Raises IdempotencyConflict if there is one."""
        with self._engine.begin() as connection:
            known = [one for one in _secrets(connection, tenant) if one.valid]
            if known:
                raise IdempotencyConflict(
                    f"tenant {tenant!r}: it has secret {known[0].secret_id!r}; rotate it with "
                    f"`lorabatch webhooks secret rotate --tenant {tenant}`"
                )
            return _made(connection, tenant)

    def rotate(self, tenant: str, overlap_s: float = OVERLAP_S) -> Secret:
        """A new one; those before it sign for so long beside it."""
        with self._engine.begin() as connection:
            until = _now(connection) + round(overlap_s * 1e6)
            mine = webhook_secrets.c.tenant == tenant
            longer = sa.or_(
                webhook_secrets.c.expires_us.is_(None), webhook_secrets.c.expires_us > until
            )
            connection.execute(
                sa.update(webhook_secrets).where(mine, longer).values(expires_us=until)
            )
            return _made(connection, tenant)

    def revoke(self, secret_id: str) -> Secret | None:
        """The secret, which signs nothing from now on; None if there is none of that id."""
        mine = webhook_secrets.c.secret_id == secret_id
        with self._engine.begin() as connection:
            tenant = connection.scalar(sa.select(webhook_secrets.c.tenant).where(mine))
            if tenant is None:
                return None
            lives = sa.or_(
                webhook_secrets.c.expires_us.is_(None), webhook_secrets.c.expires_us > now_us()
            )
            connection.execute(
                sa.update(webhook_secrets).where(mine, lives).values(expires_us=now_us())
            )
            return next(one for one in _secrets(connection, tenant) if one.secret_id == secret_id)

    def list(self, tenant: str | None = None) -> Sequence[Secret]:
        """The newest first, those that have expired too."""
        with self._engine.execution_options(read_only=True).begin() as connection:
            return _secrets(connection, tenant)


def _made(connection: sa.Connection, tenant: str) -> Secret:
    secret_id = secrets.token_hex(6)
    row = {
        "secret_id": secret_id,
        "tenant": tenant,
        "secret": PREFIX + base64.b64encode(secrets.token_bytes(32)).decode(),
        "created_us": _now(connection),
    }
    connection.execute(webhook_secrets.insert(), [row])
    return next(one for one in _secrets(connection, tenant) if one.secret_id == secret_id)


def _secrets(connection: sa.Connection, tenant: str | None) -> Sequence[Secret]:
    now = _now(connection)
    mine = sa.true() if tenant is None else webhook_secrets.c.tenant == tenant
    query = webhook_secrets.select().where(mine)
    replaced = webhook_secrets.c.expires_us.is_not(None)  # SQLite's clock has milliseconds
    query = query.order_by(replaced, webhook_secrets.c.created_us.desc())
    rows = connection.execute(query).mappings()
    return [
        Secret(**row, valid=row["expires_us"] is None or row["expires_us"] > now) for row in rows
    ]


def _now(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.select(now_us())) or 0)

"""Keys of the HTTP API: who may ask, for which tenant, and what for.

    key, text = Keys(engine).create("acme")   # text: lb-KEY_ID-SECRET, said this once
    Keys(engine).check(text)                  # the Key, or None

The database has the SHA-256 of the secret. A slow hash is for what people think of; this is 256
random bits, which nobody finds by trying. Scopes: `generate` jobs, files and batches, with `read`
in it; `read`: look only; `usage`: reports; `metrics`: the server's numbers, of all tenants
together; `admin`: all of it, for every tenant. Database errors pass through.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.settings import Settings
from lorabatch.tables import api_keys
from lorabatch.urls import is_loopback

__all__ = ["DEFAULT_SCOPES", "SCOPES", "Key", "Keys", "keys_wanted"]

SCOPES: Final = ("generate", "read", "usage", "admin", "metrics")
DEFAULT_SCOPES: Final = ("generate", "read", "usage")
USE_NOTED_US = 300_000_000  # a write for each request would cost more than the request
_KEY = re.compile(r"lb-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_NOBODY = sha256(secrets.token_bytes(32)).hexdigest()  # what an unknown key is compared with


@dataclass(frozen=True)
class Key:
    """All that is known of a key; times are UTC microseconds. `valid`: by the database's clock."""

    key_id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    created_us: int
    expires_us: int | None
    revoked_us: int | None
    last_used_us: int | None
    valid: bool


class Keys:
    """Safe for many processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._read = engine.execution_options(read_only=True)

    def create(
        self,
        tenant: str,
        name: str = "",
        scopes: Collection[str] = DEFAULT_SCOPES,
        expires_s: float | None = None,
    ) -> tuple[Key, str]:
        """The key, and its text, which nobody can read back."""
        assert scopes
        assert set(scopes) <= set(SCOPES)
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        with self._engine.begin() as connection:
            now = int(connection.scalar(sa.select(now_us())) or 0)
            expires_us = None if expires_s is None else now + round(expires_s * 1e6)
            row = {
                "key_id": key_id,
                "tenant": tenant,
                "name": name,
                "secret_sha256": _digest(secret),
                "scopes": ",".join(scope for scope in SCOPES if scope in scopes),
                "created_us": now,
                "expires_us": expires_us,
            }
            connection.execute(api_keys.insert(), [row])
            (key,) = _keys(connection, api_keys.c.key_id == key_id)
        return key, f"lb-{key_id}-{secret}"

    def list(self, tenant: str | None = None) -> Sequence[Key]:
        """Oldest first, those that are revoked or expired too."""
        mine = sa.true() if tenant is None else api_keys.c.tenant == tenant
        with self._read.begin() as connection:
            return _keys(connection, mine)

    def revoke(self, key_id: str) -> Key | None:
        """The key, revoked now or before; None if there is none of that id."""
        mine = api_keys.c.key_id == key_id
        with self._engine.begin() as connection:
            change = sa.update(api_keys).where(mine, api_keys.c.revoked_us.is_(None))
            connection.execute(change.values(revoked_us=now_us()))
            return next(iter(_keys(connection, mine)), None)

    def check(self, text: str) -> Key | None:
        """Whose key it is; None if it is nobody's, revoked or expired: in the same time."""
        parts = _KEY.fullmatch(text)
        if parts is None:
            return None
        mine = api_keys.c.key_id == parts[1]
        with self._read.begin() as connection:
            found = next(iter(_keys(connection, mine)), None)
            kept = connection.scalar(sa.select(api_keys.c.secret_sha256).where(mine)) or _NOBODY
            now = int(connection.scalar(sa.select(now_us())) or 0)
        right = secrets.compare_digest(_digest(parts[2]), kept)
        if not right or found is None or not found.valid:
            return None
        if found.last_used_us is None or found.last_used_us < now - USE_NOTED_US:
            with self._engine.begin() as connection:
                connection.execute(sa.update(api_keys).where(mine).values(last_used_us=now))
        return found

    def known(self) -> bool:
        """Whether there ever was one; revoking the last one does not open what it closed."""
        with self._read.begin() as connection:
            return connection.scalar(sa.select(api_keys.c.key_id).limit(1)) is not None

    def usable(self) -> bool:
        """Whether there is one that is neither revoked nor expired."""
        with self._read.begin() as connection:
            query = sa.select(api_keys.c.key_id).where(_valid()).limit(1)
            return connection.scalar(query) is not None


def keys_wanted(settings: Settings) -> bool | None:
    """Whether the HTTP API asks for keys; None: as soon as there is one."""
    if settings.http_keys == "auto":
        return None if is_loopback(settings.http_host) else True
    return settings.http_keys == "on"


def _digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _valid() -> sa.ColumnElement[bool]:
    lives = sa.or_(api_keys.c.expires_us.is_(None), api_keys.c.expires_us > now_us())
    return sa.and_(api_keys.c.revoked_us.is_(None), lives)


def _keys(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> Sequence[Key]:
    names = ("key_id", "tenant", "name", "scopes", "created_us", "expires_us", "revoked_us")
    columns = [*(api_keys.c[name] for name in names), api_keys.c.last_used_us]
    valid = sa.case((_valid(), 1), else_=0).label("valid")
    query = sa.select(*columns, valid).where(condition)
    rows = connection.execute(query.order_by(api_keys.c.created_us, api_keys.c.key_id))
    return [
        Key(**{**row, "scopes": tuple(row["scopes"].split(",")), "valid": bool(row["valid"])})
        for row in rows.mappings()
    ]

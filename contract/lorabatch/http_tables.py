"""Tables that the HTTP API alone uses: who may ask, and what was asked for in this minute.

As those of `tables`, whose metadata they share. Raises nothing.
"""

from __future__ import annotations

import sqlalchemy as sa

from lorabatch.columns import Micros, metadata

__all__ = ["api_keys", "tenant_minutes"]

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(255), nullable=False, comment="comma list"),
    sa.Column("created_us", Micros, nullable=False),
    sa.Column("expires_us", Micros),
    sa.Column("revoked_us", Micros),
    sa.Column("last_used_us", Micros, comment="to some minutes"),
    sa.Index(None, "tenant"),
)

tenant_minutes = sa.Table(
    "tenant_minutes",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("minute", sa.BigInteger, nullable=False, comment="since 1970, by the database"),
    sa.Column("requests", sa.BigInteger, nullable=False, comment="accepted in it"),
    sa.Column("tokens", sa.BigInteger, nullable=False, comment="that they may take, estimated"),
)

"""Tables of webhooks: what is to be delivered, and the secrets that it is signed with.

A delivery's row is written with the outcome that it tells of, in the same transaction. As those of
`tables`, whose metadata they share. Raises nothing.
"""

from __future__ import annotations

import sqlalchemy as sa

from lorabatch.columns import Micros, metadata, partial

__all__ = ["webhook_deliveries", "webhook_secrets"]

webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("webhook_id", sa.String(64), primary_key=True, comment="the same at each attempt"),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("event", sa.String(32), nullable=False, comment="job.succeeded, batch.failed, ..."),
    sa.Column("subject", sa.String(64), nullable=False, comment="the id of the job or batch"),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("host", sa.String(255), nullable=False, comment="of the url"),
    sa.Column("state", sa.String(16), nullable=False, comment="waiting, delivered, failed"),
    sa.Column("attempts", sa.Integer, nullable=False, comment="that were begun"),
    sa.Column("happened_us", Micros, nullable=False),
    sa.Column("holder", sa.String(64), comment="the sender that attempts it now"),
    sa.Column("due_us", Micros, nullable=False, comment="when any sender may take it"),
    sa.Column("since_us", Micros, nullable=False, comment="from when on it is tried"),
    sa.Column("ended_us", Micros),
    sa.Column("status", sa.Integer, comment="of the last answer"),
    sa.Column("error", sa.Text, comment="of the last attempt; ours, without addresses"),
    partial("ix_webhook_deliveries_due", *("host", "due_us"), where="state = 'waiting'"),
    partial("ix_webhook_deliveries_ended", *("state", "ended_us"), where="ended_us IS NOT NULL"),
)

webhook_secrets = sa.Table(
    "webhook_secrets",
    metadata,
    sa.Column("secret_id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("secret", sa.String(255), nullable=False, comment="as it is: it signs"),
    sa.Column("created_us", Micros, nullable=False),
    sa.Column("expires_us", Micros, comment="since another took its place, or it was revoked"),
    sa.Index(None, "tenant"),
)

"""webhooks of jobs and batches, what is to be delivered, and secrets to sign with

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
oldest_code = "0004"


def upgrade() -> None:
    for table in ("jobs", "openai_batches"):
        told = sa.Column("webhook", sa.Text(), nullable=True, comment="URL that hears of its end")
        op.add_column(table, told)
    _deliveries()
    op.create_table(
        "webhook_secrets",
        sa.Column("secret_id", sa.String(length=32), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("secret", sa.String(length=255), nullable=False, comment="as it is: it signs"),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column(
            "expires_us",
            sa.BigInteger(),
            nullable=True,
            comment="since another took its place, or it was revoked",
        ),
        sa.PrimaryKeyConstraint("secret_id", name="pk_webhook_secrets"),
    )
    op.create_index("ix_webhook_secrets_tenant", "webhook_secrets", ["tenant"])


def downgrade() -> None:
    op.drop_index("ix_webhook_secrets_tenant", table_name="webhook_secrets")
    op.drop_table("webhook_secrets")
    for name in ("ended", "due"):
        op.drop_index(f"ix_webhook_deliveries_{name}", table_name="webhook_deliveries")
    op.drop_table("webhook_deliveries")
    for table in ("openai_batches", "jobs"):
        op.drop_column(table, "webhook")


def _deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        sa.Column(
            "webhook_id",
            sa.String(length=64),
            nullable=False,
            comment="the same at each attempt",
        ),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column(
            "event",
            sa.String(length=32),
            nullable=False,
            comment="job.succeeded, batch.failed, ...",
        ),
        sa.Column(
            "subject", sa.String(length=64), nullable=False, comment="the id of the job or batch"
        ),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False, comment="of the url"),
        sa.Column(
            "state", sa.String(length=16), nullable=False, comment="waiting, delivered, failed"
        ),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="that were begun"),
        sa.Column("happened_us", sa.BigInteger(), nullable=False),
        sa.Column("since_us", sa.BigInteger(), nullable=False, comment="from when on it is tried"),
        sa.Column(
            "holder",
            sa.String(length=64),
            nullable=True,
            comment="the sender that attempts it now",
        ),
        sa.Column("due_us", sa.BigInteger(), nullable=False, comment="when any sender may take it"),
        sa.Column("ended_us", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True, comment="of the last answer"),
        sa.Column(
            "error",
            sa.Text(),
            nullable=True,
            comment="of the last attempt; ours, without addresses",
        ),
        sa.PrimaryKeyConstraint("webhook_id", name="pk_webhook_deliveries"),
    )
    for name, columns, where in (
        ("due", ["host", "due_us"], "state = 'waiting'"),
        ("ended", ["state", "ended_us"], "ended_us IS NOT NULL"),
    ):
        op.create_index(
            f"ix_webhook_deliveries_{name}",
            "webhook_deliveries",
            columns,
            sqlite_where=sa.text(where),
            postgresql_where=sa.text(where),
        )

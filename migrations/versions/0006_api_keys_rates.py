"""keys of the HTTP API; how much a tenant may ask of it in a minute

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
oldest_code = "0004"


def upgrade() -> None:
    for name in ("requests_per_minute", "tokens_per_minute"):
        op.add_column("tenants", sa.Column(name, sa.Integer(), nullable=True))
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.String(length=255), nullable=False, comment="comma list"),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=True),
        sa.Column("revoked_us", sa.BigInteger(), nullable=True),
        sa.Column("last_used_us", sa.BigInteger(), nullable=True, comment="to some minutes"),
        sa.PrimaryKeyConstraint("key_id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])
    op.create_table(
        "tenant_minutes",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("minute", sa.BigInteger(), nullable=False, comment="since 1970, by the database"),
        sa.Column("requests", sa.BigInteger(), nullable=False, comment="accepted in it"),
        sa.Column(
            "tokens", sa.BigInteger(), nullable=False, comment="that they may take, estimated"
        ),
        sa.PrimaryKeyConstraint("tenant", name="pk_tenant_minutes"),
    )


def downgrade() -> None:
    op.drop_table("tenant_minutes")
    op.drop_index("ix_api_keys_tenant", table_name="api_keys")
    op.drop_table("api_keys")
    for name in ("tokens_per_minute", "requests_per_minute"):
        op.drop_column("tenants", name)

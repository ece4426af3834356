"""adapters, their versions and faults; which versions a job is bound to

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column(
            "tenant", sa.String(length=64), nullable=False, comment="empty: for every tenant"
        ),
        sa.Column("adapter_id", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "adapter_id", name="pk_adapters"),
    )
    op.create_table(
        "adapter_versions",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("adapter_id", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False, comment="sha256 of its files"),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column(
            "base_model",
            sa.String(length=255),
            nullable=True,
            comment="that it was checked against",
        ),
        sa.Column("rank", sa.Integer(), nullable=True),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "adapter_id", "version", name="pk_adapter_versions"),
    )
    op.create_table(
        "adapter_faults",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("adapter_id", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column(
            "base_model", sa.String(length=255), nullable=False, comment="of the workers it failed"
        ),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("since_us", sa.BigInteger(), nullable=False),
        sa.Column("retry_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant", "adapter_id", "version", "base_model", name="pk_adapter_faults"
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "adapter_versions",
            JSON,
            nullable=True,
            comment="what its adapters' names stood for when it was accepted; NULL: unknown then",
        ),
    )


def downgrade() -> None:
    op.drop_column("jobs", "adapter_versions")
    op.drop_table("adapter_faults")
    op.drop_table("adapter_versions")
    op.drop_table("adapters")

"""which base model a queue is for; which older code a schema serves

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
oldest_code = "0003"


def upgrade() -> None:
    op.create_table(
        "queues",
        sa.Column("queue", sa.String(length=64), nullable=False),
        sa.Column(
            "base_model", sa.String(length=255), nullable=False, comment="of all its workers"
        ),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("queue", name="pk_queues"),
    )
    op.create_table(
        "schema_readers",
        sa.Column("revision", sa.String(length=32), nullable=False),
        sa.Column(
            "oldest_code",
            sa.String(length=32),
            nullable=False,
            comment="that works with its schema",
        ),
        sa.PrimaryKeyConstraint("revision", name="pk_schema_readers"),
    )


def downgrade() -> None:
    op.drop_table("schema_readers")
    op.drop_table("queues")

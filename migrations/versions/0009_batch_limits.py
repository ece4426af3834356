"""what a batch may spend, and how its files' rows are jobs

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

from lorabatch.columns import Json

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
oldest_code = "0004"

CAPPED = sa.text("(max_tokens IS NOT NULL OR max_failures IS NOT NULL) AND stopped_us IS NULL")


def upgrade() -> None:
    for column in (
        sa.Column(
            "reading", Json, comment="how its files' rows are jobs; NULL: each line says all"
        ),
        sa.Column(
            "max_tokens", sa.BigInteger(), comment="that its jobs may take; NULL: any number"
        ),
        sa.Column("max_failures", sa.Integer(), comment="jobs that may fail; NULL: all"),
        sa.Column(
            "spent_tokens",
            sa.BigInteger(),
            nullable=False,
            server_default="0",
            comment="counted while one of the two is set",
        ),
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0", comment="likewise"),
        sa.Column("stopped_us", sa.BigInteger(), comment="when what waited was cancelled for it"),
    ):
        op.add_column("batches", column)
    op.create_index(
        "ix_batches_capped",
        "batches",
        ["batch_id"],
        sqlite_where=CAPPED,
        postgresql_where=CAPPED,
    )


def downgrade() -> None:
    op.drop_index("ix_batches_capped", table_name="batches")
    names = ("stopped_us", "failures", "spent_tokens", "max_failures", "max_tokens", "reading")
    for name in names:
        op.drop_column("batches", name)

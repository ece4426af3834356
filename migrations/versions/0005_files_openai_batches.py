"""uploaded files, and batches as OpenAI's API has them

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
oldest_code = "0004"

JSON = sa.JSON().with_variant(JSONB(), "postgresql")
OPEN = sa.text("status IN ('validating', 'in_progress', 'finalizing', 'cancelling')")
TIMED = ("in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled")


def upgrade() -> None:
    _files()
    _batches()


def _files() -> None:
    op.create_table(
        "files",
        sa.Column(
            "file_id",
            sa.String(length=64),
            nullable=False,
            comment="its name in the folder, too",
        ),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column(
            "filename", sa.Text(), nullable=False, comment="as its owner calls it; only shown"
        ),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("file_id", name="pk_files"),
    )
    op.create_index("ix_files_tenant_created_us", "files", ["tenant", "created_us"])


def _batches() -> None:
    op.create_table(
        "openai_batches",
        sa.Column("batch_id", sa.String(length=64), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("queue", sa.String(length=64), nullable=False),
        sa.Column("base_names", JSON, nullable=False, comment="the base model's, when it was made"),
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("completion_window", sa.String(length=16), nullable=False),
        sa.Column("metadata", JSON, nullable=True),
        sa.Column("input_file_id", sa.String(length=64), nullable=False),
        sa.Column("output_file_id", sa.String(length=64), nullable=True),
        sa.Column("error_file_id", sa.String(length=64), nullable=True),
        sa.Column("output_expires_after_s", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("errors", JSON, nullable=True),
        *(
            sa.Column(name, sa.Integer(), server_default="0", nullable=False)
            for name in ("total", "completed", "failed")
        ),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.Column(
            "done_by_us", sa.BigInteger(), nullable=False, comment="the deadline of its jobs"
        ),
        sa.Column(
            "accepted_us",
            sa.BigInteger(),
            nullable=True,
            comment="all of its lines are jobs; NULL: not yet",
        ),
        *(sa.Column(f"{status}_us", sa.BigInteger(), nullable=True) for status in TIMED),
        sa.Column(
            "holder",
            sa.String(length=64),
            nullable=True,
            comment="the server that works on it now",
        ),
        sa.Column("due_us", sa.BigInteger(), nullable=False, comment="when any server may take it"),
        sa.PrimaryKeyConstraint("batch_id", name="pk_openai_batches"),
    )
    op.create_index(
        "ix_openai_batches_tenant_created_us", "openai_batches", ["tenant", "created_us"]
    )
    op.create_index(
        "ix_openai_batches_due",
        "openai_batches",
        ["due_us"],
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )


def downgrade() -> None:
    op.drop_table("openai_batches")
    op.drop_table("files")

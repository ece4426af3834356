"""tenants' limits, dead letters, deadlines, crashes; indexes to feed the queue by

Revision ID: 0003
Revises: 0002
"""

import os

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NEVER = "9223372036854775807"
UNSENT = sa.text("state = 'queued' AND sent_us IS NULL")
OUT = sa.text("state IN ('queued', 'running') AND sent_us IS NOT NULL")
DUE = sa.text(f"state = 'queued' AND done_by_us < {NEVER}")


def upgrade() -> None:
    for column in (
        sa.Column(
            "queue",
            sa.String(length=64),
            server_default="lorabatch",
            nullable=False,
            comment="whose workers run it",
        ),
        sa.Column(
            "done_by_us",
            sa.BigInteger(),
            server_default=NEVER,
            nullable=False,
            comment="deadline; the largest number: none",
        ),
        sa.Column(
            "begun",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="under the lease that stands, it was let into a micro-batch",
        ),
        sa.Column(
            "crashes",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="leases that ran out after it had begun",
        ),
        sa.Column(
            "losses",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="leases that ran out",
        ),
        sa.Column(
            "superseded",
            sa.Boolean(),
            server_default=sa.false(),
            nullable=False,
            comment="another job of its batch runs its line again",
        ),
    ):
        op.add_column("jobs", column)
    queue = os.environ.get("LORABATCH_QUEUE") or "lorabatch"
    if queue != "lorabatch":  # what is open was for the queue of these settings
        of_here = sa.text("UPDATE jobs SET queue = :queue WHERE state IN ('queued', 'running')")
        op.execute(of_here.bindparams(queue=queue))
    op.create_table(
        "tenants",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("max_queued", sa.Integer(), nullable=True),
        sa.Column("updated_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name="pk_tenants"),
    )
    op.create_table(
        "dead_letters",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("died_us", sa.BigInteger(), nullable=False),
        sa.Column("handled_us", sa.BigInteger(), nullable=True),
        sa.Column("retried_as", sa.String(length=64), nullable=True, comment="NULL: dropped"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_dead_letters_job_id_jobs"),
        sa.PrimaryKeyConstraint("job_id", name="pk_dead_letters"),
    )
    for name, columns, where in (
        ("ix_jobs_unsent", ["queue", "tenant", "priority", "done_by_us", "submitted_us"], UNSENT),
        ("ix_jobs_out", ["queue", "tenant"], OUT),
        ("ix_jobs_due", ["done_by_us"], DUE),
    ):
        op.create_index(name, "jobs", columns, sqlite_where=where, postgresql_where=where)


def downgrade() -> None:
    for name in ("ix_jobs_due", "ix_jobs_out", "ix_jobs_unsent"):
        op.drop_index(name, table_name="jobs")
    op.drop_table("dead_letters")
    op.drop_table("tenants")
    for column in ("superseded", "losses", "crashes", "begun", "done_by_us", "queue"):
        op.drop_column("jobs", column)

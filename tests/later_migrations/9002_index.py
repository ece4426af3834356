"""what a later release might add: an index, built while others write

Revises: 9001
"""

from alembic import op

from lorabatch.migrating import index_in_use
from tests.later import newest

revision = "9002"
down_revision = "9001"
branch_labels = None
depends_on = None
oldest_code = newest()


def upgrade() -> None:
    index_in_use("ix_jobs_remark", "jobs", ["remark", "tenant"])


def downgrade() -> None:
    op.drop_index("ix_jobs_remark", table_name="jobs")

"""what a later release might add: columns of a table that is in use

Revises: the newest revision there is
"""

import sqlalchemy as sa
from alembic import op

from tests.later import newest

revision = "9001"
down_revision = oldest_code = newest()
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("remark", sa.Text(), nullable=True))
    kept = sa.Column("kept", sa.Boolean(), server_default=sa.true(), nullable=False)
    op.add_column("jobs", kept)
    op.create_table("remarks", sa.Column("remark", sa.String(length=64), primary_key=True))


def downgrade() -> None:
    op.drop_table("remarks")
    op.drop_column("jobs", "kept")
    op.drop_column("jobs", "remark")

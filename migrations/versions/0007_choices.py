"""several texts of one job, and log probabilities of their tokens

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None
oldest_code = "0004"


def upgrade() -> None:
    json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    comment = "several texts, log probabilities, and what was discarded"
    op.add_column("results", sa.Column("choices", json, nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("results", "choices")

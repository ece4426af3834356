"""Tables of uploaded files, and of batches that were made from one as OpenAI's API has it.

`openai_batches` has what such a batch is beside its row in `batches`, which has the same id.
"""

from __future__ import annotations

import sqlalchemy as sa

from lorabatch.columns import Json, Micros, metadata, partial

__all__ = ["OPEN", "STATUSES", "TIMED", "files", "openai_batches"]

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
STATUSES = (*OPEN, "completed", "failed", "expired", "cancelled")
TIMED = STATUSES[1:]  # each has a column for when it began; the first one's is created_us

files = sa.Table(
    "files",
    metadata,
    sa.Column("file_id", sa.String(64), primary_key=True, comment="its name in the folder, too"),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("filename", sa.Text, nullable=False, comment="as its owner calls it; only shown"),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_us", Micros, nullable=False),
    sa.Column("expires_us", Micros),
    sa.Index(None, "tenant", "created_us"),
)

openai_batches = sa.Table(
    "openai_batches",
    metadata,
    sa.Column("batch_id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("queue", sa.String(64), nullable=False),
    sa.Column("base_names", Json, nullable=False, comment="the base model's, when it was made"),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("completion_window", sa.String(16), nullable=False),
    sa.Column("metadata", Json),
    sa.Column("input_file_id", sa.String(64), nullable=False),
    sa.Column("output_file_id", sa.String(64)),
    sa.Column("error_file_id", sa.String(64)),
    sa.Column("output_expires_after_s", sa.Integer),
    sa.Column("webhook", sa.Text, comment="URL that hears of its end"),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("errors", Json),
    sa.Column("total", sa.Integer, nullable=False, server_default="0"),
    sa.Column("completed", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failed", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_us", Micros, nullable=False),
    sa.Column("done_by_us", Micros, nullable=False, comment="the deadline of its jobs"),
    sa.Column("accepted_us", Micros, comment="all of its lines are jobs; NULL: not yet"),
    *(sa.Column(f"{status}_us", Micros) for status in TIMED),
    sa.Column("holder", sa.String(64), comment="the server that works on it now"),
    sa.Column("due_us", Micros, nullable=False, comment="when any server may take it"),
    sa.Index(None, "tenant", "created_us"),
    partial(
        "ix_openai_batches_due",
        "due_us",
        where="status IN ('validating', 'in_progress', 'finalizing', 'cancelling')",
    ),
)

"""The ledger's tables. Migrations build the same ones; a test compares the two.

Every time is a UTC BIGINT of microseconds. Prompts live in jobs.body and results.text only,
never in the usage table. No column of a unique key is nullable.
"""

from __future__ import annotations

import sqlalchemy as sa

from lorabatch.columns import NEVER_US, Json, Micros, Serial, metadata, partial
from lorabatch.file_tables import files, openai_batches
from lorabatch.http_tables import api_keys, tenant_minutes
from lorabatch.webhook_tables import webhook_deliveries, webhook_secrets

__all__ = [
    "NEVER_US",
    "adapter_faults",
    "adapter_versions",
    "adapters",
    "api_keys",
    "batches",
    "dead_letters",
    "files",
    "job_attempts",
    "jobs",
    "metadata",
    "openai_batches",
    "queues",
    "results",
    "schema_readers",
    "tenant_minutes",
    "tenants",
    "usage_events",
    "webhook_deliveries",
    "webhook_secrets",
]

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("batch_id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("accepted_lines", sa.Integer, nullable=False),
    sa.Column("rejected_lines", sa.Integer, nullable=False),
    sa.Column("created_us", Micros, nullable=False),
    sa.Column("reading", Json, comment="how its files' rows are jobs; NULL: each line says all"),
    sa.Column("max_tokens", sa.BigInteger, comment="that its jobs may take; NULL: any number"),
    sa.Column("max_failures", sa.Integer, comment="jobs that may fail; NULL: all"),
    sa.Column(
        "spent_tokens",
        sa.BigInteger,
        nullable=False,
        server_default="0",
        comment="counted while one of the two is set",
    ),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0", comment="likewise"),
    sa.Column("stopped_us", Micros, comment="when what waited was cancelled for it"),
    partial(
        *("ix_batches_capped", "batch_id"),
        where="(max_tokens IS NOT NULL OR max_failures IS NOT NULL) AND stopped_us IS NULL",
    ),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("adapter_id", sa.String(128)),
    sa.Column("batch_id", sa.String(64)),
    sa.Column("custom_id", sa.String(512)),
    sa.Column("idempotency_key", sa.String(255), nullable=False),
    sa.Column("request_hash", sa.String(64), nullable=False),
    sa.Column("body", Json, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("state", sa.String(16), nullable=False, server_default="queued"),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_owner", sa.String(128)),
    sa.Column("lease_token", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("lease_expires_us", Micros),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column(
        "publish_result",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="a plain Celery client waits for it in the result backend",
    ),
    sa.Column(
        "adapter_versions",
        Json,
        comment="what its adapters' names stood for when it was accepted; NULL: unknown then",
    ),
    sa.Column("submitted_us", Micros, nullable=False),
    sa.Column("sent_us", Micros),
    sa.Column(
        "queue",
        sa.String(64),
        nullable=False,
        server_default="lorabatch",
        comment="whose workers run it",
    ),
    sa.Column(
        "done_by_us",
        Micros,
        nullable=False,
        server_default=str(NEVER_US),
        comment="deadline; the largest number: none",
    ),
    sa.Column(
        "begun",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="under the lease that stands, it was let into a micro-batch",
    ),
    sa.Column(
        "crashes",
        sa.Integer,
        nullable=False,
        server_default="0",
        comment="leases that ran out after it had begun",
    ),
    sa.Column(
        "losses", sa.Integer, nullable=False, server_default="0", comment="leases that ran out"
    ),
    sa.Column(
        "superseded",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="another job of its batch runs its line again",
    ),
    sa.Column("webhook", sa.Text, comment="URL that hears of its end"),
    sa.Column("started_us", Micros),
    sa.Column("finished_us", Micros),
    sa.UniqueConstraint("tenant", "idempotency_key"),
    sa.CheckConstraint(
        "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"
    ),
    sa.Index(None, "batch_id", "state"),
    sa.Index(None, "state", "sent_us"),
    sa.Index(None, "state", "lease_expires_us"),
    partial(
        "ix_jobs_unsent",
        *("queue", "tenant", "priority", "done_by_us", "submitted_us"),
        where="state = 'queued' AND sent_us IS NULL",
    ),
    partial(
        *("ix_jobs_out", "queue", "tenant"),
        where="state IN ('queued', 'running') AND sent_us IS NOT NULL",
    ),
    partial("ix_jobs_due", "done_by_us", where=f"state = 'queued' AND done_by_us < {NEVER_US}"),
)

queues = sa.Table(
    "queues",
    metadata,
    sa.Column("queue", sa.String(64), primary_key=True),
    sa.Column("base_model", sa.String(255), nullable=False, comment="of all its workers"),
    sa.Column("updated_us", Micros, nullable=False),
)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("max_running", sa.Integer),
    sa.Column("max_queued", sa.Integer),
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("tokens_per_minute", sa.Integer),
    sa.Column("updated_us", Micros, nullable=False),
)

dead_letters = sa.Table(
    "dead_letters",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.job_id"), primary_key=True),
    sa.Column("died_us", Micros, nullable=False),
    sa.Column("handled_us", Micros),
    sa.Column("retried_as", sa.String(64), comment="NULL: dropped"),
)

job_attempts = sa.Table(
    "job_attempts",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.job_id"), primary_key=True),
    sa.Column("lease_token", sa.BigInteger, primary_key=True),
    sa.Column("worker", sa.String(128), nullable=False),
    sa.Column("started_us", Micros, nullable=False),
    sa.Column("finished_us", Micros),
    sa.Column("outcome", sa.String(16), comment="a state, or 'released'; NULL: it was lost"),
)

results = sa.Table(
    "results",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.job_id"), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("text", sa.Text),
    sa.Column("token_ids", Json, nullable=False),
    sa.Column("finish_reason", sa.String(16)),
    sa.Column("choices", Json, comment="several texts, log probabilities, and what was discarded"),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("adapter_version", sa.String(64)),
    sa.Column("base_model", sa.String(255)),
    sa.Column("seed", sa.BigInteger),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("recorded_us", Micros, nullable=False),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True, comment="empty: for every tenant"),
    sa.Column("adapter_id", sa.String(128), primary_key=True),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("updated_us", Micros, nullable=False),
)

adapter_versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("adapter_id", sa.String(128), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True, comment="sha256 of its files"),
    sa.Column("location", sa.Text, nullable=False),
    sa.Column("base_model", sa.String(255), comment="that it was checked against"),
    sa.Column("rank", sa.Integer),
    sa.Column("nbytes", sa.BigInteger, nullable=False),
    sa.Column("created_us", Micros, nullable=False),
)

adapter_faults = sa.Table(
    "adapter_faults",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("adapter_id", sa.String(128), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("base_model", sa.String(255), primary_key=True, comment="of the workers it failed"),
    sa.Column("code", sa.String(64), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("since_us", Micros, nullable=False),
    sa.Column("retry_us", Micros, nullable=False),
)

usage_events = sa.Table(
    "usage_events",
    metadata,
    sa.Column("usage_event_id", Serial, primary_key=True, autoincrement=True),
    sa.Column("event_key", sa.String(128), nullable=False, unique=True),
    sa.Column("job_id", sa.String(64), nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("adapter_id", sa.String(128)),
    sa.Column("adapter_version", sa.String(64)),
    sa.Column("base_model", sa.String(255)),
    sa.Column("batch_id", sa.String(64)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("input_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("output_tokens", sa.Integer, nullable=False),
    sa.Column("queue_us", Micros, nullable=False),
    sa.Column("run_us", Micros, nullable=False),
    sa.Column("billable", sa.Boolean, nullable=False),
    sa.Column("occurred_us", Micros, nullable=False),
    sa.Column("recorded_us", Micros, nullable=False),
    sa.Index(None, "tenant", "occurred_us"),
    sa.Index(None, "occurred_us"),
    sa.Index(None, "job_id"),
)

schema_readers = sa.Table(
    "schema_readers",
    metadata,
    sa.Column("revision", sa.String(32), primary_key=True),
    sa.Column("oldest_code", sa.String(32), nullable=False, comment="that works with its schema"),
)

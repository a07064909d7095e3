"""The tables of the gateway's database; `migrations/` updates older databases."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.schema import Column

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("endpoint_id", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    # Encrypted: it may hold the caller's keys, and always holds the prompt.
    Column("request", LargeBinary, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("execution_timeout_s", Float, nullable=False),
    Column("queue_ttl_s", Float, nullable=False),
    Column("retention_s", Float, nullable=False),
    Column("signature", String(64), nullable=False),
    Column("webhook", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("prompt_id", String(64)),
    Column("backend", String(512)),
    Column("progress", JSON),
    Column("progress_number", BigInteger),
    Column("output", JSON),
    Column("error", JSON),
    Column("door", String(32), key="api", nullable=False, server_default="runpod"),
    Column("details", JSON, nullable=False, server_default="{}"),
    Column("retries", Integer, nullable=False, server_default="0"),
    # Empty without an API key.
    Column("owner", String(64), nullable=False, server_default=""),
    Index("jobs_state", "state", "created_at"),
    Index("jobs_ended", "ended_at"),
    Index("jobs_owner", "owner", "created_at"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", String(255), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("job_id", String(128), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(128), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    # Its time in microseconds.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("type", String(32), nullable=False),
    Column("data", JSON, nullable=False),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(128), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, unique=True),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("done_at", Float),
    Column("last_error", Text),
    Index("webhook_deliveries_due", "done_at", "due_at"),
)

stage_seconds = Table(
    "stage_seconds",
    metadata,
    # A count is the sum of its parts.
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("stage", String(16), primary_key=True),
    # Infinity for the longest.
    Column("up_to", Float, primary_key=True),
    Column("jobs", BigInteger, nullable=False),
    Column("seconds", Float, nullable=False),
)

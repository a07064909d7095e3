"""Alembic's entry: runs migrations over the connection that `migrate.py` hands in."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from comfy_worker.gateway.store.tables import metadata

_LOCK = 0x636F6D66
"""Any number that nobody else locks; the letters of "comf"."""

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()

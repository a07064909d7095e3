"""What a gateway's database has of a webhook."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.tables import webhook_deliveries


def delivery_of(url: str, job_id: str) -> dict[str, Any] | None:
    """Return the row of the webhook that tells of a job's end; None if none is to, or the job has not ended."""
    engine = connect(url)
    try:
        with engine.connect() as connection:
            query = select(webhook_deliveries).where(webhook_deliveries.c.job_id == job_id)
            row = connection.execute(query).mappings().one_or_none()
    finally:
        engine.dispose()
    return None if row is None else dict(row)

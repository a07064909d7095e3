"""A job in the shape of RunPod's `/status`, for responses and webhooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord


def status_body(record: JobRecord, output: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a job in the shape of RunPod's `/status`.

    The error is in the output too, because the `output()` of RunPod's client shows nothing else of a failed job.

    Args:
        record: the job.
        output: its output as the reader can use it, with the bytes of its files or URLs in place of references.
    """
    body: dict[str, Any] = {"id": record.id, "status": record.state.value}
    if record.delay_ms is not None:
        body["delayTime"] = record.delay_ms
    if record.execution_ms is not None:
        body["executionTime"] = record.execution_ms
    if output is not None:
        body["output"] = output
    if record.error is not None:
        body["error"] = record.error["error"]
        body["output"] = {**(output or {}), **record.error}
    return body


def has_output(record: JobRecord) -> bool:
    """Return whether `/status` shows a final output: what the job made, or why it failed."""
    return record.output is not None or record.error is not None


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    return status_body(record, parts.inlined(record))


def _progress(record: JobRecord, progress: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": record.id, "status": record.state.value, "output": progress}


WEBHOOK = WebhookFormat(_end, _progress)

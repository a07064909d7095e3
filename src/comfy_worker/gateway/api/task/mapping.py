"""A job's record in the task API's form."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from comfy_worker.gateway.api.outputs import files_by_kind
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Kind

_STATUSES: Mapping[JobState, str] = {
    JobState.IN_QUEUE: "pending",
    JobState.IN_PROGRESS: "processing",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.TIMED_OUT: "failed",
    JobState.CANCELLED: "cancelled",
}


def task_status(record: JobRecord) -> str:
    """Return a task's status."""
    return _STATUSES[record.state]


def summary_of(record: JobRecord, percent: float) -> dict[str, Any]:
    """Return a `TaskSummary`; `percent` of the workflow has run if the job runs or has failed."""
    if record.state is JobState.IN_QUEUE:
        percent = 0.0
    return {
        "task_id": record.id,
        "task_type": "comfyui",
        "status": task_status(record),
        "progress": 100.0 if record.state is JobState.COMPLETED else percent,
        "created_at": datetime.fromtimestamp(record.created_at, timezone.utc).isoformat(),
    }


def outcome_of(record: JobRecord, output: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `result` and `error`, each only if present; the files of `output` are links."""
    result = {} if output is None else {"result": result_of(output)}
    error = {} if record.error is None else {"error": record.error["error"], "code": record.error["code"]}
    return {**result, **error}


def result_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `TaskResult`, given an output whose files are links."""
    links = {kind.value: [item["data"] for item in items] for kind, items in files_by_kind(output).items()}
    images = links.pop(Kind.IMAGE.value)
    texts = [item["text"] for item in output.get("texts", [])]
    optional = {**links, "texts": texts, "errors": list(output.get("errors", []))}
    return {
        "comfy_prompt_id": output.get("prompt_id"),
        "images": images,
        "count": len(images),
        **{name: values for name, values in optional.items() if values},
    }


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    percent = float((record.progress or {}).get("percent", 0.0))
    output = None if record.output is None else parts.linked(record)
    return {**summary_of(record, percent), **outcome_of(record, output)}


def _progress(record: JobRecord, progress: Mapping[str, Any]) -> dict[str, Any]:
    return summary_of(record, float(progress.get("percent", 0.0)))


WEBHOOK = WebhookFormat(_end, _progress)

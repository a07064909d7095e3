"""A job's record in the workflow API's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_worker.gateway.api.dependencies import OutputLinks
from comfy_worker.gateway.api.outputs import files_by_kind
from comfy_worker.gateway.api.workflow.schemas import STATES
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState


async def status_of(record: JobRecord, jobs: JobService, links: OutputLinks) -> dict[str, Any]:
    """Return the status of a job, with links to its files."""
    output = None if record.output is None else links.in_output(record.output)
    progress = await jobs.progress_of(record)
    return status_body(record, progress.data if progress else None, jobs.position_of(record), output)


def status_body(
    record: JobRecord,
    progress: Mapping[str, Any] | None,
    position: QueuePosition | None,
    output: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return a `WorkflowStatus`.

    Args:
        record: the job.
        progress: its progress.
        position: its position in the queue; None if it has ended, or the position is unknown.
        output: its output, with links to the files.
    """
    data = progress or {}
    node = data.get("node", {}) if record.state is JobState.IN_PROGRESS else {}
    error = record.error or {}
    is_waiting = position is not None and position.position is not None and record.state is JobState.IN_QUEUE
    return {
        "prompt_id": record.id,
        "status": STATES[record.state],
        "progress": _progress(record.state, data),
        "current_node": node.get("id"),
        "current_node_title": node.get("title"),
        **_outputs(output or {}),
        "error": error.get("error"),
        **{f"error_{name}": error[name] for name in ("code", "hint") if error.get(name)},
        **({"queue_position": position.position} if position is not None and is_waiting else {}),
        **({"notice": data["notice"]} if data.get("notice") and not record.state.is_terminal else {}),
        "estimated_time_remaining": _remaining_s(record.state, position),
    }


def _progress(state: JobState, progress: Mapping[str, Any]) -> float:
    if state is JobState.IN_QUEUE:
        return 0.0
    return 100.0 if state is JobState.COMPLETED else float(progress.get("percent", 0.0))


def _remaining_s(state: JobState, position: QueuePosition | None) -> int | None:
    """Return the seconds until a job's end, None if unknown."""
    if state.is_terminal:
        return 0
    return None if position is None or position.remaining_s is None else math.ceil(position.remaining_s)


def _outputs(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return links to a job's files, and its texts; of empty lists, only those of images and videos."""
    links = {f"output_{kind.value}": [_link(item) for item in items] for kind, items in files_by_kind(output).items()}
    always = {name: links.pop(name) for name in ("output_images", "output_videos")}
    texts = [item["text"] for item in output.get("texts", [])]
    optional = {**links, "texts": texts, "warnings": list(output.get("errors", []))}
    return {**always, **{name: value for name, value in optional.items() if value}}


def _link(item: Mapping[str, Any]) -> str:
    """Return a file's link; for one that was delivered in base64 too, that of its copy in the bucket."""
    return str(item.get("url") or item["data"])


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    return status_body(record, record.progress, None, parts.linked(record))


def _progress_of(record: JobRecord, progress: Mapping[str, Any]) -> dict[str, Any]:
    return status_body(record, progress, None, None)


WEBHOOK = WebhookFormat(_end, _progress_of)

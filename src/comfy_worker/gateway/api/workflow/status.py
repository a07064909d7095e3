"""A job's record in the workflow API's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.outputs import files_by_kind
from comfy_worker.gateway.api.workflow.schemas import STATES
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState


async def status_of(record: JobRecord, parts: Dependencies, base_url: str) -> dict[str, Any]:
    """Return where a job stands, with links to what it made."""
    output = None if record.output is None else parts.linked(record.output, base_url)
    told = await parts.service.progress_of(record)
    return status_body(record, told.data if told else None, parts.service.position_of(record), output)


def status_body(
    record: JobRecord, progress: Mapping[str, Any] | None, place: QueuePosition | None, output: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return where a job stands.

    Args:
        record: the job.
        progress: how far it is.
        place: where it stands in the queue; None if it has ended, or nobody can tell.
        output: what it made, with links to its files.
    """
    data = progress or {}
    node = data.get("node", {}) if record.state is JobState.IN_PROGRESS else {}
    error = record.error or {}
    position = place.position if place is not None and record.state is JobState.IN_QUEUE else None
    return {
        "prompt_id": record.id,
        "status": STATES[record.state],
        "progress": _progress(record.state, data),
        "current_node": node.get("id"),
        "current_node_title": node.get("title"),
        **_outputs(output or {}),
        "error": error.get("error"),
        **{f"error_{name}": error[name] for name in ("code", "hint") if error.get(name)},
        **({} if position is None else {"queue_position": position}),
        **({"notice": data["notice"]} if data.get("notice") and not record.state.is_terminal else {}),
        "estimated_time_remaining": _remaining(record.state, place),
    }


def _progress(state: JobState, progress: Mapping[str, Any]) -> float:
    if state is JobState.IN_QUEUE:
        return 0.0
    return 100.0 if state is JobState.COMPLETED else float(progress.get("percent", 0.0))


def _remaining(state: JobState, place: QueuePosition | None) -> int | None:
    """Return in how many seconds a job will have ended, None if that is not known."""
    if state.is_terminal:
        return 0
    return None if place is None or place.remaining_s is None else math.ceil(place.remaining_s)


def _outputs(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return links to what a job made, and its texts; what there is none of is only named for pictures and videos."""
    links = {f"output_{kind.value}": [_link(item) for item in items] for kind, items in files_by_kind(output).items()}
    always = {name: links.pop(name) for name in ("output_images", "output_videos")}
    texts = [item["text"] for item in output.get("texts", [])]
    found = {**links, "texts": texts, "warnings": list(output.get("errors", []))}
    return {**always, **{name: value for name, value in found.items() if value}}


def _link(item: Mapping[str, Any]) -> str:
    """Return where a file is; of one that came as base64 too, where else it is."""
    return str(item.get("url") or item["data"])


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    return status_body(record, record.progress, None, parts.linked(record))


def _progress_of(record: JobRecord, told: Mapping[str, Any]) -> dict[str, Any]:
    return status_body(record, told, None, None)


WEBHOOK = WebhookFormat(_end, _progress_of)

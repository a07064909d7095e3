"""A job's record in the workflow API's words."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comfy_worker.gateway.doors.outputs import files_by_kind
from comfy_worker.gateway.doors.parts import Parts
from comfy_worker.gateway.doors.workflow_words import STATES
from comfy_worker.gateway.events import PROGRESS, Event
from comfy_worker.gateway.records import JobRecord
from comfy_worker.gateway.service import Place
from comfy_worker.gateway.webhook_words import WebhookParts, WebhookWords
from comfy_worker.jobs import JobState


async def status_of(record: JobRecord, parts: Parts, base_url: str) -> dict[str, Any]:
    """Return where a job stands, with links to what it made."""
    output = None if record.output is None else parts.linked(record.output, base_url)
    told = await parts.service.progress_of(record)
    return status_body(record, told, parts.service.place_of(record), output, time.time())


def status_body(
    record: JobRecord, told: Event | None, place: Place | None, output: Mapping[str, Any] | None, now: float
) -> dict[str, Any]:
    """Return where a job stands.

    Args:
        record: the job.
        told: the last word on how far it is.
        place: where it stands in the queue, None if it does not wait.
        output: what it made, with links to its files.
        now: seconds since the epoch.
    """
    data = told.data if told else {}
    node = data.get("node", {}) if record.state is JobState.IN_PROGRESS else {}
    error = record.error or {}
    return {
        "prompt_id": record.id,
        "status": STATES[record.state],
        "progress": _progress(record.state, data),
        "current_node": node.get("id"),
        "current_node_title": node.get("title"),
        **_outputs(output or {}),
        "error": error.get("error"),
        **{f"error_{name}": error[name] for name in ("code", "hint") if error.get(name)},
        **({} if place is None else {"queue_position": place.position}),
        "estimated_time_remaining": _remaining(record.state, told, place, now),
    }


def _progress(state: JobState, told: Mapping[str, Any]) -> float:
    if state is JobState.IN_QUEUE:
        return 0.0
    return 100.0 if state is JobState.COMPLETED else float(told.get("percent", 0.0))


def _remaining(state: JobState, told: Event | None, place: Place | None, now: float) -> int | None:
    """Return in how many seconds a job will have ended, None if that is not known."""
    if state.is_terminal:
        return 0
    if state is JobState.IN_QUEUE:
        if place is None or place.wait_s is None or place.run_s is None:
            return None
        return math.ceil(place.wait_s + place.run_s)
    if told is None or "estimated_s" not in told.data:
        return None
    # An event's number is the microsecond in which it happened.
    expected_s = float(told.data["estimated_s"])
    return math.ceil(max(0.0, expected_s - (now - told.number / 1_000_000)))


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
    told = None if record.progress is None else Event(record.progress_number or 0, record.id, PROGRESS, record.progress)
    return status_body(record, told, None, parts.linked(record), time.time())


def _progress_of(record: JobRecord, told: Mapping[str, Any]) -> dict[str, Any]:
    now = time.time()
    event = Event(int(now * 1_000_000), record.id, PROGRESS, told)
    return status_body(replace(record, state=JobState.IN_PROGRESS), event, None, None, now)


WEBHOOK = WebhookWords(_end, _progress_of)

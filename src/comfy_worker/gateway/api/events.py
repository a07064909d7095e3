"""Live updates of a job, as server-sent events and over a WebSocket."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response, WebSocket
from sse_starlette import ServerSentEvent

from comfy_worker.gateway.api.dependencies import Jobs
from comfy_worker.gateway.api.job_updates import JobUpdate, job_updates
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, JOB_ID, error_responses
from comfy_worker.gateway.errors import DatabaseUnavailable
from comfy_worker.gateway.events.bus import PREVIEW, PROGRESS, STATUS
from comfy_worker.gateway.http.event_stream import EventStream
from comfy_worker.gateway.http.websockets import send_messages

_MAX_NUMBER = 2**63 - 1
"""The largest integer of the databases."""
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "For `Last-Event-ID`; the status at the beginning has none."},
        "event": {"enum": [STATUS, PROGRESS, PREVIEW]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_EVENTS = {
    "description": "Events: `status`, `progress` and, on request, `preview`; the last is the job's end.",
    "content": {"text/event-stream": {"itemSchema": _EVENT}},
}

JobId = Annotated[str, Path(pattern=JOB_ID)]
LastEventId = Annotated[str | None, Header(description="The `id` of the last event that the client received.")]
Previews = Annotated[bool, Query(description="Whether to send previews of the output too.")]

router = APIRouter(tags=["Live"])


@router.get(
    "/events/{job_id}",
    operation_id="get_events",
    response_class=Response,
    responses={200: _EVENTS, **error_responses(*COMMON_ERRORS, 404)},
)
async def get_events(
    job_id: JobId, jobs: Jobs, last_event_id: LastEventId = None, previews: Previews = False
) -> EventStream:
    """Send a job's updates until it has ended; keep-alives every 15 s."""
    record = await jobs.get(job_id)
    return EventStream(_as_events(job_updates(jobs, record, _number(last_event_id), previews=previews)))


def _number(last_event_id: str | None) -> int | None:
    """Return the number in a Last-Event-ID; None if it is not one of ours, as if it were missing."""
    if last_event_id is None or not (last_event_id.isascii() and last_event_id.isdecimal()):
        return None
    return min(int(last_event_id[:19]), _MAX_NUMBER)


async def _as_events(updates: AsyncGenerator[JobUpdate, None]) -> AsyncGenerator[ServerSentEvent, None]:
    # A stream that the database interrupts just ends: the client comes back with its Last-Event-ID.
    with contextlib.suppress(DatabaseUnavailable):
        async with aclosing(updates):
            async for update in updates:
                event_id = None if update.number is None else str(update.number)
                yield ServerSentEvent(json.dumps(update.data), event=update.type, id=event_id)


@router.websocket("/ws/{job_id}")
async def websocket(websocket: WebSocket, job_id: str, jobs: Jobs, after: int | None = None) -> None:
    """Send a job's updates until it has ended: JSON objects `{"id", "event", "data"}`."""
    record = await jobs.get(job_id)
    after = None if after is None else max(-1, min(after, _MAX_NUMBER))
    previews = websocket.query_params.get("previews", "").lower() in ("1", "true", "yes")
    await send_messages(websocket, _as_messages(job_updates(jobs, record, after, previews=previews)))


async def _as_messages(updates: AsyncGenerator[JobUpdate, None]) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(updates):
        async for update in updates:
            yield {"id": update.number, "event": update.type, "data": update.data}

"""What happens to a job, told the moment it happens: as server-sent events and over a WebSocket."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response, WebSocket
from sse_starlette import ServerSentEvent

from comfy_worker.gateway.api.schemas import JOB_ID, problems
from comfy_worker.gateway.errors import DatabaseUnavailable, NotFound
from comfy_worker.gateway.events.bus import PREVIEW, PROGRESS, STATUS, Event
from comfy_worker.gateway.http.event_stream import EventStream
from comfy_worker.gateway.http.middleware import answer_error
from comfy_worker.gateway.http.websockets import PATIENCE_S, tell
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

_KEEP_ALIVE_S = 15
_LARGEST_NUMBER = 2**63 - 1
"""That a database takes."""

_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "For `Last-Event-ID`; what only says where the job stands has none."},
        "event": {"enum": [STATUS, PROGRESS, PREVIEW]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}

JobId = Annotated[str, Path(pattern=JOB_ID)]
LastNumber = Annotated[str | None, Header(description="The `id` of the last event that was heard.")]
Previews = Annotated[bool, Query(description="Whether pictures of what is being made are told too.")]


def router(service: JobService) -> APIRouter:
    """Return the routes."""
    live = _Live(service)
    api = APIRouter(tags=["Live"])
    stream = {
        "description": "Events: `status`, `progress` and, on request, `preview`; the last is the job's end.",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }
    api.add_api_route(
        "/events/{job_id}",
        live.events,
        methods=["GET"],
        operation_id="get_events",
        response_class=Response,
        responses={200: stream, **problems(404)},
    )
    api.add_api_websocket_route("/ws/{job_id}", live.websocket)
    return api


class _Live:
    def __init__(self, service: JobService) -> None:
        self._service = service

    async def events(self, job_id: JobId, last_event_id: LastNumber = None, previews: Previews = False) -> EventStream:
        """Tell what happens to a job until it has ended; keep-alives every 15 s."""
        record = await self._service.get(job_id)
        told = self._as_sse(record, _number(last_event_id), previews)
        return EventStream(told, keep_alive_s=_KEEP_ALIVE_S, patience_s=PATIENCE_S)

    async def _as_sse(
        self, record: JobRecord, after: int | None, previews: bool
    ) -> AsyncGenerator[ServerSentEvent, None]:
        # A stream that the database breaks off is no error of its own: the client comes back and says what it heard.
        with contextlib.suppress(DatabaseUnavailable):
            async with aclosing(self._told(record, after, previews)) as told:
                async for number, kind, data in told:
                    # What only says where the job stands has no number: a client that comes back did not hear it.
                    event_id = None if number is None else str(number)
                    yield ServerSentEvent(json.dumps(data), event=kind, id=event_id)

    async def websocket(self, websocket: WebSocket, job_id: str, after: int | None = None) -> None:
        """Tell what happens to a job until it has ended: JSON objects `{"id", "event", "data"}`."""
        try:
            record = await self._service.get(job_id)
        except (NotFound, DatabaseUnavailable) as error:
            await websocket.send_denial_response(answer_error(error, websocket.url.path))
            return
        after = None if after is None else max(-1, min(after, _LARGEST_NUMBER))
        previews = websocket.query_params.get("previews", "").lower() in ("1", "true", "yes")
        await tell(websocket, self._as_messages(record, after, previews))

    async def _as_messages(
        self, record: JobRecord, after: int | None, previews: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self._told(record, after, previews)) as told:
            async for number, kind, data in told:
                yield {"id": number, "event": kind, "data": data}

    async def _told(
        self, record: JobRecord, after: int | None, previews: bool
    ) -> AsyncGenerator[tuple[int | None, str, dict[str, Any]], None]:
        """Yield number, kind and data of each event; to a client that is new, where the job stands comes first."""
        if after is None and not record.state.is_terminal:
            yield None, STATUS, self._standing(record)
        async with aclosing(self._service.events(record.id, after, known=record.state)) as events:
            async for event in events:
                if event.type != PREVIEW:
                    yield event.number, event.type, dict(event.data)
                elif previews:
                    yield None, PREVIEW, _preview(event)

    def _standing(self, record: JobRecord) -> dict[str, Any]:
        standing: dict[str, Any] = {"status": record.state.value}
        if record.state is JobState.IN_QUEUE and (place := self._service.position_of(record)) is not None:
            standing |= place.progress_fields()
        return standing


def _number(last_event_id: str | None) -> int | None:
    """Return the number in a Last-Event-ID; None for one that is none of ours, as if it were not there."""
    if last_event_id is None or not (last_event_id.isascii() and last_event_id.isdecimal()):
        return None
    return min(int(last_event_id[:19]), _LARGEST_NUMBER)


def _preview(event: Event) -> dict[str, Any]:
    content = base64.b64encode(event.data["content"]).decode("ascii")
    return {"mime_type": event.data["mime_type"], "content": content}

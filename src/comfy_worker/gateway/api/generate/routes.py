"""The generate API: `POST /generate` and its kin, then `GET /result/{request_id}`; and the README as a page."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.api.dependencies import Dependencies, queue_sizes
from comfy_worker.gateway.api.generate.mapping import (
    Following,
    GenerateEvent,
    GenerateResult,
    QueueInfo,
    Standing,
    ended,
    files_of,
    http_status,
    result_of,
)
from comfy_worker.gateway.api.generate.readme_page import readme_page
from comfy_worker.gateway.api.generate.requests import (
    GenerateRequest,
    check_source,
    fingerprint,
    not_read,
    runpod_request,
)
from comfy_worker.gateway.api.schemas import JOB_ID, Answer, DetailedErrorResponse, problems, request_body
from comfy_worker.gateway.errors import DatabaseUnavailable, DuplicateRequest, NotFound
from comfy_worker.gateway.http.client_disconnect import while_connected
from comfy_worker.gateway.http.event_stream import EventStream
from comfy_worker.gateway.http.request_validation import read_body, warnings_of
from comfy_worker.gateway.modifiers import run_modifier
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.job.payload import input_warnings
from comfy_worker.modifiers import randomized
from comfy_worker.types import JobState

DOOR = "generate"
_WAIT_S = 300.0
_LONGEST_WAIT_S = 3600.0
_KEEP_ALIVE_S = 15
_PATIENCE_S = 30
"""A client that takes nothing for so long is let go; its job goes on."""
_COUNTS_AGE_S = 0.5
_MODIFIERS_AT_ONCE = 8
_FAILED: dict[int, str] = {
    400: "The request, or the job's input, is not as it must be.",
    409: "There is a job with this request_id already; or the job was cancelled.",
    413: "The request, or what the job made, is too large.",
    422: "An input of the job could not be fetched.",
    500: "The job failed, or the gateway, because of a bug of its own.",
    502: "ComfyUI broke off, or the outputs could not be delivered.",
    503: "No more jobs can wait, or no ComfyUI answers.",
    504: "The job took too long.",
    507: "ComfyUI's disk is full.",
}

RequestId = Annotated[str, Path(pattern=JOB_ID)]
AsBase64 = Annotated[
    str | None,
    Header(
        alias="X-Return-Outputs-As-Base64",
        description="`1`, `true`, `yes` or `on`: the files' bytes come in the answer, as with "
        "`return_outputs_as_base64`.",
    ),
]
WithHistory = Annotated[
    str | None,
    Header(
        alias="X-Include-ComfyUI-Response",
        description="`1`, `true`, `yes` or `on`: the result has what ComfyUI's history says of its outputs, as "
        "`comfyui_response`; anything else: it has not, whatever INCLUDE_COMFYUI_RESPONSE says.",
    ),
]


@dataclass(frozen=True)
class _Wish:
    """How a caller wants the result: with the files' bytes, and in ComfyUI's words too."""

    with_bytes: bool = False
    with_history: bool = False


def router(parts: Dependencies) -> APIRouter:
    """Return the door's routes."""
    door = _Door(parts)
    api = APIRouter(tags=["Generate"])
    body = request_body(GenerateRequest)
    api.add_api_route(
        "/generate",
        door.generate,
        methods=["POST"],
        operation_id="generate",
        status_code=202,
        response_model=GenerateResult,
        responses=problems(409, 503, model=DetailedErrorResponse),
        openapi_extra=body,
    )
    api.add_api_route(
        "/generate/sync",
        door.sync,
        methods=["POST"],
        operation_id="generate_sync",
        response_model=GenerateResult,
        response_model_exclude_none=True,
        responses={**problems(503, model=DetailedErrorResponse), **_results(), 202: _unfinished()},
        openapi_extra=body,
    )
    api.add_api_route(
        "/generate/stream",
        door.stream,
        methods=["POST"],
        operation_id="generate_stream",
        response_class=Response,
        responses={200: _stream(), **problems(409, 503, model=DetailedErrorResponse)},
        openapi_extra=body,
    )
    api.add_api_route(
        "/result/{request_id}",
        door.result,
        methods=["GET"],
        operation_id="get_result",
        response_model=GenerateResult,
        response_model_exclude_none=True,
        responses={**problems(404, 503, model=DetailedErrorResponse), **_results()},
    )
    api.add_api_route(
        "/queue-info",
        door.queue_info,
        methods=["GET"],
        operation_id="get_queue_info",
        response_model=QueueInfo,
        responses=problems(503, model=DetailedErrorResponse),
    )
    for method, operation_id in (("GET", "readme"), ("HEAD", "readme_head")):
        api.add_api_route(
            "/",
            readme_page,
            methods=[method],
            operation_id=operation_id,
            response_class=HTMLResponse,
            responses=problems(404),
        )
    return api


def _results() -> dict[int | str, dict[str, Any]]:
    """Return the declaration of answers with the result of a job that failed, or of a request that was refused."""
    return {
        status: {"model": GenerateResult | DetailedErrorResponse, "description": why} for status, why in _FAILED.items()
    }


def _unfinished() -> dict[str, Any]:
    return {"model": GenerateResult, "description": "The job goes on; ask `GET /result/{request_id}`."}


def _stream() -> dict[str, Any]:
    event = {"type": "object", "properties": {"data": {"type": "string", "contentMediaType": "application/json"}}}
    schema = GenerateEvent.model_json_schema()
    names = ", ".join(f"`{name}`" for name in schema["properties"])
    return {
        "description": f"Events with {names}; the last has the status `final_result`.",
        "content": {"text/event-stream": {"itemSchema": event}},
    }


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._service = parts.service
        self._modifier_threads = CapacityLimiter(_MODIFIERS_AT_ONCE)
        self._counts: tuple[float, Mapping[JobState, int]] | None = None

    async def generate(self, request: Request, as_base64: AsBase64 = None, with_history: WithHistory = None) -> Answer:
        """Queue a job and return its id."""
        wish = self._wish(as_base64, with_history)
        record, warnings = await self._submit(request, wish)
        return Answer({**await self._result(request, record, wish), **warnings}, status_code=202)

    async def sync(
        self,
        request: Request,
        as_base64: AsBase64 = None,
        with_history: WithHistory = None,
        timeout: Annotated[
            float, Query(gt=0, le=_LONGEST_WAIT_S, allow_inf_nan=False, description="Seconds.")
        ] = _WAIT_S,
    ) -> Answer:
        """Queue a job and return its result; 202 and where it stands if that takes longer than `timeout` seconds."""
        wish = self._wish(as_base64, with_history)
        record, warnings = await self._submit(request, wish)
        # Nobody reads the answer to a client that has left; its job goes on.
        record = await while_connected(request, self._service.wait(record.id, timeout)) or record
        status = http_status(record) if record.state.is_terminal else 202
        return Answer({**await self._result(request, record, wish), **warnings}, status_code=status)

    async def stream(
        self, request: Request, as_base64: AsBase64 = None, with_history: WithHistory = None
    ) -> EventStream:
        """Queue a job and tell what happens to it until it has ended; it goes on when the client leaves."""
        wish = self._wish(as_base64, with_history)
        record, warnings = await self._submit(request, wish)
        told = self._as_sse(request, record, wish, warnings)
        return EventStream(told, keep_alive_s=_KEEP_ALIVE_S, patience_s=_PATIENCE_S)

    async def result(
        self, request: Request, request_id: RequestId, as_base64: AsBase64 = None, with_history: WithHistory = None
    ) -> Answer:
        """Return where a job stands, with its result when it has one."""
        record = await self._service.get(request_id)
        result = await self._result(request, record, self._wish(as_base64, with_history))
        return Answer(result, status_code=http_status(record))

    async def queue_info(self) -> Answer:
        """Return how many jobs there are in each queue."""
        sizes = queue_sizes(await self._counted(at_most_s=0), self._service.all_backends())
        return Answer(_queue_info(sizes))

    # ----------------------------------------------------------------------------------------------- request

    def _wish(self, as_base64: str | None, with_history: str | None) -> _Wish:
        always = self._parts.settings.include_comfyui_response
        return _Wish(_is_yes(as_base64), always if with_history is None else _is_yes(with_history))

    async def _submit(self, request: Request, wish: _Wish) -> tuple[JobRecord, Mapping[str, Any]]:
        """Queue a job; return it, and for the answer what was ignored."""
        body = await read_body(request, GenerateRequest)
        job_input = body["input"]
        check_source(job_input)
        workflow, unread = await self._workflow(job_input)
        job = runpod_request(body, workflow)
        record = await self._accept(request, body, job, wish)
        # For the line that the log has of this request.
        request.state.job_id = record.id
        in_input = await run_in_threadpool(input_warnings, job["input"])
        return record, warnings_of(body, GenerateRequest, [*in_input, *not_read(unread)])

    async def _accept(
        self, request: Request, body: Mapping[str, Any], job: Mapping[str, Any], wish: _Wish
    ) -> JobRecord:
        """Queue a job under its caller's id; where that is open already, the same request is the same job."""
        own_id = body["input"].get("request_id")
        details = self._parts.details(request, sent=await run_in_threadpool(fingerprint, body))
        if wish.with_bytes or body["input"].get("return_outputs_as_base64"):
            details["as_base64"] = True
        try:
            return await self._service.submit(
                job, job_id=own_id or str(uuid.uuid4()), api=DOOR, details=details, replace_ended=True
            )
        except DuplicateRequest:
            with suppress(NotFound):
                earlier = await self._service.get(own_id)
                if earlier.details.get("sent") == details["sent"]:
                    return earlier
            raise

    async def _workflow(self, job_input: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
        """Return the workflow to run, and the names of the modifications that its modifier did not read."""
        workflow: Mapping[str, Any] = job_input.get("workflow_json") or {}
        if not job_input.get("modifier"):
            return await run_in_threadpool(randomized, workflow), ()
        modifications = job_input.get("modifications") or {}
        limit_s = self._parts.settings.modifier_timeout_s
        modify = partial(run_modifier, self._parts.modifiers, job_input["modifier"], modifications, timeout_s=limit_s)
        # In threads of their own: slow ones keep nobody waiting who wants something else.
        made = await to_thread.run_sync(modify, limiter=self._modifier_threads)
        return made.workflow, made.unread

    # ------------------------------------------------------------------------------------------------ result

    async def _result(self, request: Request, record: JobRecord, wish: _Wish) -> dict[str, Any]:
        if not record.state.is_terminal:
            following = Following.of(record, await self._service.recent_events(record.id))
            return result_of(record, following.standing(self._service.queue_position(record.id)), [])
        with_bytes = wish.with_bytes or bool(record.details.get("as_base64"))
        output = await run_in_threadpool(self._files, record, self._parts.base_url(request), with_bytes)
        return result_of(record, ended(record), output, with_history=wish.with_history)

    def _files(self, record: JobRecord, base_url: str, as_base64: bool) -> list[dict[str, Any]]:
        output = record.output or {}
        return files_of(
            record.id, output, self._parts.linked(output, base_url), self._parts.assets, as_base64=as_base64
        )

    # ------------------------------------------------------------------------------------------------ stream

    async def _as_sse(
        self, request: Request, record: JobRecord, wish: _Wish, warnings: Mapping[str, Any]
    ) -> AsyncGenerator[ServerSentEvent, None]:
        async with aclosing(self._told(request, record, wish, warnings)) as told:
            async for data in told:
                yield ServerSentEvent(json.dumps(data))

    async def _told(
        self, request: Request, record: JobRecord, wish: _Wish, warnings: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what each event says; the last has the result, or says why there is none yet."""
        following = Following()
        standing = following.standing(self._service.queue_position(record.id))
        try:
            async with aclosing(self._standings(record, following)) as standings:
                async for standing in standings:
                    yield await self._event(record, standing)
            record = await self._service.get(record.id)
            if record.state.is_terminal:
                standing = ended(record)
                yield await self._event(record, standing)
                result = {**await self._result(request, record, wish), **warnings}
                yield {**await self._event(record, standing), "status": "final_result", "result": result}
                return
        except DatabaseUnavailable:
            # A stream that has begun cannot be answered with an error any more.
            pass
        words = f"The stream ends before the job: ask GET /result/{record.id}"
        yield await self._event(record, replace(standing, message=words))

    async def _standings(self, record: JobRecord, following: Following) -> AsyncGenerator[Standing, None]:
        """Yield where the job stands, each time that it changes, until it ends or nothing more can be heard."""
        told: Standing | None = None
        async with aclosing(self._service.events(record.id, after=-1)) as events:
            async for event in events:
                following.hear(event)
                if following.has_ended:
                    return
                standing = following.standing(self._service.queue_position(record.id))
                if standing != told:
                    told = standing
                    yield standing

    async def _event(self, record: JobRecord, standing: Standing) -> dict[str, Any]:
        counts = await self._counted_lately()
        sizes = queue_sizes(counts, self._service.all_backends())
        return {
            **_head(record, standing.status),
            "message": standing.message,
            "queue_position": standing.queue_position(sizes, counts.get(JobState.IN_QUEUE, 0)),
            "queue_info": _queue_info(sizes),
        }

    async def _counted(self, at_most_s: float) -> Mapping[JobState, int]:
        """Return how many jobs are in each state, as it was so many seconds ago at most."""
        now = time.monotonic()
        if self._counts is None or now - self._counts[0] >= at_most_s:
            # The database counts them, and need not do it for each event of each stream.
            self._counts = (now, await self._service.counts())
        return self._counts[1]

    async def _counted_lately(self) -> Mapping[JobState, int]:
        """Return the same for a stream, which goes on with the last figures while the database is away."""
        try:
            return await self._counted(at_most_s=_COUNTS_AGE_S)
        except DatabaseUnavailable:
            return self._counts[1] if self._counts else {}


def _head(record: JobRecord, status: str) -> dict[str, Any]:
    elapsed = max(0.0, time.time() - record.created_at)
    return {"request_id": record.id, "status": status, "elapsed_time": round(elapsed, 1)}


def _queue_info(sizes: Mapping[str, int]) -> dict[str, int]:
    return {f"{queue}_queue_size": size for queue, size in sizes.items()}


def _is_yes(header: str | None) -> bool:
    return header is not None and header.strip().lower() in ("1", "true", "yes", "on")

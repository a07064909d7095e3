"""The generate API: `POST /generate`, `/generate/sync` and `/generate/stream`, and `GET /result/{request_id}`."""

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
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from comfy_worker.gateway.api.dependencies import AllServices, Jobs, Links, OutputLinks, Services
from comfy_worker.gateway.api.generate.mapping import (
    JobStatus,
    ended_status,
    files_of,
    http_status,
    open_status,
    result_of,
)
from comfy_worker.gateway.api.generate.requests import check_source, fingerprint, runpod_request, unread_warnings
from comfy_worker.gateway.api.generate.schemas import (
    GenerateBody,
    GenerateEvent,
    GenerateInput,
    GenerateRequest,
    GenerateResponse,
    QueueInfo,
)
from comfy_worker.gateway.api.job_updates import job_updates
from comfy_worker.gateway.api.queue_sizes import queue_sizes
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, JOB_ID, DetailedErrorResponse, error_responses, reference
from comfy_worker.gateway.errors import DatabaseUnavailable, DuplicateRequest, NotFound
from comfy_worker.gateway.http.client_disconnect import while_connected
from comfy_worker.gateway.http.event_stream import EventStream
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.modifiers.random_ints import randomized
from comfy_worker.gateway.modifiers.runner import run_modifier
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.job.payload import input_warnings
from comfy_worker.types import JobState

API = "generate"
_DEFAULT_WAIT_S = 300.0
_MAX_WAIT_S = 3600.0
_COUNTS_AGE_S = 0.5
_MAX_MODIFIERS = 8
"""How many modifiers run at the same time."""
_FAILED = {
    400: "The request, or the job's input, is invalid.",
    409: "There is a job with this request_id already, or the job was cancelled.",
    413: "The request, or the job's output, is too large.",
    422: "An input of the job could not be fetched.",
    500: "The job failed, or the gateway, because of a bug of its own.",
    502: "ComfyUI failed, or the outputs could not be delivered.",
    503: "The queue is full, or no ComfyUI answers.",
    504: "The job took too long.",
    507: "ComfyUI's disk is full.",
}
_RESULT_OR_ERROR = {"anyOf": [reference(GenerateResponse), reference(DetailedErrorResponse)]}
_RESULTS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _RESULT_OR_ERROR}}}
    for status, description in _FAILED.items()
}
_EVENTS = {
    "description": f"Events with {', '.join(f'`{name}`' for name in GenerateEvent.model_fields)}; "
    "the last has the status `final_result`.",
    "content": {
        "text/event-stream": {
            "itemSchema": {
                "type": "object",
                "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
            }
        }
    },
}


class QueueCounts:
    """Counts the jobs in each state, for many streams; `app.state.queue_counts`."""

    def __init__(self, jobs: JobService) -> None:
        self._jobs = jobs
        self._last: tuple[float, Mapping[JobState, int]] | None = None

    async def recent(self) -> Mapping[JobState, int]:
        """Return the counts, half a second old at most, or older while the database is away."""
        if self._last is None or time.monotonic() - self._last[0] >= _COUNTS_AGE_S:
            with suppress(DatabaseUnavailable):
                self._last = (time.monotonic(), await self._jobs.counts())
        return self._last[1] if self._last else {}


def modifier_limiter() -> CapacityLimiter:
    """Return what limits the modifiers that run at the same time; `app.state.modifier_limiter`."""
    return CapacityLimiter(_MAX_MODIFIERS)


# ---------------------------------------------------------------------------------------------------- dependencies


@dataclass(frozen=True)
class ResultOptions:
    """How a caller wants the result: with the files' bytes, with `comfyui_response`."""

    with_bytes: bool
    with_history: bool


async def _get_options(
    services: AllServices,
    as_base64: Annotated[
        str | None,
        Header(
            alias="X-Return-Outputs-As-Base64",
            description="`1`, `true`, `yes` or `on`: the response has the files' bytes, as with "
            "`return_outputs_as_base64`.",
        ),
    ] = None,
    with_history: Annotated[
        str | None,
        Header(
            alias="X-Include-ComfyUI-Response",
            description="`1`, `true`, `yes` or `on`: the result has `comfyui_response`, its outputs as in ComfyUI's "
            "history; anything else: it has not, whatever INCLUDE_COMFYUI_RESPONSE says.",
        ),
    ] = None,
) -> ResultOptions:
    default = services.settings.include_comfyui_response
    return ResultOptions(_is_true(as_base64), default if with_history is None else _is_true(with_history))


def _is_true(header: str | None) -> bool:
    return header is not None and header.strip().lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Context:
    """What a handler submits jobs and makes results with."""

    request: Request
    services: Services
    links: OutputLinks
    options: ResultOptions

    async def submit(self, body: GenerateRequest) -> tuple[JobRecord, dict[str, Sequence[str]]]:
        """Queue a job; return it, and `warnings` for the response."""
        check_source(body.input)
        workflow, unread = await self._make_workflow(body.input)
        job = runpod_request(body, workflow)
        record = await self._submit(body, job)
        self.request.state.job_id = record.id
        others = await run_in_threadpool(input_warnings, job["input"])
        return record, body.warnings([*others, *unread_warnings(unread)])

    async def _make_workflow(self, job_input: GenerateInput) -> tuple[Mapping[str, Any], Sequence[str]]:
        """Return the workflow to run, and the names of the modifications that its modifier did not read."""
        if not job_input.modifier:
            return await run_in_threadpool(randomized, job_input.workflow_json or {}), ()
        timeout_s = self.services.settings.modifier_timeout_s
        modifications = job_input.modifications or {}
        modify = partial(run_modifier, self.services.modifiers, job_input.modifier, modifications, timeout_s=timeout_s)
        # In threads of their own, so that slow modifiers delay nothing else.
        made = await to_thread.run_sync(modify, limiter=self.request.app.state.modifier_limiter)
        return made.workflow, made.unread

    async def _submit(self, body: GenerateRequest, job: Mapping[str, Any]) -> JobRecord:
        """Submit a job under its caller's id; the same request under the id of an open job is that job."""
        own_id = body.input.request_id
        details: dict[str, Any] = {"base_url": self.links.base_url, "sent": await run_in_threadpool(fingerprint, body)}
        if self.options.with_bytes or body.input.return_outputs_as_base64:
            details["as_base64"] = True
        try:
            return await self.services.jobs.submit(
                job, job_id=own_id or str(uuid.uuid4()), api=API, details=details, replace_ended=True
            )
        except DuplicateRequest:
            with suppress(NotFound):
                earlier = await self.services.jobs.get(str(own_id))
                if earlier.details.get("sent") == details["sent"]:
                    return earlier
            raise

    async def result(self, record: JobRecord) -> dict[str, Any]:
        """Return a `GenerateResponse`."""
        jobs = self.services.jobs
        if not record.state.is_terminal:
            progress = await jobs.progress_of(record)
            status = open_status(record.state, progress.data if progress else {}, jobs.queue_position(record.id))
            return result_of(record, status, [])
        stored = record.output or {}
        with_bytes = self.options.with_bytes or bool(record.details.get("as_base64"))
        linked = self.links.in_output(stored)
        output = await run_in_threadpool(
            partial(files_of, record.id, stored, linked, self.services.assets, as_base64=with_bytes)
        )
        return result_of(record, ended_status(record), output, with_history=self.options.with_history)


async def _get_context(
    request: Request, services: AllServices, links: Links, options: Annotated[ResultOptions, Depends(_get_options)]
) -> Context:
    return Context(request, services, links, options)


async def _get_queue_counts(connection: HTTPConnection) -> QueueCounts:
    counts: QueueCounts = connection.app.state.queue_counts
    return counts


Generate = Annotated[Context, Depends(_get_context)]
Counts = Annotated[QueueCounts, Depends(_get_queue_counts)]
RequestId = Annotated[str, Path(pattern=JOB_ID)]

router = APIRouter(
    tags=["Generate"],
    route_class=StrictJSONRoute,
    responses=error_responses(*COMMON_ERRORS, model=DetailedErrorResponse),
)
_CONFLICT = error_responses(409, model=DetailedErrorResponse)
_NOT_FOUND = error_responses(404, model=DetailedErrorResponse)


# --------------------------------------------------------------------------------------------------------- routes


@router.post(
    "/generate", operation_id="generate", status_code=202, response_model=GenerateResponse, responses=_CONFLICT
)
async def generate(body: GenerateBody, context: Generate) -> SafeJSONResponse:
    """Queue a job and return its id."""
    record, warnings = await context.submit(body)
    return SafeJSONResponse({**await context.result(record), **warnings}, status_code=202)


@router.post(
    "/generate/sync",
    operation_id="generate_sync",
    response_model=GenerateResponse,
    responses={
        **_RESULTS,
        202: {"model": GenerateResponse, "description": "The job goes on; see `GET /result/{request_id}`."},
    },
)
async def generate_sync(
    request: Request,
    body: GenerateBody,
    jobs: Jobs,
    context: Generate,
    timeout: Annotated[
        float, Query(gt=0, le=_MAX_WAIT_S, allow_inf_nan=False, description="Seconds.")
    ] = _DEFAULT_WAIT_S,
) -> SafeJSONResponse:
    """Queue a job and return its result; 202 and its status if that takes longer than `timeout` seconds."""
    record, warnings = await context.submit(body)
    # None if the client has disconnected: the job goes on, and nobody reads the response.
    record = await while_connected(request, jobs.wait(record.id, timeout)) or record
    status_code = http_status(record) if record.state.is_terminal else 202
    return SafeJSONResponse({**await context.result(record), **warnings}, status_code=status_code)


@router.post(
    "/generate/stream",
    operation_id="generate_stream",
    response_class=Response,
    responses={200: _EVENTS, **_CONFLICT},
)
async def generate_stream(body: GenerateBody, jobs: Jobs, context: Generate, counts: Counts) -> EventStream:
    """Queue a job and send its updates until it has ended; it goes on when the client leaves."""
    record, warnings = await context.submit(body)
    return EventStream(_stream(record, warnings, jobs, context, counts))


@router.get(
    "/result/{request_id}",
    operation_id="get_result",
    response_model=GenerateResponse,
    responses={**_NOT_FOUND, **_RESULTS},
)
async def get_result(request_id: RequestId, jobs: Jobs, context: Generate) -> SafeJSONResponse:
    """Return the status of a job, with its result when it has one."""
    record = await jobs.get(request_id)
    return SafeJSONResponse(await context.result(record), status_code=http_status(record))


@router.get("/queue-info", operation_id="get_queue_info")
async def get_queue_info(jobs: Jobs) -> QueueInfo:
    """Return how many jobs there are in each queue."""
    return QueueInfo(**_queue_info(queue_sizes(await jobs.counts(), jobs.all_backends())))


# --------------------------------------------------------------------------------------------------------- stream


async def _stream(
    record: JobRecord, warnings: Mapping[str, Any], jobs: JobService, context: Context, counts: QueueCounts
) -> AsyncGenerator[ServerSentEvent, None]:
    """Yield an event for each change; the last has the result, or says why there is none yet."""

    async def event(job_status: JobStatus, **others: Any) -> ServerSentEvent:
        return ServerSentEvent(json.dumps({**_event(record, job_status, await counts.recent(), jobs), **others}))

    status, sent = open_status(JobState.IN_QUEUE, {}, jobs.queue_position(record.id)), None
    # Once a stream has begun, its response can no longer be an error.
    with suppress(DatabaseUnavailable):
        async with aclosing(job_updates(jobs, record, after=-1)) as updates:
            async for update in updates:
                if update.state.is_terminal:
                    break
                status = open_status(update.state, update.progress, jobs.queue_position(record.id))
                if status != sent:
                    sent = status
                    yield await event(status)
        record = await jobs.get(record.id)
        if record.state.is_terminal:
            status = ended_status(record)
            yield await event(status)
            yield await event(status, status="final_result", result={**await context.result(record), **warnings})
            return
    yield await event(replace(status, message=f"The stream ends before the job; see GET /result/{record.id}"))


def _event(record: JobRecord, status: JobStatus, counts: Mapping[JobState, int], jobs: JobService) -> dict[str, Any]:
    sizes = queue_sizes(counts, jobs.all_backends())
    return {
        "request_id": record.id,
        "status": status.status,
        "elapsed_time": round(max(0.0, time.time() - record.created_at), 1),
        "message": status.message,
        "queue_position": status.queue_position(sizes, counts.get(JobState.IN_QUEUE, 0)),
        "queue_info": _queue_info(sizes),
    }


def _queue_info(sizes: Mapping[str, int]) -> dict[str, int]:
    return {f"{queue}_queue_size": size for queue, size in sizes.items()}

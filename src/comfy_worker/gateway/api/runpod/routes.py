"""RunPod's own API, so that a client written for an endpoint of RunPod needs only another base URL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from comfy_worker import __version__
from comfy_worker.gateway.api.dependencies import Assets, Jobs, Links
from comfy_worker.gateway.api.queue_sizes import queue_sizes
from comfy_worker.gateway.api.runpod.mapping import has_output
from comfy_worker.gateway.api.runpod.schemas import (
    ComfyUIState,
    HealthResponse,
    JobCounts,
    JobResponse,
    PurgeResponse,
    QueueSizes,
    RunBody,
    StatusResponse,
    StreamResponse,
    WorkerCounts,
)
from comfy_worker.gateway.api.runpod.status import FileFormat, ended_status, status_response
from comfy_worker.gateway.api.runpod.stream_cursors import Cursor, StreamCursors
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, JOB_ID, error_responses
from comfy_worker.gateway.callers import current_caller
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.events.bus import PROGRESS, Event
from comfy_worker.gateway.http.client_disconnect import while_connected
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.jobs.queue_position import iso_time
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

ENDPOINT_PREFIX = "/v2/{endpoint_id}"
"""RunPod's clients put this before every path; the router is included with it and without."""
_DEFAULT_WAIT_MS = 90_000
_STREAM_WAIT_S = 5.0
"""How long `/stream` waits for an update; RunPod's client times out after 10 s."""


def _operation_id(route: APIRoute) -> str:
    """Return for example `post_run`, and `post_run_endpoint` below `/v2/{endpoint_id}`."""
    method = min(route.methods or ())
    path = route.path_format.removeprefix(ENDPOINT_PREFIX)
    name = path.split("/")[1].replace("-", "_")
    return f"{method.lower()}_{name}" + ("_endpoint" if path != route.path_format else "")


async def _check_endpoint(
    endpoint_id: Annotated[
        str,
        Path(
            pattern=JOB_ID,
            description="Any name; jobs are counted, and the queue is purged, by endpoint.",
            examples=["local"],
        ),
    ],
) -> None:
    """Validate the name of an endpoint."""


CheckEndpoint = Depends(_check_endpoint)
"""For the router below `/v2/{endpoint_id}`."""


async def _get_endpoint(request: Request) -> str | None:
    endpoint_id: str | None = request.path_params.get("endpoint_id")
    return endpoint_id


Endpoint = Annotated[str | None, Depends(_get_endpoint)]
JobId = Annotated[str, Path(pattern=JOB_ID)]
Files = Annotated[
    FileFormat,
    Query(description="How files come: in the response, or as links that work without a key for a while."),
]
Wait = Annotated[int, Query(ge=1000, le=300_000, description="Milliseconds.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="The same key with the same body is the same job.",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
    ),
]

router = APIRouter(
    route_class=StrictJSONRoute,
    generate_unique_id_function=_operation_id,
    responses=error_responses(*COMMON_ERRORS),
)


# --------------------------------------------------------------------------------------------------------- submit


@router.post("/run", responses=error_responses(409), response_model_exclude_none=True)
async def run(
    request: Request, body: RunBody, jobs: Jobs, endpoint_id: Endpoint, idempotency_key: IdempotencyKey = None
) -> JobResponse:
    """Queue a job and return its id."""
    record = await jobs.submit(body.as_job(), endpoint_id=endpoint_id or "local", idempotency_key=idempotency_key)
    request.state.job_id = record.id
    return _job_response(record)


@router.post("/runsync", response_model=StatusResponse, responses=error_responses(404, 409))
async def runsync(
    request: Request,
    body: RunBody,
    jobs: Jobs,
    assets: Assets,
    links: Links,
    endpoint_id: Endpoint,
    wait: Wait = _DEFAULT_WAIT_MS,
    files: Files = "base64",
    idempotency_key: IdempotencyKey = None,
) -> SafeJSONResponse:
    """Queue a job and return its result, or its status after `wait` milliseconds."""
    record = await jobs.submit(
        body.as_job(), endpoint_id=endpoint_id or "local", sync=True, idempotency_key=idempotency_key
    )
    request.state.job_id = record.id
    # None if the client has disconnected: the job goes on, and nobody reads the response.
    waited = await while_connected(request, jobs.wait(record.id, wait / 1000))
    return await status_response(waited or record, files, jobs, assets, links)


# ---------------------------------------------------------------------------------------------------------- status


@router.get("/status/{job_id}", response_model=StatusResponse, responses=error_responses(404))
@router.post("/status/{job_id}", response_model=StatusResponse, responses=error_responses(404))
async def status(job_id: JobId, jobs: Jobs, assets: Assets, links: Links, files: Files = "base64") -> SafeJSONResponse:
    """Return the status of a job, with its output when it has one."""
    return await status_response(await jobs.get(job_id), files, jobs, assets, links)


@router.get("/status-sync/{job_id}", response_model=StatusResponse, responses=error_responses(404))
@router.post("/status-sync/{job_id}", response_model=StatusResponse, responses=error_responses(404))
async def status_sync(
    request: Request,
    job_id: JobId,
    jobs: Jobs,
    assets: Assets,
    links: Links,
    wait: Wait = _DEFAULT_WAIT_MS,
    files: Files = "base64",
) -> SafeJSONResponse:
    """Return a job's result, or its status after `wait` milliseconds."""
    record = await while_connected(request, jobs.wait(job_id, wait / 1000))
    return await status_response(record or await jobs.get(job_id), files, jobs, assets, links)


@router.get("/stream/{job_id}", response_model=StreamResponse, responses=error_responses(404))
@router.post("/stream/{job_id}", response_model=StreamResponse, responses=error_responses(404))
async def stream(job_id: JobId, jobs: Jobs, assets: Assets, links: Links, cursors: StreamCursors) -> SafeJSONResponse:
    """Return a job's updates since the last call with this key; waits up to 5 s for one."""
    client = current_caller().name
    try:
        record = await jobs.get(job_id)
    except NotFound:
        await cursors.delete(client, job_id)
        raise
    cursor = await cursors.get(client, job_id)
    events = await jobs.recent_events(job_id, cursor.after)
    if not events and not record.state.is_terminal:
        events = await _next_event(jobs, job_id, cursor.after)
        record = await jobs.get(job_id)
    chunks = [{"output": dict(event.data)} for event in events if event.type == PROGRESS]
    if has_output(record) and not cursor.has_output:
        ended = await run_in_threadpool(ended_status, record, "base64", assets, links)
        chunks.append({"output": ended["output"]})
    await cursors.store(client, job_id, Cursor(events[-1].number if events else cursor.after, has_output(record)))
    return SafeJSONResponse({"status": record.state.value, "stream": chunks})


async def _next_event(jobs: JobService, job_id: str, after: int) -> list[Event]:
    """Return the next event, or none if none comes in time."""
    async with aclosing(jobs.events(job_id, after)) as events:
        try:
            return [await asyncio.wait_for(anext(events), _STREAM_WAIT_S)]
        except (asyncio.TimeoutError, StopAsyncIteration):
            return []


# --------------------------------------------------------------------------------------------------- change a job


@router.post("/cancel/{job_id}", responses=error_responses(404), response_model_exclude_none=True)
async def cancel(job_id: JobId, jobs: Jobs) -> JobResponse:
    """Cancel a job. A job that has ended stays as it is.

    The response comes when the job is off the GPU, or after 10 s if a node ignores interrupts and runs on.
    """
    record = await jobs.cancel(job_id)
    was_cancelled = record.state is JobState.CANCELLED
    message = "The job is cancelled" if was_cancelled else f"The job had ended before: it is {record.state.value}"
    return JobResponse(id=record.id, status=record.state, message=message)


@router.post("/retry/{job_id}", responses=error_responses(404, 409), response_model_exclude_none=True)
async def retry(job_id: JobId, jobs: Jobs) -> JobResponse:
    """Run a job that failed or timed out again, under its id."""
    return _job_response(await jobs.retry(job_id))


@router.post("/purge-queue")
async def purge_queue(jobs: Jobs, endpoint_id: Endpoint) -> PurgeResponse:
    """Cancel this key's waiting jobs; below an endpoint, those of that endpoint."""
    return PurgeResponse(removed=await jobs.purge(endpoint_id))


def _job_response(record: JobRecord) -> JobResponse:
    return JobResponse(id=record.id, status=record.state)


# ---------------------------------------------------------------------------------------------------------- health


@router.get("/health", response_model_exclude_none=True)
async def health(jobs: Jobs) -> HealthResponse:
    """Return how many jobs and workers there are, and whether jobs can run; makes no request to ComfyUI."""
    counts = await jobs.counts()
    backends = jobs.all_backends()
    healthy = sum(bool(backend["healthy"]) for backend in backends)
    return HealthResponse(
        jobs=JobCounts(
            completed=counts.get(JobState.COMPLETED, 0),
            failed=counts.get(JobState.FAILED, 0) + counts.get(JobState.TIMED_OUT, 0),
            inProgress=counts.get(JobState.IN_PROGRESS, 0),
            inQueue=counts.get(JobState.IN_QUEUE, 0),
            retried=await jobs.retried(),
        ),
        workers=_workers(backends),
        status="healthy" if healthy else "unhealthy",
        comfyui=ComfyUIState(
            reachable=healthy > 0, healthy=healthy, total=len(backends), away_since=_away_since(backends)
        ),
        queues=QueueSizes(**queue_sizes(counts, backends)),
        version=__version__,
    )


def _workers(backends: Sequence[Mapping[str, Any]]) -> WorkerCounts:
    """Return the counts of ComfyUIs, or of the workers of the endpoint that is the only backend."""
    if len(backends) == 1 and "workers" in backends[0]:
        return WorkerCounts(**backends[0]["workers"])
    healthy = [backend for backend in backends if backend["healthy"]]
    running = sum(bool(backend["jobs"]) for backend in healthy)
    return WorkerCounts(
        idle=len(healthy) - running, ready=len(healthy), running=running, unhealthy=len(backends) - len(healthy)
    )


def _away_since(backends: Sequence[Mapping[str, Any]]) -> str | None:
    """Return since when no ComfyUI has answered, as ISO 8601 in UTC; None if one does, or it is unknown."""
    if any(backend["healthy"] for backend in backends):
        return None
    since = [backend["away_since"] for backend in backends if backend.get("away_since")]
    return iso_time(max(since)) if since else None

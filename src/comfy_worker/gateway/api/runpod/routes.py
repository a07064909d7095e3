"""RunPod's own API, so that a client written for an endpoint of RunPod needs only another base URL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.concurrency import run_in_threadpool

from comfy_worker import __version__
from comfy_worker.errors import OutputTooLarge
from comfy_worker.gateway.api.dependencies import Dependencies, away, queue_sizes
from comfy_worker.gateway.api.runpod.stream_cursors import Cursor, make_cursors
from comfy_worker.gateway.api.schemas import (
    JOB_ID,
    Answer,
    HealthAnswer,
    JobAnswer,
    PurgeAnswer,
    RunRequest,
    StatusAnswer,
    StreamAnswer,
    problems,
    request_body,
)
from comfy_worker.gateway.callers import current_caller
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.events.bus import PROGRESS, Event
from comfy_worker.gateway.http.client_disconnect import while_connected
from comfy_worker.gateway.http.limits import MB, RUN_LIMIT, RUNSYNC_LIMIT
from comfy_worker.gateway.http.request_validation import read_body
from comfy_worker.gateway.store.records import JobRecord, has_output, status_body
from comfy_worker.types import JobState, Kind

_WAIT_MS = 90_000
_STREAM_WAIT_S = 5.0
"""How long `/stream` waits for something to tell: RunPod's client gives an answer 10 s."""
_ROOM = 100_000
"""Bytes of an answer that are kept for all that is no file."""

JobId = Annotated[str, Path(pattern=JOB_ID)]
Files = Annotated[
    Literal["base64", "url"],
    Query(description="How files come: in the answer, or as links that work for a while without a key."),
]
Wait = Annotated[int, Query(ge=1000, le=300_000, description="Milliseconds.")]
Idempotency = Annotated[
    str | None,
    Header(
        description="The same key with the same body is the same job.", min_length=1, max_length=255,
        pattern=r"^[\x21-\x7e]+$",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class _Route:
    path: str
    methods: tuple[str, ...]
    handler: Callable[..., Any]
    model: type
    errors: tuple[int, ...] = ()
    extra: dict[str, Any] | None = None


def router(parts: Dependencies) -> APIRouter:
    """Return the door's routes; they stand at the root and below `/v2/{endpoint_id}` alike."""
    door = _Door(parts)
    routes = [
        _Route("/run", ("POST",), door.run, JobAnswer, (409, 503), request_body(RunRequest)),
        _Route("/runsync", ("POST",), door.runsync, StatusAnswer, (404, 409, 503), request_body(RunRequest)),
        _Route("/status/{job_id}", ("GET", "POST"), door.status, StatusAnswer, (404,)),
        _Route("/status-sync/{job_id}", ("GET", "POST"), door.status_sync, StatusAnswer, (404,)),
        _Route("/stream/{job_id}", ("GET", "POST"), door.stream, StreamAnswer, (404,)),
        _Route("/cancel/{job_id}", ("POST",), door.cancel, JobAnswer, (404,)),
        _Route("/retry/{job_id}", ("POST",), door.retry, JobAnswer, (404, 409)),
        _Route("/purge-queue", ("POST",), door.purge, PurgeAnswer),
        _Route("/health", ("GET",), door.health, HealthAnswer),
    ]
    api = APIRouter()
    for prefix, tag in (("", "Jobs"), ("/v2/{endpoint_id}", "Jobs of an endpoint")):
        for route in routes:
            for method in route.methods:
                _add(api, prefix, tag, route, method)
    return api


def _add(api: APIRouter, prefix: str, tag: str, route: _Route, method: str) -> None:
    names = [method.lower(), route.path.split("/")[1].replace("-", "_"), *(["endpoint"] if prefix else [])]
    api.add_api_route(
        f"{prefix}{route.path}",
        route.handler,
        methods=[method],
        response_model=route.model,
        response_model_exclude_none=True,
        responses=problems(*route.errors),
        tags=[tag],
        operation_id="_".join(names),
        dependencies=[Depends(_check_endpoint)] if prefix else None,
        openapi_extra=route.extra,
    )


async def _check_endpoint(
    endpoint_id: Annotated[
        str,
        Path(
            pattern=JOB_ID,
            description="Any name; jobs are counted together, the queue is purged by it.",
            examples=["local"],
        ),
    ],
) -> None:
    """Refuse a name that no endpoint has."""


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._service = parts.service
        self._cursors = make_cursors(parts.settings)

    async def run(self, request: Request, idempotency_key: Idempotency = None) -> Answer:
        """Queue a job and return its id."""
        return _brief(await self._submit(request, idempotency_key, sync=False))

    async def runsync(
        self,
        request: Request,
        wait: Wait = _WAIT_MS,
        files: Files = "base64",
        idempotency_key: Idempotency = None,
    ) -> Answer:
        """Queue a job and return its result, or where it stands after `wait` milliseconds."""
        record = await self._submit(request, idempotency_key, sync=True)
        waited = await while_connected(request, self._service.wait(record.id, wait / 1000))
        # Nobody reads the answer to a client that has left; its job goes on.
        return await self._answer(request, waited, files) if waited else _brief(record)

    async def _submit(self, request: Request, idempotency_key: str | None, *, sync: bool) -> JobRecord:
        body = _with_webhook(await read_body(request, RunRequest))
        endpoint_id = _endpoint(request) or "local"
        record = await self._service.submit(body, endpoint_id=endpoint_id, sync=sync, idempotency_key=idempotency_key)
        # For the line that the log has of this request.
        request.state.job_id = record.id
        return record

    async def status(self, request: Request, job_id: JobId, files: Files = "base64") -> Answer:
        """Return where a job stands, with its output when it has one."""
        return await self._answer(request, await self._service.get(job_id), files)

    async def status_sync(
        self, request: Request, job_id: JobId, wait: Wait = _WAIT_MS, files: Files = "base64"
    ) -> Answer:
        """Return a job's result, or where it stands after `wait` milliseconds."""
        waited = await while_connected(request, self._service.wait(job_id, wait / 1000))
        return await self._answer(request, waited or await self._service.get(job_id), files)

    async def stream(self, request: Request, job_id: JobId) -> Answer:
        """Return what a job has told since the last call with this key; waits up to 5 s for something to tell."""
        client = current_caller().name
        record = await self._get_followed(client, job_id)
        reader = await self._cursors.of(client, job_id)
        told = await self._service.recent_events(job_id, reader.after)
        if not told and not record.state.is_terminal:
            told = await self._wait_for_one(job_id, reader.after)
            record = await self._service.get(job_id)
        chunks = [{"output": dict(event.data)} for event in told if event.type == PROGRESS]
        if has_output(record) and not reader.has_output:
            status = await run_in_threadpool(self._with_output, record, "base64", self._parts.base_url(request))
            chunks.append({"output": status["output"]})
        cursor = Cursor(told[-1].number if told else reader.after, has_output(record))
        await self._cursors.keep(client, job_id, cursor)
        return Answer({"status": record.state.value, "stream": chunks})

    async def _wait_for_one(self, job_id: str, after: int) -> list[Event]:
        try:
            return [await asyncio.wait_for(self._next_event(job_id, after), _STREAM_WAIT_S)]
        except (asyncio.TimeoutError, StopAsyncIteration):
            return []

    async def _next_event(self, job_id: str, after: int) -> Event:
        async with aclosing(self._service.events(job_id, after)) as events:
            return await anext(events)

    async def _get_followed(self, client: str, job_id: str) -> JobRecord:
        try:
            return await self._service.get(job_id)
        except NotFound:
            await self._cursors.forget(client, job_id)
            raise

    async def cancel(self, job_id: JobId) -> Answer:
        """End a job; when this answers, it is off the GPU. One that has ended stays as it is."""
        record = await self._service.cancel(job_id)
        was_cancelled = record.state is JobState.CANCELLED
        message = "The job is cancelled" if was_cancelled else f"The job had ended before: it is {record.state.value}"
        return Answer({**_id_and_status(record), "message": message})

    async def retry(self, job_id: JobId) -> Answer:
        """Run a job again that failed or timed out, under its id."""
        return _brief(await self._service.retry(job_id))

    async def purge(self, request: Request) -> Answer:
        """Cancel this key's jobs that wait; below an endpoint, those of that endpoint."""
        return Answer({"removed": await self._service.purge(_endpoint(request)), "status": "completed"})

    async def health(self) -> Answer:
        """Return how many jobs and workers there are, and whether jobs can run; touches no ComfyUI."""
        counts = await self._service.counts()
        backends = self._service.all_backends()
        healthy = sum(bool(backend["healthy"]) for backend in backends)
        jobs = {
            "completed": counts.get(JobState.COMPLETED, 0),
            "failed": counts.get(JobState.FAILED, 0) + counts.get(JobState.TIMED_OUT, 0),
            "inProgress": counts.get(JobState.IN_PROGRESS, 0),
            "inQueue": counts.get(JobState.IN_QUEUE, 0),
            "retried": await self._service.retried(),
        }
        return Answer(
            {
                "jobs": jobs,
                "workers": _workers(backends),
                "status": "healthy" if healthy else "unhealthy",
                "comfyui": {
                    "reachable": healthy > 0,
                    "healthy": healthy,
                    "total": len(backends),
                    **away(backends),
                },
                "queues": queue_sizes(counts, backends),
                "version": __version__,
            }
        )

    async def _answer(self, request: Request, record: JobRecord, files: str) -> Answer:
        """Return RunPod's `/status` of a job."""
        if record.output is None:
            return Answer(status_body(record, await self._progress(record)))
        return await run_in_threadpool(self._within_limit, record, files, self._parts.base_url(request))

    def _within_limit(self, record: JobRecord, files: str, base: str) -> Answer:
        answer = Answer(self._with_output(record, files, base))
        if len(answer.body) > _limit(record):
            raise OutputTooLarge(
                f"The answer would have more than {_limit(record)} bytes", hint="Let the workflow make less"
            )
        return answer

    def _with_output(self, record: JobRecord, files: str, base: str) -> dict[str, Any]:
        """Return RunPod's `/status` of a job that has ended; files that do not fit into an answer come as links."""
        return status_body(record, None if record.output is None else self._output(record, record.output, files, base))

    def _output(self, record: JobRecord, output: Mapping[str, Any], files: str, base: str) -> dict[str, Any]:
        limit = _limit(record)
        if files == "base64" and _bytes_of_files(output) * 4 // 3 + _ROOM < limit:
            return self._parts.assets.as_base64(output)
        linked = self._parts.linked(output, base)
        if files == "base64":
            notice = f"The files come as links: with them, the answer would have more than {limit // MB} MB"
            linked["errors"] = [*linked.get("errors", []), notice]
        return linked

    async def _progress(self, record: JobRecord) -> dict[str, Any] | None:
        """Return how far a job is, as RunPod shows a worker's progress updates."""
        if record.state.is_terminal:
            return None
        told = await self._service.progress_of(record)
        return None if told is None else dict(told.data)


def _workers(backends: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many workers do what: ComfyUIs, or the workers of the endpoint that is the only backend."""
    names = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
    if len(backends) == 1 and "workers" in backends[0]:
        return {name: backends[0]["workers"].get(name, 0) for name in names}
    healthy = [backend for backend in backends if backend["healthy"]]
    running = sum(bool(backend["jobs"]) for backend in healthy)
    counts = {"idle": len(healthy) - running, "ready": len(healthy), "running": running}
    return {**dict.fromkeys(names, 0), **counts, "unhealthy": len(backends) - len(healthy)}


def _endpoint(request: Request) -> str | None:
    endpoint_id: str | None = request.path_params.get("endpoint_id")
    return endpoint_id


def _with_webhook(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a job with the receiver that it names as `webhookV2`, as the type of RunPod's JavaScript SDK lets it."""
    return body if body.get("webhook") or not body.get("webhookV2") else {**body, "webhook": body["webhookV2"]}


def _brief(record: JobRecord) -> Answer:
    return Answer(_id_and_status(record))


def _id_and_status(record: JobRecord) -> dict[str, Any]:
    return {"id": record.id, "status": record.state.value}


def _limit(record: JobRecord) -> int:
    return RUNSYNC_LIMIT if record.is_sync else RUN_LIMIT


def _bytes_of_files(output: Mapping[str, Any]) -> int:
    return sum(int(item.get("size_bytes", 0)) for kind in Kind for item in output.get(kind.value, []))

"""The HTTP side of the stand-in platform: what workers ask, and what clients ask under RunPod's public API."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol, TypeAlias

from aiohttp import web

from tests.support.runpod.platform_state import RETRYABLE_STATES, Call, PlatformJob, PlatformState, limit_bytes

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
WorkerHandler: TypeAlias = Callable[[web.Request, Call], Awaitable[web.Response]]
PlatformFault: TypeAlias = int | Literal["cut", "lost"]
"""An HTTP status to answer with, to cut the connection without an answer, or to do so when a client's wish was done."""

WORKER_KEY = "rpa_worker_key_5f1c9e"
CLIENT_KEY = "rpa_client_key_a83d02"
_LARGEST_REQUEST = 64 * 2**20
_RUNSYNC_WAIT_MS = 90_000


class Rules(Protocol):
    """What a test has set."""

    state: PlatformState
    take_hold_s: float
    stop_hold_s: float

    def take_fault(self, kind: str) -> PlatformFault | None:
        """Return what to do to a request, and count it."""


def create_app(platform: Rules) -> web.Application:
    """Return the application of one endpoint."""
    app = web.Application(client_max_size=_LARGEST_REQUEST, middlewares=[_json_errors])
    app.add_routes(_routes(platform))
    return app


def _routes(platform: Rules) -> list[web.RouteDef]:
    worker, client = _WorkerSide(platform), _ClientSide(platform)
    return [
        web.get("/v2/{ep}/{kind:job-take|job-take-batch}/{worker}", worker.recorded(worker.take)),
        web.get("/v2/{ep}/{kind:job-stop}/{worker}", worker.recorded(worker.stop)),
        web.post("/v2/{ep}/{kind:job-done}/{worker}/{job}", worker.recorded(worker.done)),
        web.post("/v2/{ep}/{kind:job-stream}/{worker}/{job}", worker.recorded(worker.stream)),
        web.get("/v2/{ep}/{kind:ping}/{worker}", worker.recorded(worker.ping)),
        web.post("/v2/{ep}/run", client.authorised(client.run)),
        web.post("/v2/{ep}/runsync", client.authorised(client.runsync)),
        web.get("/v2/{ep}/status/{job}", client.authorised(client.status)),
        web.post("/v2/{ep}/status/{job}", client.authorised(client.status)),
        web.get("/v2/{ep}/stream/{job}", client.authorised(client.stream)),
        web.post("/v2/{ep}/cancel/{job}", client.authorised(client.cancel)),
        web.post("/v2/{ep}/retry/{job}", client.authorised(client.retry)),
        web.get("/v2/{ep}/health", client.authorised(client.health)),
        web.post("/v2/{ep}/purge-queue", client.authorised(client.purge)),
    ]


@web.middleware
async def _json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.text or error.reason}, status=error.status)


def _find_job(platform: Rules, request: web.Request) -> PlatformJob:
    job = platform.state.jobs.get(request.match_info["job"])
    if job is None:
        raise web.HTTPNotFound(text="job not found")
    return job


def _json_object(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        raise web.HTTPBadRequest(text="the body is not JSON") from None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body is not an object")
    return body


class _WorkerSide:
    """What workers ask."""

    def __init__(self, platform: Rules) -> None:
        self._platform = platform
        self._state = platform.state

    def recorded(self, handler: WorkerHandler) -> Handler:
        """Write each request and its answer down, and do to it what the test wants done."""

        async def handle(request: web.Request) -> web.StreamResponse:
            call = await _call(request)
            self._state.record(call)
            try:
                response = self._misbehave(request, call) or await handler(request, call)
            except web.HTTPException as error:
                self._state.answered(call, error.status)
                raise
            self._state.answered(call, response.status)
            return response

        return handle

    def _misbehave(self, request: web.Request, call: Call) -> web.Response | None:
        fault = self._platform.take_fault(call.kind)
        if fault is None:
            return None
        if not isinstance(fault, int):
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError
        return web.Response(status=fault)

    async def take(self, request: web.Request, _call: Call) -> web.Response:
        is_batch = request.match_info["kind"] == "job-take-batch"
        most = int(request.query.get("batch_size", "1")) if is_batch else 1
        jobs = await self._state.take(request.match_info["worker"], most, self._platform.take_hold_s)
        if request.transport is None or request.transport.is_closing():
            self._state.put_back(jobs)
            return web.Response(status=204)
        for job in jobs:
            self._limit_time(job)
        if not jobs:
            return web.Response(status=204)
        handed_out = [job.for_worker() for job in jobs]
        return web.json_response(handed_out if is_batch else handed_out[0])

    def _limit_time(self, job: PlatformJob) -> None:
        timeout_ms = (job.request.get("policy") or {}).get("executionTimeout")
        if timeout_ms is not None and job.started_at is not None:
            asyncio.get_running_loop().call_later(timeout_ms / 1000, self._state.time_out, job, job.started_at)

    async def stop(self, request: web.Request, _call: Call) -> web.Response:
        job_ids = await self._state.stops(request.match_info["worker"], self._platform.stop_hold_s)
        return web.json_response({"jobsToStop": job_ids}) if job_ids else web.Response(status=204)

    async def done(self, request: web.Request, call: Call) -> web.Response:
        job = _find_job(self._platform, request)
        size = request.content_length or 0
        if size > job.limit_bytes:
            self._state.refuse_result(job)
            raise web.HTTPRequestEntityTooLarge(max_size=job.limit_bytes, actual_size=size)
        self._state.take_result(job, _posted(call))
        return web.json_response({})

    async def stream(self, request: web.Request, call: Call) -> web.Response:
        self._state.take_chunk(_find_job(self._platform, request), _posted(call))
        return web.json_response({})

    async def ping(self, _request: web.Request, _call: Call) -> web.Response:
        return web.json_response({})


def _posted(call: Call) -> dict[str, Any]:
    if not isinstance(call.body, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object")
    return call.body


async def _call(request: web.Request) -> Call:
    arrived_at = time.monotonic()
    text = await request.text() if request.method == "POST" else ""
    try:
        body = json.loads(text) if text else None
    except ValueError:
        body = text
    return Call(
        at=arrived_at,
        kind=request.match_info["kind"],
        worker_id=request.match_info["worker"],
        job_id=request.match_info.get("job", ""),
        query=dict(request.query),
        body=body,
    )


class _ClientSide:
    """What clients ask, under RunPod's public API."""

    def __init__(self, platform: Rules) -> None:
        self._platform = platform
        self._state = platform.state

    def authorised(self, handler: Handler) -> Handler:
        """Refuse requests without the key."""

        async def handle(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") != f"Bearer {CLIENT_KEY}":
                raise web.HTTPUnauthorized
            fault = self._platform.take_fault(request.path.split("/")[3])
            if isinstance(fault, int):
                return web.Response(status=fault)
            answer = None if fault == "cut" else await handler(request)
            if answer is None or fault == "lost":
                if request.transport is not None:
                    request.transport.abort()
                raise asyncio.CancelledError
            return answer

        return handle

    async def run(self, request: web.Request) -> web.Response:
        job = await self._add(request, sync=False)
        return web.json_response({"id": job.id, "status": job.state})

    async def runsync(self, request: web.Request) -> web.Response:
        job = await self._add(request, sync=True)
        await self._state.wait_for_end(job, int(request.query.get("wait", _RUNSYNC_WAIT_MS)) / 1000)
        return web.json_response(job.status())

    async def _add(self, request: web.Request, *, sync: bool) -> PlatformJob:
        size, limit = request.content_length or 0, limit_bytes(sync=sync)
        if size > limit:
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size)
        body = _json_object(await request.text())
        if "input" not in body:
            raise web.HTTPBadRequest(text="input is missing")
        return self._state.add(body, sync=sync)

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(_find_job(self._platform, request).status())

    async def stream(self, request: web.Request) -> web.Response:
        job = _find_job(self._platform, request)
        chunks = [{"output": chunk} for chunk in self._state.read_chunks(job)]
        return web.json_response({"status": job.state, "stream": chunks})

    async def cancel(self, request: web.Request) -> web.Response:
        job = _find_job(self._platform, request)
        self._state.cancel(job)
        return web.json_response({"id": job.id, "status": job.state})

    async def retry(self, request: web.Request) -> web.Response:
        job = _find_job(self._platform, request)
        if job.state not in RETRYABLE_STATES:
            raise web.HTTPBadRequest(text=f"a job that is {job.state} cannot be retried")
        self._state.retry(job)
        return web.json_response({"id": job.id, "status": job.state})

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response(self._state.health())

    async def purge(self, _request: web.Request) -> web.Response:
        return web.json_response({"removed": self._state.purge(), "status": "completed"})

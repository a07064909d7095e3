"""Whether the gateway is alive and can run jobs, and its metrics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import ComfyUnreachable
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, OPEN_ERRORS, error_responses
from comfy_worker.gateway.http.ping import PATH as PING_PATH
from comfy_worker.gateway.http.ping import CachedReadiness
from comfy_worker.gateway.jobs.metrics import Cached
from comfy_worker.gateway.jobs.service import JobService

_READY_AGE_S = 1.0


class HealthStatus(BaseModel):
    """The gateway is alive, or ready."""

    status: Literal["ok"] = "ok"


class Readiness:
    """Checks whether jobs can run; `app.state.readiness`.

    Attributes:
        cached: the same as a status, checked once a second at most.
    """

    def __init__(self, jobs: JobService) -> None:
        self._jobs = jobs
        self._has_comfyui = Cached(lambda: any(backend["healthy"] for backend in jobs.backends()), _READY_AGE_S)
        self.cached = CachedReadiness(self.check)

    async def check(self) -> None:
        """Return if jobs can run.

        Raises:
            DatabaseUnavailable: the database does not answer.
            ComfyUnreachable: no ComfyUI answers.
        """
        await self._jobs.counts()
        if not await run_in_threadpool(self._has_comfyui.get):
            raise ComfyUnreachable("No ComfyUI answers")


async def _get_readiness(request: Request) -> Readiness:
    readiness: Readiness = request.app.state.readiness
    return readiness


async def _get_registry(request: Request) -> CollectorRegistry:
    registry: CollectorRegistry = request.app.state.metrics_registry
    return registry


ReadinessCheck = Annotated[Readiness, Depends(_get_readiness)]
Registry = Annotated[CollectorRegistry, Depends(_get_registry)]

router = APIRouter(tags=["Operations"])
_WITHOUT_KEY: dict[str, Any] = {"security": []}


@router.get("/live", operation_id="live", responses=error_responses(*OPEN_ERRORS), openapi_extra=_WITHOUT_KEY)
async def live() -> HealthStatus:
    """Report that the gateway is alive; needs no key."""
    return HealthStatus()


@router.get("/ready", operation_id="ready", responses=error_responses(*COMMON_ERRORS))
async def ready(readiness: ReadinessCheck) -> HealthStatus:
    """Report whether jobs can run: the database and a ComfyUI answer."""
    await readiness.check()
    return HealthStatus()


@router.get(
    PING_PATH,
    operation_id="ping",
    response_class=Response,
    responses={
        **error_responses(*OPEN_ERRORS),
        200: {"description": "Jobs can run."},
        204: {"description": "Not yet."},
    },
    openapi_extra=_WITHOUT_KEY,
)
async def ping(readiness: ReadinessCheck) -> Response:
    """Tell RunPod's load balancer whether jobs can run; needs no key. 204 while ComfyUI starts."""
    return Response(status_code=await readiness.cached.status())


@router.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    responses={
        **error_responses(*COMMON_ERRORS),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus's format."},
    },
)
async def metrics(registry: Registry) -> Response:
    """Return the metrics for Prometheus."""
    return Response(await run_in_threadpool(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)

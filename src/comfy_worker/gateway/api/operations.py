"""For who runs the gateway: alive, ready, figures; and the outputs' files."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import ComfyUnreachable
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.outputs import link_elsewhere
from comfy_worker.gateway.api.schemas import Answer, CatalogErrorResponse, ErrorResponse, FileAnswer, State, problems
from comfy_worker.gateway.callers import has_caller
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.http.ping import PATH as PING_PATH
from comfy_worker.gateway.http.ping import Readiness
from comfy_worker.gateway.jobs.assets import AssetStore, no_such_file
from comfy_worker.gateway.jobs.metrics import Cached
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import IMAGES_PATH, PATH, AssetLinks
from comfy_worker.media.probe import mime_type_of_name

Responses = dict[int | str, dict[str, Any]]

_READY_AGE_S = 1.0
_SHOWN = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/avif", "video/", "audio/")
"""What a browser may show in place; everything else, SVG and HTML with their scripts above all, it is to save."""


def router(parts: Dependencies, registry: CollectorRegistry) -> APIRouter:
    """Return the routes."""
    door = _Door(parts.service, parts.assets, parts.links, registry)
    api = APIRouter()
    figures: Responses = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus's format."}
    }
    file: Responses = {
        200: {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}, "description": "The file."},
        206: {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}, "description": "A part of it."},
        307: {"description": "The file is in a bucket, where the link leads."},
    }
    api.add_api_route(
        "/live", door.live, operation_id="live", response_model=State, responses=problems(), tags=["Operations"]
    )
    api.add_api_route(
        "/ready", door.ready, operation_id="ready", response_model=State, responses=problems(503), tags=["Operations"]
    )
    api.add_api_route(
        PING_PATH,
        door.ping,
        operation_id="ping",
        response_class=Response,
        responses={**problems(), 200: {"description": "Jobs can run."}, 204: {"description": "Not yet."}},
        tags=["Operations"],
    )
    api.add_api_route(
        "/metrics",
        door.metrics,
        operation_id="metrics",
        response_class=Response,
        responses={**problems(), **figures},
        tags=["Operations"],
    )
    for prefix, name, problem in (
        (PATH, "asset", ErrorResponse),
        (IMAGES_PATH, "generated_image", CatalogErrorResponse),
    ):
        for method, operation_id in (("GET", name), ("HEAD", f"{name}_head")):
            api.add_api_route(
                f"{prefix}/{{job_id}}/{{path:path}}",
                door.asset,
                methods=[method],
                operation_id=operation_id,
                response_class=FileAnswer,
                responses={**problems(404, 416, model=problem), **file},
                tags=["Files"],
            )
    return api


class _Door:
    def __init__(self, service: JobService, assets: AssetStore, links: AssetLinks, registry: CollectorRegistry) -> None:
        self._service = service
        self._assets = assets
        self._links = links
        self._registry = registry
        self._has_backend = Cached(lambda: any(backend["healthy"] for backend in service.backends()), _READY_AGE_S)
        self._readiness = Readiness(self._check)

    async def live(self) -> Answer:
        """Say that something listens; needs no key."""
        return Answer({"status": "ok"})

    async def ready(self) -> Answer:
        """Say whether jobs can run: the database answers, and so does a ComfyUI."""
        await self._check()
        return Answer({"status": "ok"})

    async def ping(self) -> Response:
        """Say to a load balancer of RunPod whether jobs can run; needs no key. 204 while ComfyUI starts."""
        return Response(status_code=await self._readiness.status())

    async def _check(self) -> None:
        """Return if jobs can run.

        Raises:
            DatabaseUnavailable: the database does not answer.
            ComfyUnreachable: no ComfyUI does.
        """
        await self._service.counts()
        if not await run_in_threadpool(self._has_backend.get):
            raise ComfyUnreachable("No ComfyUI answers")

    async def metrics(self) -> Response:
        """Return the figures, for Prometheus."""
        return Response(await run_in_threadpool(generate_latest, self._registry), media_type=CONTENT_TYPE_LATEST)

    async def asset(
        self,
        job_id: Annotated[str, Path(max_length=255)],
        path: Annotated[str, Path(max_length=2048)],
        expires: Annotated[int | None, Query(ge=0, le=2**53, description="Seconds since the epoch.")] = None,
        signature: Annotated[str | None, Query(max_length=255)] = None,
    ) -> Response:
        """Return an output's file, or a range of it; needs a key or a signed link out of an answer.

        With a key, a file that is in a bucket is where the answer leads.
        """
        name = f"{job_id}/{path}"
        if not has_caller():
            self._links.check(name, expires or 0, signature or "")
        elif not await self._service.may_see(job_id):
            raise no_such_file()
        try:
            file = await run_in_threadpool(self._assets.path_of, name)
        except NotFound:
            link = await self._link_elsewhere(job_id, path)
            if link is None:
                raise
            return RedirectResponse(link)
        mime_type = mime_type_of_name(file.name)
        place = "inline" if mime_type.startswith(_SHOWN) else "attachment"
        return FileAnswer(
            file,
            media_type=mime_type,
            filename=file.name,
            content_disposition_type=place,
            headers={"Cache-Control": "private, max-age=3600"},
        )

    async def _link_elsewhere(self, job_id: str, path: str) -> str | None:
        if not has_caller():
            return None
        with suppress(NotFound):
            return link_elsewhere((await self._service.get(job_id)).output or {}, path)
        return None

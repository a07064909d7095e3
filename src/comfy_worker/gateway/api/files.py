"""The files of outputs."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from comfy_worker.gateway.api.dependencies import AllServices
from comfy_worker.gateway.api.outputs import bucket_link
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, CatalogErrorResponse, error_responses
from comfy_worker.gateway.callers import has_caller
from comfy_worker.gateway.errors import NotFound
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.jobs.assets import no_such_file
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import IMAGES_PATH, PATH
from comfy_worker.media.probe import mime_type_of_name

_INLINE = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/avif", "video/", "audio/")
"""What browsers may display; they download everything else, above all SVG and HTML with their scripts."""
_RANGE_ERRORS = {
    400: {"error": "The header Range cannot be read", "code": "invalid_input"},
    416: {"error": "The file has no such range", "code": "range_not_satisfiable"},
}
_BINARY: dict[str, Any] = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": _BINARY, "description": "The file."},
    206: {"content": _BINARY, "description": "A part of it."},
    307: {"description": "The file is in a bucket; the location is its link."},
}
_ASSET = {**error_responses(*COMMON_ERRORS, 404, 416), **_FILE}
_IMAGE = {**error_responses(*COMMON_ERRORS, 404, 416, model=CatalogErrorResponse), **_FILE}
_ASSET_PATH, _IMAGE_PATH = (f"{prefix}/{{job_id}}/{{path:path}}" for prefix in (PATH, IMAGES_PATH))


class RangeFileResponse(FileResponse):
    """A file, or a range of it; an invalid range gets our error response instead of Starlette's."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        error: SafeJSONResponse | None = None

        async def send_unless_error(message: Message) -> None:
            nonlocal error
            if message["type"] == "http.response.start" and message["status"] in _RANGE_ERRORS:
                error = SafeJSONResponse(_RANGE_ERRORS[message["status"]], status_code=message["status"])
                if content_range := Headers(raw=message["headers"]).get("content-range"):
                    error.headers["Content-Range"] = content_range
            if error is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_error)
        if error is not None:
            await error(scope, receive, send)


router = APIRouter(tags=["Files"])


@router.get(_ASSET_PATH, operation_id="asset", response_class=RangeFileResponse, responses=_ASSET)
@router.head(_ASSET_PATH, operation_id="asset_head", response_class=RangeFileResponse, responses=_ASSET)
@router.get(_IMAGE_PATH, operation_id="generated_image", response_class=RangeFileResponse, responses=_IMAGE)
@router.head(_IMAGE_PATH, operation_id="generated_image_head", response_class=RangeFileResponse, responses=_IMAGE)
async def get_file(
    services: AllServices,
    job_id: Annotated[str, Path(max_length=255)],
    path: Annotated[str, Path(max_length=2048)],
    expires: Annotated[int | None, Query(ge=0, le=2**53, description="Seconds since the epoch.")] = None,
    signature: Annotated[str | None, Query(max_length=255)] = None,
) -> Response:
    """Return an output's file, or a range of it; needs a key or a signed link from a response.

    With a key, the response for a file in a bucket is a redirect to it.
    """
    name = f"{job_id}/{path}"
    if not has_caller():
        services.links.check(name, expires or 0, signature or "")
    elif not await services.jobs.may_see(job_id):
        raise no_such_file()
    try:
        file = await run_in_threadpool(services.assets.path_of, name)
    except NotFound:
        link = await _bucket_link(services.jobs, job_id, path)
        if link is None:
            raise
        return RedirectResponse(link)
    mime_type = mime_type_of_name(file.name)
    return RangeFileResponse(
        file,
        media_type=mime_type,
        filename=file.name,
        content_disposition_type="inline" if mime_type.startswith(_INLINE) else "attachment",
        headers={"Cache-Control": "private, max-age=3600"},
    )


async def _bucket_link(jobs: JobService, job_id: str, path: str) -> str | None:
    if not has_caller():
        return None
    with suppress(NotFound):
        return bucket_link((await jobs.get(job_id)).output or {}, path)
    return None

"""RunPod's `/status` of a job, within RunPod's limits of a response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool

from comfy_worker.errors import OutputTooLarge
from comfy_worker.gateway.api.dependencies import OutputLinks
from comfy_worker.gateway.api.runpod.mapping import status_body
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.limits import MB, RUN_LIMIT, RUNSYNC_LIMIT
from comfy_worker.gateway.jobs.assets import AssetStore
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import Kind

FileFormat = Literal["base64", "url"]

_RESERVED = 100_000
"""Bytes of a response that are reserved for everything but the files."""


async def status_response(
    record: JobRecord, files: FileFormat, jobs: JobService, assets: AssetStore, links: OutputLinks
) -> SafeJSONResponse:
    """Return the status of a job.

    Raises:
        OutputTooLarge: the response would be larger than RunPod allows, even with links to the files.
    """
    if record.output is None:
        progress = None if record.state.is_terminal else await jobs.progress_of(record)
        return SafeJSONResponse(status_body(record, None if progress is None else dict(progress.data)))
    return await run_in_threadpool(_limited_response, record, files, assets, links)


def _limited_response(record: JobRecord, files: FileFormat, assets: AssetStore, links: OutputLinks) -> SafeJSONResponse:
    response = SafeJSONResponse(ended_status(record, files, assets, links))
    if len(response.body) > _limit(record):
        raise OutputTooLarge(
            f"The response would have more than {_limit(record)} bytes", hint="Let the workflow make less"
        )
    return response


def ended_status(record: JobRecord, files: FileFormat, assets: AssetStore, links: OutputLinks) -> dict[str, Any]:
    """Return the status of a job that has ended; files that are too large for a response are replaced by links."""
    return status_body(record, None if record.output is None else _output(record, record.output, files, assets, links))


def _output(
    record: JobRecord, output: Mapping[str, Any], files: FileFormat, assets: AssetStore, links: OutputLinks
) -> dict[str, Any]:
    limit = _limit(record)
    if files == "base64" and _size_of_files(output) * 4 // 3 + _RESERVED < limit:
        return assets.as_base64(output)
    linked = links.in_output(output)
    if files == "base64":
        notice = f"Files are returned as links because the response would exceed {limit // MB} MB"
        linked["errors"] = [*linked.get("errors", []), notice]
    return linked


def _limit(record: JobRecord) -> int:
    return RUNSYNC_LIMIT if record.is_sync else RUN_LIMIT


def _size_of_files(output: Mapping[str, Any]) -> int:
    return sum(int(item.get("size_bytes", 0)) for kind in Kind for item in output.get(kind.value, []))

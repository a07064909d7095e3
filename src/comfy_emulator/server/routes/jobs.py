"""`/api/jobs`: queue and history in one list (`server.py`, `comfy_execution/jobs.py` of ComfyUI)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from aiohttp import web

from comfy_emulator.execution.prompt_queue import QueueItem
from comfy_emulator.json_types import JsonObject
from comfy_emulator.server.request import emulator_of

STATUSES = ("pending", "in_progress", "completed", "failed")
_SORT_FIELDS = ("created_at", "execution_duration")
_END_EVENTS = ("execution_success", "execution_error", "execution_interrupted")
_PREVIEWABLE_MEDIA = ("images", "video", "audio")
_3D_SUFFIXES = (".obj", ".fbx", ".gltf", ".glb")


class BadQuery(ValueError):
    """An invalid query, answered 400 with this message."""


class JobsQuery(NamedTuple):
    """Filter, order and page of the list."""

    statuses: Collection[str]
    workflow_id: str | None
    sort_by: str
    descending: bool
    limit: int | None
    offset: int


def add_routes(router: web.UrlDispatcher) -> None:
    """Add the routes of this module, which exist only below `/api`."""
    router.add_get("/api/jobs", get_jobs)
    router.add_get("/api/jobs/{job_id}", get_job)


async def get_jobs(request: web.Request) -> web.Response:
    """Return a filtered, sorted page of jobs."""
    try:
        query = _read_query(dict(request.query))
    except BadQuery as error:
        return web.json_response({"error": str(error)}, status=400)
    queue = emulator_of(request).queue
    running, waiting = queue.get_current_queue()
    jobs = [
        *(_queued_job(item, "in_progress") for item in running),
        *(_queued_job(item, "pending") for item in waiting),
        *(_finished_job(prompt_id, entry) for prompt_id, entry in queue.get_history().items()),
    ]
    selected = [job for job in jobs if _matches(job, query)]
    selected.sort(key=lambda job: _sort_key(job, query.sort_by), reverse=query.descending)
    page = selected[query.offset :] if query.limit is None else selected[query.offset : query.offset + query.limit]
    has_more = query.offset + len(page) < len(selected)
    pagination = {"offset": query.offset, "limit": query.limit, "total": len(selected), "has_more": has_more}
    return web.json_response({"jobs": page, "pagination": pagination})


async def get_job(request: web.Request) -> web.Response:
    """Return one job, with outputs and workflow if it has finished."""
    queue = emulator_of(request).queue
    job_id = request.match_info["job_id"]
    for prompt_id, entry in queue.get_history_of(job_id).items():
        _, _, prompt, extra_data, _ = entry["prompt"]
        details = {
            "outputs": entry["outputs"],
            "execution_status": entry["status"],
            "workflow": {"prompt": prompt, "extra_data": extra_data},
        }
        return web.json_response({**_finished_job(prompt_id, entry), **details})
    running, waiting = queue.get_current_queue()
    for status, items in (("in_progress", running), ("pending", waiting)):
        for item in items:
            if item.prompt_id == job_id:
                return web.json_response(_queued_job(item, status))
    return web.json_response({"error": "Job not found"}, status=404)


def _read_query(query: dict[str, str]) -> JobsQuery:
    statuses = [name.strip().lower() for name in query.get("status", "").split(",") if name.strip()]
    unknown = [name for name in statuses if name not in STATUSES]
    if unknown:
        valid = ", ".join(STATUSES)
        raise BadQuery(f"Invalid status value(s): {', '.join(unknown)}. Valid values: {valid}")
    sort_by = query.get("sort_by", "created_at").lower()
    if sort_by not in _SORT_FIELDS:
        raise BadQuery("sort_by must be 'created_at' or 'execution_duration'")
    order = query.get("sort_order", "desc").lower()
    if order not in ("asc", "desc"):
        raise BadQuery("sort_order must be 'asc' or 'desc'")
    limit = _read_number(query, "limit")
    if limit is not None and limit <= 0:
        raise BadQuery("limit must be a positive integer")
    offset = max(_read_number(query, "offset") or 0, 0)
    filtered = statuses if query.get("status") else STATUSES
    return JobsQuery(filtered, query.get("workflow_id"), sort_by, order == "desc", limit, offset)


def _read_number(query: dict[str, str], name: str) -> int | None:
    if name not in query:
        return None
    try:
        return int(query[name])
    except ValueError:
        raise BadQuery(f"{name} must be an integer") from None


def _matches(job: JsonObject, query: JobsQuery) -> bool:
    return job["status"] in query.statuses and (not query.workflow_id or job.get("workflow_id") == query.workflow_id)


def _sort_key(job: JsonObject, sort_by: str) -> float:
    if sort_by == "created_at":
        return float(job.get("create_time", 0))
    return float(job.get("execution_end_time", 0) - job.get("execution_start_time", 0))


def _queued_job(item: QueueItem, status: str) -> JsonObject:
    return _without_none(
        {
            "id": item.prompt_id,
            "status": status,
            "priority": item.number,
            "create_time": item.extra_data.get("create_time"),
            "outputs_count": 0,
            "workflow_id": _workflow_id(item.extra_data),
        }
    )


def _finished_job(prompt_id: str, entry: JsonObject) -> JsonObject:
    number, _, _, extra_data, _ = entry["prompt"]
    messages: dict[str, JsonObject] = dict(entry["status"]["messages"])
    end: JsonObject = next((messages[name] for name in _END_EVENTS if name in messages), {})
    files = list(_output_files(entry["outputs"]))
    return _without_none(
        {
            "id": prompt_id,
            "status": "completed" if entry["status"]["completed"] else "failed",
            "priority": number,
            "create_time": extra_data.get("create_time"),
            "execution_start_time": messages.get("execution_start", {}).get("timestamp"),
            "execution_end_time": end.get("timestamp"),
            "execution_error": messages.get("execution_error"),
            "outputs_count": len(files),
            "preview_output": _preview_output(files),
            "workflow_id": _workflow_id(extra_data),
        }
    )


def _output_files(outputs: JsonObject) -> Iterator[JsonObject]:
    for node_id, output in outputs.items():
        for media, items in output.items():
            if media != "animated":
                yield from ({**item, "nodeId": node_id, "mediaType": media} for item in items if isinstance(item, dict))


def _preview_output(files: list[JsonObject]) -> JsonObject | None:
    """Return the file to show, preferably an output file (`get_outputs_summary`)."""
    previewable = [file for file in files if _is_previewable(file)]
    return next((file for file in previewable if file.get("type") == "output"), next(iter(previewable), None))


def _is_previewable(file: JsonObject) -> bool:
    if file["mediaType"] in _PREVIEWABLE_MEDIA or file.get("format", "").startswith(("video/", "audio/")):
        return True
    return bool(file.get("filename", "").lower().endswith(_3D_SUFFIXES))


def _workflow_id(extra_data: JsonObject) -> Any:
    return extra_data.get("extra_pnginfo", {}).get("workflow", {}).get("id")


def _without_none(job: JsonObject) -> JsonObject:
    return {key: value for key, value in job.items() if value is not None}

"""The task API: `POST /task`, then `GET /task/{task_id}` until it has a result."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from comfy_worker.gateway.api.dependencies import Jobs, Links
from comfy_worker.gateway.api.schemas import (
    COMMON_ERRORS,
    JOB_ID,
    RUNPOD_FIELDS,
    DetailedErrorResponse,
    error_responses,
)
from comfy_worker.gateway.api.task.backend_address import backend_at
from comfy_worker.gateway.api.task.mapping import outcome_of, summary_of, task_status
from comfy_worker.gateway.api.task.schemas import Task, TaskAccepted, TaskBody, TaskSummary
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import LOW_PRIORITY, NORMAL_PRIORITY, JobRecord
from comfy_worker.job.payload import unknown_keys
from comfy_worker.types import JobState

API = "task"
_PRIORITIES = {"low": LOW_PRIORITY, "normal": NORMAL_PRIORITY, "high": NORMAL_PRIORITY + 1}
_MAX_LISTED = 1000

TaskId = Annotated[str, Path(pattern=JOB_ID)]

router = APIRouter(
    tags=["Tasks"],
    route_class=StrictJSONRoute,
    responses=error_responses(*COMMON_ERRORS, model=DetailedErrorResponse),
)


@router.post("/task", operation_id="create_task", response_model=TaskAccepted)
async def create_task(request: Request, body: TaskBody, jobs: Jobs, links: Links) -> SafeJSONResponse:
    """Queue a task and return its id."""
    sent = body.as_sent()
    job_input = sent["params"]
    job_input.pop("server_address", None)
    details = {"base_url": links.base_url}
    if body.params.server_address:
        backends = [backend["url"] for backend in jobs.backends()]
        if (backend := backend_at(body.params.server_address, backends)) is not None:
            details["only_backend"] = backend
    job = {"input": job_input, **{name: sent[name] for name in RUNPOD_FIELDS if sent.get(name)}}
    priority = _PRIORITIES[body.priority] if body.priority else None
    record = await jobs.submit(job, job_id=str(uuid.uuid4()), priority=priority, api=API, details=details)
    request.state.job_id = record.id
    return SafeJSONResponse(
        {
            "task_id": record.id,
            "status": task_status(record),
            "message": "The task was accepted and queued",
            **body.warnings(unknown_keys(job_input, "params")),
        }
    )


@router.get("/task", operation_id="list_tasks", response_model=list[TaskSummary])
async def list_tasks(jobs: Jobs, limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 50) -> SafeJSONResponse:
    """Return this key's latest tasks, newest first."""
    return SafeJSONResponse([await _summary(record, jobs) for record in await jobs.latest(limit=limit)])


@router.get(
    "/task/{task_id}",
    operation_id="get_task",
    response_model=Task,
    responses=error_responses(404, model=DetailedErrorResponse),
)
async def get_task(task_id: TaskId, jobs: Jobs, links: Links) -> SafeJSONResponse:
    """Return the status of a task, with its result when it has one."""
    record = await jobs.get(task_id)
    output = None if record.output is None else links.in_output(record.output)
    task = {**await _summary(record, jobs), **outcome_of(record, output)}
    if record.state is JobState.IN_QUEUE and (position := jobs.position_of(record)) is not None:
        waiting = {"queue_position": position.position, "notice": position.notice or None}
        task |= {name: value for name, value in waiting.items() if value is not None}
    return SafeJSONResponse(task)


async def _summary(record: JobRecord, jobs: JobService) -> dict[str, Any]:
    if record.state in (JobState.IN_QUEUE, JobState.COMPLETED):
        return summary_of(record, 0.0)
    progress = await jobs.progress_of(record)
    return summary_of(record, float(progress.data.get("percent", 0.0)) if progress else 0.0)

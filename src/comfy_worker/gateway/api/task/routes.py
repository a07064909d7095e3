"""The task API: `POST /task`, then `GET /task/{task_id}` until it has a result."""

from __future__ import annotations

import re
import socket
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.outputs import files_by_kind
from comfy_worker.gateway.api.schemas import (
    EXAMPLE_JOB,
    JOB_ID,
    Answer,
    BucketConfig,
    DetailedErrorResponse,
    Policy,
    problems,
    request_body,
)
from comfy_worker.gateway.api_keys import is_loopback
from comfy_worker.gateway.http.request_validation import RUNPODS_FIELDS, read_body, warnings_of
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import LOW_PRIORITY, NORMAL_PRIORITY, JobRecord
from comfy_worker.job.payload import unknown_keys
from comfy_worker.settings import without_credentials
from comfy_worker.types import JobState, Kind

DOOR = "task"
_TASK_TYPE = "comfyui"
_PRIORITIES = {"low": LOW_PRIORITY, "normal": NORMAL_PRIORITY, "high": NORMAL_PRIORITY + 1}
_STATUSES: Mapping[JobState, str] = {
    JobState.IN_QUEUE: "pending",
    JobState.IN_PROGRESS: "processing",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.TIMED_OUT: "failed",
    JobState.CANCELLED: "cancelled",
}
_MOST_LISTED = 1000
_DEFAULT_ADDRESS = ("127.0.0.1", 8188)
"""What clients send that leave the choice to the gateway: the default that the API's description names."""
_ADDRESS = re.compile(r"(?:https?://)?(?:[^\s/?#@:\[\]]+|\[[0-9a-f:.]+\])(?::[0-9]+)?/?", re.IGNORECASE)

TaskStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]


class TaskParams(BaseModel):
    """What a task runs; beside these, whatever RunPod's `input` takes (`images`, `delivery`, `webhook`, …)."""

    GOES_ON: ClassVar[bool] = True
    model_config = ConfigDict(extra="allow")
    workflow: dict[str, Any] = Field(description="The graph in ComfyUI's API format.")
    server_address: str | None = Field(
        None,
        description="`host:port`, or the URL, of the ComfyUI that is to run it: one of the gateway's own, or of a "
        "fleet's workers; any if left out, empty or `127.0.0.1:8188` where none listens there.",
    )


class TaskRequest(BaseModel):
    """A task."""

    HINT: ClassVar[str] = 'Send {"task_type": "comfyui", "params": {"workflow": {…}}}'
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"task_type": "comfyui", "params": EXAMPLE_JOB["input"], "priority": "normal"}]}
    )
    task_type: Literal["comfyui"]
    params: TaskParams
    priority: Literal["low", "normal", "high"] | None = Field(
        None, description="`normal` if left out, unless `policy` says otherwise."
    )
    webhook: str | None = Field(
        None, description="URL that is told of the task's end, as RunPod's; `params.webhook` goes before it."
    )
    policy: Policy | None = None
    s3Config: BucketConfig | None = Field(
        None, description="Where the outputs go, in RunPod's words; `params.s3` goes before it."
    )


class TaskAccepted(BaseModel):
    """A task that was queued."""

    task_id: str
    status: TaskStatus
    message: str
    warnings: list[str] | None = Field(None, description="What was ignored.")


class TaskResult(BaseModel):
    """What a task made."""

    comfy_prompt_id: str | None
    images: list[str] = Field(description="A link to each picture.")
    count: int = Field(description="How many pictures there are.")
    videos: list[str] | None = None
    audio: list[str] | None = None
    files: list[str] | None = None
    texts: list[str] | None = None
    errors: list[str] | None = Field(None, description="What went wrong without failing the task.")


class TaskSummary(BaseModel):
    """Where a task stands."""

    task_id: str
    task_type: str
    status: TaskStatus
    progress: float = Field(description="How much of the workflow has run, from 0 to 100.")
    created_at: str = Field(description="ISO 8601, in UTC.")


class TaskAnswer(TaskSummary):
    """A task with its result."""

    result: TaskResult | None = None
    error: str | None = Field(None, description="Why it failed.")
    code: str | None = Field(None, description="The same for a program.")
    queue_position: int | None = Field(None, description="Its position in the queue; 1 is next.")
    notice: str | None = Field(None, description="Why it does not get on.")


TaskId = Annotated[str, Path(pattern=JOB_ID)]


def router(parts: Dependencies) -> APIRouter:
    """Return the door's routes."""
    door = _Door(parts)
    api = APIRouter(tags=["Tasks"])
    api.add_api_route(
        "/task",
        door.submit,
        methods=["POST"],
        operation_id="create_task",
        response_model=TaskAccepted,
        responses=problems(503, model=DetailedErrorResponse),
        openapi_extra=request_body(TaskRequest),
    )
    api.add_api_route(
        "/task",
        door.latest,
        methods=["GET"],
        operation_id="list_tasks",
        response_model=list[TaskSummary],
        responses=problems(503, model=DetailedErrorResponse),
    )
    api.add_api_route(
        "/task/{task_id}",
        door.status,
        methods=["GET"],
        operation_id="get_task",
        response_model=TaskAnswer,
        response_model_exclude_none=True,
        responses=problems(404, 503, model=DetailedErrorResponse),
    )
    return api


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._service = parts.service

    async def submit(self, request: Request) -> Answer:
        """Queue a task and return its id."""
        body = await read_body(request, TaskRequest)
        job_input = dict(body["params"])
        address = job_input.pop("server_address", None)
        details = self._parts.details(request)
        if address and (backend := backend_at(address, self._backends())) is not None:
            details["only_backend"] = backend
        priority = _PRIORITIES[body["priority"]] if body.get("priority") else None
        job = {"input": job_input, **{name: body[name] for name in RUNPODS_FIELDS if body.get(name)}}
        record = await self._service.submit(job, job_id=str(uuid.uuid4()), priority=priority, api=DOOR, details=details)
        request.state.job_id = record.id
        return Answer(
            {
                "task_id": record.id,
                "status": _STATUSES[record.state],
                "message": "The task was accepted and queued",
                **warnings_of(body, TaskRequest, unknown_keys(job_input, "params")),
            }
        )

    def _backends(self) -> list[str]:
        return [backend["url"] for backend in self._service.backends()]

    async def latest(self, limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 50) -> Answer:
        """Return this key's latest tasks, newest first."""
        return Answer([await _summary(record, self._service) for record in await self._service.latest(limit=limit)])

    async def status(self, request: Request, task_id: TaskId) -> Answer:
        """Return where a task stands, with its result when it has one."""
        record = await self._service.get(task_id)
        output = None if record.output is None else self._parts.linked(record.output, self._parts.base_url(request))
        answer = _with_outcome(await _summary(record, self._service), record, output)
        place = self._service.position_of(record)
        if record.state is JobState.IN_QUEUE and place is not None:
            waiting = {"queue_position": place.position, "notice": place.notice or None}
            answer |= {name: value for name, value in waiting.items() if value is not None}
        return Answer(answer)


def backend_at(address: str, backends: list[str]) -> str | None:
    """Return the URL, without a password, of the gateway's ComfyUI at an address, `host:port` or a URL.

    The description's default that is no ComfyUI of the gateway's stands for any of them, and is None.

    Raises:
        InvalidInput: none of the gateway's own listens there; a caller must not choose whom the server talks to.
    """
    host, port = _host_and_port(address) if _is_plain(address) else ("", 0)
    # A fleet knows a ComfyUI on a loopback address by the name of its machine.
    hosts = {host, socket.gethostname().lower()} if is_loopback(host) else {host}
    wanted = {(host, port) for host in hosts if port}
    for backend in backends:
        if _host_and_port(backend) in wanted:
            return without_credentials(backend)
    if (host, port) == _DEFAULT_ADDRESS:
        return None
    raise InvalidInput(
        "params.server_address is none of this gateway's ComfyUIs",
        hint="Leave it out, or have its URL added to COMFYUI_BACKENDS",
    )


def _is_plain(address: str) -> bool:
    """Return whether an address is `host:port` or such a URL, with nobody before it and nothing behind it."""
    return _ADDRESS.fullmatch(address) is not None


def _host_and_port(address: str) -> tuple[str, int]:
    """Return both in lower case and with the scheme's own port; a port of 0 for what cannot be read."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return "", 0
    return "127.0.0.1" if is_loopback(host) else host, port


def result_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return an output whose files are links in this API's words."""
    links = {kind.value: [item["data"] for item in items] for kind, items in files_by_kind(output).items()}
    texts = [item["text"] for item in output.get("texts", [])]
    images = links.pop(Kind.IMAGE.value)
    result = {"comfy_prompt_id": output.get("prompt_id"), "images": images, "count": len(images), **links}
    result |= {"texts": texts, "errors": list(output.get("errors", []))}
    return {name: value for name, value in result.items() if value or name in ("comfy_prompt_id", "images", "count")}


async def _summary(record: JobRecord, service: JobService) -> dict[str, Any]:
    return _summary_at(record, await _progress(record, service))


def _summary_at(record: JobRecord, progress: float) -> dict[str, Any]:
    return {
        "task_id": record.id,
        "task_type": _TASK_TYPE,
        "status": _STATUSES[record.state],
        "progress": progress,
        "created_at": datetime.fromtimestamp(record.created_at, timezone.utc).isoformat(),
    }


def _with_outcome(summary: dict[str, Any], record: JobRecord, output: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a task with its result, whose files are links, and why it failed."""
    result = {} if output is None else {"result": result_of(output)}
    error = {} if record.error is None else {"error": record.error["error"], "code": record.error["code"]}
    return {**summary, **result, **error}


async def _progress(record: JobRecord, service: JobService) -> float:
    if record.state is JobState.COMPLETED:
        return 100.0
    if record.state is JobState.IN_QUEUE:
        return 0.0
    told = await service.progress_of(record)
    return 0.0 if told is None else float(told.data.get("percent", 0.0))


def _webhook_end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    percent = 100.0 if record.state is JobState.COMPLETED else float((record.progress or {}).get("percent", 0.0))
    output = None if record.output is None else parts.linked(record)
    return _with_outcome(_summary_at(record, percent), record, output)


def _webhook_progress(record: JobRecord, told: Mapping[str, Any]) -> dict[str, Any]:
    return _summary_at(record, float(told.get("percent", 0.0)))


WEBHOOK = WebhookFormat(_webhook_end, _webhook_progress)

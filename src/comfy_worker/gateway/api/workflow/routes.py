"""The workflow API: submit a graph, get its status, cancel it; the queue, and versions of named workflows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, WebSocket
from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.api.dependencies import AllServices, Jobs, Links, OutputLinks, Workflows
from comfy_worker.gateway.api.job_updates import job_updates
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, JOB_ID, DetailedErrorResponse, error_responses
from comfy_worker.gateway.api.workflow.requests import cache_key_of, check_comfyui, input_of, submit
from comfy_worker.gateway.api.workflow.schemas import (
    STATES,
    CancelResponse,
    SubmitBody,
    SubmitResponse,
    WorkflowQueue,
    WorkflowStatus,
    WorkflowVersion,
    WorkflowVersions,
)
from comfy_worker.gateway.api.workflow.status import status_of
from comfy_worker.gateway.errors import NotFound, NotImplementedYet
from comfy_worker.gateway.events.bus import STATUS
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.http.websockets import send_messages
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

PromptId = Annotated[str, Path(pattern=JOB_ID)]
TemplateName = Annotated[str, Path(max_length=255, examples=["solid-color"])]
_NOT_FOUND = error_responses(404, model=DetailedErrorResponse)

router = APIRouter(
    prefix="/api",
    tags=["Workflows"],
    route_class=StrictJSONRoute,
    responses=error_responses(*COMMON_ERRORS, model=DetailedErrorResponse),
)


@router.post("/workflow/submit", operation_id="submit_workflow", response_model=SubmitResponse)
async def submit_workflow(request: Request, body: SubmitBody, services: AllServices, links: Links) -> SafeJSONResponse:
    """Queue a workflow and return its id."""
    sent, catalog = body.as_sent(), services.catalog
    job_input = await run_in_threadpool(input_of, sent, catalog, body.inputs)
    await check_comfyui(services.jobs)
    cache_key = await run_in_threadpool(cache_key_of, sent, catalog) if body.cache else None
    record, is_cached = await submit(request, services, links, job_input, cache_key)
    message = "An identical earlier request answers this one" if is_cached else "Workflow submitted successfully"
    return SafeJSONResponse(
        {
            "prompt_id": record.id,
            "status": STATES[record.state],
            "message": message,
            **({"cached": True} if is_cached else {}),
            **body.warnings(),
        }
    )


@router.post(
    "/workflow/generate",
    operation_id="generate_workflow",
    responses=error_responses(501, model=DetailedErrorResponse),
)
async def generate_workflow() -> Any:
    """Make a workflow from a text; not implemented: the response is always 501."""
    raise NotImplementedYet(
        "Making a workflow out of a text needs ComfyGPT, which this gateway does not have",
        hint="Submit a workflow, or name one of GET /api/v1/comfyui/workflows as template",
    )


@router.get(
    "/workflow/status/{prompt_id}",
    operation_id="workflow_status",
    response_model=WorkflowStatus,
    responses=_NOT_FOUND,
)
async def workflow_status(prompt_id: PromptId, jobs: Jobs, links: Links) -> SafeJSONResponse:
    """Return the status of a workflow, with links to its files."""
    return SafeJSONResponse(await status_of(await jobs.get(prompt_id), jobs, links))


@router.post("/workflow/cancel/{prompt_id}", operation_id="cancel_workflow", responses=_NOT_FOUND)
async def cancel_workflow(prompt_id: PromptId, jobs: Jobs) -> CancelResponse:
    """Cancel a workflow that runs or waits.

    The response comes when the workflow is off the GPU, or after 10 s if a node ignores interrupts and runs on.
    """
    before = await jobs.get(prompt_id)
    record = await jobs.cancel(prompt_id)
    had_ended = before.state.is_terminal or record.state is not JobState.CANCELLED
    message = "The workflow had ended already" if had_ended else "Workflow cancelled"
    return CancelResponse(prompt_id=record.id, status=STATES[record.state], message=message)


@router.get("/queue", operation_id="workflow_queue")
async def workflow_queue(jobs: Jobs) -> WorkflowQueue:
    """Return this key's running and waiting workflows, of all APIs, the next one first.

    Their numbers count those of the other keys too.
    """
    unfinished = await jobs.unfinished()
    return WorkflowQueue(
        running=_numbered(unfinished, JobState.IN_PROGRESS), pending=_numbered(unfinished, JobState.IN_QUEUE)
    )


def _numbered(unfinished: Sequence[tuple[int, JobRecord]], state: JobState) -> list[list[Any]]:
    """Return the jobs in a state in the form of ComfyUI's queue."""
    return [[str(number), record.id, {}] for number, record in unfinished if record.state is state]


@router.get("/workflows/{name}/versions", operation_id="workflow_versions", responses=_NOT_FOUND)
async def workflow_versions(name: TemplateName, catalog: Workflows) -> WorkflowVersions:
    """Return all known versions of a named workflow, newest first."""
    versions = await run_in_threadpool(catalog.versions, name)
    if not versions:
        raise NotFound(f"There is no named workflow {name!r}")
    current = {entry.version for entry in await run_in_threadpool(catalog.entries) if entry.name == name}
    return WorkflowVersions(
        name=name,
        versions=[
            WorkflowVersion(version=entry.version, title=entry.manifest.title, current=entry.version in current)
            for entry in reversed(versions)
        ],
    )


@router.websocket("/workflow/ws/{prompt_id}")
async def workflow_websocket(websocket: WebSocket, prompt_id: str, jobs: Jobs, links: Links) -> None:
    """Send the status of a workflow at each change, until it has ended."""
    await send_messages(websocket, _changes(await jobs.get(prompt_id), jobs, links))


async def _changes(record: JobRecord, jobs: JobService, links: OutputLinks) -> AsyncGenerator[dict[str, Any], None]:
    sent: dict[str, Any] | None = None
    async with aclosing(job_updates(jobs, record)) as updates:
        async for update in updates:
            if update.type == STATUS and update.number is not None:
                record = await jobs.get(record.id)
            status = await status_of(record, jobs, links)
            if sent is None or _has_changed(sent, status):
                sent = status
                yield status


def _has_changed(sent: dict[str, Any], status: dict[str, Any]) -> bool:
    """Return whether a status differs by more than the time that has passed."""
    return {**sent, "estimated_time_remaining": None} != {**status, "estimated_time_remaining": None}

"""The catalog API: list named workflows, execute them, list ComfyUI's nodes; everything in one envelope."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, WebSocket
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.entry import CatalogEntry
from comfy_worker.gateway.api.catalog.mapping import (
    JOB_PREFIX,
    execution_of,
    iso,
    job_id_of,
    node_of,
    nodes_of,
    parameter_of,
    response_of,
    workflow_id_of,
)
from comfy_worker.gateway.api.catalog.schemas import (
    AnyExecutionResponse,
    ExecuteBody,
    ExecutionResponse,
    NodesResponse,
    WorkflowResponse,
    WorkflowsResponse,
)
from comfy_worker.gateway.api.dependencies import Jobs, Links, OutputLinks, Workflows
from comfy_worker.gateway.api.job_updates import job_updates
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, JOB_ID, CatalogErrorResponse, error_responses
from comfy_worker.gateway.errors import DuplicateRequest, ExecutionNotFound, NotFound, WorkflowNotFound
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.http.websockets import send_messages
from comfy_worker.gateway.jobs.metrics import Cached
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.jobs.signed_links import IMAGES_PATH
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.gateway.store.workflow_versions import VersionedCatalog
from comfy_worker.types import JobState

API = "catalog"
_NODES_AGE_S = 60.0
"""ComfyUI's nodes only change when it restarts."""

WorkflowId = Annotated[
    str,
    Path(pattern=r"^[A-Za-z0-9._-]{1,128}$", description="A workflow's `id`, or its `key`.", examples=["solid-color"]),
]
ExecutionId = Annotated[str, Path(pattern=JOB_ID, description="An execution's `id`.")]
NodeList = list[dict[str, Any]]


def make_nodes(jobs: JobService) -> Cached[NodeList]:
    """Return ComfyUI's nodes; `app.state.nodes`."""
    return Cached(lambda: [node_of(*item) for item in sorted(jobs.comfyui().object_info().items())], _NODES_AGE_S)


async def _get_nodes(request: Request) -> Cached[NodeList]:
    nodes: Cached[NodeList] = request.app.state.nodes
    return nodes


router = APIRouter(
    prefix="/api/v1/comfyui",
    tags=["Catalog"],
    route_class=StrictJSONRoute,
    responses=error_responses(*COMMON_ERRORS, model=CatalogErrorResponse),
)
_NOT_FOUND = error_responses(404, model=CatalogErrorResponse)


# ------------------------------------------------------------------------------------------------------ workflows


@router.get("/workflows", operation_id="catalog_workflows", response_model=WorkflowsResponse)
async def list_workflows(catalog: Workflows) -> SafeJSONResponse:
    """List the workflows that can be executed."""
    entries = await run_in_threadpool(catalog.entries)
    return _success({"workflows": [_workflow(entry, catalog) for entry in entries]})


@router.get(
    "/workflows/{workflow_id}",
    operation_id="catalog_workflow",
    response_model=WorkflowResponse,
    responses=_NOT_FOUND,
)
async def get_workflow(workflow_id: WorkflowId, catalog: Workflows) -> SafeJSONResponse:
    """Return one workflow."""
    entry = await run_in_threadpool(_find_entry, catalog, workflow_id, None)
    return _success({"workflow": _workflow(entry, catalog)})


def _find_entry(catalog: VersionedCatalog, workflow_id: str, version: str | None) -> CatalogEntry:
    """Return the workflow with an id or a key.

    Raises:
        WorkflowNotFound: there is none.
        InvalidInput: it has no such version.
    """
    for entry in catalog.entries():
        if workflow_id in (entry.name, str(workflow_id_of(entry))):
            return entry if version is None else catalog.get(entry.name, version)
    raise WorkflowNotFound(f"Workflow with id {workflow_id} not found")


def _workflow(entry: CatalogEntry, catalog: VersionedCatalog) -> dict[str, Any]:
    created, updated = catalog.times(entry.name)
    return {
        "id": workflow_id_of(entry),
        "key": entry.name,
        "name": entry.manifest.title,
        "description": entry.manifest.description,
        "version": entry.version,
        "parameters": [parameter_of(name, entry) for name in entry.manifest.parameters],
        "nodes": nodes_of(entry),
        "created_at": iso(created),
        "updated_at": iso(updated),
    }


# ----------------------------------------------------------------------------------------------------- executions


@router.post(
    "/workflows/{workflow_id}/execute",
    operation_id="catalog_execute",
    response_model=ExecutionResponse,
    responses=_NOT_FOUND,
)
async def execute_workflow(
    request: Request, workflow_id: WorkflowId, body: ExecuteBody, jobs: Jobs, links: Links, catalog: Workflows
) -> SafeJSONResponse:
    """Execute a workflow with the given inputs, and the defaults of the others."""
    entry = await run_in_threadpool(_find_entry, catalog, workflow_id, body.version or None)
    job_input: dict[str, Any] = {"template": f"{entry.name}@{entry.version}", "inputs": body.inputs or {}}
    if body.webhook is not None:
        job_input["webhook"] = body.webhook
    details = {"workflow_id": workflow_id_of(entry), "workflow": entry.name}
    record = await _submit(jobs, {"input": job_input}, details)
    request.state.job_id = record.id
    # The API's description calls an execution running as soon as it is accepted.
    execution = {**await _execution(record, jobs, links), "status": "running"}
    return _success({"execution": execution}, body.warnings())


async def _submit(jobs: JobService, request: Mapping[str, Any], details: Mapping[str, Any]) -> JobRecord:
    """Queue a job under a new number."""
    while True:
        # Microseconds: they grow, over restarts too, and JavaScript can represent them exactly.
        number = time.time_ns() // 1000
        try:
            return await jobs.submit(request, job_id=f"{JOB_PREFIX}{number}", api=API, details=details)
        except DuplicateRequest:
            await asyncio.sleep(0)


@router.get(
    "/executions/{execution_id}",
    operation_id="catalog_execution",
    response_model=AnyExecutionResponse,
    responses=_NOT_FOUND,
)
async def get_execution(execution_id: ExecutionId, jobs: Jobs, links: Links) -> SafeJSONResponse:
    """Return the status of an execution, with its outputs, or why it failed."""
    # 200 for a failed execution too: the envelope has the error.
    return SafeJSONResponse(await _response(await _find_job(jobs, execution_id), jobs, links))


@router.post(
    "/executions/{execution_id}/cancel",
    operation_id="catalog_cancel",
    response_model=AnyExecutionResponse,
    responses=_NOT_FOUND,
)
async def cancel_execution(execution_id: ExecutionId, jobs: Jobs, links: Links) -> SafeJSONResponse:
    """Cancel an execution. An execution that has ended stays as it is.

    The response comes when the execution is off the GPU, or after 10 s if a node ignores interrupts and runs on.
    """
    record = await _find_job(jobs, execution_id)
    return SafeJSONResponse(await _response(await jobs.cancel(record.id), jobs, links))


@router.websocket("/executions/{execution_id}/ws")
async def execution_websocket(websocket: WebSocket, execution_id: str, jobs: Jobs, links: Links) -> None:
    """Send an execution at each update until it has ended, as `GET /executions/{id}` returns it."""
    await send_messages(websocket, _responses(await _find_job(jobs, execution_id), jobs, links))


async def _responses(record: JobRecord, jobs: JobService, links: OutputLinks) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(job_updates(jobs, record)) as updates:
        async for update in updates:
            if update.number is not None:
                record = await jobs.get(record.id)
            yield await _response(record, jobs, links)


async def _find_job(jobs: JobService, execution_id: str) -> JobRecord:
    # The id of a job of another API may consist of digits, too.
    for job_id in dict.fromkeys((job_id_of(execution_id), execution_id)):
        with contextlib.suppress(NotFound):
            return await jobs.get(job_id)
    raise ExecutionNotFound(f"Execution with id {execution_id} not found")


async def _response(record: JobRecord, jobs: JobService, links: OutputLinks) -> dict[str, Any]:
    return response_of(record, await _execution(record, jobs, links))


async def _execution(record: JobRecord, jobs: JobService, links: OutputLinks) -> dict[str, Any]:
    progress = None if record.state is JobState.COMPLETED else await jobs.progress_of(record)
    output = None if record.output is None else links.below("", IMAGES_PATH, record.output)
    percent = 0.0 if progress is None or record.state is JobState.IN_QUEUE else progress.data.get("percent", 0.0)
    execution = execution_of(record, percent, output, progress.at if progress else None)
    if record.state is JobState.IN_QUEUE and (position := jobs.position_of(record)) is not None:
        waiting = {"queue_position": position.position, "notice": position.notice or None}
        execution |= {name: value for name, value in waiting.items() if value is not None}
    return execution


# ---------------------------------------------------------------------------------------------------------- nodes


@router.get("/nodes", operation_id="catalog_nodes", response_model=NodesResponse)
async def list_nodes(nodes: Annotated[Cached[NodeList], Depends(_get_nodes)]) -> SafeJSONResponse:
    """List ComfyUI's nodes, with their inputs and outputs."""
    return _success({"nodes": await run_in_threadpool(nodes.get)})


def _success(data: Mapping[str, Any], warnings: Mapping[str, Any] | None = None) -> SafeJSONResponse:
    return SafeJSONResponse({"status": "success", "data": data, **(warnings or {})})

"""The catalog API: named workflows, their executions and the nodes there are, in an envelope."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Path, Request, WebSocket
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.entry import CatalogEntry
from comfy_worker.gateway.api.catalog import schemas as answers
from comfy_worker.gateway.api.catalog.mapping import (
    JOB_PREFIX,
    event_of,
    execution_of,
    iso,
    job_id_of,
    node_of,
    nodes_of,
    number_of,
    parameter_of,
)
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.schemas import JOB_ID, Answer, CatalogErrorResponse, problems, request_body
from comfy_worker.gateway.errors import (
    DatabaseUnavailable,
    DuplicateRequest,
    ExecutionNotFound,
    NotFound,
    WorkflowNotFound,
)
from comfy_worker.gateway.events.bus import PREVIEW
from comfy_worker.gateway.http.middleware import answer_error
from comfy_worker.gateway.http.request_validation import read_body, warnings_of
from comfy_worker.gateway.http.websockets import tell
from comfy_worker.gateway.jobs.signed_links import IMAGES_PATH
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

DOOR = "catalog"
_ROOT = "/api/v1/comfyui"
_NODES_AGE_S = 60.0
"""How long ComfyUI's nodes are remembered: they only change when it is started anew."""

WorkflowId = Annotated[
    str,
    Path(pattern=r"^[A-Za-z0-9._-]{1,128}$", description="A workflow's `id`, or its `key`.", examples=["solid-color"]),
]
ExecutionId = Annotated[str, Path(pattern=JOB_ID, description="An execution's `id`.")]


class ExecuteRequest(BaseModel):
    """What a workflow is to be filled in with."""

    HINT: ClassVar[str] = 'Send {"inputs": {"prompt": "…"}}'
    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": {}}]})
    inputs: dict[str, Any] | None = Field(None, description="A value by the name of its parameter.")
    version: str | None = Field(
        None, description="The content of the workflow that is meant; the present one if not given."
    )
    webhook: dict[str, Any] | None = Field(None, description="Who is told of the end; see docs/reference/webhooks.md.")


def router(parts: Dependencies) -> APIRouter:
    """Return the door's routes."""
    door = _Door(parts)
    api = APIRouter(prefix=_ROOT, tags=["Catalog"])
    get, post = ["GET"], ["POST"]
    refusals = problems(503, model=CatalogErrorResponse)
    not_found = problems(404, 503, model=CatalogErrorResponse)
    body = request_body(ExecuteRequest)
    for path, methods, handler, model, responses, extra in (
        ("/workflows", get, door.workflows, answers.Workflows, refusals, None),
        ("/workflows/{workflow_id}", get, door.workflow, answers.OneWorkflow, not_found, None),
        (
            "/workflows/{workflow_id}/execute",
            post,
            door.execute,
            answers.Execution,
            not_found,
            body,
        ),
        ("/executions/{execution_id}", get, door.execution, answers.AnyExecution, not_found, None),
        ("/executions/{execution_id}/cancel", post, door.cancel, answers.AnyExecution, not_found, None),
        ("/nodes", get, door.nodes, answers.Nodes, refusals, None),
    ):
        api.add_api_route(
            path,
            handler,
            methods=methods,
            operation_id=f"catalog_{handler.__name__}",
            response_model=model,
            response_model_exclude_none=True,
            responses=responses,
            openapi_extra=extra,
        )
    api.add_api_websocket_route("/executions/{execution_id}/ws", door.websocket)
    return api


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._service = parts.service
        self._nodes: tuple[float, Sequence[Mapping[str, Any]]] | None = None

    # ------------------------------------------------------------------------------------------- workflows

    async def workflows(self) -> Answer:
        """List the workflows that can be executed."""
        entries = await run_in_threadpool(self._parts.library.entries)
        return _success({"workflows": [self._shown(entry) for entry in entries]})

    async def workflow(self, workflow_id: WorkflowId) -> Answer:
        """Return one workflow."""
        return _success({"workflow": self._shown(await run_in_threadpool(self._entry, workflow_id, None))})

    def _shown(self, entry: CatalogEntry) -> dict[str, Any]:
        created, updated = self._parts.library.times(entry.name)
        return {
            "id": number_of(entry),
            "key": entry.name,
            "name": entry.manifest.title,
            "description": entry.manifest.description,
            "version": entry.version,
            "parameters": [parameter_of(name, entry) for name in entry.manifest.parameters],
            "nodes": nodes_of(entry),
            "created_at": iso(created),
            "updated_at": iso(updated),
        }

    def _entry(self, workflow_id: str, version: str | None) -> CatalogEntry:
        """Return the workflow with an id or a key.

        Raises:
            WorkflowNotFound: there is none.
            InvalidInput: it has no such version.
        """
        for entry in self._parts.library.entries():
            if workflow_id in (entry.name, str(number_of(entry))):
                return entry if version is None else self._parts.library.get(entry.name, version)
        raise WorkflowNotFound(f"Workflow with id {workflow_id} not found")

    # ------------------------------------------------------------------------------------------ executions

    async def execute(self, request: Request, workflow_id: WorkflowId) -> Answer:
        """Execute a workflow with the inputs that are given, and the defaults of the others."""
        body = await read_body(request, ExecuteRequest)
        entry = await run_in_threadpool(self._entry, workflow_id, body.get("version") or None)
        job_input = {"template": f"{entry.name}@{entry.version}", "inputs": body.get("inputs") or {}}
        if body.get("webhook") is not None:
            job_input["webhook"] = body["webhook"]
        record = await self._submit({"input": job_input}, {"workflow_id": number_of(entry), "workflow": entry.name})
        request.state.job_id = record.id
        # The description calls an execution running as soon as it is accepted; whoever asks again gets where it stands.
        accepted = {**await self._execution(record), "status": "running"}
        return _success({"execution": accepted}, warnings_of(body, ExecuteRequest))

    async def _submit(self, request: Mapping[str, Any], details: Mapping[str, Any]) -> JobRecord:
        """Queue a job under a number that no other has."""
        while True:
            # The microsecond is a number that grows, over restarts too, and that JavaScript reads exactly.
            number = time.time_ns() // 1000
            try:
                return await self._service.submit(request, job_id=f"{JOB_PREFIX}{number}", api=DOOR, details=details)
            except DuplicateRequest:
                await asyncio.sleep(0)

    async def execution(self, execution_id: ExecutionId) -> Answer:
        """Return where an execution stands, with its outputs; of one that failed, why."""
        return await self._told(await self._record(execution_id))

    async def _record(self, execution_id: str) -> JobRecord:
        # A job of another door may have digits alone as its id.
        for job_id in dict.fromkeys((job_id_of(execution_id), execution_id)):
            with contextlib.suppress(NotFound):
                return await self._service.get(job_id)
        raise ExecutionNotFound(f"Execution with id {execution_id} not found")

    async def cancel(self, execution_id: ExecutionId) -> Answer:
        """End an execution; when this answers, it is off the GPU. One that has ended stays as it is."""
        record = await self._record(execution_id)
        return await self._told(await self._service.cancel(record.id))

    async def _told(self, record: JobRecord) -> Answer:
        # An execution that is known is a 200, and so is the question for one that failed: the envelope says so.
        return Answer(await self._message(record))

    async def _execution(self, record: JobRecord) -> dict[str, Any]:
        told = None if record.state is JobState.COMPLETED else await self._service.progress_of(record)
        output = None if record.output is None else self._parts.linked(record.output, "", IMAGES_PATH)
        percent = 0.0 if told is None or record.state is JobState.IN_QUEUE else told.data.get("percent", 0.0)
        execution = execution_of(record, percent, output, told.at if told else None)
        if record.state is JobState.IN_QUEUE and (place := self._service.position_of(record)) is not None:
            waiting = {"queue_position": place.position, "notice": place.notice or None}
            execution |= {name: value for name, value in waiting.items() if value is not None}
        return execution

    async def websocket(self, websocket: WebSocket, execution_id: str) -> None:
        """Tell how far an execution is until it has ended: each time what `GET /executions/{id}` would answer."""
        try:
            record = await self._record(execution_id)
        except (NotFound, DatabaseUnavailable) as error:
            await websocket.send_denial_response(answer_error(error, websocket.url.path))
            return
        await tell(websocket, self._live(record))

    async def _live(self, record: JobRecord) -> AsyncGenerator[Mapping[str, Any], None]:
        yield await self._message(record)
        if record.state.is_terminal:
            return
        async with aclosing(self._service.events(record.id)) as events:
            async for event in events:
                if event.type != PREVIEW:
                    yield await self._message(await self._service.get(record.id))

    async def _message(self, record: JobRecord) -> Mapping[str, Any]:
        return event_of(record, await self._execution(record))

    # ----------------------------------------------------------------------------------------------- nodes

    async def nodes(self) -> Answer:
        """List the nodes that ComfyUI has, with their inputs and outputs."""
        if self._nodes is None or time.monotonic() - self._nodes[0] > _NODES_AGE_S:
            info = await run_in_threadpool(lambda: self._service.comfyui().object_info())
            self._nodes = time.monotonic(), [node_of(name, node) for name, node in sorted(info.items())]
        return _success({"nodes": list(self._nodes[1])})


def _success(data: Mapping[str, Any], warnings: Mapping[str, Any] | None = None) -> Answer:
    return Answer({"status": "success", "data": data, **(warnings or {})})

"""The workflow API: submit a graph, ask for its status, cancel it; queue and versions of named workflows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, WebSocket
from starlette.concurrency import run_in_threadpool

from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.schemas import JOB_ID, Answer, DetailedErrorResponse, problems, request_body
from comfy_worker.gateway.api.workflow.requests import cache_key_of, check_comfyui, input_of, submit
from comfy_worker.gateway.api.workflow.schemas import (
    STATES,
    CancelAnswer,
    SubmitAnswer,
    SubmitRequest,
    WorkflowQueue,
    WorkflowStatus,
    WorkflowVersions,
)
from comfy_worker.gateway.api.workflow.status import status_of
from comfy_worker.gateway.errors import DatabaseUnavailable, NotFound, NotImplementedYet
from comfy_worker.gateway.events.bus import PREVIEW, STATUS
from comfy_worker.gateway.http.middleware import answer_error
from comfy_worker.gateway.http.request_validation import read_body, warnings_of
from comfy_worker.gateway.http.websockets import tell
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState

PromptId = Annotated[str, Path(pattern=JOB_ID)]
TemplateName = Annotated[str, Path(max_length=255, examples=["solid-color"])]


def router(parts: Dependencies) -> APIRouter:
    """Return the door's routes."""
    door = _Door(parts)
    api = APIRouter(tags=["Workflows"])
    api.add_api_route(
        "/api/workflow/submit",
        door.submit,
        methods=["POST"],
        operation_id="submit_workflow",
        response_model=SubmitAnswer,
        response_model_exclude_none=True,
        responses=problems(503, model=DetailedErrorResponse),
        openapi_extra=request_body(SubmitRequest),
    )
    api.add_api_route(
        "/api/workflow/generate",
        door.generate,
        methods=["POST"],
        operation_id="generate_workflow",
        responses=problems(501, model=DetailedErrorResponse),
    )
    api.add_api_route(
        "/api/workflow/cancel/{prompt_id}",
        door.cancel,
        methods=["POST"],
        operation_id="cancel_workflow",
        response_model=CancelAnswer,
        responses=problems(404, model=DetailedErrorResponse),
    )
    for path, handler, operation_id, model, statuses in (
        ("/api/workflow/status/{prompt_id}", door.status, "workflow_status", WorkflowStatus, (404,)),
        ("/api/queue", door.queue, "workflow_queue", WorkflowQueue, ()),
        ("/api/workflows/{name}/versions", door.versions, "workflow_versions", WorkflowVersions, (404,)),
    ):
        api.add_api_route(
            path,
            handler,
            methods=["GET"],
            operation_id=operation_id,
            response_model=model,
            responses=problems(*statuses, model=DetailedErrorResponse),
        )
    api.add_api_websocket_route("/api/workflow/ws/{prompt_id}", door.websocket)
    return api


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._service = parts.service

    async def submit(self, request: Request) -> Answer:
        """Queue a workflow and return its id."""
        body = await read_body(request, SubmitRequest)
        library = self._parts.library
        job_input = await run_in_threadpool(input_of, body, library, body.get("inputs"))
        await check_comfyui(self._service)
        cache_key = None
        if body.get("cache"):
            cache_key = await run_in_threadpool(cache_key_of, body, library)
        record, is_cached = await submit(request, self._parts, job_input, cache_key)
        message = "An identical earlier request answers this one" if is_cached else "Workflow submitted successfully"
        return Answer(
            {
                "prompt_id": record.id,
                "status": STATES[record.state],
                "message": message,
                **({"cached": True} if is_cached else {}),
                **warnings_of(body, SubmitRequest),
            }
        )

    async def generate(self) -> Answer:
        """Make a workflow out of a text; that is not there yet, and this always answers 501."""
        raise NotImplementedYet(
            "Making a workflow out of a text needs ComfyGPT, which this gateway does not have",
            hint="Submit a workflow, or name one of GET /api/v1/comfyui/workflows as template",
        )

    async def status(self, request: Request, prompt_id: PromptId) -> Answer:
        """Return where a workflow stands, with links to what it made."""
        record = await self._service.get(prompt_id)
        return Answer(await status_of(record, self._parts, self._parts.base_url(request)))

    async def cancel(self, prompt_id: PromptId) -> Answer:
        """Cancel a workflow that runs or waits; when this answers, it is off the GPU."""
        before = await self._service.get(prompt_id)
        record = await self._service.cancel(prompt_id)
        has_ended_before = before.state.is_terminal or record.state is not JobState.CANCELLED
        message = "The workflow had ended already" if has_ended_before else "Workflow cancelled"
        return Answer({"prompt_id": record.id, "status": STATES[record.state], "message": message})

    async def queue(self) -> Answer:
        """Return this key's workflows that run and that wait, of all doors, the next one in front.

        Their numbers count those of the other keys too.
        """
        unfinished = await self._service.unfinished()
        states = {"running": JobState.IN_PROGRESS, "pending": JobState.IN_QUEUE}
        return Answer({name: _numbered(unfinished, state) for name, state in states.items()})

    async def versions(self, name: TemplateName) -> Answer:
        """Return all known versions of a named workflow, the latest in front."""
        versions = await run_in_threadpool(self._parts.library.versions, name)
        current = {entry.name: entry.version for entry in await run_in_threadpool(self._parts.library.entries)}.get(
            name
        )
        if not versions:
            raise NotFound(f"There is no named workflow {name!r}")
        shown = [
            {"version": entry.version, "title": entry.manifest.title, "current": entry.version == current}
            for entry in reversed(versions)
        ]
        return Answer({"name": name, "versions": shown})

    async def websocket(self, websocket: WebSocket, prompt_id: str) -> None:
        """Tell the status of a workflow at each change, until it has ended."""
        try:
            record = await self._service.get(prompt_id)
        except (NotFound, DatabaseUnavailable) as error:
            await websocket.send_denial_response(answer_error(error, websocket.url.path))
            return
        base = self._parts.settings.public_url or str(websocket.base_url).replace("ws", "http", 1).rstrip("/")
        await tell(websocket, self._changes(record, base))

    async def _changes(self, record: JobRecord, base: str) -> AsyncGenerator[dict[str, Any], None]:
        told = await status_of(record, self._parts, base)
        yield told
        if record.state.is_terminal:
            return
        # From its beginning, so that no change is missed between the question and the first event.
        async with aclosing(self._service.events(record.id, 0)) as events:
            async for event in events:
                if event.type == PREVIEW:
                    continue
                if event.type == STATUS:
                    record = await self._service.get(record.id)
                status = await status_of(record, self._parts, base)
                if _has_changed(told, status):
                    told = status
                    yield told


def _numbered(unfinished: Sequence[tuple[int, JobRecord]], state: JobState) -> list[list[Any]]:
    """Return the jobs in a state in the form of ComfyUI's queue."""
    return [[str(number), record.id, {}] for number, record in unfinished if record.state is state]


def _has_changed(told: dict[str, Any], status: dict[str, Any]) -> bool:
    """Return whether there is news beyond the passing of time."""
    return {**told, "estimated_time_remaining": None} != {**status, "estimated_time_remaining": None}

"""`/api/workflow/batch`: one workflow run many times, with other inputs or seeds."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.dependencies import Dependencies
from comfy_worker.gateway.api.schemas import JOB_ID, Answer, DetailedErrorResponse, problems, request_body
from comfy_worker.gateway.api.workflow.graph_edits import with_inputs, with_seed
from comfy_worker.gateway.api.workflow.requests import DOOR, check_comfyui, input_of, job_of, template_of
from comfy_worker.gateway.api.workflow.schemas import (
    MOST_IN_BATCH,
    STATES,
    BatchAnswer,
    BatchCancelAnswer,
    BatchRequest,
    BatchStatus,
    WorkflowState,
)
from comfy_worker.gateway.api.workflow.status import status_of
from comfy_worker.gateway.errors import NotFound, RequestTooLarge
from comfy_worker.gateway.http.request_validation import read_body, warnings_of
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.job.payload import parse_job
from comfy_worker.types import JobState

_MOST_BYTES = 64_000_000
"""Of all jobs of a batch together: they are written at once."""

BatchId = Annotated[str, Path(pattern=JOB_ID)]


def router(parts: Dependencies) -> APIRouter:
    """Return the door's routes."""
    door = _Door(parts)
    api = APIRouter(tags=["Workflows"])
    api.add_api_route(
        "/api/workflow/batch",
        door.submit,
        methods=["POST"],
        operation_id="submit_batch",
        response_model=BatchAnswer,
        response_model_exclude_none=True,
        responses=problems(503, model=DetailedErrorResponse),
        openapi_extra=request_body(BatchRequest),
    )
    api.add_api_route(
        "/api/workflow/batch/{batch_id}",
        door.status,
        methods=["GET"],
        operation_id="batch_status",
        response_model=BatchStatus,
        responses=problems(404, model=DetailedErrorResponse),
    )
    api.add_api_route(
        "/api/workflow/batch/{batch_id}/cancel",
        door.cancel,
        methods=["POST"],
        operation_id="cancel_batch",
        response_model=BatchCancelAnswer,
        responses=problems(404, model=DetailedErrorResponse),
    )
    return api


class _Door:
    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._service = parts.service

    async def submit(self, request: Request) -> Answer:
        """Queue one workflow many times, all of them or none, and return their ids."""
        body = await read_body(request, BatchRequest)
        batch_id = str(uuid.uuid4())
        jobs = await run_in_threadpool(self._jobs, body, batch_id)
        await check_comfyui(self._service)
        records = await self._service.submit_all(
            jobs, api=DOOR, details=self._parts.details(request, batch_id=batch_id)
        )
        return Answer(
            {
                "batch_id": batch_id,
                "prompt_ids": [record.id for record in records],
                "count": len(records),
                "status": "pending",
                "message": "Batch submitted successfully",
                **warnings_of(body, BatchRequest),
            }
        )

    def _jobs(self, body: Mapping[str, Any], batch_id: str) -> dict[str, Mapping[str, Any]]:
        """Return each run's id and job; what is wrong with any of them refuses all."""
        jobs: dict[str, Mapping[str, Any]] = {}
        for number, job_input in enumerate(inputs_of_runs(body, self._parts.library), 1):
            job_id = f"{batch_id}-{number}"
            jobs[job_id] = job_of(job_input, self._parts.settings)
            parse_job(jobs[job_id])
        return jobs

    async def status(self, request: Request, batch_id: BatchId) -> Answer:
        """Return where the workflows of a batch stand, as many as are still kept."""
        records = await self._records(batch_id)
        base = self._parts.base_url(request)
        statuses = [await status_of(record, self._parts, base) for record in records]
        return Answer({**_summary(batch_id, records), "count": len(records), "jobs": statuses})

    async def cancel(self, batch_id: BatchId) -> Answer:
        """Cancel all workflows of a batch that run or wait; when this answers, they are off the GPU."""
        open_ones = [record for record in await self._records(batch_id) if not record.state.is_terminal]
        # The last one first: none of those that wait gets its turn meanwhile.
        cancelled = [await self._service.cancel(record.id) for record in reversed(open_ones)]
        count = sum(record.state is JobState.CANCELLED for record in cancelled)
        records = await self._records(batch_id)
        return Answer({**_summary(batch_id, records), "message": cancel_message(count, len(records))})

    async def _records(self, batch_id: str) -> Sequence[JobRecord]:
        found = await self._service.with_prefix(f"{batch_id}-")
        records = [record for record in found if record.details.get("batch_id") == batch_id]
        if not records:
            raise NotFound(f"There is no batch {batch_id!r} (any more)")
        return records


def inputs_of_runs(body: Mapping[str, Any], library: Catalog) -> Iterator[Mapping[str, Any]]:
    """Yield RunPod's `input` of each run of a batch.

    Raises:
        InvalidInput: a run is not as it must be; the sentence begins with which one.
        InvalidWorkflow: the workflow is no graph in API format.
        RequestTooLarge: all runs together are.
    """
    kind, runs = _runs_of(body)
    if len(json.dumps(body)) * len(runs) > _MOST_BYTES:
        raise RequestTooLarge(
            f"The runs of the batch have more than {_MOST_BYTES} bytes together", hint="Send fewer, or inputs by URL"
        )
    shared = body.get("inputs") if isinstance(body.get("inputs"), Mapping) else None
    base = None if kind == "inputs" and template_of(body) is not None else input_of(body, library, shared)
    for number, run in enumerate(runs):
        try:
            yield _input_of_run(body, library, kind, run, base, shared)
        except InvalidInput as error:
            raise InvalidInput(f"{kind}.{number}: {error.message}", hint=error.hint) from None


def _input_of_run(
    body: Mapping[str, Any],
    library: Catalog,
    kind: str,
    run: Any,
    base: Mapping[str, Any] | None,
    shared: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    if base is None:
        return input_of(body, library, run)
    if template_of(body) is not None:
        # Filled in anew, so that what a template draws by lot is another one for each run.
        base = input_of(body, library, shared)
    change = with_seed if kind == "seeds" else with_inputs
    return {**base, "workflow": change(base["workflow"], run)}


def _runs_of(body: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """Return which of its lists a batch has, and that list."""
    lists = {name: body[name] for name in ("inputs", "seeds", "sets") if isinstance(body.get(name), list)}
    if len(lists) != 1:
        raise InvalidInput("A batch has one list: inputs, seeds or sets", hint=BatchRequest.HINT)
    [(kind, runs)] = lists.items()
    if not 1 <= len(runs) <= MOST_IN_BATCH:
        raise InvalidInput(f"A batch has 1 to {MOST_IN_BATCH} runs, and {kind} has {len(runs)}")
    return kind, runs


def cancel_message(cancelled: int, count: int) -> str:
    """Return what came of cancelling a batch: so many of its workflows had not ended before."""
    if not cancelled:
        return "The batch had ended already"
    if cancelled == count:
        return "Batch cancelled"
    return f"Batch cancelled: {cancelled} of {count} workflows, the others had ended already"


def _summary(batch_id: str, records: Sequence[JobRecord]) -> dict[str, Any]:
    counts = Counter(STATES[record.state] for record in records)
    all_states: dict[WorkflowState, int] = {state: counts[state] for state in dict.fromkeys(STATES.values())}
    return {"batch_id": batch_id, "status": _state_of_batch(counts), "counts": all_states}


def _state_of_batch(counts: Mapping[WorkflowState, int]) -> WorkflowState:
    """Return how a batch is doing: open as long as one of its workflows is, then as bad as the worst of them."""
    has_begun = any(count for state, count in counts.items() if state != "pending")
    if counts.get("pending") or counts.get("running"):
        return "running" if has_begun else "pending"
    worst: Sequence[WorkflowState] = ("failed", "cancelled")
    return next((state for state in worst if counts.get(state)), "completed")

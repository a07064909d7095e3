"""`/api/workflow/batch`: one workflow run many times, with other inputs or seeds."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.dependencies import AllServices, Jobs, Links, Services
from comfy_worker.gateway.api.schemas import COMMON_ERRORS, JOB_ID, DetailedErrorResponse, error_responses
from comfy_worker.gateway.api.workflow.graph_edits import with_inputs, with_seed
from comfy_worker.gateway.api.workflow.requests import API, check_comfyui, input_of, job_of, template_of
from comfy_worker.gateway.api.workflow.schemas import (
    MAX_BATCH_RUNS,
    STATES,
    BatchBody,
    BatchCancelResponse,
    BatchRequest,
    BatchResponse,
    BatchStatus,
    WorkflowState,
)
from comfy_worker.gateway.api.workflow.status import status_of
from comfy_worker.gateway.errors import NotFound, RequestTooLarge
from comfy_worker.gateway.http.json_response import SafeJSONResponse
from comfy_worker.gateway.http.strict_json_route import StrictJSONRoute
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.job.payload import parse_job
from comfy_worker.types import JobState

_MAX_BYTES = 64_000_000
"""Of all jobs of a batch, which are stored at once."""

BatchId = Annotated[str, Path(pattern=JOB_ID)]
_NOT_FOUND = error_responses(404, model=DetailedErrorResponse)

router = APIRouter(
    prefix="/api/workflow/batch",
    tags=["Workflows"],
    route_class=StrictJSONRoute,
    responses=error_responses(*COMMON_ERRORS, model=DetailedErrorResponse),
)


@router.post("", operation_id="submit_batch", response_model=BatchResponse)
async def submit_batch(body: BatchBody, services: AllServices, links: Links) -> SafeJSONResponse:
    """Queue one workflow many times, all runs or none, and return their ids."""
    batch_id = str(uuid.uuid4())
    requests = await run_in_threadpool(_requests, body.as_sent(), batch_id, services)
    await check_comfyui(services.jobs)
    details = {"base_url": links.base_url, "batch_id": batch_id}
    records = await services.jobs.submit_all(requests, api=API, details=details)
    return SafeJSONResponse(
        {
            "batch_id": batch_id,
            "prompt_ids": [record.id for record in records],
            "count": len(records),
            "status": "pending",
            "message": "Batch submitted successfully",
            **body.warnings(),
        }
    )


def _requests(body: Mapping[str, Any], batch_id: str, services: Services) -> dict[str, Mapping[str, Any]]:
    """Return each run's id and request; an error in any of them is raised."""
    requests: dict[str, Mapping[str, Any]] = {}
    for number, job_input in enumerate(inputs_of_runs(body, services.catalog), 1):
        request = job_of(job_input, services.settings)
        parse_job(request)
        requests[f"{batch_id}-{number}"] = request
    return requests


@router.get("/{batch_id}", operation_id="batch_status", response_model=BatchStatus, responses=_NOT_FOUND)
async def batch_status(batch_id: BatchId, jobs: Jobs, links: Links) -> SafeJSONResponse:
    """Return the status of a batch's workflows that have not expired."""
    records = await _records(batch_id, jobs)
    statuses = [await status_of(record, jobs, links) for record in records]
    return SafeJSONResponse({**_summary(batch_id, records), "count": len(records), "jobs": statuses})


@router.post("/{batch_id}/cancel", operation_id="cancel_batch", responses=_NOT_FOUND)
async def cancel_batch(batch_id: BatchId, jobs: Jobs) -> BatchCancelResponse:
    """Cancel all workflows of a batch that run or wait.

    The response comes when they are off the GPU, or after 10 s if a node ignores interrupts and runs on.
    """
    unfinished = [record for record in await _records(batch_id, jobs) if not record.state.is_terminal]
    # The last one first, so that none of those that wait starts meanwhile.
    cancelled = [await jobs.cancel(record.id) for record in reversed(unfinished)]
    count = sum(record.state is JobState.CANCELLED for record in cancelled)
    records = await _records(batch_id, jobs)
    return BatchCancelResponse(**_summary(batch_id, records), message=cancel_message(count, len(records)))


async def _records(batch_id: str, jobs: JobService) -> Sequence[JobRecord]:
    found = await jobs.with_prefix(f"{batch_id}-")
    records = [record for record in found if record.details.get("batch_id") == batch_id]
    if not records:
        raise NotFound(f"There is no batch {batch_id!r}, or it has expired")
    return records


def inputs_of_runs(body: Mapping[str, Any], library: Catalog) -> Iterator[Mapping[str, Any]]:
    """Yield RunPod's `input` of each run of a batch.

    Raises:
        InvalidInput: a run is invalid; the sentence begins with which one.
        InvalidWorkflow: the workflow is not a graph in API format.
        RequestTooLarge: all runs together are too large.
    """
    kind, runs = _runs_of(body)
    if len(json.dumps(body)) * len(runs) > _MAX_BYTES:
        raise RequestTooLarge(
            f"The runs of the batch have more than {_MAX_BYTES} bytes together", hint="Send fewer, or inputs by URL"
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
        # Filled in again, so that each run has random values of its own.
        base = input_of(body, library, shared)
    change = with_seed if kind == "seeds" else with_inputs
    return {**base, "workflow": change(base["workflow"], run)}


def _runs_of(body: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """Return the name of the list that a batch has, and the list."""
    lists = {name: body[name] for name in ("inputs", "seeds", "sets") if isinstance(body.get(name), list)}
    if len(lists) != 1:
        raise InvalidInput("A batch has one list: inputs, seeds or sets", hint=BatchRequest.HINT)
    [(kind, runs)] = lists.items()
    if not 1 <= len(runs) <= MAX_BATCH_RUNS:
        raise InvalidInput(f"A batch has 1 to {MAX_BATCH_RUNS} runs, and {kind} has {len(runs)}")
    return kind, runs


def cancel_message(cancelled: int, count: int) -> str:
    """Return the result of cancelling a batch with `count` workflows."""
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
    """Return the state of a batch: open while one of its workflows is, then the worst state of them."""
    has_begun = any(count for state, count in counts.items() if state != "pending")
    if counts.get("pending") or counts.get("running"):
        return "running" if has_begun else "pending"
    worst: Sequence[WorkflowState] = ("failed", "cancelled")
    return next((state for state in worst if counts.get(state)), "completed")

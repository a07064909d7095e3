"""Maps a job of the gateway to RunPod's format, and RunPod's status to the gateway's."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_worker.errors import (
    DeliveryFailed,
    ExecutionFailed,
    OutputMissing,
    TimedOut,
    WorkerError,
    redact_all,
)
from comfy_worker.gateway.errors import RequestTooLarge
from comfy_worker.gateway.http.limits import MB, RUN_LIMIT
from comfy_worker.gateway.store.records import NORMAL_PRIORITY, JobRecord
from comfy_worker.job.envelope import read_input
from comfy_worker.job.payload import split_failure
from comfy_worker.media.probe import mime_type_of_name
from comfy_worker.storage.base import DeliverableFile, Storage
from comfy_worker.storage.content import InMemory
from comfy_worker.storage.object_keys import safe_name, safe_path
from comfy_worker.types import JobState, Kind
from comfy_worker.webhooks.message import status_of

_SHORTEST_RUN_MS = 5_000
_SHORTEST_TTL_MS = 10_000
_LONGEST_TTL_MS = 7 * 24 * 3_600_000
"""RunPod's limits, from its documentation."""
_SENTENCES = {
    JobState.CANCELLED: "The job was cancelled at RunPod",
    JobState.TIMED_OUT: "RunPod ended the job because it took longer than its policy allows",
    JobState.FAILED: "RunPod says that the job failed, and not why",
}


@dataclass(frozen=True)
class Outcome:
    """How a job ended at RunPod.

    Attributes:
        state: a terminal state.
        output: what the worker returned, with its files as RunPod sent them; partial outputs if it failed.
        error: `{error, code, …}` if it did not complete; None if it was cancelled.
        ran_s: how long it ran, in seconds; None if RunPod does not say.
    """

    state: JobState
    output: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    ran_s: float | None


# ---------------------------------------------------------------------------------------------- submission


def submission(record: JobRecord, request: Mapping[str, Any], webhook: str | None) -> bytes:
    """Return the body of `/run`.

    The caller's webhook is not in it: the gateway sends that itself.

    Raises:
        RequestTooLarge: it is larger than RunPod allows.
    """
    body: dict[str, Any] = {"input": _without_webhook(request["input"]), "policy": _policy(record)}
    if request.get("s3Config") is not None:
        body["s3Config"] = request["s3Config"]
    if webhook is not None:
        body["webhook"] = webhook
    encoded = json.dumps(body).encode()
    if len(encoded) > RUN_LIMIT:
        raise RequestTooLarge(
            f"The job has {len(encoded)} bytes, and RunPod takes {RUN_LIMIT // MB} MB", hint="Send inputs by URL"
        )
    return encoded


def _without_webhook(job_input: Any) -> dict[str, Any]:
    payload, _is_wrapped = read_input({"input": job_input})
    return {key: value for key, value in payload.items() if key != "webhook"}


def _policy(record: JobRecord) -> dict[str, Any]:
    run_ms = max(_SHORTEST_RUN_MS, round(record.execution_timeout_s * 1000))
    # RunPod's ttl is from the submission to the end, ours until the run begins.
    ttl_ms = run_ms + max(_SHORTEST_TTL_MS, round(record.queue_ttl_s * 1000))
    return {
        "executionTimeout": run_ms,
        "ttl": min(ttl_ms, _LONGEST_TTL_MS),
        "lowPriority": record.priority < NORMAL_PRIORITY,
    }


# ----------------------------------------------------------------------------------------------------- end


def state_in(status: Mapping[str, Any]) -> JobState:
    """Return the state of a job by the body of `/status`; a state that RunPod may add later counts as running.

    Such a job ends by its time limits, if it does not end by itself.
    """
    try:
        return JobState(status.get("status"))
    except ValueError:
        return JobState.IN_PROGRESS


def outcome_of(status: Mapping[str, Any], secrets: Iterable[str | None]) -> Outcome:
    """Return how a job ended, by the body of its `/status`."""
    state, output = state_in(status), status.get("output")
    ran_ms = status.get("executionTime")
    ran_s = ran_ms / 1000 if isinstance(ran_ms, (int, float)) and not isinstance(ran_ms, bool) else None
    if state is JobState.COMPLETED and "error" not in status:
        if isinstance(output, Mapping):
            return Outcome(state, output, None, ran_s)
        # RunPod does so if a result is too large.
        lost = OutputMissing("RunPod calls the job completed, and has no output of it")
        return Outcome(JobState.FAILED, None, lost.as_output(), ran_s)
    made, error = split_failure(_error_in(status, state))
    error = redact_all(error, list(secrets))
    if state in (JobState.COMPLETED, JobState.FAILED):
        state = status_of(error)  # for RunPod, a worker that reached its own time limit has failed
    return Outcome(state, made, None if state is JobState.CANCELLED else error, ran_s)


def _error_in(status: Mapping[str, Any], state: JobState) -> dict[str, Any]:
    """Return the error record: the worker's own, or one with the message of RunPod or of another image's worker."""
    output = status.get("output")
    extra = {key: value for key, value in output.items() if key != "error"} if isinstance(output, Mapping) else {}
    code = TimedOut.code if state is JobState.TIMED_OUT else ExecutionFailed.code
    if not isinstance(extra.get("code"), str):
        extra = {"code": code}
    return {"error": _sentence(status.get("error")) or _SENTENCES.get(state, _SENTENCES[JobState.FAILED]), **extra}


def _sentence(error: Any) -> str:
    """Return the error message: a text, or that of an exception as RunPod's SDK reports it, without traceback."""
    if not isinstance(error, str):
        return "" if error is None else json.dumps(error)
    try:
        parsed = json.loads(error)
    except ValueError:
        return error
    if isinstance(parsed, dict) and isinstance(parsed.get("error_message"), str):
        return parsed["error_message"] or str(parsed.get("error_type", ""))
    return error


def progress_in(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the progress of a running job, None if its worker reports none."""
    output = status.get("output")
    if state_in(status) is not JobState.IN_PROGRESS or not isinstance(output, Mapping):
        return None
    return dict(output) if isinstance(output.get("stage"), str) else None


# --------------------------------------------------------------------------------------------------- files


def store_files(job_id: str, output: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """Return an output whose base64 files are delivered to a storage; links stay as they are.

    Raises:
        DeliveryFailed: a file could not be stored, or is not base64.
    """
    stored, taken = dict(output), set[str]()
    for kind in Kind:
        items = output.get(kind.value)
        if isinstance(items, list):
            stored[kind.value] = [
                _stored_item(job_id, item, storage, taken) for item in items if isinstance(item, Mapping)
            ]
    stored.setdefault(Kind.IMAGE.value, [])
    return stored


def _stored_item(job_id: str, item: Mapping[str, Any], storage: Storage, taken: set[str]) -> dict[str, Any]:
    described = {"filename": "file", "size_bytes": 0, **item}
    described.setdefault("mime_type", mime_type_of_name(str(described["filename"])))
    if item.get("type") != "base64":
        return described
    try:
        content = base64.b64decode(str(item.get("data", "")), validate=True)
    except ValueError as error:
        raise DeliveryFailed("RunPod returned an output that is not base64") from error
    path = safe_path(f"{item.get('subfolder') or ''}/{described['filename']}")
    if path in taken:
        path = f"node_{safe_name(str(item.get('node_id', '')))}_{len(taken)}/{path}"
    taken.add(path)
    delivered = storage.deliver(DeliverableFile(job_id, path, str(described["mime_type"]), InMemory(content)))
    return {**described, "type": delivered.type, "data": delivered.data, "size_bytes": len(content)}


def with_warnings(output: Mapping[str, Any], warnings: Iterable[str]) -> Mapping[str, Any]:
    """Return an output with the warnings about the caller's request, which the worker did not see."""
    found = output.get("errors")
    errors = list(found) if isinstance(found, list) else []
    errors[:0] = [warning for warning in warnings if warning not in errors]
    return {**output, "errors": errors} if errors else output


def unknown_job() -> WorkerError:
    """Return the error of a job that RunPod no longer knows."""
    return OutputMissing(
        "RunPod no longer knows the job: it was purged there, or its result has expired",
        hint="Retry it",
    )

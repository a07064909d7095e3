"""A job's record and progress in the generate API's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_worker.errors import Cancelled, ExecutionFailed, WorkerError, all_errors
from comfy_worker.gateway.api.generate.schemas import Status
from comfy_worker.gateway.api.outputs import kind_of, path_in_job
from comfy_worker.gateway.http.limits import RUNSYNC_LIMIT
from comfy_worker.gateway.jobs.assets import AssetStore, with_urls
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.jobs.signed_links import PATH
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Kind, Stage

_RESERVED = 100_000
"""Bytes of a response that are reserved for everything but the files."""
_TIMINGS = {"preprocess_ms": "staged_ms", "generation_ms": "executed_ms", "postprocess_ms": "delivered_ms"}
_ENDS: Mapping[JobState, tuple[Status, str]] = {
    JobState.COMPLETED: ("completed", "The job is complete"),
    JobState.FAILED: ("failed", "The job failed"),
    # Clients of this API wait for one of three ends; `code` has the kind of failure.
    JobState.TIMED_OUT: ("failed", "The job took too long"),
    JobState.CANCELLED: ("cancelled", "The job was cancelled"),
}
_QUEUE_SIZES = {"preprocessing": "preprocess", "generation": "generation", "postprocessing": "postprocess"}
"""The size of each queue in `queue_sizes`."""


# --------------------------------------------------------------------------------------------------------- status


@dataclass(frozen=True)
class JobStatus:
    """The status of a job as this API describes it.

    Attributes:
        queue: the job's queue; None when it has ended.
        position: among all waiting jobs, from 1; 0 for a job that is being processed.
        wait_s: how long it will wait, in seconds; None if unknown.
    """

    status: Status
    message: str
    queue: str | None = None
    position: int = 0
    wait_s: float | None = 0

    def queue_position(self, sizes: Mapping[str, int], waiting: int) -> dict[str, Any]:
        """Return the `queue_position` of an event, given the sizes of all queues and the number of waiting jobs."""
        size = 0 if self.queue is None else sizes[_QUEUE_SIZES[self.queue]]
        size = waiting if self.position else size
        return {
            "current_queue": self.queue,
            "position": self.position,
            "queue_size": max(size, self.position),
            "estimated_wait_time": self.wait_s,
        }


def ended_status(record: JobRecord) -> JobStatus:
    """Return the status of a job that has ended."""
    status, message = _ENDS[record.state]
    return JobStatus(status, str(record.error["error"]) if record.error else message)


def open_status(state: JobState, progress: Mapping[str, Any], position: QueuePosition | None) -> JobStatus:
    """Return the status of a job that has not ended, by the progress of its present attempt."""
    if state is JobState.IN_QUEUE:
        return _waiting_status(progress, position)
    if progress.get("stage") == Stage.DELIVERING.value:
        return JobStatus("processing", "Delivering the outputs", "postprocessing")
    return JobStatus("generating", _running_message(progress), "generation")


def _running_message(progress: Mapping[str, Any]) -> str:
    percent = f"{progress.get('percent', 0):g} %"
    if node := progress.get("node"):
        step = f", step {progress['step']:g} of {progress['steps']:g}" if progress.get("steps") else ""
        return f"Running {node.get('title') or node['id']}{step} ({percent})"
    return str(progress.get("notice") or f"ComfyUI runs the workflow ({percent})")


def _waiting_status(progress: Mapping[str, Any], position: QueuePosition | None) -> JobStatus:
    if position is None:
        number, wait_s, queue, notice = 1, None, "preprocessing", str(progress.get("notice") or "")
    else:
        number, wait_s, notice = max(1, position.position or 1), position.wait_s, position.notice
        queue = "generation" if position.stage == Stage.QUEUED.value else "preprocessing"
    return JobStatus("queued", notice or _waits_behind(number - 1), queue, number, wait_s)


def _waits_behind(others: int) -> str:
    if others == 0:
        return "The request is next"
    return f"The request waits behind {'one other' if others == 1 else f'{others} others'}"


def http_status(record: JobRecord) -> int:
    """Return the HTTP status of a response with a job's result, by the class of its error."""
    if record.state is JobState.CANCELLED:
        return Cancelled.http_status
    if record.error is None:
        return 200
    # Subclasses that share the code of their base mean the same.
    classes = {error.code: error for error in reversed(list(all_errors()))}
    failure = classes.get(str(record.error.get("code")), WorkerError)
    # This API calls a node that raises "processing failed".
    return 500 if issubclass(failure, ExecutionFailed) else failure.http_status


# --------------------------------------------------------------------------------------------------------- result


def result_of(
    record: JobRecord, status: JobStatus, output: list[dict[str, Any]], *, with_history: bool = False
) -> dict[str, Any]:
    """Return a `GenerateResponse`, with or without `comfyui_response`."""
    result: dict[str, Any] = {
        "id": record.id,
        "status": status.status,
        "message": status.message,
        "output": output,
        "timings": _timings(record),
        "comfyui_response": _history(record) if with_history else {},
    }
    for name in ("texts", "errors"):
        if record.output is not None and record.output.get(name):
            result[name] = record.output[name]
    if record.error is not None:
        result |= {name: value for name, value in record.error.items() if name in ("code", "hint", "details")}
    return result


def _timings(record: JobRecord) -> dict[str, int]:
    """Return when a job was accepted and ended, and how long each stage took, in milliseconds."""
    spent = (record.output or {}).get("timings", {})
    stages = {name: int(spent[ours]) for name, ours in _TIMINGS.items() if ours in spent}
    timings = {"queued_at_ms": round(record.created_at * 1000), **stages}
    if record.ended_at is not None:
        total_s = max(0.0, record.ended_at - record.created_at)
        timings |= {"completed_at_ms": round(record.ended_at * 1000), "total_ms": round(total_s * 1000)}
    return timings


def _history(record: JobRecord) -> dict[str, Any]:
    """Return a job's outputs and status in the form of ComfyUI's `/history`, as far as the gateway stores them."""
    if not record.state.is_terminal or record.prompt_id is None:
        return {}
    output, nodes = record.output or {}, dict[str, dict[str, list[Any]]]()
    for kind in Kind:
        for item in output.get(kind.value, []):
            folder = "temp" if item.get("preview") else "output"
            file = {"filename": item["filename"], "subfolder": item.get("subfolder") or "", "type": folder}
            nodes.setdefault(item["node_id"], {}).setdefault(kind.value, []).append(file)
    for text in output.get("texts", []):
        nodes.setdefault(text["node_id"], {}).setdefault("text", []).append(text["text"])
    has_completed = record.state is JobState.COMPLETED
    status = {"status_str": "success" if has_completed else "error", "completed": has_completed}
    return {record.prompt_id: {"outputs": nodes, "status": status}}


def files_of(
    job_id: str, output: Mapping[str, Any], linked: Mapping[str, Any], assets: AssetStore, *, as_base64: bool
) -> list[dict[str, Any]]:
    """Return the files of a job.

    Args:
        job_id: the job.
        output: its output as the store has it.
        linked: the same with links to the files.
        assets: the files.
        as_base64: whether to include their bytes, as far as they fit into a response.
    """
    paths = with_urls(output, lambda path: path)
    budget = RUNSYNC_LIMIT - _RESERVED
    files = []
    for listed_as, item, link, path in _each(output, linked, paths):
        is_here = path["data"] != item["data"]
        file = {
            "filename": item["filename"],
            "local_path": f"{PATH}/{path['data'] if is_here else f'{job_id}/{path_in_job(item)}'}",
            "url": item.get("url") or (None if link["type"] == "base64" else link["data"]),
            "type": "temp" if item.get("preview") else "output",
            "subfolder": item.get("subfolder") or "",
            "node_id": item["node_id"],
            "output_type": kind_of(item, listed_as).value,
        }
        if as_base64:
            content, why_not = _content(item, listed_as.value, assets, budget) if is_here else _own_content(item)
            budget -= len(content)
            file |= {"error": why_not} if why_not else {"data": content, "mimetype": item["mime_type"]}
        files.append(file)
    return files


def _each(*outputs: Mapping[str, Any]) -> Iterator[tuple[Kind, Any, Any, Any]]:
    for kind in Kind:
        for items in zip(*(output.get(kind.value, []) for output in outputs), strict=True):
            yield (kind, *items)


def _content(item: Mapping[str, Any], kind: str, assets: AssetStore, budget: int) -> tuple[str, str]:
    """Return a file in base64, or why it is left out."""
    if 4 * -(-int(item["size_bytes"]) // 3) > budget:
        return "", "The file does not fit into the response; fetch it from its url"
    return assets.as_base64({kind: [item]})[kind][0]["data"], ""


def _own_content(item: Mapping[str, Any]) -> tuple[str, str]:
    if item["type"] == "base64":
        # Delivered as `both`: in the response and in a bucket.
        return str(item["data"]), ""
    return "", "The file is in a bucket; take it by its url"


# ------------------------------------------------------------------------------------------------------- webhooks


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    as_base64 = bool(record.details.get("as_base64"))
    files = files_of(record.id, record.output or {}, parts.linked(record), parts.assets, as_base64=as_base64)
    result = result_of(record, ended_status(record), files)
    # The wrapper's webhooks do not have it either.
    del result["comfyui_response"]
    return result


def _progress(record: JobRecord, progress: Mapping[str, Any]) -> dict[str, Any]:
    return result_of(record, open_status(record.state, progress, None), [])


def _extra(extra_params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the caller's parameters as `extra`, and beside it, where earlier versions of the wrapper put them."""
    return {**extra_params, "extra": extra_params} if extra_params else {}


WEBHOOK = WebhookFormat(_end, _progress, _extra)

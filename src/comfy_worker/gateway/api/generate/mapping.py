"""What the generate API tells of a job: its result, and on the way where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from comfy_worker.errors import Cancelled, ExecutionFailed, WorkerError, all_errors
from comfy_worker.gateway.api.outputs import kind_of, path_in_job
from comfy_worker.gateway.events.bus import PROGRESS, STATUS, Event
from comfy_worker.gateway.http.limits import RUNSYNC_LIMIT
from comfy_worker.gateway.jobs.assets import AssetStore, with_urls
from comfy_worker.gateway.jobs.queue_position import QueuePosition
from comfy_worker.gateway.jobs.signed_links import PATH
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Kind, Stage

Status = Literal["queued", "processing", "generating", "completed", "failed", "cancelled"]

_ROOM = 100_000
"""Bytes of an answer that are kept for all that is no file."""
_TIMINGS = {"preprocess_ms": "staged_ms", "generation_ms": "executed_ms", "postprocess_ms": "delivered_ms"}
_ENDS: Mapping[JobState, tuple[Status, str]] = {
    JobState.COMPLETED: ("completed", "The job is complete"),
    JobState.FAILED: ("failed", "The job failed"),
    # Clients of this API wait for one of three ends; which kind of failure it was is in `code`.
    JobState.TIMED_OUT: ("failed", "The job took too long"),
    JobState.CANCELLED: ("cancelled", "The job was cancelled"),
}


# ------------------------------------------------------------------------------------------------------- result


class GenerateOutput(BaseModel):
    """One file that the job made."""

    filename: str
    local_path: str = Field(description="The file's path at this gateway, also for one in a bucket; it needs a key.")
    url: str | None = Field(description="A link that works for a while without a key, or the file in the bucket.")
    type: Literal["output", "temp"]
    subfolder: str
    node_id: str
    output_type: str = Field(description="`images`, `videos`, `audio` or `files`.")
    data: str | None = Field(None, description="The file in base64, if that was asked for.")
    mimetype: str | None = Field(None, description="What the data is.")
    error: str | None = Field(None, description="Why there is no data.")


class GenerateResult(BaseModel):
    """Where a request stands, and what it made."""

    id: str
    status: Status
    message: str
    output: list[GenerateOutput]
    timings: dict[str, int] = Field(description="Milliseconds of each stage; `…_at_ms` are since the epoch.")
    comfyui_response: dict[str, Any] = Field(
        description="What ComfyUI's history says of outputs and status, with `X-Include-ComfyUI-Response: 1`."
    )
    texts: list[dict[str, Any]] | None = Field(None, description="Texts that nodes made.")
    errors: list[str] | None = Field(None, description="What went wrong without failing the job.")
    warnings: list[str] | None = Field(None, description="What was ignored in the request that this answers.")
    code: str | None = Field(None, description="Why it failed, for a program.")
    hint: str | None = Field(None, description="How to mend it.")
    details: Any = Field(None, description="What exactly is wrong, where there is more to say.")


def http_status(record: JobRecord) -> int:
    """Return the status of an answer that tells of a job: by the class of its error, if it has one."""
    if record.state is JobState.CANCELLED:
        return Cancelled.http_status
    if record.error is None:
        return 200
    failure = _classes().get(str(record.error.get("code")), WorkerError)
    # A node that raises is what this API calls "processing failed".
    return 500 if issubclass(failure, ExecutionFailed) else failure.http_status


def _classes() -> dict[str, type[WorkerError]]:
    """Return the class of each code; those below it that share the code say nothing else."""
    return {error.code: error for error in reversed(list(all_errors()))}


def result_of(
    record: JobRecord, standing: Standing, output: list[dict[str, Any]], *, with_history: bool = False
) -> dict[str, Any]:
    """Return a job as this API tells of it; `with_history` in ComfyUI's words too."""
    result: dict[str, Any] = {
        "id": record.id,
        "status": standing.status,
        "message": standing.message,
        "output": output,
        "timings": timings_of(record),
        "comfyui_response": history_of(record) if with_history else {},
    }
    for name in ("texts", "errors"):
        if record.output is not None and record.output.get(name):
            result[name] = record.output[name]
    if record.error is not None:
        result |= {name: value for name, value in record.error.items() if name in ("code", "hint", "details")}
    return result


def timings_of(record: JobRecord) -> dict[str, int]:
    """Return when a job was accepted and when it ended, and how long each stage took, in milliseconds."""
    spent = (record.output or {}).get("timings", {})
    stages = {name: int(spent[ours]) for name, ours in _TIMINGS.items() if ours in spent}
    timings = {"queued_at_ms": round(record.created_at * 1000), **stages}
    if record.ended_at is not None:
        total_s = max(0.0, record.ended_at - record.created_at)
        timings |= {"completed_at_ms": round(record.ended_at * 1000), "total_ms": round(total_s * 1000)}
    return timings


def history_of(record: JobRecord) -> dict[str, Any]:
    """Return what ComfyUI's `/history` says of a job's outputs and status, as far as the gateway keeps it."""
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
    """Return the files of a job's output, as the store has it and as `linked` has links to it.

    With `as_base64` their bytes come too, as long as they fit into an answer.
    """
    paths = with_urls(output, lambda path: path)
    budget = RUNSYNC_LIMIT - _ROOM
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
    """Return a file in base64, or why it is not there."""
    if 4 * -(-int(item["size_bytes"]) // 3) > budget:
        return "", "The file does not fit into the answer; take it by its url"
    return assets.as_base64({kind: [item]})[kind][0]["data"], ""


def _own_content(item: Mapping[str, Any]) -> tuple[str, str]:
    if item["type"] == "base64":
        # Delivered as `both`: in the answer and in a bucket.
        return str(item["data"]), ""
    return "", "The file is in a bucket; take it by its url"


# ----------------------------------------------------------------------------------------------------- progress


class QueueStatus(BaseModel):
    """Where a job stands in the queue that it is in."""

    current_queue: Literal["preprocessing", "generation", "postprocessing"] | None
    position: int = Field(description="Among all jobs that wait, counted from 1; 0 for one that is being worked on.")
    queue_size: int = Field(description="All jobs that wait; of one that does not, the jobs of its queue.")
    estimated_wait_time: float | None = Field(description="Seconds; null if that is not known.")


class QueueInfo(BaseModel):
    """How many jobs each queue has."""

    preprocess_queue_size: int = Field(description="Jobs that wait and that no ComfyUI was given.")
    generation_queue_size: int = Field(description="Jobs that a ComfyUI was given, up to the end of their workflow.")
    postprocess_queue_size: int = Field(description="Jobs whose outputs are being delivered.")


class GenerateEvent(BaseModel):
    """One event of `/generate/stream`."""

    request_id: str
    status: Status | Literal["final_result"]
    message: str
    elapsed_time: float = Field(description="Seconds since the request was accepted.")
    queue_position: QueueStatus
    queue_info: QueueInfo
    result: GenerateResult | None = Field(None, description="With the last event, `final_result`.")


@dataclass(frozen=True)
class Standing:
    """Where a job stands.

    Attributes:
        queue: the queue that it is in; None when it has ended.
        position: among all jobs that wait, counted from 1; 0 for one that is being worked on.
        wait_s: how long it will wait, in seconds; None if that is not known.
    """

    status: Status
    message: str
    queue: str | None = None
    position: int = 0
    wait_s: float | None = 0

    def queue_position(self, sizes: Mapping[str, int], waiting: int) -> dict[str, Any]:
        """Return it as this API tells of it, with queues of these sizes and so many jobs that wait in all of them."""
        keys = {"preprocessing": "preprocess", "generation": "generation", "postprocessing": "postprocess"}
        size = 0 if self.queue is None else sizes[keys[self.queue]]
        size = waiting if self.position else size
        return {
            "current_queue": self.queue,
            "position": self.position,
            "queue_size": max(size, self.position),
            "estimated_wait_time": self.wait_s,
        }


def ended(record: JobRecord) -> Standing:
    """Return where a job stands that has ended."""
    status, message = _ENDS[record.state]
    return Standing(status, str(record.error["error"]) if record.error else message)


@dataclass
class Following:
    """Follows a job by its events, or what is remembered of them."""

    _state: JobState = JobState.IN_QUEUE
    _told: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: JobRecord, events: Iterable[Event]) -> Following:
        """Return it for a job of which so much is remembered."""
        following = cls()
        for event in events:
            following.hear(event)
        if following._state is not record.state:
            following = cls(record.state)
        return following

    def hear(self, event: Event) -> None:
        """Take in what happened."""
        if event.type == STATUS:
            # What was told before belongs to another turn of it.
            self._state, self._told = JobState(event.data["status"]), {}
        elif event.type == PROGRESS:
            self._told = event.data

    @property
    def has_ended(self) -> bool:
        """Whether its end was heard."""
        return self._state.is_terminal

    def standing(self, place: QueuePosition | None) -> Standing:
        """Return where the job stands, which is at this place of the queue."""
        if self._state is JobState.IN_QUEUE:
            return self._waiting(place)
        if self._told.get("stage") == Stage.DELIVERING.value:
            return Standing("processing", "Delivering the outputs", "postprocessing")
        words = f"ComfyUI runs the workflow ({self._told.get('percent', 0):g} %)"
        return Standing("generating", self._message(words), "generation")

    def _message(self, otherwise: str) -> str:
        told = self._told
        if node := told.get("node"):
            step = f", step {told['step']:g} of {told['steps']:g}" if told.get("steps") else ""
            return f"Running {node.get('title') or node['id']}{step} ({told.get('percent', 0):g} %)"
        return str(told.get("notice") or otherwise)

    def _waiting(self, place: QueuePosition | None) -> Standing:
        is_in_comfyui = place is not None and place.stage == Stage.QUEUED.value
        notice = str(self._told.get("notice") or "") if place is None else place.notice
        position = 1 if place is None else max(1, place.position or 1)
        queue = "generation" if is_in_comfyui else "preprocessing"
        wait_s = None if place is None else place.wait_s
        return Standing("queued", notice or _behind(position - 1), queue, position, wait_s)


def _behind(others: int) -> str:
    if others == 0:
        return "The request is next"
    return f"The request waits behind {'one other' if others == 1 else f'{others} others'}"


# ---------------------------------------------------------------------------------------------------- webhooks


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    as_base64 = bool(record.details.get("as_base64"))
    files = files_of(record.id, record.output or {}, parts.linked(record), parts.assets, as_base64=as_base64)
    result = result_of(record, ended(record), files)
    # ComfyUI's words are for who asks for them: the wrapper leaves them out, too.
    return {name: value for name, value in result.items() if name != "comfyui_response"}


def _progress(record: JobRecord, told: Mapping[str, Any]) -> dict[str, Any]:
    return result_of(record, Following(record.state, told).standing(None), [])


def _extra(extra_params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the caller's parameters as the wrapper gave them back first, beside its fields, and does today."""
    return {**extra_params, "extra": extra_params} if extra_params else {}


WEBHOOK = WebhookFormat(_end, _progress, _extra)

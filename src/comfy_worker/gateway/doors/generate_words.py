"""The generate API's words: its request in RunPod's words, a job's events and record in its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from comfy_worker.errors import Cancelled, ExecutionFailed, InvalidInput, WorkerError, all_errors
from comfy_worker.gateway.answers import EXAMPLE_JOB, BucketConfig, Policy
from comfy_worker.gateway.assets import AssetStore, with_urls
from comfy_worker.gateway.bodies import RUNPODS_FIELDS
from comfy_worker.gateway.doors.outputs import kind_of
from comfy_worker.gateway.events import PROGRESS, STATUS, Event
from comfy_worker.gateway.limits import RUNSYNC_LIMIT
from comfy_worker.gateway.records import JobRecord
from comfy_worker.gateway.service import Place
from comfy_worker.jobs import JobState, Kind, Stage

Status = Literal["queued", "processing", "generating", "completed", "failed", "cancelled"]

_OWN_FIELDS = ("request_id", "modifier", "modifications", "workflow_json", "return_outputs_as_base64", "s3", "webhook")
_OTHERS_FIELDS = ("workflow", "template")
_AWS = "https://s3.amazonaws.com"
_BUCKET_FIELDS = ("access_key_id", "secret_access_key", "bucket_name")
_MOST_NAMED = 10
_ROOM = 100_000
"""Bytes of an answer that are kept for all that is no file."""
_ENDS: Mapping[JobState, tuple[Status, str]] = {
    JobState.COMPLETED: ("completed", "The job is complete"),
    JobState.FAILED: ("failed", "The job failed"),
    # Clients of this API wait for one of three ends; which kind of failure it was is in `code`.
    JobState.TIMED_OUT: ("failed", "The job took too long"),
    JobState.CANCELLED: ("cancelled", "The job was cancelled"),
}


# ------------------------------------------------------------------------------------------------------ request


class GenerateBucket(BaseModel):
    """Where the outputs go. With every field empty it is as if it were not there."""

    model_config = ConfigDict(extra="allow")
    access_key_id: str | None = ""
    secret_access_key: str | None = ""
    endpoint_url: str | None = Field("", description=f"{_AWS} if empty.")
    bucket_name: str | None = ""
    region: str | None = ""


class GenerateWebhook(BaseModel):
    """Who is told of the job's end; see docs/webhooks.md. Without a URL it is as if it were not there."""

    model_config = ConfigDict(extra="allow")
    url: str | None = ""
    extra_params: dict[str, Any] | None = Field(None, description="Comes back with each message.")


class GenerateInput(BaseModel):
    """What is to be run; beside these, whatever RunPod's `input` takes (`files`, `delivery`, `timeout_s`, …)."""

    model_config = ConfigDict(extra="allow")
    request_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{0,128}$",
        description="The caller's own name for the job, which no other has; a UUID is made if it is empty.",
    )
    modifier: str | None = Field(None, max_length=255, description="Name of the modifier that makes the workflow.")
    modifications: dict[str, Any] | None = Field(None, description="The modifier's values.")
    workflow_json: dict[str, Any] | None = Field(
        None, description="The graph in ComfyUI's API format, in place of a modifier."
    )
    s3: GenerateBucket | None = None
    webhook: GenerateWebhook | None = None
    return_outputs_as_base64: StrictBool | None = Field(
        None, description="Whether the files' bytes come in the answer too."
    )


class GenerateRequest(BaseModel):
    """A request to generate."""

    HINT: ClassVar[str] = 'Send {"input": {"workflow_json": {…}}} or {"input": {"modifier": "…", "modifications": {…}}}'
    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"input": {"workflow_json": EXAMPLE_JOB["input"]["workflow"]}}]},
    )
    input: GenerateInput
    webhook: str | None = Field(
        None, description="URL that is told of the job's end, as RunPod's; `input.webhook` goes before it."
    )
    policy: Policy | None = None
    s3Config: BucketConfig | None = Field(
        None, description="Where the outputs go, in RunPod's words; `input.s3` goes before it."
    )


def check_source(job_input: Mapping[str, Any]) -> None:
    """Refuse an input that has no workflow, or two.

    Raises:
        InvalidInput: it has both a modifier and a workflow, or neither; or another API's word for one.
    """
    for name in _OTHERS_FIELDS:
        if job_input.get(name) is not None:
            raise InvalidInput(f"input.{name} belongs to /run; this API takes workflow_json or modifier")
    if job_input.get("workflow_json") and job_input.get("modifier"):
        raise InvalidInput("input has both a workflow_json and a modifier; send one of them")
    if not job_input.get("workflow_json") and not job_input.get("modifier"):
        raise InvalidInput("input needs a workflow_json or a modifier", hint=GenerateRequest.HINT)
    if job_input.get("modifications") and not job_input.get("modifier"):
        raise InvalidInput("input.modifications are for a modifier, and input names none")


def not_read(names: Sequence[str]) -> list[str]:
    """Return, for the answer, a sentence for each of the caller's modifications that the modifier never looked at."""
    said = [f"input.modifications.{name} was not read by the modifier" for name in names[:_MOST_NAMED]]
    more = len(names) - _MOST_NAMED
    return [*said, f"{more} more modifications were not read"] if more > 0 else said


def runpod_request(body: Mapping[str, Any], workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request in RunPod's words, with the workflow that it is to run.

    Raises:
        InvalidInput: a part of its bucket is missing.
    """
    job_input = body["input"]
    rest = {name: value for name, value in job_input.items() if name not in _OWN_FIELDS}
    bucket, webhook = _bucket(job_input.get("s3") or {}), _filled(job_input.get("webhook") or {})
    request: dict[str, Any] = {"input": {**rest, "workflow": workflow}}
    if bucket:
        request["input"]["s3"] = bucket
    if webhook.get("url"):
        request["input"]["webhook"] = webhook
    return {**request, **{name: body[name] for name in RUNPODS_FIELDS if body.get(name)}}


def _bucket(given: Mapping[str, Any]) -> dict[str, Any]:
    bucket = _filled(given)
    missing = [name for name in _BUCKET_FIELDS if name not in bucket]
    if not bucket or len(missing) == len(_BUCKET_FIELDS):
        return {}
    if missing:
        raise InvalidInput(f"input.s3 is only half there: {' and '.join(missing)} must be given too")
    return {"endpoint_url": _AWS, **bucket}


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not empty: clients send whole forms in which they filled in a few."""
    return {name: value for name, value in given.items() if value not in ("", None)}


# ------------------------------------------------------------------------------------------------------- result


class GenerateOutput(BaseModel):
    """One file that the job made."""

    filename: str
    local_path: str | None = Field(description="Below the gateway's own folder for outputs; null for one in a bucket.")
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


def result_of(record: JobRecord, standing: Standing, output: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a job as this API tells of it."""
    result: dict[str, Any] = {
        "id": record.id,
        "status": standing.status,
        "message": standing.message,
        "output": output,
    }
    for name in ("texts", "errors"):
        if record.output is not None and record.output.get(name):
            result[name] = record.output[name]
    if record.error is not None:
        result |= {name: value for name, value in record.error.items() if name in ("code", "hint", "details")}
    return result


def files_of(
    output: Mapping[str, Any], linked: Mapping[str, Any], assets: AssetStore, *, as_base64: bool
) -> list[dict[str, Any]]:
    """Return the files of an output, as the store has it and as `linked` has links to it.

    With `as_base64` their bytes come too, as long as they fit into an answer.
    """
    paths = with_urls(output, lambda path: path)
    budget = RUNSYNC_LIMIT - _ROOM
    files = []
    for listed_as, item, link, path in _each(output, linked, paths):
        is_here = path["data"] != item["data"]
        file = {
            "filename": item["filename"],
            "local_path": path["data"] if is_here else None,
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


class QueuePosition(BaseModel):
    """Where a job stands in the queue that it is in."""

    current_queue: Literal["preprocessing", "generation", "postprocessing"] | None
    position: int = Field(description="Counted from 1; 0 for one that is being worked on.")
    queue_size: int
    estimated_wait_time: float | None = Field(description="Seconds; null if that is not known.")


class QueueInfo(BaseModel):
    """How many jobs each queue has."""

    preprocess_queue_size: int = Field(description="Jobs that wait for their turn.")
    generation_queue_size: int = Field(description="Jobs that a ComfyUI was given, up to the end of their workflow.")
    postprocess_queue_size: int = Field(description="Jobs whose outputs are being delivered.")


class GenerateEvent(BaseModel):
    """One event of `/generate/stream`."""

    request_id: str
    status: Status | Literal["final_result"]
    message: str | None = None
    elapsed_time: float = Field(description="Seconds since the request was accepted.")
    queue_position: QueuePosition | None = None
    queue_info: QueueInfo | None = None
    result: GenerateResult | None = Field(None, description="With the last event, `final_result`.")


@dataclass(frozen=True)
class Standing:
    """Where a job stands.

    Attributes:
        queue: the queue that it is in; None when it has ended.
        position: in this queue, counted from 1; 0 for one that is being worked on.
        wait_s: how long it will wait, in seconds; None if that is not known.
    """

    status: Status
    message: str
    queue: str | None = None
    position: int = 0
    wait_s: float | None = 0

    def queue_position(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return it as this API tells of it, with queues of these sizes."""
        keys = {"preprocessing": "preprocess", "generation": "generation", "postprocessing": "postprocess"}
        size = sizes[keys[self.queue]] if self.queue else 0
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

    def standing(self, place: Place | None) -> Standing:
        """Return where the job stands, which is at this place of the queue."""
        stage = self._told.get("stage")
        if self._state is JobState.IN_QUEUE:
            return _waiting(place)
        if stage == Stage.QUEUED.value:
            position = max(1, int(self._told.get("queue_position") or 0))
            return Standing("processing", self._message("Waiting for ComfyUI"), "generation", position, None)
        if stage == Stage.RUNNING.value:
            words = f"ComfyUI runs the workflow ({self._told.get('percent', 0):g} %)"
            return Standing("generating", self._message(words), "generation")
        if stage == Stage.DELIVERING.value:
            return Standing("processing", "Delivering the outputs", "postprocessing")
        return Standing("processing", self._message("Staging the inputs"), "preprocessing")

    def _message(self, otherwise: str) -> str:
        told = self._told
        if node := told.get("node"):
            step = f", step {told['step']:g} of {told['steps']:g}" if told.get("steps") else ""
            return f"Running {node.get('title') or node['id']}{step} ({told.get('percent', 0):g} %)"
        return str(told.get("notice") or otherwise)


def _waiting(place: Place | None) -> Standing:
    if place is None:
        return Standing("queued", "The request was queued", "preprocessing", 1, None)
    return Standing("queued", "The request was queued", "preprocessing", place.position + 1, place.wait_s)

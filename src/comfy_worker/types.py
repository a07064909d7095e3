"""What a job is, what it becomes and what happens on the way: data without behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypeAlias

Workflow: TypeAlias = Mapping[str, Any]
"""A graph in ComfyUI's API format: node id to `{class_type, inputs, _meta}`."""


class JobState(str, Enum):
    """RunPod's states of a job; a terminal one never changes."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has come to its end."""
        return self not in (JobState.IN_QUEUE, JobState.IN_PROGRESS)


@dataclass(frozen=True)
class InputFile:
    """A file that the workflow loads; it has either its content or a URL.

    Attributes:
        name: as the workflow refers to it; may have folders (`poses/a.png`), never leads out of its own.
        content: the bytes, where the job brought them.
        url: http(s) or s3, where they are to be fetched.
    """

    name: str
    content: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)


DeliveryType: TypeAlias = Literal["auto", "base64", "s3", "both", "local"]


@dataclass(frozen=True)
class Delivery:
    """How the caller wants the outputs.

    Attributes:
        type: `auto` puts into the answer what fits, and the rest into the bucket; `both` does both with each file;
            `local` leaves it in a folder that somebody serves; None is what the worker's settings say.
        prefix: folder in the bucket; the job's id if None.
        expires_s: how long a presigned URL is good for, in seconds; the worker's setting if None.
    """

    type: DeliveryType | None = None
    prefix: str | None = None
    expires_s: int | None = None


@dataclass(frozen=True)
class Conversion:
    """How pictures are to be made smaller before they are delivered.

    Attributes:
        format: what they become; None leaves the format.
        quality: of JPEG and WebP, 1 to 100.
        max_side: longest side in pixels; larger ones are scaled down, smaller ones left.
        keep_metadata: whether the workflow and prompt that ComfyUI writes into pictures stay in them; the worker's
            setting if None.
    """

    format: Literal["png", "jpeg", "webp"] | None = None
    quality: int = 90
    max_side: int | None = None
    keep_metadata: bool | None = None


@dataclass(frozen=True)
class JobBucket:
    """A bucket of the caller's own, for the outputs (and `s3://` inputs) of one job; never stored or logged.

    Its `name` may be left to the endpoint, or else to the month.
    """

    endpoint_url: str
    name: str | None
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    region: str | None = None


@dataclass(frozen=True)
class Webhook:
    """Who is told of the job's end.

    Attributes:
        url: gets a POST.
        secret: signs it, as Standard Webhooks describes; None leaves it unsigned.
        extra_params: handed back with it.
        progress: whether progress is told too.
    """

    url: str
    secret: str | None = field(default=None, repr=False)
    extra_params: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False


@dataclass(frozen=True)
class Job:
    """One workflow to run.

    Attributes:
        id: the door's name for the job (RunPod's id, say).
        prompt_id: our uuid for it in ComfyUI; names its input and output folders too, so that jobs cannot meet and a
            lost answer can be looked up. A second attempt gets an id of its own.
        workflow: the graph, as the caller sent it.
        files: what the graph loads.
        delivery: how to hand the outputs back.
        conversion: how to make pictures smaller; None leaves them.
        bucket: the caller's own; None for the worker's.
        webhook: who is told of the end; None for whoever the worker's settings name.
        timeout_s: how long ComfyUI may take from submission to end, in seconds; the worker's setting if None.
        execution_timeout_s: how long the whole job may take from its start, as the platform says; None for no limit.
        staging_timeout_s: how long its inputs may take from their turn, where nobody watches the whole job; None for no
            limit. `timeout_s` is one, too.
        retry_on_crash: run the workflow again, once, if ComfyUI dies while it runs; the worker's setting if None.
        strict: a workflow of which ComfyUI would skip an invalid part is a failure, not a warning.
        include_previews: hand back files of type `temp` too.
        comfy_org_api_key: key for ComfyUI's paid API nodes.
        extra_data: passed on with the prompt.
        resumed: its prompt may be in ComfyUI already, sent there by a gateway that was killed meanwhile.
        warnings: what was odd about the input without being wrong.
    """

    id: str
    prompt_id: str
    workflow: Workflow
    files: tuple[InputFile, ...] = ()
    delivery: Delivery = Delivery()
    conversion: Conversion | None = None
    bucket: JobBucket | None = None
    webhook: Webhook | None = None
    timeout_s: float | None = None
    execution_timeout_s: float | None = None
    staging_timeout_s: float | None = None
    retry_on_crash: bool | None = None
    strict: bool = False
    include_previews: bool = False
    comfy_org_api_key: str | None = field(default=None, repr=False)
    extra_data: Mapping[str, Any] = field(default_factory=dict, repr=False)
    resumed: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def secrets(self) -> list[str]:
        """Values that the job brought and nobody else may see."""
        values = (value for name, value in self.extra_data.items() if "key" in name or "token" in name)
        bucket = (self.bucket.access_key_id, self.bucket.secret_access_key) if self.bucket else ()
        webhook = (self.webhook.secret,) if self.webhook else ()
        return [value for value in (self.comfy_org_api_key, *bucket, *webhook, *values) if isinstance(value, str)]


# ------------------------------------------------------------------------------------------------ outputs


class Kind(str, Enum):
    """Which list of the answer an output stands in."""

    IMAGE = "images"
    VIDEO = "videos"
    AUDIO = "audio"
    FILE = "files"


@dataclass(frozen=True)
class OutputFile:
    """A file that a node reported, or a picture that it sent over the websocket.

    Attributes:
        filename: its name, without folder.
        subfolder: where it lies below ComfyUI's folder of that type; "" for a websocket picture.
        type: ComfyUI's `output` or `temp`; `websocket` for a picture that was never a file.
        kind: which list of the answer it stands in.
        node_id: the node that made it, with `class_type` and `title`.
        index: its place among that node's files, from 0.
    """

    filename: str
    subfolder: str
    type: str
    kind: Kind
    node_id: str
    class_type: str
    title: str
    index: int


@dataclass(frozen=True)
class OutputText:
    """A text that a node reported."""

    node_id: str
    class_type: str
    title: str
    text: str


@dataclass(frozen=True)
class Delivered:
    """Where an output can be had.

    Attributes:
        type: "base64": `data` is the file itself; "s3_url" and "url": `data` is where it can be fetched.
        url: where it can be fetched as well, if it is in the answer and in a bucket.
    """

    type: Literal["base64", "s3_url", "url"]
    data: str = field(repr=False)
    url: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Artifact:
    """An output in the caller's hands.

    Attributes:
        file: who made it and what it is called.
        folder: its folder below the job's own, "" for none; what the caller wrote in front of `filename_prefix`.
        delivered: where it can be had.
        mime_type: by its content, or else by its name.
        size_bytes: of the file itself.
        width: in pixels, for a picture or a video; None otherwise. So `height`.
        duration_s: of a video or a sound, in seconds; None where it is not known.
    """

    file: OutputFile
    folder: str
    delivered: Delivered
    mime_type: str
    size_bytes: int
    width: int | None = None
    height: int | None = None
    duration_s: float | None = None


@dataclass(frozen=True)
class Timings:
    """How long each part of a job took, in milliseconds."""

    staged_ms: int = 0
    queued_ms: int = 0
    executed_ms: int = 0
    delivered_ms: int = 0
    total_ms: int = 0


@dataclass(frozen=True)
class JobResult:
    """What a job hands back, all or, if it failed, what it had made; `warnings` is what went wrong besides."""

    prompt_id: str
    artifacts: tuple[Artifact, ...]
    texts: tuple[OutputText, ...]
    warnings: tuple[str, ...]
    timings: Timings


# ------------------------------------------------------------------------------------------------- events


class Stage(str, Enum):
    """Which part of its way a job is on."""

    STAGING = "staging"
    QUEUED = "queued"
    RUNNING = "running"
    DELIVERING = "delivering"


@dataclass(frozen=True)
class JobStarted:
    """The job was parsed and begins; `workflow` is the graph that its input or its template stands for."""

    workflow: Workflow = field(repr=False)


@dataclass(frozen=True)
class StageStarted:
    """The job entered the next part of its way."""

    stage: Stage


@dataclass(frozen=True)
class PromptsAhead:
    """How many prompts ComfyUI runs before this one; 0: it is next or running."""

    ahead: int


@dataclass(frozen=True)
class NodesCached:
    """Nodes whose results ComfyUI still has and does not make again."""

    node_ids: tuple[str, ...]


@dataclass(frozen=True)
class NodeStarted:
    """A node is at work."""

    node_id: str
    class_type: str
    title: str


@dataclass(frozen=True)
class NodeProgress:
    """The running node did `value` of `maximum` steps."""

    node_id: str
    value: float
    maximum: float


@dataclass(frozen=True)
class NodeFinished:
    """A node is done."""

    node_id: str


@dataclass(frozen=True)
class Preview:
    """A picture of an unfinished result."""

    node_id: str
    mime_type: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Notice:
    """One sentence on why the job is not getting on, or what was done about it."""

    text: str


JobEvent: TypeAlias = (
    JobStarted
    | StageStarted
    | PromptsAhead
    | NodesCached
    | NodeStarted
    | NodeProgress
    | NodeFinished
    | Preview
    | Notice
)
OnEvent: TypeAlias = Callable[[JobEvent], None]


def ignore_events(_event: JobEvent) -> None:
    """Be the `on_event` of a caller who does not care."""

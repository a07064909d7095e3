"""Jobs, their results and their events: data without behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AliasChoices, Field, StrictBool, StrictInt, StrictStr
from pydantic.dataclasses import dataclass as pydantic_dataclass

Workflow: TypeAlias = Mapping[str, Any]
"""A graph in ComfyUI's API format: `{class_type, inputs, _meta}` by node id."""


class JobState(str, Enum):
    """RunPod's states of a job. A terminal state never changes."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return self not in (JobState.IN_QUEUE, JobState.IN_PROGRESS)


@dataclass(frozen=True)
class InputFile:
    """A file that the workflow loads, with either its content or a URL.

    Attributes:
        name: its name in the workflow; may contain folders (`poses/a.png`), but never leads out of the job's folder.
        content: the bytes, if the job contains them.
        url: an http(s) or s3 URL, from which to download them.
    """

    name: str
    content: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)


DeliveryType: TypeAlias = Literal["auto", "base64", "s3", "both", "local"]


@pydantic_dataclass(frozen=True)
class Delivery:
    """How the outputs are delivered.

    Attributes:
        type: `auto` puts files into the response if they fit, and the others into the bucket; `both` uses both for each
            file; `local` writes into a folder that a web server serves; None means the worker's setting.
        prefix: a folder in the bucket; the job's id if None.
        expires_s: seconds until a presigned URL expires; the worker's setting if None.
    """

    type: DeliveryType | None = None
    prefix: StrictStr | None = None
    expires_s: Annotated[StrictInt, Field(ge=1, le=7 * 24 * 3600)] | None = None


@pydantic_dataclass(frozen=True)
class Conversion:
    """How images are converted before they are delivered.

    Attributes:
        format: the new format; None leaves it unchanged.
        quality: of JPEG and WebP, 1 to 100.
        max_side: the longest side in pixels; larger images are scaled down.
        keep_metadata: whether images keep the workflow and prompt that ComfyUI writes into them; the worker's setting
            if None.
    """

    format: Literal["png", "jpeg", "webp"] | None = None
    quality: Annotated[StrictInt, Field(ge=1, le=100)] = 90
    max_side: Annotated[StrictInt, Field(ge=1, le=65535)] | None = None
    keep_metadata: StrictBool | None = None


@pydantic_dataclass(frozen=True)
class JobBucket:
    """The caller's bucket for the outputs and `s3://` inputs of one job. Never stored or logged.

    Without a `name`, the endpoint or the current month names the bucket. In a request, the fields have the names of
    `input.s3` or those of RunPod's own `s3Config`.
    """

    endpoint_url: StrictStr = Field(validation_alias=AliasChoices("endpoint_url", "endpointUrl"))
    access_key_id: StrictStr = Field(validation_alias=AliasChoices("access_key_id", "accessId"), repr=False)
    secret_access_key: StrictStr = Field(validation_alias=AliasChoices("secret_access_key", "accessSecret"), repr=False)
    name: StrictStr | None = Field(default=None, validation_alias=AliasChoices("bucket_name", "bucketName"))
    region: StrictStr | None = None


@pydantic_dataclass(frozen=True)
class Webhook:
    """The receiver of a job's webhooks.

    Attributes:
        url: receives a POST when the job ends.
        secret: signs the messages as Standard Webhooks defines; None leaves them unsigned.
        extra_params: sent back in each message.
        progress: whether to send progress too.
    """

    url: StrictStr
    secret: StrictStr | None = Field(default=None, repr=False)
    extra_params: dict[str, Any] = Field(default_factory=dict)
    progress: StrictBool = False


@dataclass(frozen=True)
class Job:
    """One workflow to run.

    Attributes:
        id: the caller's id of the job, such as RunPod's.
        prompt_id: a uuid for it in ComfyUI. It also names the input and output folders, so that jobs cannot overwrite
            each other's files, and a lost response can be looked up. A second attempt gets another one.
        workflow: the graph as the caller sent it.
        files: the files that the graph loads.
        delivery: how to deliver the outputs.
        conversion: how to convert images; None leaves them unchanged.
        bucket: the caller's bucket; None for the worker's.
        webhook: the receiver of webhooks; None for that of the worker's settings.
        timeout_s: seconds that ComfyUI may take from submission to end; the worker's setting if None.
        execution_timeout_s: seconds that the whole job may take, set by the platform; None for no limit.
        staging_timeout_s: seconds that staging may take if nothing else limits the whole job; None for no limit.
            `timeout_s` limits it too.
        retry_on_crash: whether to run the workflow once more if ComfyUI dies; the worker's setting if None.
        strict: whether the job fails if ComfyUI would skip an invalid part of the workflow, instead of a warning.
        include_previews: whether files of type `temp` are outputs too.
        comfy_org_api_key: the key for ComfyUI's paid API nodes.
        extra_data: sent to ComfyUI with the prompt.
        resumed: whether a gateway that was killed meanwhile may have sent its prompt to ComfyUI already.
        warnings: sentences about oddities in the input that are no errors.
    """

    id: str
    prompt_id: str
    workflow: Workflow
    files: tuple[InputFile, ...] = ()
    delivery: Delivery = field(default_factory=Delivery)
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
        """The secret values in the job."""
        values = (value for name, value in self.extra_data.items() if "key" in name or "token" in name)
        bucket = (self.bucket.access_key_id, self.bucket.secret_access_key) if self.bucket else ()
        webhook = (self.webhook.secret,) if self.webhook else ()
        return [value for value in (self.comfy_org_api_key, *bucket, *webhook, *values) if isinstance(value, str)]


# ------------------------------------------------------------------------------------------------ outputs


class Kind(str, Enum):
    """The list of the response that contains an output."""

    IMAGE = "images"
    VIDEO = "videos"
    AUDIO = "audio"
    FILE = "files"


@dataclass(frozen=True)
class OutputFile:
    """A file that a node reported, or an image that it sent over the websocket.

    Attributes:
        filename: its name without folders.
        subfolder: its folder in ComfyUI's folder of that type; "" for an image from the websocket.
        type: ComfyUI's `output` or `temp`; `websocket` for an image that was never a file.
        kind: the list of the response that contains it.
        node_id: the id of the node that created it.
        class_type: the class of that node.
        title: the title of that node.
        index: its index among the files of that node.
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
    """Where an output was delivered.

    Attributes:
        type: what `data` is: the file as base64, or its URL.
        data: the file or its URL.
        url: the URL of a file that is in the response and in a bucket.
    """

    type: Literal["base64", "s3_url", "url"]
    data: str = field(repr=False)
    url: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Artifact:
    """An output that was delivered.

    Attributes:
        file: its name and its node.
        folder: its folder in the job's folder, from the workflow's `filename_prefix`; "" for none.
        delivered: where it was delivered.
        mime_type: its type according to its content or, if that is unknown, its name.
        size_bytes: the size of the file.
        width: the width in pixels of an image or a video; otherwise None.
        height: the height, likewise.
        duration_s: the duration in seconds of a video or audio; None if unknown.
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
    """The duration of each stage of a job, in milliseconds."""

    staged_ms: int = 0
    queued_ms: int = 0
    executed_ms: int = 0
    delivered_ms: int = 0
    total_ms: int = 0


@dataclass(frozen=True)
class JobResult:
    """The outputs of a job or, if it failed, those that exist; `warnings` are problems that did not fail it."""

    prompt_id: str
    artifacts: tuple[Artifact, ...]
    texts: tuple[OutputText, ...]
    warnings: tuple[str, ...]
    timings: Timings


# ------------------------------------------------------------------------------------------------- events


class Stage(str, Enum):
    """A stage of a job."""

    STAGING = "staging"
    QUEUED = "queued"
    RUNNING = "running"
    DELIVERING = "delivering"


@dataclass(frozen=True)
class JobStarted:
    """The job was parsed and starts; `workflow` is its graph, expanded if it names a template."""

    workflow: Workflow = field(repr=False)


@dataclass(frozen=True)
class StageStarted:
    """The job entered a stage."""

    stage: Stage


@dataclass(frozen=True)
class PromptsAhead:
    """The number of prompts that ComfyUI runs before this one; 0 if it is next or running."""

    ahead: int


@dataclass(frozen=True)
class NodesCached:
    """ComfyUI has the results of these nodes in its cache and skips them."""

    node_ids: tuple[str, ...]


@dataclass(frozen=True)
class NodeStarted:
    """A node started."""

    node_id: str
    class_type: str
    title: str


@dataclass(frozen=True)
class NodeProgress:
    """The running node has done `value` of `maximum` steps."""

    node_id: str
    value: float
    maximum: float


@dataclass(frozen=True)
class NodeFinished:
    """A node finished."""

    node_id: str


@dataclass(frozen=True)
class Preview:
    """A preview image of an unfinished result."""

    node_id: str
    mime_type: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Notice:
    """A sentence about why the job makes no progress, or what was done about it."""

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
    """Do nothing; the default `on_event`."""

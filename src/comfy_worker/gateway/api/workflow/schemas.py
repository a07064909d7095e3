"""What the workflow API takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB, RequestModel, body_examples
from comfy_worker.types import JobState

MAX_BATCH_RUNS = 100
_EXAMPLE_GRAPH: dict[str, Any] = EXAMPLE_JOB["input"]["workflow"]

WorkflowState = Literal["pending", "running", "completed", "failed", "cancelled"]
STATES: Mapping[JobState, WorkflowState] = {
    JobState.IN_QUEUE: "pending",
    JobState.IN_PROGRESS: "running",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.TIMED_OUT: "failed",
    JobState.CANCELLED: "cancelled",
}

Seed = Annotated[StrictInt, Field(ge=0, le=2**64 - 1)]


class _WorkflowRequest(RequestModel):
    workflow: dict[str, Any] | None = Field(
        None, description='The graph in ComfyUI\'s API format, bare or as `{"prompt": {…}}`.'
    )
    template: str | None = Field(None, description="A named workflow instead: `name`, or `name@version`.")
    version: str | None = Field(None, description="The version of the named workflow; the current one if left out.")
    prompt: str | None = Field(
        None,
        description="Replaces the positive prompt: the named workflow's parameter `prompt`, or else the text at the "
        "sampler's positive input. An empty one counts as left out.",
    )
    extra_data: dict[str, Any] | None = Field(None, description="Passed on to ComfyUI.")
    images: list[dict[str, Any]] | None = Field(
        None, description="Input files: `{name, image}` (base64 or data URI) or `{name, url}`."
    )


class SubmitRequest(_WorkflowRequest):
    """A workflow to run."""

    HINT: ClassVar[str] = 'Send {"workflow": {"prompt": {…}}}'
    inputs: dict[str, Any] | None = Field(None, description="The named workflow's parameters.")
    cache: StrictBool = Field(
        False,
        description="Whether the job of an identical earlier request may be returned, if it has not failed or expired.",
    )


class BatchRequest(_WorkflowRequest):
    """One workflow to run many times: once for each of `inputs`, `seeds` or `sets`."""

    HINT: ClassVar[str] = 'Send {"workflow": {"prompt": {…}}, "seeds": [1, 2, 3]}'
    inputs: list[dict[str, Any]] | dict[str, Any] | None = Field(
        None,
        description="A list: for each run, the named workflow's parameters, or values by `<node id>.<input>`. "
        "An object: the parameters of all runs.",
    )
    seeds: list[Seed] | None = Field(
        None, description="For each run, the value of every `seed` and `noise_seed` of the graph."
    )
    sets: list[dict[str, Any]] | None = Field(None, description="For each run, values by `<node id>.<input>`.")


class VideoRequest(RequestModel):
    """A video to make with HunyuanVideo."""

    HINT: ClassVar[str] = 'Send {"prompt": "…", "duration": 5, "resolution": "512x512"}'
    prompt: str = Field(min_length=1, description="What the video is to show.")
    duration: float | None = Field(None, description="Seconds.")
    resolution: str | None = Field(
        None, pattern=r"^[0-9]{1,5}[xX][0-9]{1,5}$", description="Width and height in pixels, `512x512`."
    )
    style: str | None = Field(None, description="A word or two, such as cinematic.")
    extra_params: dict[str, Any] | None = Field(None, description="The named workflow's other parameters.")


SubmitBody = Annotated[SubmitRequest, body_examples({"workflow": {"prompt": _EXAMPLE_GRAPH}})]
BatchBody = Annotated[
    BatchRequest,
    body_examples({"workflow": {"prompt": _EXAMPLE_GRAPH}, "sets": [{"1.color": 255}, {"1.color": 65280}]}),
]
VideoBody = Annotated[
    VideoRequest,
    body_examples(
        {
            "prompt": "A beautiful sunset over mountains",
            "duration": 1,
            "resolution": "128x128",
            "style": "cinematic",
            "extra_params": {"steps": 2},
        }
    ),
]


class SubmitResponse(BaseModel):
    """A workflow that was accepted."""

    prompt_id: str
    status: WorkflowState
    message: str
    cached: bool | None = Field(None, description="True if this is the job of an identical earlier request.")
    warnings: list[str] | None = Field(None, description="What was ignored.")


class WorkflowStatus(BaseModel):
    """The status of a workflow."""

    prompt_id: str
    status: WorkflowState
    progress: float = Field(description="How much of the workflow has run, from 0 to 100.")
    current_node: str | None = Field(description="The id of the running node.")
    current_node_title: str | None = Field(description="Its title in the workflow.")
    output_images: list[str] = Field(description="A link to each image.")
    output_videos: list[str] = Field(description="A link to each video.")
    output_audio: list[str] | None = None
    output_files: list[str] | None = None
    texts: list[str] | None = None
    warnings: list[str] | None = Field(None, description="What went wrong without failing the workflow.")
    error: str | None = Field(description="Why it failed.")
    error_code: str | None = Field(None, description="The same for programs.")
    error_hint: str | None = Field(None, description="How to fix it.")
    queue_position: int | None = Field(None, description="Its position in the queue; 1 is next.")
    notice: str | None = Field(None, description="Why it does not proceed.")
    estimated_time_remaining: int | None = Field(description="Seconds until its end; null if unknown.")


class CancelResponse(BaseModel):
    """A workflow that was cancelled, or had ended before."""

    prompt_id: str
    status: WorkflowState
    message: str


class WorkflowQueue(BaseModel):
    """All workflows that have not ended, the next one first: `[number, prompt_id, {}]`."""

    running: list[list[Any]]
    pending: list[list[Any]]


class BatchResponse(BaseModel):
    """A batch that was accepted."""

    batch_id: str
    prompt_ids: list[str]
    count: int
    status: WorkflowState
    message: str
    warnings: list[str] | None = None


class BatchStatus(BaseModel):
    """The status of a batch."""

    batch_id: str
    status: WorkflowState
    count: int = Field(description="How many of its workflows have not expired.")
    counts: dict[WorkflowState, int]
    jobs: list[WorkflowStatus]


class BatchCancelResponse(BaseModel):
    """A batch whose unfinished workflows were cancelled."""

    batch_id: str
    status: WorkflowState
    counts: dict[WorkflowState, int]
    message: str


class WorkflowVersion(BaseModel):
    """A version of a named workflow."""

    version: str
    title: str
    current: bool = Field(description="Whether requests without a version use it.")


class WorkflowVersions(BaseModel):
    """All known versions of a named workflow, newest first."""

    name: str
    versions: list[WorkflowVersion]

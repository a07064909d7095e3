"""The words of the workflow API: what it is sent and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB
from comfy_worker.types import JobState

MOST_IN_BATCH = 100
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


class _WorkflowRequest(BaseModel):
    model_config = ConfigDict(extra="allow")
    workflow: dict[str, Any] | None = Field(
        None, description='The graph in ComfyUI\'s API format, bare or as `{"prompt": {…}}`.'
    )
    template: str | None = Field(None, description="A named workflow in place of one: `name`, or `name@version`.")
    version: str | None = Field(None, description="Which version of the named workflow; the present one if left out.")
    prompt: str | None = Field(
        None,
        description="Takes the place of the positive prompt: a named workflow's own parameter `prompt`, or else the "
        "text that the sampler's positive input leads to. An empty one counts as left out.",
    )
    extra_data: dict[str, Any] | None = Field(None, description="Handed on to ComfyUI.")
    images: list[dict[str, Any]] | None = Field(
        None, description="Input files: `{name, image}` (base64 or data URI) or `{name, url}`."
    )


class SubmitRequest(_WorkflowRequest):
    """A workflow to be run."""

    HINT: ClassVar[str] = 'Send {"workflow": {"prompt": {…}}}'
    model_config = ConfigDict(json_schema_extra={"examples": [{"workflow": {"prompt": _EXAMPLE_GRAPH}}]})
    inputs: dict[str, Any] | None = Field(None, description="The named workflow's parameters.")
    cache: StrictBool = Field(
        False, description="Whether an identical earlier request that is still kept, and did not fail, may answer this."
    )


class BatchRequest(_WorkflowRequest):
    """One workflow to be run many times: once for each of `inputs`, `seeds` or `sets`."""

    HINT: ClassVar[str] = 'Send {"workflow": {"prompt": {…}}, "seeds": [1, 2, 3]}'
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"workflow": {"prompt": _EXAMPLE_GRAPH}, "sets": [{"1.color": 255}, {"1.color": 65280}]}]
        }
    )
    inputs: list[dict[str, Any]] | dict[str, Any] | None = Field(
        None,
        description="A list: the named workflow's parameters, or `<node id>.<input>` of the graph, once for each run. "
        "An object: parameters that all runs have in common.",
    )
    seeds: list[Seed] | None = Field(None, description="Goes into every `seed` and `noise_seed` of the graph.")
    sets: list[dict[str, Any]] | None = Field(None, description="Values by `<node id>.<input>`.")


class VideoRequest(BaseModel):
    """A video to be made with HunyuanVideo."""

    HINT: ClassVar[str] = 'Send {"prompt": "…", "duration": 5, "resolution": "512x512"}'
    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "prompt": "A beautiful sunset over mountains",
                    "duration": 1,
                    "resolution": "128x128",
                    "style": "cinematic",
                    "extra_params": {"steps": 2},
                }
            ]
        },
    )
    prompt: str = Field(min_length=1, description="What the video shows.")
    duration: float | None = Field(None, description="Seconds.")
    resolution: str | None = Field(
        None, pattern=r"^[0-9]{1,5}[xX][0-9]{1,5}$", description="Width and height in pixels, `512x512`."
    )
    style: str | None = Field(None, description="A word or two, such as cinematic.")
    extra_params: dict[str, Any] | None = Field(None, description="The named workflow's other parameters.")


class SubmitAnswer(BaseModel):
    """A workflow that was accepted."""

    prompt_id: str
    status: WorkflowState
    message: str
    cached: bool | None = Field(None, description="True if an identical earlier request answers this one.")
    warnings: list[str] | None = Field(None, description="What was ignored.")


class WorkflowStatus(BaseModel):
    """Where a workflow stands."""

    prompt_id: str
    status: WorkflowState
    progress: float = Field(description="How much of the workflow has run, from 0 to 100.")
    current_node: str | None = Field(description="The id of the node at work.")
    current_node_title: str | None = Field(description="What it is called in the workflow.")
    output_images: list[str] = Field(description="A link to each picture.")
    output_videos: list[str] = Field(description="A link to each video.")
    output_audio: list[str] | None = None
    output_files: list[str] | None = None
    texts: list[str] | None = None
    warnings: list[str] | None = Field(None, description="What went wrong without failing the workflow.")
    error: str | None = Field(description="Why it failed.")
    error_code: str | None = Field(None, description="The same for a program.")
    error_hint: str | None = Field(None, description="How to mend it.")
    queue_position: int | None = Field(None, description="Its position in the queue; 1 is next.")
    notice: str | None = Field(None, description="Why it does not get on.")
    estimated_time_remaining: int | None = Field(description="Seconds until its end; null where nobody can tell yet.")


class CancelAnswer(BaseModel):
    """A workflow that was cancelled, or had ended before."""

    prompt_id: str
    status: WorkflowState
    message: str


class WorkflowQueue(BaseModel):
    """All workflows that have not ended: `[number, prompt_id, {}]`, the next one in front."""

    running: list[list[Any]]
    pending: list[list[Any]]


class BatchAnswer(BaseModel):
    """A batch that was accepted."""

    batch_id: str
    prompt_ids: list[str]
    count: int
    status: WorkflowState
    message: str
    warnings: list[str] | None = None


class BatchStatus(BaseModel):
    """Where a batch stands."""

    batch_id: str
    status: WorkflowState
    count: int = Field(description="How many of its workflows are still kept.")
    counts: dict[WorkflowState, int]
    jobs: list[WorkflowStatus]


class BatchCancelAnswer(BaseModel):
    """A batch of which all that had not ended was cancelled."""

    batch_id: str
    status: WorkflowState
    counts: dict[WorkflowState, int]
    message: str


class WorkflowVersion(BaseModel):
    """One content of a named workflow."""

    version: str
    title: str
    current: bool = Field(description="Whether a request without a version gets it.")


class WorkflowVersions(BaseModel):
    """All contents of a named workflow that are known, the latest in front."""

    name: str
    versions: list[WorkflowVersion]

"""What the task API takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB, BucketConfig, Policy, RequestModel, body_examples

TaskStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]


class TaskParams(RequestModel):
    """What a task runs, and any other field of RunPod's `input` (`images`, `delivery`, `webhook`, …)."""

    PASSES_UNKNOWN_ON: ClassVar[bool] = True
    workflow: dict[str, Any] = Field(description="The graph in ComfyUI's API format.")
    server_address: str | None = Field(
        None,
        description="`host:port`, or the URL, of the ComfyUI that is to run it: one of the gateway's own, or of a "
        "fleet's workers; any if left out, empty or `127.0.0.1:8188` where none listens there.",
    )


class TaskRequest(RequestModel):
    """A task."""

    HINT: ClassVar[str] = 'Send {"task_type": "comfyui", "params": {"workflow": {…}}}'
    task_type: Literal["comfyui"]
    params: TaskParams
    priority: Literal["low", "normal", "high"] | None = Field(
        None, description="`normal` if left out, unless `policy` says otherwise."
    )
    webhook: str | None = Field(
        None, description="URL that is called when the task has ended, as RunPod's; `params.webhook` takes precedence."
    )
    policy: Policy | None = None
    s3Config: BucketConfig | None = Field(
        None, description="Where the outputs go, in RunPod's form; `params.s3` takes precedence."
    )


TaskBody = Annotated[
    TaskRequest,
    body_examples({"task_type": "comfyui", "params": EXAMPLE_JOB["input"], "priority": "normal"}),
]


class TaskAccepted(BaseModel):
    """A task that was queued."""

    task_id: str
    status: TaskStatus
    message: str
    warnings: list[str] | None = Field(None, description="What was ignored.")


class TaskResult(BaseModel):
    """What a task made."""

    comfy_prompt_id: str | None
    images: list[str] = Field(description="A link to each image.")
    count: int = Field(description="The number of images.")
    videos: list[str] | None = None
    audio: list[str] | None = None
    files: list[str] | None = None
    texts: list[str] | None = None
    errors: list[str] | None = Field(None, description="What went wrong without failing the task.")


class TaskSummary(BaseModel):
    """The status of a task."""

    task_id: str
    task_type: str
    status: TaskStatus
    progress: float = Field(description="How much of the workflow has run, from 0 to 100.")
    created_at: str = Field(description="ISO 8601, in UTC.")


class Task(TaskSummary):
    """A task with its result."""

    result: TaskResult | None = None
    error: str | None = Field(None, description="Why it failed.")
    code: str | None = Field(None, description="The same for programs.")
    queue_position: int | None = Field(None, description="Its position in the queue; 1 is next.")
    notice: str | None = Field(None, description="Why it does not proceed.")

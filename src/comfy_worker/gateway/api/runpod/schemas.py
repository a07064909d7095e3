"""What RunPod's API takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from comfy_worker.gateway.api.schemas import (
    EXAMPLE_IN_FULL,
    EXAMPLE_JOB,
    EXAMPLE_WITH_INPUT,
    BucketConfig,
    Policy,
    RequestModel,
    body_examples,
)
from comfy_worker.types import JobState

_NUMBER = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HOST = rf"(([A-Za-z0-9_-]+\.)*[A-Za-z][A-Za-z0-9_-]*|({_NUMBER}\.){{3}}{_NUMBER})"
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3})"
WEBHOOK = rf"^([Hh][Tt][Tt][Pp][Ss]?://{_HOST}(:{_PORT})?([/?#][!-\[\]-~]*)?)?$"
"""The URL of a webhook as OpenAPI describes it: what the check of webhooks accepts, or empty for no webhook."""
_WebhookUrl = Annotated[str, WithJsonSchema({"type": "string", "pattern": WEBHOOK})]


class RunRequest(RequestModel):
    """A job."""

    HINT: ClassVar[str] = 'Send {"input": {"workflow": {…}}}'
    input: dict[str, Any] | str = Field(description="The workflow and its files; see docs/reference/api.md.")
    webhook: _WebhookUrl | None = Field(None, description="URL that is called when the job has ended.")
    webhookV2: _WebhookUrl | None = Field(None, description="The same; `webhook` counts if both are given.")
    policy: Policy | None = None
    s3Config: BucketConfig | None = None

    def as_job(self) -> dict[str, Any]:
        """Return the job, with `webhook` set from `webhookV2`, which the type of RunPod's JavaScript SDK allows."""
        job = self.as_sent()
        return job if self.webhook or not self.webhookV2 else {**job, "webhook": self.webhookV2}


RunBody = Annotated[RunRequest, body_examples(EXAMPLE_JOB, EXAMPLE_WITH_INPUT, EXAMPLE_IN_FULL)]


class JobResponse(BaseModel):
    """A job that was accepted, cancelled or retried."""

    id: str
    status: JobState
    message: str | None = Field(default=None, description="The result of cancelling it.")


class StatusResponse(JobResponse):
    """The status of a job."""

    delayTime: int | None = Field(None, description="Milliseconds that it waited.")
    executionTime: int | None = Field(None, description="Milliseconds that it ran.")
    output: Any = Field(None, description="Its output; the progress of a running job.")
    error: str | None = Field(None, description="Why it failed.")


class Chunk(BaseModel):
    """One update of a job."""

    output: Any


class StreamResponse(BaseModel):
    """The updates of a job since the last call with the same key."""

    status: JobState
    stream: list[Chunk]


class PurgeResponse(BaseModel):
    """How many jobs were removed from the queue."""

    removed: int
    status: Literal["completed"] = "completed"


class JobCounts(BaseModel):
    """How many jobs are in each state."""

    completed: int
    failed: int
    inProgress: int
    inQueue: int
    retried: int


class WorkerCounts(BaseModel):
    """How many ComfyUIs there are, by what they do."""

    idle: int = 0
    initializing: int = 0
    ready: int = 0
    running: int = 0
    throttled: int = 0
    unhealthy: int = 0


class ComfyUIState(BaseModel):
    """Whether jobs can run now."""

    reachable: bool = Field(description="Whether any ComfyUI answered when the gateway last asked, seconds ago.")
    healthy: int = Field(description="How many answered.")
    total: int
    away_since: str | None = Field(None, description="Since when none has answered: ISO 8601, in UTC.")


class QueueSizes(BaseModel):
    """How many jobs each queue has; see `GET /queue-info`."""

    preprocess: int
    generation: int
    postprocess: int


class HealthResponse(BaseModel):
    """The state of the endpoint."""

    jobs: JobCounts
    workers: WorkerCounts
    status: Literal["healthy", "unhealthy"] = Field(description="`healthy` as long as any ComfyUI answers.")
    comfyui: ComfyUIState
    queues: QueueSizes
    version: str = Field(description="The gateway's.")

"""The shapes of what the gateway answers, as its OpenAPI declares them."""

from __future__ import annotations

import json
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from comfy_worker.jobs import JobState

JOB_ID = r"^[A-Za-z0-9._-]{1,128}$"
EXAMPLE_JOB: dict[str, Any] = {
    "input": {
        "workflow": {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 4286945},
            },
            "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "example"}},
        }
    }
}
"""A job that any ComfyUI can run: it needs no model."""


class Answer(JSONResponse):
    """JSON that a lone surrogate in a caller's text cannot break: what has no UTF-8 is escaped."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Problem(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="One sentence for a person.", examples=["There is no such job (any more)"])
    code: str = Field(description="For a program; it stays as it is.", examples=["not_found"])
    hint: str | None = Field(None, description="How to mend it.")
    details: Any = Field(None, description="What exactly is wrong, where there is more to say.")


class Policy(BaseModel):
    """RunPod's policy of a job."""

    model_config = ConfigDict(extra="allow")
    executionTimeout: int | None = Field(
        None, ge=5_000, le=604_800_000, description="Milliseconds that the job may run; 600,000 if not given."
    )
    ttl: int | None = Field(
        None, ge=10_000, le=604_800_000, description="Milliseconds that the job may wait; 86,400,000 if not given."
    )
    lowPriority: bool | None = Field(None, description="Whether others go first.")


class BucketConfig(BaseModel):
    """RunPod's `s3Config`: where the job's outputs go."""

    model_config = ConfigDict(extra="allow")
    accessId: str
    accessSecret: str
    bucketName: str
    endpointUrl: str


class RunRequest(BaseModel):
    """A job."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [EXAMPLE_JOB]})
    input: dict[str, Any] | str = Field(description="The workflow and its files; see docs/api.md.")
    webhook: str | None = Field(None, description="URL that is told of the job's end.")
    policy: Policy | None = None
    s3Config: BucketConfig | None = None


class JobAnswer(BaseModel):
    """A job that was accepted, cancelled or put back into the queue."""

    id: str
    status: JobState


class StatusAnswer(JobAnswer):
    """Where a job stands."""

    delayTime: int | None = Field(None, description="Milliseconds that it waited.")
    executionTime: int | None = Field(None, description="Milliseconds that it ran.")
    output: Any = Field(None, description="What it made; of one that runs, how far it is.")
    error: str | None = Field(None, description="Why it failed.")


class Chunk(BaseModel):
    """One thing that a job told."""

    output: Any


class StreamAnswer(BaseModel):
    """What a job told since the last call with the same key."""

    status: JobState
    stream: list[Chunk]


class PurgeAnswer(BaseModel):
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

    idle: int
    initializing: int
    ready: int
    running: int
    throttled: int
    unhealthy: int


class HealthAnswer(BaseModel):
    """How the endpoint is doing."""

    jobs: JobCounts
    workers: WorkerCounts


class State(BaseModel):
    """Whether the gateway is alive, or ready."""

    status: Literal["ok"] = "ok"


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the declaration of the errors that a route answers with, beside those that all do."""
    words = {
        400: "The request is not as it must be.",
        401: "The key, or the link's signature, is missing or wrong.",
        404: "There is no such job or file (any more).",
        409: "It cannot be done as things are.",
        413: "The request, or the answer, is too large.",
        416: "The file has no such part.",
        429: "The key is used too often; Retry-After says when to come back.",
        503: "It cannot be done now; Retry-After says when to come back.",
    }
    return {
        status: {"model": Problem, "description": words[status]} for status in sorted({400, 401, 413, 429, *statuses})
    }

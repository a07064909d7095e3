"""What the generate API takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictBool

from comfy_worker.gateway.api.schemas import EXAMPLE_JOB, BucketConfig, Policy, RequestModel, body_examples

Status = Literal["queued", "processing", "generating", "completed", "failed", "cancelled"]
AWS_ENDPOINT = "https://s3.amazonaws.com"


# -------------------------------------------------------------------------------------------------------- request


class GenerateBucket(RequestModel):
    """Where the outputs go. If every field is empty, it counts as left out."""

    access_key_id: str | None = ""
    secret_access_key: str | None = ""
    endpoint_url: str | None = Field("", description=f"{AWS_ENDPOINT} if empty.")
    bucket_name: str | None = ""
    region: str | None = ""


class GenerateWebhook(RequestModel):
    """The receiver of the job's webhooks; see docs/reference/webhooks.md. Without a URL, it counts as left out."""

    url: str | None = ""
    extra_params: dict[str, Any] | None = Field(None, description="Comes back with each message.")


class GenerateInput(RequestModel):
    """What to run, and any other field of RunPod's `input` (`files`, `delivery`, `timeout_s`, …)."""

    PASSES_UNKNOWN_ON: ClassVar[bool] = True
    request_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{0,128}$",
        description="The caller's id for the job; a UUID if empty. When the job has ended, the id can be used again.",
    )
    modifier: str | None = Field(None, max_length=255, description="Name of the modifier that makes the workflow.")
    modifications: dict[str, Any] | None = Field(None, description="The modifier's values.")
    workflow_json: dict[str, Any] | None = Field(
        None, description="The graph in ComfyUI's API format, instead of a modifier."
    )
    s3: GenerateBucket | None = None
    webhook: GenerateWebhook | None = None
    return_outputs_as_base64: StrictBool | None = Field(
        None, description="Whether the response has the files' bytes too."
    )


class GenerateRequest(RequestModel):
    """A request to generate."""

    HINT: ClassVar[str] = 'Send {"input": {"workflow_json": {…}}} or {"input": {"modifier": "…", "modifications": {…}}}'
    input: GenerateInput
    webhook: str | None = Field(
        None, description="URL that is called when the job has ended, as RunPod's; `input.webhook` takes precedence."
    )
    policy: Policy | None = None
    s3Config: BucketConfig | None = Field(
        None, description="Where the outputs go, in RunPod's form; `input.s3` takes precedence."
    )


GenerateBody = Annotated[
    GenerateRequest,
    body_examples({"input": {"workflow_json": EXAMPLE_JOB["input"]["workflow"]}}),
]


# ------------------------------------------------------------------------------------------------------- responses


class GenerateOutput(BaseModel):
    """A file that the job made."""

    filename: str
    local_path: str = Field(description="The file's path at this gateway, also for one in a bucket; it needs a key.")
    url: str | None = Field(description="A link that works without a key for a while, or the file in the bucket.")
    type: Literal["output", "temp"]
    subfolder: str
    node_id: str
    output_type: str = Field(description="`images`, `videos`, `audio` or `files`.")
    data: str | None = Field(None, description="The file in base64, if requested.")
    mimetype: str | None = Field(None, description="The type of the data.")
    error: str | None = Field(None, description="Why there is no data.")


class GenerateResponse(BaseModel):
    """The status of a request, and its result."""

    id: str
    status: Status
    message: str
    output: list[GenerateOutput]
    timings: dict[str, int] = Field(description="Milliseconds of each stage; `…_at_ms` are since the epoch.")
    comfyui_response: dict[str, Any] = Field(
        description="Outputs and status as in ComfyUI's history, with `X-Include-ComfyUI-Response: 1`."
    )
    texts: list[dict[str, Any]] | None = Field(None, description="Texts that nodes made.")
    errors: list[str] | None = Field(None, description="What went wrong without failing the job.")
    warnings: list[str] | None = Field(None, description="What was ignored in the request.")
    code: str | None = Field(None, description="Why it failed, for programs.")
    hint: str | None = Field(None, description="How to fix it.")
    details: Any = Field(None, description="What exactly is wrong, if there is more to say.")


class QueueStatus(BaseModel):
    """The position of a job in its queue."""

    current_queue: Literal["preprocessing", "generation", "postprocessing"] | None
    position: int = Field(description="Among all waiting jobs, from 1; 0 for a job that is being processed.")
    queue_size: int = Field(description="All waiting jobs; for a job that does not wait, the jobs of its queue.")
    estimated_wait_time: float | None = Field(description="Seconds; null if unknown.")


class QueueInfo(BaseModel):
    """How many jobs each queue has."""

    preprocess_queue_size: int = Field(description="Waiting jobs that no ComfyUI has been given.")
    generation_queue_size: int = Field(description="Jobs that a ComfyUI has been given, until their workflow ends.")
    postprocess_queue_size: int = Field(description="Jobs whose outputs are being delivered.")


class GenerateEvent(BaseModel):
    """An event of `/generate/stream`."""

    request_id: str
    status: Status | Literal["final_result"]
    message: str
    elapsed_time: float = Field(description="Seconds since the request was accepted.")
    queue_position: QueueStatus
    queue_info: QueueInfo
    result: GenerateResponse | None = Field(None, description="With the last event, `final_result`.")

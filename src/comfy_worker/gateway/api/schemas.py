"""The shapes of what the gateway answers, as its OpenAPI declares them."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, WithJsonSchema
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from comfy_worker.types import JobState

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
EXAMPLE_WITH_INPUT: dict[str, Any] = {
    "input": {
        "workflow": {
            "1": {"class_type": "LoadImage", "inputs": {"image": "mine.png"}},
            "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
            "9": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}},
        },
        "images": [
            {
                "name": "mine.png",
                "image": (
                    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mOMWnCHgYGBiYGBgY"
                    "GBAQAVsAHanTiGiQAAAABJRU5ErkJggg=="
                ),
            }
        ],
    }
}
"""A job with a picture of its own."""
EXAMPLE_IN_FULL: dict[str, Any] = {
    "input": {**EXAMPLE_JOB["input"], "convert": {"format": "webp", "quality": 80}, "timeout_s": 60},
    "policy": {"executionTimeout": 120_000, "ttl": 3_600_000, "lowPriority": True},
}
"""A job that says how it is to be run and delivered."""


_SCHEMAS = "#/components/schemas/"
_RANGE_REFUSALS = {
    400: {"error": "The header Range cannot be read", "code": "invalid_input"},
    416: {"error": "The file has no such range", "code": "range_not_satisfiable"},
}


class Answer(JSONResponse):
    """JSON that a lone surrogate in a caller's text cannot break: what has no UTF-8 is escaped."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class FileAnswer(FileResponse):
    """A file, or a range of it; a range that there is not is refused in our form."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        refusal: Answer | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] in _RANGE_REFUSALS:
                refusal = Answer(_RANGE_REFUSALS[message["status"]], status_code=message["status"])
                if of_all := Headers(raw=message["headers"]).get("content-range"):
                    refusal.headers["Content-Range"] = of_all
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is not None:
            await refusal(scope, receive, send)


class ErrorResponse(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="One sentence for a person.", examples=["There is no such job (any more)"])
    code: str = Field(description="For a program; it stays as it is.", examples=["not_found"])
    hint: str | None = Field(None, description="How to mend it.")
    details: Any = Field(None, description="What exactly is wrong, where there is more to say.")


class DetailedErrorResponse(ErrorResponse):
    """Why a request was refused, in FastAPI's own words too."""

    detail: str = Field(description="The same sentence.")


class CatalogError(BaseModel):
    """One thing that went wrong."""

    code: str
    message: str
    details: str | None = Field(None, description="More about it, in a sentence.")
    data: Any = Field(None, description="The same for a program.")
    reason: str | None = Field(None, description="Of an execution: the code of its failure.")


class CatalogErrorResponse(BaseModel):
    """Why a request was refused, in the catalog API's envelope."""

    status: Literal["error"] = "error"
    message: str
    errors: list[CatalogError]


PROBLEMS: tuple[type[BaseModel], ...] = (ErrorResponse, DetailedErrorResponse, CatalogErrorResponse)
"""Every shape of a refusal; `openapi.describe` puts their schemas where the description has all of them."""


def _no_text(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic makes a sentence of this one only
    return value


# Text that reads like a number is none, or it would be taken for no time at all.
_RunTime = Annotated[int, Field(ge=5_000, le=604_800_000), BeforeValidator(_no_text)]
_WaitTime = Annotated[int, Field(ge=10_000, le=604_800_000), BeforeValidator(_no_text)]


class Policy(BaseModel):
    """RunPod's policy of a job."""

    model_config = ConfigDict(extra="allow")
    executionTimeout: _RunTime | None = Field(
        None, description="Milliseconds that the job may run; 600,000 if not given."
    )
    ttl: _WaitTime | None = Field(None, description="Milliseconds that the job may wait; 86,400,000 if not given.")
    lowPriority: StrictBool | None = Field(None, description="Whether others go first.")


class BucketConfig(BaseModel):
    """RunPod's `s3Config`: where the job's outputs go."""

    model_config = ConfigDict(extra="allow")
    accessId: str
    accessSecret: str
    bucketName: str
    endpointUrl: str


_NUMBER = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HOST = rf"(([A-Za-z0-9_-]+\.)*[A-Za-z][A-Za-z0-9_-]*|({_NUMBER}\.){{3}}{_NUMBER})"
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3})"
WEBHOOK = rf"^([Hh][Tt][Tt][Pp][Ss]?://{_HOST}(:{_PORT})?([/?#][!-\[\]-~]*)?)?$"
"""A webhook's URL as it is declared: what the check of webhooks accepts, or nothing for no webhook."""
_WebhookUrl = Annotated[str, WithJsonSchema({"type": "string", "pattern": WEBHOOK})]


class RunRequest(BaseModel):
    """A job."""

    HINT: ClassVar[str] = 'Send {"input": {"workflow": {…}}}'
    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [EXAMPLE_JOB, EXAMPLE_WITH_INPUT, EXAMPLE_IN_FULL]}
    )
    input: dict[str, Any] | str = Field(description="The workflow and its files; see docs/reference/api.md.")
    webhook: _WebhookUrl | None = Field(None, description="URL that is told of the job's end.")
    webhookV2: _WebhookUrl | None = Field(None, description="The same; `webhook` counts where both are there.")
    policy: Policy | None = None
    s3Config: BucketConfig | None = None


class JobAnswer(BaseModel):
    """A job that was accepted, cancelled or put back into the queue."""

    id: str
    status: JobState
    message: str | None = Field(None, description="What came of cancelling it.")


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


class ComfyUIState(BaseModel):
    """Whether jobs can run now."""

    reachable: bool = Field(description="Whether any ComfyUI answered when it was asked last, seconds ago.")
    healthy: int = Field(description="How many did.")
    total: int
    away_since: str | None = Field(None, description="Since when none has answered: ISO 8601, in UTC.")


class QueueSizes(BaseModel):
    """How many jobs each queue has; see `GET /queue-info`."""

    preprocess: int
    generation: int
    postprocess: int


class HealthAnswer(BaseModel):
    """How the endpoint is doing."""

    jobs: JobCounts
    workers: WorkerCounts
    status: Literal["healthy", "unhealthy"] = Field(description="`healthy` as long as any ComfyUI answers.")
    comfyui: ComfyUIState
    queues: QueueSizes
    version: str = Field(description="The gateway's.")


class State(BaseModel):
    """Whether the gateway is alive, or ready."""

    status: Literal["ok"] = "ok"


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the declaration of a body that a route reads by itself, with the model's examples.

    `x-schemas` is for `openapi.describe`, which puts them where the description has all its schemas.
    """
    schemas = schemas_of(model)
    given = schemas[model.__name__].get("examples", [])
    examples = {f"example {number}": {"value": value} for number, value in enumerate(given, 1)}
    content = {"schema": _reference(model), **({"examples": examples} if examples else {})}
    return {
        "requestBody": {"required": True, "content": {"application/json": content}},
        "x-schemas": schemas,
    }


def schemas_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schemas of a model and of all that it is made of, by name."""
    schema = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _SCHEMAS + model.__name__}


def problems(*statuses: int, model: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    """Return the declaration of the errors that a route answers with, beside those that all do.

    They refer to the model's schema. Given the model itself, FastAPI would prepare its validation for each status of
    each route, which takes a sixth of a gateway's start.

    Args:
        statuses: of the errors that this route answers with.
        model: one of `PROBLEMS`.
    """
    words = {
        400: "The request is not as it must be.",
        401: "The key, or the link's signature, is missing or wrong.",
        403: "The key may not do this.",
        404: "There is no such job or file (any more), or it is another key's.",
        408: "The rest of the request does not arrive.",
        409: "It cannot be done as things are.",
        413: "The request, or the answer, is too large.",
        416: "The file has no such part.",
        422: "The job could not be run as it is.",
        429: "The key is used too often; Retry-After says when to come back.",
        500: "The gateway failed because of a bug of its own; its log says where.",
        501: "It is not there yet.",
        503: "It cannot be done now; Retry-After says when to come back.",
        507: "The GPU's memory, or a disk, is full.",
        504: "It took too long.",
        502: "ComfyUI, or where the outputs go, failed.",
    }
    content = {"application/json": {"schema": _reference(model)}}
    return {
        status: {"description": words[status], "content": content}
        for status in sorted({400, 401, 408, 413, 429, 500, 503} | {*statuses})
    }

"""What the APIs' schemas share: examples, error responses, and the base class of request bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Body
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from comfy_worker.gateway.http.error_responses import shortened

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
"""A job with an image of its own."""
EXAMPLE_IN_FULL: dict[str, Any] = {
    "input": {**EXAMPLE_JOB["input"], "convert": {"format": "webp", "quality": 80}, "timeout_s": 60},
    "policy": {"executionTimeout": 120_000, "ttl": 3_600_000, "lowPriority": True},
}
"""A job that says how it is to be run and delivered."""

_SCHEMAS = "#/components/schemas/"
_MAX_WARNINGS = 10


# -------------------------------------------------------------------------------------------------------- errors


class ErrorResponse(BaseModel):
    """Why a request failed."""

    error: str = Field(description="One sentence for a person.", examples=["There is no such job, or it has expired"])
    code: str = Field(description="For programs; it never changes.", examples=["not_found"])
    hint: str | None = Field(None, description="How to fix it.")
    details: Any = Field(None, description="What exactly is wrong, if there is more to say.")


class DetailedErrorResponse(ErrorResponse):
    """Why a request failed, with the sentence also where FastAPI puts it."""

    detail: str = Field(description="The same sentence.")


class CatalogError(BaseModel):
    """One error."""

    code: str
    message: str
    details: str | None = Field(None, description="More about it, in a sentence.")
    data: Any = Field(None, description="The same for programs.")
    reason: str | None = Field(None, description="Of a failed execution: the error code of its job.")


class CatalogErrorResponse(BaseModel):
    """Why a request failed, in the catalog API's envelope."""

    status: Literal["error"] = "error"
    message: str
    errors: list[CatalogError]


ERROR_RESPONSES: tuple[type[BaseModel], ...] = (ErrorResponse, DetailedErrorResponse, CatalogErrorResponse)
"""The models that `error_responses` refers to; the OpenAPI description has to include their schemas."""
OPEN_ERRORS = (400, 408, 413, 500)
"""Statuses that every route can return."""
COMMON_ERRORS = (*OPEN_ERRORS, 401, 429, 503)
"""Statuses that every route that needs a key can return."""
_ERRORS = {
    400: "The request is invalid.",
    401: "The key, or the link's signature, is missing or wrong.",
    403: "The key does not allow this.",
    404: "There is no such job or file, or it has expired, or it belongs to another key.",
    408: "The rest of the request does not arrive.",
    409: "The current state does not allow this.",
    413: "The request, or the response, is too large.",
    416: "The file has no such range.",
    422: "The job could not be run as it is.",
    429: "Too many requests with this key; see Retry-After.",
    500: "The gateway failed because of a bug of its own; see its log.",
    501: "Not implemented.",
    502: "ComfyUI, or the storage of the outputs, failed.",
    503: "Not possible now; see Retry-After.",
    504: "It took too long.",
    507: "The GPU's memory, or a disk, is full.",
}


def error_responses(*statuses: int, model: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a router or route that can return these statuses.

    They refer to the model's schema. If they had the model itself, FastAPI would prepare its validation for each status
    of each route, which takes a sixth of a gateway's start.
    """
    content = {"application/json": {"schema": reference(model)}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def reference(model: type[BaseModel]) -> dict[str, str]:
    """Return a reference to the schema of a model in the OpenAPI description."""
    return {"$ref": _SCHEMAS + model.__name__}


def schemas_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schemas of a model and of the models in it, by name."""
    schema = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}


# -------------------------------------------------------------------------------------------------------- requests


class RequestModel(BaseModel):
    """The body of a request, or a part of it. Unknown fields are kept, to be passed on or to be warned about."""

    model_config = ConfigDict(extra="allow")
    HINT: ClassVar[str | None] = None
    """An example of a valid body, for error responses."""
    PASSES_UNKNOWN_ON: ClassVar[bool] = False
    """Whether unknown fields are for another reader, who warns about them."""

    def as_sent(self) -> dict[str, Any]:
        """Return the fields that the client sent, without defaults."""
        sent = self.model_fields_set
        return {
            name: value.as_sent() if isinstance(value, RequestModel) else value for name, value in self if name in sent
        }

    def warnings(self, others: Sequence[str] = ()) -> dict[str, Sequence[str]]:
        """Return `warnings` for the response: a sentence for each unknown field, and `others`; empty without any."""
        unknown = self._unknown_fields()
        # The nearest known name is only looked for in these: that takes its time.
        warnings = [_unknown_field(*field) for field in unknown[:_MAX_WARNINGS]]
        if len(unknown) > _MAX_WARNINGS:
            warnings.append(f"{len(unknown) - _MAX_WARNINGS} more fields are unknown and were ignored")
        warnings += others
        return {"warnings": warnings} if warnings else {}

    def _unknown_fields(self, prefix: str = "") -> list[tuple[str, str, Sequence[str]]]:
        """Return each unknown field's prefix and name, and the names that are known there."""
        if self.PASSES_UNKNOWN_ON:
            return []
        known: Sequence[str] = list(type(self).model_fields)
        unknown = [(prefix, name, known) for name in self.model_extra or {}]
        for name in known:
            value = getattr(self, name)
            if isinstance(value, RequestModel):
                unknown = [*value._unknown_fields(f"{prefix}{name}."), *unknown]
        return unknown


def _unknown_field(prefix: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(shortened(name), known, n=1)
    advice = f"; did you mean {prefix + near[0]!r}?" if near else ""
    return f"{prefix + shortened(name)!r} is unknown and was ignored{advice}"


def body_examples(*examples: Mapping[str, Any]) -> Any:
    """Return FastAPI's annotation of a request body, with examples for the OpenAPI description."""
    return Body(openapi_examples={f"example {n}": {"value": example} for n, example in enumerate(examples, 1)})


def _no_text(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("must be a number")  # noqa: TRY004 - pydantic reports this class only
    return value


# pydantic would accept a number in a string, which RunPod ignores.
_RunTime = Annotated[int, Field(ge=5_000, le=604_800_000), BeforeValidator(_no_text)]
_WaitTime = Annotated[int, Field(ge=10_000, le=604_800_000), BeforeValidator(_no_text)]


class Policy(RequestModel):
    """RunPod's execution policy of a job."""

    executionTimeout: _RunTime | None = Field(
        None, description="Milliseconds that the job may run; 600,000 if not given."
    )
    ttl: _WaitTime | None = Field(None, description="Milliseconds that the job may wait; 86,400,000 if not given.")
    lowPriority: StrictBool | None = Field(None, description="Whether other jobs go first.")


class BucketConfig(RequestModel):
    """RunPod's `s3Config`: the bucket for the job's outputs."""

    accessId: str
    accessSecret: str
    bucketName: str
    endpointUrl: str


RUNPOD_FIELDS = ("webhook", "policy", "s3Config")
"""The fields beside RunPod's `input` that other APIs take too, and pass on."""

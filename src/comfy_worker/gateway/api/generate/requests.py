"""The generate API's requests, in RunPod's words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.schemas import EXAMPLE_JOB, BucketConfig, Policy
from comfy_worker.gateway.http.request_validation import RUNPODS_FIELDS

_OWN_FIELDS = ("request_id", "modifier", "modifications", "workflow_json", "return_outputs_as_base64", "s3", "webhook")
_OTHERS_FIELDS = ("workflow", "template")
_AWS = "https://s3.amazonaws.com"
_BUCKET_FIELDS = ("access_key_id", "secret_access_key", "bucket_name")
_MOST_NAMED = 10

# ------------------------------------------------------------------------------------------------------ request


class GenerateBucket(BaseModel):
    """Where the outputs go. With every field empty it is as if it were not there."""

    model_config = ConfigDict(extra="allow")
    access_key_id: str | None = ""
    secret_access_key: str | None = ""
    endpoint_url: str | None = Field("", description=f"{_AWS} if empty.")
    bucket_name: str | None = ""
    region: str | None = ""


class GenerateWebhook(BaseModel):
    """Who is told of the job's end; see docs/reference/webhooks.md. Without a URL it is as if it were not there."""

    model_config = ConfigDict(extra="allow")
    url: str | None = ""
    extra_params: dict[str, Any] | None = Field(None, description="Comes back with each message.")


class GenerateInput(BaseModel):
    """What is to be run; beside these, whatever RunPod's `input` takes (`files`, `delivery`, `timeout_s`, …)."""

    GOES_ON: ClassVar[bool] = True
    model_config = ConfigDict(extra="allow")
    request_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{0,128}$",
        description="The caller's own name for the job; a UUID is made if it is empty. A job that has ended gives its "
        "name to the next.",
    )
    modifier: str | None = Field(None, max_length=255, description="Name of the modifier that makes the workflow.")
    modifications: dict[str, Any] | None = Field(None, description="The modifier's values.")
    workflow_json: dict[str, Any] | None = Field(
        None, description="The graph in ComfyUI's API format, in place of a modifier."
    )
    s3: GenerateBucket | None = None
    webhook: GenerateWebhook | None = None
    return_outputs_as_base64: StrictBool | None = Field(
        None, description="Whether the files' bytes come in the answer too."
    )


class GenerateRequest(BaseModel):
    """A request to generate."""

    HINT: ClassVar[str] = 'Send {"input": {"workflow_json": {…}}} or {"input": {"modifier": "…", "modifications": {…}}}'
    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"input": {"workflow_json": EXAMPLE_JOB["input"]["workflow"]}}]},
    )
    input: GenerateInput
    webhook: str | None = Field(
        None, description="URL that is told of the job's end, as RunPod's; `input.webhook` goes before it."
    )
    policy: Policy | None = None
    s3Config: BucketConfig | None = Field(
        None, description="Where the outputs go, in RunPod's words; `input.s3` goes before it."
    )


def check_source(job_input: Mapping[str, Any]) -> None:
    """Refuse an input that has no workflow, or two.

    Raises:
        InvalidInput: it has both a modifier and a workflow, or neither; or another API's word for one.
    """
    for name in _OTHERS_FIELDS:
        if job_input.get(name) is not None:
            raise InvalidInput(f"input.{name} belongs to /run; this API takes workflow_json or modifier")
    if job_input.get("workflow_json") and job_input.get("modifier"):
        raise InvalidInput("input has both a workflow_json and a modifier; send one of them")
    if not job_input.get("workflow_json") and not job_input.get("modifier"):
        raise InvalidInput("input needs a workflow_json or a modifier", hint=GenerateRequest.HINT)
    if job_input.get("modifications") and not job_input.get("modifier"):
        raise InvalidInput("input.modifications are for a modifier, and input names none")


def fingerprint(body: Mapping[str, Any]) -> str:
    """Return what is the same for the same request."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def not_read(names: Sequence[str]) -> list[str]:
    """Return, for the answer, a sentence for each of the caller's modifications that the modifier never looked at."""
    said = [f"input.modifications.{name} was not read by the modifier" for name in names[:_MOST_NAMED]]
    more = len(names) - _MOST_NAMED
    return [*said, f"{more} more modifications were not read"] if more > 0 else said


def runpod_request(body: Mapping[str, Any], workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request in RunPod's words, with the workflow that it is to run.

    Raises:
        InvalidInput: a part of its bucket is missing.
    """
    job_input = body["input"]
    rest = {name: value for name, value in job_input.items() if name not in _OWN_FIELDS}
    bucket, webhook = _bucket(job_input.get("s3") or {}), _filled(job_input.get("webhook") or {})
    request: dict[str, Any] = {"input": {**rest, "workflow": workflow}}
    if bucket:
        request["input"]["s3"] = bucket
    if webhook.get("url"):
        request["input"]["webhook"] = webhook
    return {**request, **{name: body[name] for name in RUNPODS_FIELDS if body.get(name)}}


def _bucket(given: Mapping[str, Any]) -> dict[str, Any]:
    bucket = _filled(given)
    missing = [name for name in _BUCKET_FIELDS if name not in bucket]
    if not bucket or len(missing) == len(_BUCKET_FIELDS):
        return {}
    if missing:
        raise InvalidInput(f"input.s3 is only half there: {' and '.join(missing)} must be given too")
    return {"endpoint_url": _AWS, **bucket}


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not empty: clients send whole forms in which they filled in a few."""
    return {name: value for name, value in given.items() if value not in ("", None)}

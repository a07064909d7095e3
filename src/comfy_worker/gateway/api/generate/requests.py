"""Turns the generate API's requests into RunPod's form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_worker.errors import InvalidInput
from comfy_worker.gateway.api.generate.schemas import AWS_ENDPOINT, GenerateBucket, GenerateInput, GenerateRequest
from comfy_worker.gateway.api.schemas import RUNPOD_FIELDS, RequestModel

_REQUIRED_OF_BUCKET = ("access_key_id", "secret_access_key", "bucket_name")
_MAX_WARNINGS = 10


def check_source(job_input: GenerateInput) -> None:
    """Check that an input has either a workflow or a modifier.

    Raises:
        InvalidInput: it has both or neither, or another API's field for a workflow.
    """
    for name in ("workflow", "template"):
        if (job_input.model_extra or {}).get(name) is not None:
            raise InvalidInput(f"input.{name} belongs to /run; this API takes workflow_json or modifier")
    if job_input.workflow_json and job_input.modifier:
        raise InvalidInput("input has both a workflow_json and a modifier; send one of them")
    if not job_input.workflow_json and not job_input.modifier:
        raise InvalidInput("input needs a workflow_json or a modifier", hint=GenerateRequest.HINT)
    if job_input.modifications and not job_input.modifier:
        raise InvalidInput("input.modifications are for a modifier, and input names none")


def fingerprint(body: GenerateRequest) -> str:
    """Return a hash by which a repeated request is recognised."""
    return hashlib.sha256(json.dumps(body.as_sent(), sort_keys=True).encode()).hexdigest()


def unread_warnings(names: Sequence[str]) -> list[str]:
    """Return a warning for each of the caller's modifications that the modifier did not read."""
    warnings = [f"input.modifications.{name} was not read by the modifier" for name in names[:_MAX_WARNINGS]]
    more = len(names) - _MAX_WARNINGS
    return [*warnings, f"{more} more modifications were not read"] if more > 0 else warnings


def runpod_request(body: GenerateRequest, workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request in RunPod's form, with the workflow to run.

    Raises:
        InvalidInput: a part of its bucket is missing.
    """
    sent = body.as_sent()
    job_input: dict[str, Any] = {**(body.input.model_extra or {}), "workflow": workflow}
    if bucket := _bucket(body.input.s3):
        job_input["s3"] = bucket
    webhook = _filled(body.input.webhook)
    if webhook.get("url"):
        job_input["webhook"] = webhook
    return {"input": job_input, **{name: sent[name] for name in RUNPOD_FIELDS if sent.get(name)}}


def _bucket(given: GenerateBucket | None) -> dict[str, Any]:
    bucket = _filled(given)
    missing = [name for name in _REQUIRED_OF_BUCKET if name not in bucket]
    if not bucket or len(missing) == len(_REQUIRED_OF_BUCKET):
        return {}
    if missing:
        raise InvalidInput(f"input.s3 is incomplete: {' and '.join(missing)} must be given too")
    return {"endpoint_url": AWS_ENDPOINT, **bucket}


def _filled(given: RequestModel | None) -> dict[str, Any]:
    """Return the fields that are not empty: clients send whole forms with a few fields filled in."""
    return {} if given is None else {name: value for name, value in given.as_sent().items() if value not in ("", None)}

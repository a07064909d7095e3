"""RunPod's `input` to a Job, and a JobResult to RunPod's `output`."""

from __future__ import annotations

import base64
import binascii
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic.aliases import AliasChoices

from comfy_worker.errors import InvalidInput, InvalidWorkflow, WorkerError
from comfy_worker.jobs import (
    Artifact,
    Conversion,
    Delivery,
    DeliveryType,
    InputFile,
    Job,
    JobBucket,
    JobResult,
    Kind,
    Webhook,
    Workflow,
)
from comfy_worker.workflow import check_workflow

_DATA_URI = re.compile(r"data:[^,]*,", re.IGNORECASE)
_URL = re.compile(r"(https?|s3)://", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ANNOTATION = re.compile(r"\[(input|output|temp)\]$")
"""ComfyUI takes it for an annotation without a space before it too."""
_REFUSALS = {
    "missing": "is missing",
    "string_type": "must be a string",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "list_type": "must be a list",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
}
"""pydantic's types of problem in the words of JSON; the others say what they mean."""
_MOST_KEYS_NAMED = 50
_LONGEST_KEY = 100
_LONGEST_NAME = 1024
_LONGEST_PART = 255
"""Bytes that a file system takes for one part of a path."""


class _Model(BaseModel):
    """Takes keys that it does not know, so that they can be named in a warning instead of getting lost."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def unknown_keys(self, where: str) -> Iterator[str]:
        known = [name for field, info in type(self).model_fields.items() for name in _accepted_names(field, info)]
        extra = list(self.__pydantic_extra__ or {})
        for key in extra[:_MOST_KEYS_NAMED]:
            name = key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]}…"
            if key in known:
                yield f"{where}.{name} was ignored: its other name is there too"
                continue
            near = get_close_matches(name, known, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{where}.{name} is unknown and was ignored{advice}"
        if len(extra) > _MOST_KEYS_NAMED:
            yield f"{where} has {len(extra) - _MOST_KEYS_NAMED} more keys that are unknown and were ignored"


def _accepted_names(field: str, info: Any) -> list[str]:
    alias = info.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [field]


class _FileInput(_Model):
    name: StrictStr
    image: StrictStr | None = None
    url: StrictStr | None = None


class _DeliveryInput(_Model):
    type: DeliveryType | None = None
    prefix: StrictStr | None = None
    expires_s: Annotated[StrictInt, Field(ge=1, le=7 * 24 * 3600)] | None = None


class _ConvertInput(_Model):
    format: Literal["png", "jpeg", "webp"] | None = None
    quality: Annotated[StrictInt, Field(ge=1, le=100)] = 90
    max_side: Annotated[StrictInt, Field(ge=1, le=65535)] | None = None
    keep_metadata: StrictBool = True


class _BucketInput(_Model):
    """Takes the names of `input.s3` and those of RunPod's own `s3Config`."""

    endpoint_url: StrictStr = Field(validation_alias=AliasChoices("endpoint_url", "endpointUrl"))
    bucket_name: StrictStr | None = Field(default=None, validation_alias=AliasChoices("bucket_name", "bucketName"))
    access_key_id: StrictStr = Field(validation_alias=AliasChoices("access_key_id", "accessId"))
    secret_access_key: StrictStr = Field(validation_alias=AliasChoices("secret_access_key", "accessSecret"))
    region: StrictStr | None = None


class _WebhookInput(_Model):
    url: StrictStr
    secret: StrictStr | None = None
    extra_params: dict[str, Any] = Field(default_factory=dict)
    progress: StrictBool = False


class _JobInput(_Model):
    workflow: dict[str, Any] | StrictStr
    images: list[_FileInput] = Field(default_factory=list)
    files: list[_FileInput] = Field(default_factory=list)
    delivery: _DeliveryInput = _DeliveryInput()
    convert: _ConvertInput | None = None
    s3: _BucketInput | None = None
    webhook: _WebhookInput | None = None
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None
    retry_on_crash: StrictBool | None = None
    strict: StrictBool = False
    include_previews: StrictBool = False
    refresh_worker: StrictBool = False
    comfy_org_api_key: StrictStr | None = Field(
        default=None, validation_alias=AliasChoices("comfy_org_api_key", "api_key_comfy_org")
    )
    extra_data: dict[str, Any] = Field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- input


def parse_job(job: Mapping[str, Any]) -> Job:
    """Return the Job in what RunPod hands to a handler: `{"id": …, "input": {…}}`.

    Raises:
        InvalidInput: a field is missing, of the wrong kind or cannot be decoded; the sentence names all of them.
        InvalidWorkflow: the workflow is no graph in API format.
    """
    payload = _json_object(job.get("input"))
    if payload.get("workflow") is None:
        raise InvalidInput("Missing 'workflow' parameter", hint=_hint_of_missing(payload))
    try:
        # A field that is null is one that was left out, as for every client that fills in a template.
        parsed = _JobInput.model_validate({key: value for key, value in payload.items() if value is not None})
    except ValidationError as error:
        raise InvalidInput(_sentence(error)) from None
    workflow = _parse_workflow(parsed.workflow)
    return Job(
        id=str(job.get("id") or "local_test"),
        prompt_id=str(uuid.uuid4()),
        workflow=check_workflow(workflow),
        files=_decode_files([*parsed.images, *parsed.files]),
        delivery=_parse_delivery(parsed.delivery),
        conversion=_parse_conversion(parsed.convert),
        bucket=_parse_bucket(parsed.s3 or _platform_bucket(job.get("s3Config"))),
        webhook=_parse_webhook(parsed.webhook),
        timeout_s=parsed.timeout_s,
        execution_timeout_s=_execution_timeout(job.get("policy")),
        retry_on_crash=parsed.retry_on_crash,
        strict=parsed.strict,
        include_previews=parsed.include_previews,
        comfy_org_api_key=parsed.comfy_org_api_key,
        extra_data={**_wrapped_extra_data(workflow), **parsed.extra_data},
        warnings=tuple(_warnings(parsed)),
    )


def _hint_of_missing(payload: Mapping[str, Any]) -> str:
    if payload.get("modifier") is not None:
        return "Modifiers are for POST /generate of the gateway; send input.workflow or input.template here"
    return "Send the workflow as input.workflow, or name one of the catalog as input.template"


def workflow_of(job: Mapping[str, Any]) -> Workflow:
    """Return the graph of a job that may yet turn out to be invalid; an empty one if none can be made out."""
    try:
        payload = _json_object(job.get("input"))
        return check_workflow(_parse_workflow(payload.get("workflow") or {}))
    except WorkerError:
        return {}


def webhook_of(job: Mapping[str, Any]) -> Webhook | None:
    """Return who is to be told of a job that may yet turn out to be invalid; None if nobody can be made out."""
    try:
        return asked_webhook(job)
    except WorkerError:
        return None


def asked_webhook(job: Mapping[str, Any]) -> Webhook | None:
    """Return the job's own receiver, whatever else is wrong with the job; None if it names none.

    Raises:
        InvalidInput: the webhook has not the form that it must have.
    """
    try:
        asked = _json_object(job.get("input")).get("webhook")
    except WorkerError:
        return None
    if asked is None:
        return None
    try:
        return _parse_webhook(_WebhookInput.model_validate(asked))
    except ValidationError as error:
        raise InvalidInput(_sentence(error, "input.webhook")) from None


def _wrapped_extra_data(workflow: Any) -> Mapping[str, Any]:
    """Return the `extra_data` of a whole `{"prompt": …}`, as ComfyUI's own API is sent."""
    extra_data = workflow.get("extra_data") if isinstance(workflow, Mapping) and "prompt" in workflow else None
    return extra_data if isinstance(extra_data, Mapping) else {}


def _execution_timeout(policy: Any) -> float | None:
    """Return RunPod's `policy.executionTimeout`, milliseconds, in seconds; None where the job carries none."""
    milliseconds = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    return milliseconds / 1000 if isinstance(milliseconds, (int, float)) and milliseconds > 0 else None


def _json_object(value: Any) -> Mapping[str, Any]:
    if value is None:
        raise InvalidInput("Please provide input", hint='Send {"input": {"workflow": {…}}}')
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidInput("Invalid JSON format in input") from None
    if not isinstance(value, Mapping):
        raise InvalidInput("input must be an object with a workflow")
    return value


def _sentence(error: ValidationError, where: str = "input") -> str:
    """Return all problems that pydantic found as one sentence, each at its place, without the values."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        # The parts of a union that did not fit ("str", "dict[str,any]") are pydantic's words, not the caller's.
        place = ".".join(str(part) for part in item["loc"] if not re.search(r"[\[\]()]|^str$", str(part)))
        words = _REFUSALS.get(item["type"]) or item["msg"].replace("Input should", "must")
        problems.setdefault(f"{where}.{place}", words)
    return "; ".join(f"{place} {words}" for place, words in problems.items())


def _parse_workflow(workflow: Any) -> Any:
    if isinstance(workflow, dict):
        return workflow
    if not isinstance(workflow, str):
        raise InvalidWorkflow("Workflow validation failed: the workflow is neither an object nor a string")
    try:
        return json.loads(workflow)
    except (ValueError, RecursionError):
        raise InvalidWorkflow("Workflow validation failed: the workflow is a string that is not JSON") from None


def _parse_delivery(delivery: _DeliveryInput) -> Delivery:
    prefix = check_name(delivery.prefix.strip("/"), "input.delivery.prefix") if delivery.prefix else None
    return Delivery(type=delivery.type, prefix=prefix, expires_s=delivery.expires_s)


def _parse_conversion(convert: _ConvertInput | None) -> Conversion | None:
    if convert is None:
        return None
    return Conversion(convert.format, convert.quality, convert.max_side, convert.keep_metadata)


def _platform_bucket(config: Any) -> _BucketInput | None:
    """Return the bucket of RunPod's `s3Config`, which stands beside `input` in the job."""
    if config is None:
        return None
    try:
        return _BucketInput.model_validate(config)
    except ValidationError as error:
        raise InvalidInput(_sentence(error, "s3Config")) from None


def _parse_bucket(bucket: _BucketInput | None) -> JobBucket | None:
    if bucket is None:
        return None
    return JobBucket(
        endpoint_url=bucket.endpoint_url,
        name=bucket.bucket_name,
        access_key_id=bucket.access_key_id,
        secret_access_key=bucket.secret_access_key,
        region=bucket.region,
    )


def _parse_webhook(webhook: _WebhookInput | None) -> Webhook | None:
    return Webhook(webhook.url, webhook.secret, webhook.extra_params, webhook.progress) if webhook else None


def _warnings(parsed: _JobInput) -> Iterator[str]:
    yield from parsed.unknown_keys("input")
    for place in ("delivery", "convert", "s3", "webhook"):
        part = getattr(parsed, place)
        if part is not None:
            yield from part.unknown_keys(f"input.{place}")
    for place in ("images", "files"):
        for number, item in enumerate(getattr(parsed, place)):
            yield from item.unknown_keys(f"input.{place}.{number}")


def input_warnings(job_input: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key of an `input` that nobody knows; none for one that is not sound otherwise."""
    try:
        parsed = _JobInput.model_validate({key: value for key, value in job_input.items() if value is not None})
    except ValidationError:
        return []
    return list(_warnings(parsed))


def _decode_files(items: Sequence[_FileInput]) -> tuple[InputFile, ...]:
    files: dict[str, InputFile] = {}
    for item in items:
        name = check_name(item.name, "Image name")
        if name in files:
            raise InvalidInput(f"Two images are named {name!r}")
        files[name] = _parse_file(item, name)
    return tuple(files.values())


def _parse_file(item: _FileInput, name: str) -> InputFile:
    """Return a file that is there or is to be fetched; a URL may stand in either field, and so may a data URI."""
    given = [value for value in (item.image, item.url) if value is not None]
    if len(given) != 1:
        raise InvalidInput(f"Image {name!r} needs either 'image' (base64) or 'url'")
    if _URL.match(given[0]):
        return InputFile(name, url=given[0])
    if item.url is not None and not _DATA_URI.match(item.url[:1024]):
        raise InvalidInput(f"The url of image {name!r} is neither http(s) nor s3 nor a data URI")
    return InputFile(name, decode_base64(given[0], name))


def check_name(name: str, what: str) -> str:
    """Return `name` if it is a relative path that stays in its folder.

    Raises:
        InvalidInput: it leads elsewhere, or no file system or ComfyUI could take it.
    """
    refused = f"{what} {name!r} is refused: "
    parts = name.split("/")
    if not name.strip():
        raise InvalidInput(f"{refused}it is empty")
    if _CONTROL.search(name):
        raise InvalidInput(f"{refused}it has control characters")
    if "\\" in name or name.startswith("/") or ":" in parts[0]:
        raise InvalidInput(f"{refused}it must be relative, with '/' between folders")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidInput(f"{refused}it must not leave its folder or have empty parts")
    if _ANNOTATION.search(name):
        raise InvalidInput(f"{refused}' [input]' and its like belong into the workflow, not into the name")
    try:
        too_long = any(len(part.encode()) > _LONGEST_PART for part in parts)
    except UnicodeEncodeError:
        raise InvalidInput(f"{refused}it is not valid Unicode") from None
    if too_long:
        raise InvalidInput(f"{what} {name[:40]!r}… is refused: a part of it is longer than {_LONGEST_PART} bytes")
    if len(name.encode()) > _LONGEST_NAME:
        raise InvalidInput(f"{what} {name[:40]!r}… is refused: it is longer than {_LONGEST_NAME} bytes")
    return name


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes of a base64 text, with or without a data URI around it; line breaks are ignored.

    Raises:
        InvalidInput: it is empty, or has a character that does not belong there; the sentence names the image.
    """
    head = _DATA_URI.match(text[:1024])
    if head is None and text[:5].lower() == "data:":
        raise InvalidInput(f"Image {name!r} is a data URI without a comma before its data")
    if head is not None and not head.group().lower().endswith(";base64,"):
        raise InvalidInput(f"Image {name!r} is a data URI that is not base64")
    encoded = text[head.end() :] if head else text
    if any(space in encoded for space in "\n\r\t "):
        encoded = "".join(encoded.split())
    if not encoded:
        raise InvalidInput(f"Image {name!r} is empty")
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput(f"Image {name!r} is not valid base64") from None
    if not content:
        # Python 3.10 takes padding alone for nothing.
        raise InvalidInput(f"Image {name!r} is not valid base64")
    return content


# ------------------------------------------------------------------------------------------------ output


def result_as_output(result: JobResult) -> dict[str, Any]:
    """Return the result as the `output` of a RunPod job: JSON-safe; `images` is always there."""
    output: dict[str, Any] = {"images": _artifacts(result, Kind.IMAGE)}
    for kind in (Kind.VIDEO, Kind.AUDIO, Kind.FILE):
        if artifacts := _artifacts(result, kind):
            output[kind.value] = artifacts
    if result.texts:
        output["texts"] = [
            {"node_id": text.node_id, "class_type": text.class_type, "title": text.title, "text": text.text}
            for text in result.texts
        ]
    if not result.artifacts and not result.texts:
        output["status"] = "success_no_images"
    if result.warnings:
        output["errors"] = list(result.warnings)
    output["prompt_id"] = result.prompt_id
    output["timings"] = asdict(result.timings)
    return output


def _artifacts(result: JobResult, kind: Kind) -> list[dict[str, Any]]:
    return [_artifact(artifact) for artifact in result.artifacts if artifact.file.kind is kind]


def _artifact(artifact: Artifact) -> dict[str, Any]:
    file = artifact.file
    described: dict[str, Any] = {
        "filename": file.filename,
        "type": artifact.delivered.type,
        "data": artifact.delivered.data,
        "subfolder": artifact.folder,
        "node_id": file.node_id,
        "class_type": file.class_type,
        "title": file.title,
        "index": file.index,
        "preview": file.type == "temp",
        "mime_type": artifact.mime_type,
        "size_bytes": artifact.size_bytes,
    }
    if artifact.width is not None and artifact.height is not None:
        described |= {"width": artifact.width, "height": artifact.height}
    if artifact.duration_s is not None:
        described["duration_s"] = artifact.duration_s
    if artifact.delivered.url is not None:
        described["url"] = artifact.delivered.url
    return described

"""RunPod's `input` to a Job, and a JobResult to RunPod's `output`."""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic.aliases import AliasChoices

from comfy_worker.errors import InvalidInput, InvalidWorkflow, WorkerError
from comfy_worker.graph.workflow import check_workflow
from comfy_worker.job.envelope import (
    check_extra_params,
    check_job,
    execution_timeout_s,
    read_input,
    unknown_names,
    warnings_of_job,
)
from comfy_worker.job.input_files import FAILED, decode_files, too_many_files
from comfy_worker.names import check_name
from comfy_worker.strict_json import InvalidJson, parse_json
from comfy_worker.types import (
    Artifact,
    Conversion,
    Delivery,
    DeliveryType,
    Job,
    JobBucket,
    JobResult,
    Kind,
    Webhook,
    Workflow,
)

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
_MOST_WARNINGS = 100
"""About one job's fields, however many it has."""
_MOST_PROBLEMS = 20
_MOST_EXTRA_DATA = 100
"""Each secret in it is looked for in each sentence."""


class _Model(BaseModel):
    """Takes keys that it does not know, so that they can be named in a warning instead of getting lost."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def unknown_keys(self, where: str) -> Iterator[str]:
        known = [name for field, info in type(self).model_fields.items() for name in _accepted_names(field, info)]
        extra = list(self.__pydantic_extra__ or {})
        for key in extra:
            if key in known:
                yield f"{where}.{key} was ignored: its other name is there too"
        yield from unknown_names([key for key in extra if key not in known], known, f"{where}.")


def unknown_keys(job_input: Mapping[str, Any], where: str = "input") -> list[str]:
    """Return a sentence for each key of RunPod's `input` that nothing reads; `where` is what the caller calls it."""
    known = [name for field, info in _JobInput.model_fields.items() for name in _accepted_names(field, info)]
    return list(unknown_names([key for key in job_input if key not in known], known, f"{where}."))


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
    keep_metadata: StrictBool | None = None


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


def parse_job(job: Mapping[str, Any], max_files: int | None = None) -> Job:
    """Return the Job in what RunPod hands to a handler: `{"id": …, "input": {…}}`.

    Args:
        job: as it came; what is no object, NaN and the like are refused too.
        max_files: how many input files it may have; None for any number.

    Raises:
        InvalidInput: a field is missing, of the wrong kind or cannot be decoded; the sentence names all of them.
        InvalidWorkflow: the workflow is no graph in API format.
    """
    payload, _is_wrapped = read_input(job)
    check_job(job)
    if payload.get("workflow") is None:
        raise InvalidInput("Missing 'workflow' parameter", hint=_hint_of_missing(payload))
    _check_counts(payload, max_files)
    check_extra_params(payload.get("webhook"))
    try:
        # A field that is null is one that was left out, as for every client that fills in a template.
        parsed = _JobInput.model_validate({key: value for key, value in payload.items() if value is not None})
    except ValidationError as error:
        raise InvalidInput(_sentence(error)) from None
    workflow = _parse_workflow(parsed.workflow)
    warnings = itertools.chain(warnings_of_job(job), _warnings(parsed))
    return Job(
        id=str(job.get("id") or "local_test"),
        prompt_id=str(uuid.uuid4()),
        workflow=check_workflow(workflow),
        files=decode_files((item.name, item.image, item.url) for item in (*parsed.images, *parsed.files)),
        delivery=_parse_delivery(parsed.delivery),
        conversion=_parse_conversion(parsed.convert),
        bucket=_parse_bucket(parsed.s3 or _platform_bucket(job.get("s3Config"))),
        webhook=_parse_webhook(parsed.webhook),
        timeout_s=parsed.timeout_s,
        execution_timeout_s=execution_timeout_s(job.get("policy")),
        retry_on_crash=parsed.retry_on_crash,
        strict=parsed.strict,
        include_previews=parsed.include_previews,
        comfy_org_api_key=parsed.comfy_org_api_key,
        extra_data=_checked_extra_data({**_wrapped_extra_data(workflow), **parsed.extra_data}),
        warnings=tuple(itertools.islice(warnings, _MOST_WARNINGS)),
    )


def _checked_extra_data(extra_data: dict[str, Any]) -> dict[str, Any]:
    if len(extra_data) > _MOST_EXTRA_DATA:
        raise InvalidInput(f"extra_data has {len(extra_data)} keys, and may have {_MOST_EXTRA_DATA}")
    return extra_data


def _check_counts(payload: Mapping[str, Any], max_files: int | None) -> None:
    """Refuse a job with too many input files, before any of them is looked at."""
    lists = [payload.get(name) for name in ("images", "files")]
    count = sum(len(items) for items in lists if isinstance(items, list))
    if max_files is not None and count > max_files:
        raise InvalidInput(too_many_files(count, max_files))


def _hint_of_missing(payload: Mapping[str, Any]) -> str:
    if payload.get("modifier") is not None:
        return "Modifiers are for POST /generate of the gateway; send input.workflow or input.template here"
    return "Send the workflow as input.workflow, or name one of the catalog as input.template"


def workflow_of(job: Mapping[str, Any]) -> Workflow:
    """Return the graph of a job that may yet turn out to be invalid; an empty one if none can be made out."""
    try:
        payload, _is_wrapped = read_input(job)
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
        InvalidInput: the webhook has not the form that it must have, or too many extra parameters.
    """
    try:
        asked = read_input(job)[0].get("webhook")
    except WorkerError:
        return None
    if asked is None:
        return None
    check_extra_params(asked)
    try:
        return _parse_webhook(_WebhookInput.model_validate(asked))
    except ValidationError as error:
        raise InvalidInput(_sentence(error, "input.webhook")) from None


def _wrapped_extra_data(workflow: Any) -> Mapping[str, Any]:
    """Return the `extra_data` of a whole `{"prompt": …}`, as ComfyUI's own API is sent."""
    extra_data = workflow.get("extra_data") if isinstance(workflow, Mapping) and "prompt" in workflow else None
    return extra_data if isinstance(extra_data, Mapping) else {}


def _sentence(error: ValidationError, where: str = "input") -> str:
    """Return the problems that pydantic found as one sentence, each at its place, without the values."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        # The parts of a union that did not fit ("str", "dict[str,any]") are pydantic's words, not the caller's.
        place = ".".join(str(part) for part in item["loc"] if not re.search(r"[\[\]()]|^str$", str(part)))
        words = _REFUSALS.get(item["type"]) or item["msg"].replace("Input should", "must")
        problems.setdefault(f"{where}.{place}", words)
    named = [f"{place} {words}" for place, words in itertools.islice(problems.items(), _MOST_PROBLEMS)]
    more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
    sentence = "; ".join([*named, *more])
    are_files = all(place.startswith((f"{where}.images", f"{where}.files")) for place in problems)
    return f"{FAILED}: {sentence}" if are_files else sentence


def _parse_workflow(workflow: Any) -> Any:
    if isinstance(workflow, dict):
        return workflow
    if not isinstance(workflow, str):
        raise InvalidWorkflow("Workflow validation failed: the workflow is neither an object nor a string")
    try:
        return parse_json(workflow)
    except InvalidJson as problem:
        raise InvalidWorkflow(f"Workflow validation failed: the workflow is a string that {problem.reason}") from None


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
    return list(itertools.islice(_warnings(parsed), _MOST_WARNINGS))


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


_OF_ERRORS = ("error", "code", "hint", "details")


def failure_as_output(error: WorkerError, secrets: Iterable[str | None] = ()) -> dict[str, Any]:
    """Return a failure as the `output` of a RunPod job, with what the job had made beside it and `partial: true`."""
    output = error.as_output(secrets)
    if error.partial is None:
        return output
    made = {name: value for name, value in result_as_output(error.partial).items() if name != "status"}
    return {**output, **made, "partial": True}


def split_failure(output: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return what a failed job had made, None if that was nothing, and `{error, code, …}`."""
    if output.get("partial") is not True:
        return None, dict(output)
    error = {name: output[name] for name in _OF_ERRORS if name in output}
    return {name: value for name, value in output.items() if name not in error}, error


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

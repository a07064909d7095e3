"""RunPod's `input` to a Job, and a JobResult to RunPod's `output`."""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    Field,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from comfy_worker.errors import InvalidInput, InvalidWorkflow, WorkerError
from comfy_worker.graph.workflow import check_workflow
from comfy_worker.job.envelope import (
    check_job,
    execution_timeout_s,
    job_id_of,
    read_input,
    unknown_names,
    warnings_of_job,
)
from comfy_worker.job.input_files import UPLOAD_FAILED, decode_files, too_many_files
from comfy_worker.names import check_name
from comfy_worker.strict_json import InvalidJson, parse_json
from comfy_worker.types import (
    Artifact,
    Conversion,
    Delivery,
    Job,
    JobBucket,
    JobResult,
    Kind,
    Webhook,
    Workflow,
)

_MESSAGES = {
    "missing": "is missing",
    "string_type": "must be a string",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "dataclass_type": "must be an object",
    "list_type": "must be a list",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
}
"""Messages for pydantic's error types, in JSON's terms; for other types pydantic's message is used."""
_MAX_WARNINGS = 100
_MAX_PROBLEMS = 20
_MAX_EXTRA_DATA = 100
"""Keys of `extra_data`: each secret in it is searched for in each error sentence."""
_MAX_EXTRA_PARAMS_BYTES = 64_000
"""Size of `webhook.extra_params` as JSON: they are sent back with each message."""


def _check_prefix(delivery: Delivery) -> Delivery:
    prefix = check_name(delivery.prefix.strip("/"), "input.delivery.prefix") if delivery.prefix else None
    return replace(delivery, prefix=prefix)


def _check_extra_params(webhook: Webhook) -> Webhook:
    size = len(json.dumps(webhook.extra_params, separators=(",", ":"), ensure_ascii=False).encode(errors="replace"))
    if size > _MAX_EXTRA_PARAMS_BYTES:
        raise InvalidInput(
            f"input.webhook.extra_params has more than {_MAX_EXTRA_PARAMS_BYTES // 1000} kB as JSON",
            hint="Send a key instead, by which the receiver finds the rest",
        )
    return webhook


_Webhook: TypeAlias = Annotated[Webhook, AfterValidator(_check_extra_params)]


class _FileInput(BaseModel):
    name: StrictStr
    image: StrictStr | None = None
    url: StrictStr | None = None


class _JobInput(BaseModel):
    workflow: dict[str, Any] | StrictStr
    images: list[_FileInput] = Field(default_factory=list)
    files: list[_FileInput] = Field(default_factory=list)
    delivery: Annotated[Delivery, AfterValidator(_check_prefix)] = Delivery()
    convert: Conversion | None = None
    s3: JobBucket | None = None
    webhook: _Webhook | None = None
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None
    retry_on_crash: StrictBool | None = None
    strict: StrictBool = False
    include_previews: StrictBool = False
    refresh_worker: StrictBool = False
    comfy_org_api_key: StrictStr | None = Field(
        default=None, validation_alias=AliasChoices("comfy_org_api_key", "api_key_comfy_org")
    )
    extra_data: dict[str, Any] = Field(default_factory=dict)


_Parsed = TypeVar("_Parsed")
_JOB_INPUT = TypeAdapter(_JobInput)
_BUCKET = TypeAdapter(JobBucket)
_WEBHOOK: TypeAdapter[Webhook] = TypeAdapter(_Webhook)
_OBJECTS = {"delivery": Delivery, "convert": Conversion, "s3": JobBucket, "webhook": Webhook}
_FILE_LISTS = ("images", "files")


# ------------------------------------------------------------------------------------------------- input


def parse_job(job: Mapping[str, Any], max_files: int | None = None) -> Job:
    """Return the Job in what RunPod passes to a handler: `{"id": …, "input": {…}}`.

    Args:
        job: what was sent, not validated yet.
        max_files: how many input files it may have; None for any number.

    Raises:
        InvalidInput: a field is missing, has the wrong type or cannot be decoded; the sentence names all of them.
        InvalidWorkflow: the workflow is no graph in API format.
    """
    payload, _is_wrapped = read_input(job)
    check_job(job)
    if payload.get("workflow") is None:
        raise InvalidInput("Missing 'workflow' parameter", hint=_missing_workflow_hint(payload))
    count = sum(len(files) for name in _FILE_LISTS if isinstance(files := payload.get(name), list))
    if max_files is not None and count > max_files:
        raise InvalidInput(too_many_files(count, max_files))
    given = _without_nulls(payload)
    parsed = _validate(_JOB_INPUT, given, "input")
    workflow = _parse_workflow(parsed.workflow)
    extra_data = {**_wrapped_extra_data(workflow), **parsed.extra_data}
    if len(extra_data) > _MAX_EXTRA_DATA:
        raise InvalidInput(f"extra_data has {len(extra_data)} keys; the limit is {_MAX_EXTRA_DATA}")
    s3_config = job.get("s3Config")
    bucket = parsed.s3 or (None if s3_config is None else _validate(_BUCKET, s3_config, "s3Config"))
    warnings = itertools.chain(warnings_of_job(job), _all_unknown_keys(given))
    return Job(
        id=job_id_of(job),
        prompt_id=str(uuid.uuid4()),
        workflow=check_workflow(workflow),
        files=decode_files((item.name, item.image, item.url) for item in (*parsed.images, *parsed.files)),
        delivery=parsed.delivery,
        conversion=parsed.convert,
        bucket=bucket,
        webhook=parsed.webhook,
        timeout_s=parsed.timeout_s,
        execution_timeout_s=execution_timeout_s(job.get("policy")),
        retry_on_crash=parsed.retry_on_crash,
        strict=parsed.strict,
        include_previews=parsed.include_previews,
        comfy_org_api_key=parsed.comfy_org_api_key,
        extra_data=extra_data,
        warnings=tuple(itertools.islice(warnings, _MAX_WARNINGS)),
    )


def workflow_of(job: Mapping[str, Any]) -> Workflow:
    """Return the graph of a job that may be invalid; an empty one if it has none that can be read."""
    try:
        payload, _is_wrapped = read_input(job)
        return check_workflow(_parse_workflow(payload.get("workflow") or {}))
    except WorkerError:
        return {}


def webhook_of(job: Mapping[str, Any]) -> Webhook | None:
    """Return the job's own webhook, even if the job is invalid otherwise; None if it has none.

    Raises:
        InvalidInput: the webhook itself is invalid.
    """
    try:
        webhook = read_input(job)[0].get("webhook")
    except InvalidInput:
        return None
    return None if webhook is None else _validate(_WEBHOOK, webhook, "input.webhook")


def _missing_workflow_hint(payload: Mapping[str, Any]) -> str:
    if payload.get("modifier") is not None:
        return "Modifiers are for POST /generate of the gateway; send input.workflow or input.template here"
    return "Send the workflow as input.workflow, or name one of the catalog as input.template"


def _parse_workflow(workflow: Any) -> Any:
    if isinstance(workflow, dict):
        return workflow
    if not isinstance(workflow, str):
        raise InvalidWorkflow("Workflow validation failed: the workflow is neither an object nor a string")
    try:
        return parse_json(workflow)
    except InvalidJson as problem:
        raise InvalidWorkflow(f"Workflow validation failed: the workflow is a string that {problem.reason}") from None


def _wrapped_extra_data(workflow: Any) -> Mapping[str, Any]:
    """Return the `extra_data` of a whole `{"prompt": …}`, as it is sent to ComfyUI's own API."""
    extra_data = workflow.get("extra_data") if isinstance(workflow, Mapping) and "prompt" in workflow else None
    return extra_data if isinstance(extra_data, Mapping) else {}


# -------------------------------------------------------------------------------------------- validation


def _without_nulls(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that were sent; clients that fill in a template send null for the others."""
    return {key: value for key, value in payload.items() if value is not None}


def _validate(adapter: TypeAdapter[_Parsed], value: Any, name: str) -> _Parsed:
    """Return a value of the caller's as the adapter's type; `name` is what the caller calls it."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise InvalidInput(_sentence(error, name)) from None


def _sentence(error: ValidationError, name: str) -> str:
    """Return pydantic's errors as one sentence that names each field and does not repeat its value."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        # The members of a union ("str", "dict[str,any]") are pydantic's names, not the caller's.
        field = ".".join(str(part) for part in item["loc"] if not re.search(r"[\[\]()]|^str$", str(part)))
        message = _MESSAGES.get(item["type"]) or item["msg"].replace("Input should", "must")
        problems.setdefault(f"{name}.{field}", message)
    named = [f"{field} {message}" for field, message in itertools.islice(problems.items(), _MAX_PROBLEMS)]
    more = [f"and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
    sentence = "; ".join([*named, *more])
    are_files = all(field.startswith(tuple(f"{name}.{files}" for files in _FILE_LISTS)) for field in problems)
    return f"{UPLOAD_FAILED}: {sentence}" if are_files else sentence


def input_warnings(job_input: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key of a valid `input` that was ignored; none for an invalid one."""
    given = _without_nulls(job_input)
    try:
        _JobInput.model_validate(given)
    except (ValidationError, InvalidInput):
        return []
    return list(itertools.islice(_all_unknown_keys(given), _MAX_WARNINGS))


def unknown_keys(job_input: Mapping[str, Any], name: str = "input") -> list[str]:
    """Return a sentence for each unknown key of RunPod's `input`; `name` is what the caller calls the input."""
    return list(_unknown_keys(job_input, _JobInput, name))


def _all_unknown_keys(job_input: Mapping[str, Any]) -> Iterator[str]:
    yield from _unknown_keys(job_input, _JobInput, "input")
    for name, model in _OBJECTS.items():
        yield from _unknown_keys(job_input.get(name, {}), model, f"input.{name}")
    for name in _FILE_LISTS:
        for number, item in enumerate(job_input.get(name, ())):
            yield from _unknown_keys(item, _FileInput, f"input.{name}.{number}")


def _unknown_keys(given: Mapping[str, Any], model: Any, name: str) -> Iterator[str]:
    known: list[str] = []
    for field, info in model.__pydantic_fields__.items():
        alias = info.validation_alias
        names = [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [field]
        known += names
        used, *ignored = [key for key in names if key in given] or [field]
        yield from (f"{name}.{key} was ignored because {name}.{used} is set" for key in ignored)
    yield from unknown_names([key for key in given if key not in known], known, f"{name}.")


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


_ERROR_FIELDS = ("error", "code", "hint", "details")


def failure_as_output(error: WorkerError, secrets: Iterable[str | None] = ()) -> dict[str, Any]:
    """Return a failure as the `output` of a RunPod job; with partial outputs it has `partial: true`."""
    output = error.as_output(secrets)
    if error.partial is None:
        return output
    partial_outputs = {name: value for name, value in result_as_output(error.partial).items() if name != "status"}
    return {**output, **partial_outputs, "partial": True}


def split_failure(output: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the partial outputs of a failed job, None without any, and its `{error, code, …}`."""
    if output.get("partial") is not True:
        return None, dict(output)
    error = {name: output[name] for name in _ERROR_FIELDS if name in output}
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

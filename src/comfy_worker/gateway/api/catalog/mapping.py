"""Entries, jobs, errors and nodes in the catalog API's form."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from comfy_worker.catalog.entry import CatalogEntry
from comfy_worker.gateway.api.outputs import files_by_kind
from comfy_worker.gateway.http.error_responses import catalog_error
from comfy_worker.gateway.jobs.signed_links import IMAGES_PATH
from comfy_worker.gateway.jobs.webhook_formats import WebhookFormat, WebhookParts
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.types import JobState, Kind

JOB_PREFIX = "execution-"
_STATUSES: Mapping[JobState, str] = {
    JobState.IN_QUEUE: "pending",
    JobState.IN_PROGRESS: "running",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.TIMED_OUT: "failed",
    JobState.CANCELLED: "cancelled",
}
_LIMITS = {"default": "default", "minimum": "min", "maximum": "max"}
"""Our names of ComfyUI's options of an input."""


def workflow_id_of(entry: CatalogEntry) -> int:
    """Return a workflow's id: that of its manifest, or else a hash of its name."""
    return entry.manifest.id if entry.manifest.id is not None else zlib.crc32(entry.name.encode())


def job_id_of(execution_id: str) -> str:
    """Return the job of an execution; a job of another API is an execution with the same id."""
    return f"{JOB_PREFIX}{execution_id}" if execution_id.isdecimal() else execution_id


def execution_id_of(job_id: str) -> int | str:
    """Return the number of an execution, or the job's own id if it is a job of another API.

    Such an id may begin like ours: `execution-007` is not the job of execution 7.
    """
    number = job_id.removeprefix(JOB_PREFIX)
    return int(number) if number.isdecimal() and job_id == f"{JOB_PREFIX}{int(number)}" else job_id


def nodes_of(entry: CatalogEntry) -> list[dict[str, Any]]:
    """Return a workflow's nodes, with `{parameter}` as each input that a parameter sets."""
    placeholders = {
        (target.node, target.input): f"{{{name}}}"
        for name, parameter in entry.manifest.parameters.items()
        for target in parameter.sets
    }
    return [
        {
            "id": node_id,
            "type": node["class_type"],
            "inputs": {
                name: placeholders.get((node_id, name), value) for name, value in node.get("inputs", {}).items()
            },
        }
        for node_id, node in entry.graph.items()
    ]


def parameter_of(name: str, entry: CatalogEntry) -> dict[str, Any]:
    """Return a `Parameter`."""
    parameter = entry.manifest.parameters[name]
    fields = parameter.model_dump(include={"type", "description", "default", "minimum", "maximum", "choices"})
    return {"name": name, "required": parameter.is_required, **fields}


def outputs_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return `Outputs`, given an output whose files are links."""
    outputs: dict[str, Any] = {
        kind.value: [_file(item) for item in items]
        for kind, items in files_by_kind(output).items()
        if kind is Kind.IMAGE or items
    }
    if texts := [item["text"] for item in output.get("texts", [])]:
        outputs["texts"] = texts
    if warnings := list(output.get("errors", [])):
        outputs["warnings"] = warnings
    return outputs


def _file(item: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: item.get(name) for name in ("width", "height", "filename", "mime_type", "size_bytes", "duration_s")}
    return {"url": item["data"], **{name: value for name, value in kept.items() if value is not None}}


def execution_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error of an execution in the envelope; `reason` is the job's error code."""
    body = catalog_error({**error, "code": "execution_error"}, "Workflow execution failed")
    body["errors"][0]["reason"] = error["code"]
    return body


def execution_of(
    record: JobRecord, percent: float, output: Mapping[str, Any] | None, progress_at: float | None = None
) -> dict[str, Any]:
    """Return an `Execution`.

    Args:
        record: its job.
        percent: how much of it has run.
        output: its output; files are links.
        progress_at: the time of that progress, in seconds since the epoch.
    """
    changed = record.ended_at or max(record.started_at or record.created_at, progress_at or 0.0)
    execution = {
        "id": execution_id_of(record.id),
        "workflow_id": record.details.get("workflow_id"),
        "status": _STATUSES[record.state],
        "progress": 100 if record.state is JobState.COMPLETED else int(percent),
        "created_at": iso(record.created_at),
        "updated_at": iso(changed),
    }
    return execution if output is None else {**execution, "outputs": outputs_of(output)}


def response_of(record: JobRecord, execution: Mapping[str, Any]) -> dict[str, Any]:
    """Return an execution in the envelope, with its error if it failed."""
    data = {"execution": execution}
    return (
        {"status": "success", "data": data} if record.error is None else {**execution_error(record.error), "data": data}
    )


def node_of(name: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `Node`, given an entry of ComfyUI's `/object_info`."""
    described = info.get("input", {})
    inputs = [
        _input(input_name, spec, required=part == "required")
        for part in ("required", "optional")
        for input_name, spec in described.get(part, {}).items()
    ]
    types, names = info.get("output", []), info.get("output_name", [])
    outputs = [
        {"name": str(names[at]) if at < len(names) else _type(kind), "type": _type(kind)}
        for at, kind in enumerate(types)
    ]
    return {
        "id": name,
        "name": info.get("display_name") or name,
        "description": info.get("description") or "",
        "category": info.get("category") or "",
        "inputs": inputs,
        "outputs": outputs,
    }


def _input(name: str, spec: Any, *, required: bool) -> dict[str, Any]:
    """Return a `NodeInput`.

    ComfyUI describes it as `[type, options]`; a choice as `[[…]]` or, in newer versions, `["COMBO", {"options": […]}]`.
    """
    kind = spec[0] if isinstance(spec, list) and spec else spec
    options = spec[1] if isinstance(spec, list) and len(spec) > 1 and isinstance(spec[1], Mapping) else {}
    described: dict[str, Any] = {"name": name, "type": _type(kind), "required": required}
    choices = kind if isinstance(kind, list) else options.get("options")
    if isinstance(choices, list):
        described["choices"] = choices
    described |= {ours: options[theirs] for ours, theirs in _LIMITS.items() if theirs in options}
    return described


def _type(kind: Any) -> str:
    return "choice" if isinstance(kind, list) or kind == "COMBO" else str(kind).lower()


def iso(seconds: float) -> str:
    """Return a time as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _end(record: JobRecord, parts: WebhookParts) -> dict[str, Any]:
    percent = (record.progress or {}).get("percent", 0.0)
    # As in this API's responses, links are relative to the gateway's root.
    output = None if record.output is None else parts.linked(record, IMAGES_PATH, base_url="")
    return response_of(record, execution_of(record, percent, output))


def _progress(record: JobRecord, progress: Mapping[str, Any]) -> dict[str, Any]:
    open_record = replace(record, state=JobState.IN_PROGRESS)
    return response_of(open_record, execution_of(open_record, progress.get("percent", 0.0), None, time.time()))


WEBHOOK = WebhookFormat(_end, _progress)

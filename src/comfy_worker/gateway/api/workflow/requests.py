"""Turns the workflow API's requests into RunPod's form, and submits them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from comfy_worker.catalog.library import Catalog
from comfy_worker.catalog.template import expand
from comfy_worker.errors import ComfyUnreachable, InvalidInput
from comfy_worker.gateway.api.dependencies import OutputLinks, Services
from comfy_worker.gateway.api.workflow.graph_edits import with_prompt
from comfy_worker.gateway.jobs.service import JobService
from comfy_worker.gateway.settings import GatewaySettings
from comfy_worker.gateway.store.records import JobRecord
from comfy_worker.graph.workflow import check_workflow
from comfy_worker.job.payload import parse_job

API = "workflow"
_PROMPT = "prompt"
_COMFYUI_TIMEOUT_S = 1.0
_POLL_S = 0.05


async def check_comfyui(jobs: JobService) -> None:
    """Return if a ComfyUI answers; wait a second for it, because a gateway that has just started knows of none.

    Raises:
        ComfyUnreachable: none answers.
    """
    deadline = time.monotonic() + _COMFYUI_TIMEOUT_S
    while not any(backend["healthy"] for backend in jobs.backends()):
        if time.monotonic() >= deadline:
            raise ComfyUnreachable("ComfyUI server is not accessible", hint="Is it running? COMFYUI_URL says where")
        await asyncio.sleep(_POLL_S)


async def submit(
    request: Request,
    services: Services,
    links: OutputLinks,
    job_input: Mapping[str, Any],
    cache_key: str | None = None,
) -> tuple[JobRecord, bool]:
    """Queue a job; return it, and whether it is that of an earlier request with the same cache key.

    Raises:
        InvalidInput: an input file is invalid.
        QueueFull: no more jobs can wait.
    """
    job = job_of(job_input, services.settings)
    await run_in_threadpool(parse_job, job)
    job_id = str(uuid.uuid4())
    details = {"base_url": links.base_url}
    record = await services.jobs.submit(job, job_id=job_id, cache_key=cache_key, api=API, details=details)
    request.state.job_id = record.id
    return record, record.id != job_id


def job_of(job_input: Mapping[str, Any], settings: GatewaySettings) -> dict[str, Any]:
    """Return a job in RunPod's form; WORKFLOW_TIMEOUT, if set, limits its run."""
    if "workflow_timeout_s" not in settings.model_fields_set:
        return {"input": job_input}
    return {"input": job_input, "policy": {"executionTimeout": settings.workflow_timeout_s * 1000}}


def input_of(body: Mapping[str, Any], library: Catalog, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return RunPod's `input` with the graph of a request.

    Args:
        body: the request.
        library: the named workflows.
        inputs: the named workflow's parameters.

    Raises:
        InvalidInput: fields contradict each other; the named workflow does not exist; no text can take the prompt.
        InvalidWorkflow: the workflow is not a graph in API format.
    """
    prompt = str(body.get(_PROMPT) or "")
    asked = {name: body[name] for name in ("workflow", "images") if body.get(name) is not None}
    if (template := template_of(body)) is not None:
        given = dict(inputs or {})
        if prompt and _takes_prompt(template, library):
            if given.get(_PROMPT) is not None:
                raise InvalidInput("prompt and inputs.prompt are the same; send one of them")
            given[_PROMPT], prompt = prompt, ""
        asked |= {"template": template, "inputs": given}
    elif body.get("workflow") is None:
        raise InvalidInput("Send a workflow, or the name of one as template", hint='Send {"workflow": {"prompt": {…}}}')
    elif inputs:
        raise InvalidInput("inputs go with a template, not with a workflow of your own")
    expanded = dict(expand(asked, library))
    graph = check_workflow(expanded["workflow"])
    extra_data = {**_extra_data_of(body.get("workflow")), **(body.get("extra_data") or {})}
    return {
        **expanded,
        "workflow": with_prompt(graph, prompt) if prompt else graph,
        **({"extra_data": extra_data} if extra_data else {}),
    }


def template_of(body: Mapping[str, Any]) -> str | None:
    """Return the named workflow of a request, with its version if it has one; None if it has a graph of its own."""
    # An empty version counts as left out.
    template, version = body.get("template"), body.get("version") or None
    if version is None:
        return template
    if template is None:
        raise InvalidInput("version goes with a template, not with a workflow of your own")
    if "@" in template:
        raise InvalidInput("The version is said twice, in template and in version")
    return f"{template}@{version}"


def _takes_prompt(template: str, library: Catalog) -> bool:
    name, at, version = template.partition("@")
    return _PROMPT in library.get(name, version if at else None).manifest.parameters


def _extra_data_of(workflow: Any) -> Mapping[str, Any]:
    """Return the `extra_data` beside `prompt`, in the form that ComfyUI's own `POST /prompt` takes."""
    extra_data = workflow.get("extra_data") if isinstance(workflow, Mapping) and "prompt" in workflow else None
    return extra_data if isinstance(extra_data, Mapping) else {}


def cache_key_of(body: Mapping[str, Any], library: Catalog) -> str:
    """Return the same key for identical requests.

    It includes the content of a named workflow, so that a changed file makes a different request.
    """
    content: dict[str, Any] = {name: value for name, value in body.items() if name != "cache" and value is not None}
    if (template := template_of(body)) is not None:
        name, at, version = template.partition("@")
        content["version"] = library.get(name, version if at else None).version
    canonical = json.dumps(["workflow cache", content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()

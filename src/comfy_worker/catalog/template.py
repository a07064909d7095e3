"""Turns RunPod's `input` with a `template` into one with a `workflow`."""

from __future__ import annotations

from collections.abc import Mapping
from random import SystemRandom
from typing import Any

from comfy_worker.catalog.entry import fill
from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import InvalidInput
from comfy_worker.job.envelope import check_job, read_input

_TEMPLATE_KEYS = ("template", "inputs", "workflow")


def expand_job(job: Mapping[str, Any], catalog: Catalog) -> Mapping[str, Any]:
    """Return a RunPod job with its template expanded; a job without a template is returned unchanged.

    Raises:
        InvalidInput: the template cannot be expanded (see `expand`).
    """
    try:
        job_input, is_wrapped = read_input(job)
    except InvalidInput:
        # Parsing the job raises it again.
        return job
    if job_input.get("template") is None:
        return job
    check_job(job)
    expanded = expand(job_input, catalog)
    # Still wrapped, so that parsing the job adds its warning.
    return {**job, "input": {"input": expanded} if is_wrapped else expanded}


def expand(job_input: Mapping[str, Any], catalog: Catalog) -> Mapping[str, Any]:
    """Return RunPod's `input` with `workflow` and `images` in place of `template` and `inputs`.

    `template` is a name, or `name@version`. An input without a template is returned unchanged.

    Raises:
        InvalidInput: there is a workflow too, the template does not exist, or its inputs are invalid.
    """
    template = job_input.get("template")
    if template is None:
        return job_input
    if job_input.get("workflow") is not None:
        raise InvalidInput("input has both a workflow and a template; send one of them")
    if not isinstance(template, str):
        raise InvalidInput("input.template must be a string: a name, or name@version")
    inputs = job_input.get("inputs")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InvalidInput("input.inputs must be an object")
    name, at, version = template.partition("@")
    filled = fill(catalog.get(name, version if at else None), inputs or {}, SystemRandom())
    rest = {key: value for key, value in job_input.items() if key not in _TEMPLATE_KEYS}
    return {**rest, "workflow": filled.workflow, **_with_images(job_input.get("images"), filled.images)}


def _with_images(own: Any, images: Any) -> Mapping[str, Any]:
    """Return the job's own images and those of the template; parsing the job refuses anything but a list."""
    if own is not None and not isinstance(own, list):
        return {"images": own}
    merged = [*(own or ()), *images]
    return {"images": merged} if merged else {}

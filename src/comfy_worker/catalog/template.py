"""RunPod's `input` with a `template` to one with a `workflow`."""

from __future__ import annotations

from collections.abc import Mapping
from random import SystemRandom
from typing import Any

from comfy_worker.catalog.entry import fill
from comfy_worker.catalog.library import Catalog
from comfy_worker.errors import InvalidInput
from comfy_worker.job.envelope import check_job, read_input

_OWN_KEYS = ("template", "inputs", "workflow")


def expand_job(job: Mapping[str, Any], library: Catalog) -> Mapping[str, Any]:
    """Return a RunPod job of which the input is expanded; one without a template is returned as it is.

    Raises:
        InvalidInput: as `expand`.
    """
    try:
        job_input, is_wrapped = read_input(job)
    except InvalidInput:
        # Whoever reads the job says so.
        return job
    if job_input.get("template") is None:
        return job
    check_job(job)
    expanded = expand(job_input, library)
    # Whoever reads the job tells its caller that it is wrapped.
    return {**job, "input": {"input": expanded} if is_wrapped else expanded}


def expand(job_input: Mapping[str, Any], library: Catalog) -> Mapping[str, Any]:
    """Return RunPod's `input` with `workflow` and `images` in place of `template` and `inputs`.

    `template` is a name, or `name@version`; an input without one is returned as it is.

    Raises:
        InvalidInput: there is a workflow too, or no such template, or its inputs are not as they must be.
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
    filled = fill(library.get(name, version if at else None), inputs or {}, SystemRandom())
    rest = {key: value for key, value in job_input.items() if key not in _OWN_KEYS}
    return {**rest, "workflow": filled.workflow, **_with_images(job_input.get("images"), filled.images)}


def _with_images(own: Any, images: Any) -> Mapping[str, Any]:
    """Return the job's own images and those of the template; what is no list of images is left to be refused."""
    if own is not None and not isinstance(own, list):
        return {"images": own}
    together = [*(own or ()), *images]
    return {"images": together} if together else {}

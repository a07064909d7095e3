"""The manifest beside a graph: its title, its parameters and the models that it needs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictInt, StrictStr, StringConstraints, ValidationError

from comfy_worker.catalog.parameter import Parameter, Strict
from comfy_worker.errors import InvalidInput
from comfy_worker.graph.workflow import is_link
from comfy_worker.types import Workflow

ParameterName = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]


class ModelFile(Strict):
    """A file that must be in one of ComfyUI's model folders, and a URL from which to download it."""

    folder: StrictStr
    file: StrictStr
    url: StrictStr | None = None


class Manifest(Strict):
    """The description of a named workflow.

    Attributes:
        id: its number in APIs that number workflows; if None, derived from its name.
    """

    id: Annotated[StrictInt, Field(ge=1)] | None = None
    title: StrictStr
    description: StrictStr
    parameters: dict[ParameterName, Parameter] = Field(default_factory=dict)
    models: list[ModelFile] = Field(default_factory=list)


def parse_manifest(data: Any, graph: Workflow) -> Manifest:
    """Return the manifest in `data`, the content of its file.

    Raises:
        InvalidInput: it is invalid, or does not fit the graph; the message names every problem.
    """
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise InvalidInput("; ".join(_problem(item) for item in error.errors(include_url=False))) from None
    problems = _misfits(manifest, graph)
    if problems:
        raise InvalidInput("; ".join(problems))
    return manifest


def _problem(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "the manifest"
    return f"{field}: {item['msg'].removeprefix('Value error, ')}"


def _misfits(manifest: Manifest, graph: Workflow) -> list[str]:
    """Return the problems of targets: an input must exist, must not be a link, and belongs to one parameter."""
    problems = []
    owners: dict[tuple[str, str], str] = {}
    for name, parameter in manifest.parameters.items():
        for target in parameter.sets:
            described = f"input {target.input!r} of node {target.node!r}"
            inputs = graph[target.node].get("inputs", {}) if target.node in graph else {}
            owner = owners.setdefault((target.node, target.input), name)
            if target.input not in inputs:
                problems.append(f"parameters.{name}: the graph has no {described}")
            elif is_link(inputs[target.input]):
                problems.append(f"parameters.{name}: {described} is a link to another node")
            elif owner != name:
                problems.append(f"parameters.{name}: {described} is set by {owner!r} already")
    return problems

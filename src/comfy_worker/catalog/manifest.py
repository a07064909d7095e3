"""What stands beside a graph: its title, its parameters and the models that it needs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictInt, StrictStr, StringConstraints, ValidationError

from comfy_worker.catalog.parameter import Parameter, Strict
from comfy_worker.errors import InvalidInput
from comfy_worker.graph.workflow import is_link
from comfy_worker.types import Workflow

ParameterName = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]


class ModelFile(Strict):
    """A file that must lie in one of ComfyUI's model folders, and where it can be had."""

    folder: StrictStr
    file: StrictStr
    url: StrictStr | None = None


class Manifest(Strict):
    """A named workflow as its users see it.

    Attributes:
        id: its number in APIs that count workflows; one made of its name if None.
    """

    id: Annotated[StrictInt, Field(ge=1)] | None = None
    title: StrictStr
    description: StrictStr
    parameters: dict[ParameterName, Parameter] = Field(default_factory=dict)
    models: list[ModelFile] = Field(default_factory=list)


def parse_manifest(data: Any, graph: Workflow) -> Manifest:
    """Return the manifest in `data`, the content of its file.

    Raises:
        InvalidInput: it is not sound, or does not go with its graph; the sentence names every problem.
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
    place = ".".join(str(part) for part in item["loc"]) or "the manifest"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}"


def _misfits(manifest: Manifest, graph: Workflow) -> list[str]:
    """Return what the parameters set and cannot: an input must be there, hold a value, and have one parameter."""
    problems = []
    owners: dict[tuple[str, str], str] = {}
    for name, parameter in manifest.parameters.items():
        for target in parameter.sets:
            place = f"input {target.input!r} of node {target.node!r}"
            inputs = graph[target.node].get("inputs", {}) if target.node in graph else {}
            owner = owners.setdefault((target.node, target.input), name)
            if target.input not in inputs:
                problems.append(f"parameters.{name}: the graph has no {place}")
            elif is_link(inputs[target.input]):
                problems.append(f"parameters.{name}: {place} is a link to another node")
            elif owner != name:
                problems.append(f"parameters.{name}: {place} is set by {owner!r} already")
    return problems

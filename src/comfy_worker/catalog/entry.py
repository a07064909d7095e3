"""A catalog entry: a named workflow, and how the inputs of a request fill it in. No I/O."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from random import Random
from typing import Any

import filetype

from comfy_worker.catalog.manifest import Manifest, parse_manifest
from comfy_worker.catalog.parameter import Parameter
from comfy_worker.errors import InvalidInput
from comfy_worker.graph.file_references import is_fetched, name_of_url
from comfy_worker.graph.workflow import Graph, check_workflow
from comfy_worker.job.input_files import decode_base64
from comfy_worker.types import Workflow

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,8}\Z")
_DIGITS_OF_VERSION = 12
_MAX_EXPLAINED = 10
_MAX_SHOWN_LENGTH = 64


@dataclass(frozen=True)
class CatalogEntry:
    """A named workflow with its parameters.

    Attributes:
        name: its name in requests.
        manifest: title and parameters; there are none if the graph's file has no manifest beside it.
        graph: the workflow in API format, with its author's values.
        version: the beginning of a hash of the content; equal contents have equal versions everywhere.
        content: the `graph` and the `manifest` as JSON, the latter None without a file.
    """

    name: str
    manifest: Manifest
    graph: Workflow
    version: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Filled:
    """An entry filled in with the inputs of a request.

    Attributes:
        workflow: a copy of the graph with these inputs.
        images: the input files, as items of RunPod's `input.images`.
    """

    workflow: Graph
    images: Sequence[Mapping[str, str]]


def is_entry_name(name: str) -> bool:
    """Return whether an entry can have this name."""
    return _NAME.fullmatch(name) is not None


def shown(name: str) -> str:
    """Return a name from a request, quoted and shortened for an error message."""
    return repr(name) if len(name) <= _MAX_SHOWN_LENGTH else f"{name[:_MAX_SHOWN_LENGTH]!r}…"


def make_entry(name: str, graph: Any, manifest: Any = None) -> CatalogEntry:
    """Return the entry for the contents of its files; `manifest` is None without a file.

    Raises:
        InvalidInput: the manifest is invalid, or does not fit the graph.
        InvalidWorkflow: the graph is invalid.
    """
    workflow = copy.deepcopy(check_workflow(graph))
    parsed = Manifest(title=name, description="") if manifest is None else parse_manifest(manifest, workflow)
    content = {"manifest": manifest, "graph": workflow}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    version = hashlib.sha256(canonical.encode()).hexdigest()[:_DIGITS_OF_VERSION]
    return CatalogEntry(name, parsed, workflow, version, content)


def fill(entry: CatalogEntry, inputs: Mapping[str, Any], random: Random) -> Filled:
    """Return the entry's workflow with the inputs of a request, and defaults for those that are missing or null.

    Args:
        entry: the named workflow.
        inputs: the values by the names of their parameters.
        random: draws the values of parameters that are random by default.

    Raises:
        InvalidInput: a parameter is unknown, missing or has an invalid value; the message names every problem.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    parameters = entry.manifest.parameters
    unknown = [name for name in given if name not in parameters]
    problems = [_unknown(name, list(parameters)) for name in unknown[:_MAX_EXPLAINED]]
    if len(unknown) > _MAX_EXPLAINED:
        problems.append(f"{len(unknown) - _MAX_EXPLAINED} more names are unknown")
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        try:
            values[name] = _value(name, parameter, given, random)
        except ValueError as problem:
            problems.append(f"{name} {problem}")
    if problems:
        raise InvalidInput(f"The inputs of the template {entry.name!r} are refused: {'; '.join(problems)}")
    return _filled(entry, values)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    if near:
        return f"{shown(name)} is unknown, did you mean {near[0]!r}?"
    names = f"the parameters are {', '.join(map(repr, known))}" if known else "there are no parameters"
    return f"{shown(name)} is unknown, {names}"


def _value(name: str, parameter: Parameter, given: Mapping[str, Any], random: Random) -> Any:
    if name in given:
        return parameter.checked(given[name])
    if parameter.is_required:
        raise ValueError("is missing")
    if parameter.is_random:
        return random.randint(*parameter.random_range)
    return parameter.checked(parameter.default)


def _filled(entry: CatalogEntry, values: Mapping[str, Any]) -> Filled:
    workflow: Graph = copy.deepcopy(dict(entry.graph))
    images = []
    for name, value in values.items():
        parameter = entry.manifest.parameters[name]
        if parameter.type == "file":
            images.append(_image(name, value))
            value_in_graph = images[-1]["name"]
        else:
            value_in_graph = parameter.mapped(value)
        for target in parameter.sets:
            workflow[target.node]["inputs"][target.input] = value_in_graph
    return Filled(workflow, images)


def _image(parameter: str, file: str) -> Mapping[str, str]:
    """Return a file as an item of `input.images`, with the extension of its content or its URL."""
    if is_fetched(file):
        found = _EXTENSION.search(name_of_url(file))
        return {"name": parameter + (found.group() if found else ""), "url": file}
    known = filetype.guess(decode_base64(file, parameter))
    return {"name": f"{parameter}.{known.extension}" if known else parameter, "image": file}

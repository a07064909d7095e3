"""A named workflow, and how a request fills it in. Pure: nothing is read or written, and no graph is changed."""

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
from comfy_worker.catalog.parameter import Parameter, is_fetched
from comfy_worker.errors import InvalidInput
from comfy_worker.graph.file_references import name_of_url
from comfy_worker.graph.workflow import Graph, check_workflow
from comfy_worker.job.input_files import decode_base64
from comfy_worker.types import Workflow

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,8}\Z")
_DIGITS_OF_VERSION = 12
_MOST_EXPLAINED = 10
_LONGEST_SHOWN = 64


@dataclass(frozen=True)
class CatalogEntry:
    """A named workflow with its parameters.

    Attributes:
        name: what a request calls it.
        manifest: what it takes; without parameters if its file has no manifest beside it.
        graph: the workflow in API format, with the defaults of its author.
        version: made out of the content of both; the same content has the same version everywhere.
    """

    name: str
    manifest: Manifest
    graph: Workflow
    version: str


@dataclass(frozen=True)
class Filled:
    """What a request made of an entry.

    Attributes:
        workflow: a graph of its own.
        images: its files, as items of RunPod's `input.images`.
    """

    workflow: Graph
    images: Sequence[Mapping[str, str]]


def is_entry_name(name: str) -> bool:
    """Return whether an entry may be called so."""
    return _NAME.fullmatch(name) is not None


def shown(name: str) -> str:
    """Return a name that somebody sent, quoted and not too long for a sentence."""
    return repr(name) if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]!r}…"


def make_entry(name: str, graph: Any, manifest: Any = None) -> CatalogEntry:
    """Return the entry in the content of its files; `manifest` is None where there is none.

    Raises:
        InvalidInput: the manifest is not sound, or does not go with the graph.
        InvalidWorkflow: the graph is none.
    """
    workflow = copy.deepcopy(check_workflow(graph))
    parsed = Manifest(title=name, description="") if manifest is None else parse_manifest(manifest, workflow)
    return CatalogEntry(name, parsed, workflow, _version({"manifest": manifest, "graph": workflow}))


def _version(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGITS_OF_VERSION]


def fill(entry: CatalogEntry, inputs: Mapping[str, Any], random: Random) -> Filled:
    """Return the entry's workflow with what a request says, and the defaults for what it does not say.

    An input that is null counts as left out.

    Args:
        entry: the named workflow.
        inputs: a value by the name of its parameter.
        random: numbers for the parameters that want another one each time.

    Raises:
        InvalidInput: a parameter is unknown, missing or not as it must be; the sentence names every problem.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    parameters = entry.manifest.parameters
    unknown = [name for name in given if name not in parameters]
    problems = [_unknown(name, list(parameters)) for name in unknown[:_MOST_EXPLAINED]]
    if len(unknown) > _MOST_EXPLAINED:
        problems.append(f"{len(unknown) - _MOST_EXPLAINED} more names are unknown")
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
    return f"{shown(name)} is unknown, there is {', '.join(map(repr, known)) if known else 'no parameter'}"


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
        wanted = parameter.mapped(value)
        if parameter.type == "file":
            image = _image(name, value)
            images.append(image)
            wanted = image["name"]
        for target in parameter.sets:
            workflow[target.node]["inputs"][target.input] = wanted
    return Filled(workflow, images)


def _image(parameter: str, file: str) -> Mapping[str, str]:
    """Return a file as an item of `input.images`, with the extension that its content or its URL has."""
    if is_fetched(file):
        found = _EXTENSION.search(name_of_url(file))
        return {"name": parameter + (found.group() if found else ""), "url": file}
    known = filetype.guess(decode_base64(file, parameter))
    return {"name": f"{parameter}.{known.extension}" if known else parameter, "image": file}

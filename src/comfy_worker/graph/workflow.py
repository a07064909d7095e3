"""Pure functions on a workflow in ComfyUI's API format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

from comfy_worker.errors import InvalidWorkflow, UiFormatWorkflow
from comfy_worker.types import Workflow

Graph: TypeAlias = dict[str, dict[str, Any]]
"""A copy of a workflow that may be changed."""

_ANNOTATION = " [input]"

_DEFAULT_PREFIX = "ComfyUI"
"""Replaces an empty prefix, with which ComfyUI would name the files after the folder."""

_MAX_NAMED = 10
_MAX_ID_LENGTH = 100

WEBSOCKET_OUTPUT_NODE = "SaveImageWebsocket"
"""A node whose images arrive as binary websocket frames and are never files."""


def check_workflow(workflow: Any) -> Workflow:
    """Return the graph in `workflow`, which may be wrapped as `{"prompt": …}`, the body of ComfyUI's `POST /prompt`.

    Raises:
        UiFormatWorkflow: it is in the UI format.
        InvalidWorkflow: it is not a graph of nodes.
    """
    wrapped = workflow.get("prompt") if isinstance(workflow, Mapping) else None
    if isinstance(wrapped, Mapping) and "class_type" not in wrapped:
        workflow = wrapped
    if not isinstance(workflow, Mapping):
        raise InvalidWorkflow(
            f"Workflow validation failed: the workflow is a {_json_type(workflow)}, not an object of nodes"
        )
    if is_ui_format(workflow):
        raise UiFormatWorkflow(
            "Workflow validation failed: the workflow is in ComfyUI's UI format, not in its API format",
            hint="In ComfyUI choose Workflow > Export (API) and send that file's content",
        )
    if not workflow:
        raise InvalidWorkflow("Workflow validation failed: the workflow has no nodes")
    for node_id, node in workflow.items():
        if not isinstance(node, Mapping):
            raise InvalidWorkflow(
                f"Workflow validation failed: Node {node_id}: it is a {_json_type(node)}, not an object with "
                "class_type and inputs"
            )
        if not isinstance(node.get("class_type"), str):
            raise InvalidWorkflow(f"Workflow validation failed: Node {node_id}: class_type is missing")
        if not isinstance(node.get("inputs", {}), Mapping):
            raise InvalidWorkflow(f"Workflow validation failed: Node {node_id}: inputs is not an object")
    _check_links(workflow)
    return workflow


def _check_links(workflow: Workflow) -> None:
    """Refuse links to nodes that do not exist, for which ComfyUI raises a KeyError."""
    dangling = [
        (str(node_id), str(name), value[0])
        for node_id, node in workflow.items()
        for name, value in node.get("inputs", {}).items()
        if is_link(value) and value[0] not in workflow
    ]
    if not dangling:
        return
    problems = [
        {
            "type": "dangling_link",
            "message": f"it is linked to node {target[:_MAX_ID_LENGTH]}, which the workflow does not have",
            **node_names(workflow, node_id),
            "input_name": name,
            "given": target[:_MAX_ID_LENGTH],
        }
        for node_id, name, target in dangling[:_MAX_NAMED]
    ]
    sentences = [f"Node {problem['node_id']} ({problem['input_name']}): {problem['message']}" for problem in problems]
    more = [f"and {len(dangling) - _MAX_NAMED} more such links"] if len(dangling) > _MAX_NAMED else []
    raise InvalidWorkflow(
        f"Workflow validation failed: {'; '.join([*sentences, *more])}", details={"problems": problems}
    )


def is_ui_format(workflow: Mapping[str, Any]) -> bool:
    """Return whether the workflow is in the UI format, which has a list of `nodes`."""
    return isinstance(workflow.get("nodes"), list)


def copy_graph(workflow: Workflow) -> Graph:
    """Return a copy with nodes and inputs of its own; the inputs' values are shared.

    A node without `inputs`, which ComfyUI requires, gets an empty object.
    """
    return {str(node_id): {**node, "inputs": dict(node.get("inputs", {}))} for node_id, node in workflow.items()}


def class_type(workflow: Workflow, node_id: str) -> str:
    """Return the class of a node, or "" if the graph does not have it (another node can create nodes)."""
    return str(_node(workflow, node_id).get("class_type", ""))


def title(workflow: Workflow, node_id: str) -> str:
    """Return the title of a node, or its class if it has none."""
    meta = _node(workflow, node_id).get("_meta")
    named = meta.get("title") if isinstance(meta, Mapping) else None
    return str(named or class_type(workflow, node_id))


def node_names(workflow: Workflow, node_id: str) -> dict[str, Any]:
    """Return the `node_id`, `class_type` and `title` by which a node is shown to callers."""
    return {"node_id": node_id, "class_type": class_type(workflow, node_id), "title": title(workflow, node_id)}


def _node(workflow: Workflow, node_id: str) -> Mapping[str, Any]:
    """Return a node; for ids such as "12:3" or "12.0.0.3", node 12, which expanded into that node."""
    for candidate in (node_id, re.split(r"[.:]", node_id, maxsplit=1)[0]):
        node = workflow.get(candidate)
        if isinstance(node, Mapping):
            return node
    return {}


def nodes_of_class(workflow: Workflow, class_name: str) -> list[str]:
    """Return the ids of the nodes of one class."""
    return [node_id for node_id, node in workflow.items() if node.get("class_type") == class_name]


def split_annotation(value: str) -> tuple[str, str]:
    """Split `name [input]` into name and annotation; the annotation can be ""."""
    return (value.removesuffix(_ANNOTATION), _ANNOTATION) if value.endswith(_ANNOTATION) else (value, "")


def prefix_outputs(graph: Graph, folder: str) -> None:
    """Make every node with a `filename_prefix` save below `folder`, by changing the graph.

    All files of a job are then in one folder and cannot overwrite those of another job. An identical workflow creates
    its files again, instead of naming those of the previous run, while everything before the save node stays cached.

    Raises:
        InvalidWorkflow: a prefix leads out of that folder.
    """
    for node_id, node in graph.items():
        prefix = node["inputs"].get("filename_prefix")
        if not isinstance(prefix, str):
            continue
        if ".." in re.split(r"[/\\]", prefix):
            raise InvalidWorkflow(
                f"Workflow validation failed: Node {node_id} (filename_prefix): {prefix!r} leads out of its folder"
            )
        node["inputs"]["filename_prefix"] = f"{folder}/{prefix.strip('/') or _DEFAULT_PREFIX}"


def find_loop(workflow: Workflow) -> list[str]:
    """Return the ids of nodes that form a loop, each linked to the next one; an empty list if there is no loop."""
    sources = {
        node_id: [value[0] for value in node.get("inputs", {}).values() if is_link(value) and value[0] in workflow]
        for node_id, node in workflow.items()
    }
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as error:
        loop: list[str] = error.args[1]
        return loop[:0:-1]
    return []


def is_link(value: Any) -> bool:
    """Return whether an input's value is a link to another node: `[node id, output slot]`."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)

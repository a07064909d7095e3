"""Pure functions on a workflow in ComfyUI's API format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from comfy_worker.errors import InvalidWorkflow, UiFormatWorkflow
from comfy_worker.types import Workflow

Graph: TypeAlias = dict[str, dict[str, Any]]
"""A workflow of our own that may be changed."""

_ANNOTATION = " [input]"

_DEFAULT_PREFIX = "ComfyUI"
"""For a prefix that is empty; ComfyUI would name the files after the folder."""

_MOST_NAMED = 10
_LONGEST_ID = 100

WEBSOCKET_OUTPUT_NODE = "SaveImageWebsocket"
"""ComfyUI's node whose pictures come as binary frames and are never files."""


def check_workflow(workflow: Any) -> Workflow:
    """Return the graph in `workflow`, which may be wrapped as `{"prompt": …}` (what ComfyUI's API is sent).

    Raises:
        UiFormatWorkflow: it was saved for the canvas.
        InvalidWorkflow: it is no graph of nodes.
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
    """Refuse links that lead to no node; ComfyUI itself meets a KeyError there."""
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
            "message": f"it is linked to node {target[:_LONGEST_ID]}, which the workflow does not have",
            "node_id": node_id,
            "class_type": class_type(workflow, node_id),
            "title": title(workflow, node_id),
            "input_name": name,
            "given": target[:_LONGEST_ID],
        }
        for node_id, name, target in dangling[:_MOST_NAMED]
    ]
    sentences = [f"Node {problem['node_id']} ({problem['input_name']}): {problem['message']}" for problem in problems]
    more = [f"and {len(dangling) - _MOST_NAMED} more such links"] if len(dangling) > _MOST_NAMED else []
    raise InvalidWorkflow(
        f"Workflow validation failed: {'; '.join([*sentences, *more])}", details={"problems": problems}
    )


def is_ui_format(workflow: Mapping[str, Any]) -> bool:
    """Return whether the workflow was saved for the canvas: a list of `nodes`, and `links`."""
    return isinstance(workflow.get("nodes"), list)


def copy_graph(workflow: Workflow) -> Graph:
    """Return a copy of which nodes and their inputs may be changed; values inside the inputs are shared.

    ComfyUI wants `inputs` in every node; one without gets an empty object.
    """
    return {str(node_id): {**node, "inputs": dict(node.get("inputs", {}))} for node_id, node in workflow.items()}


def nodes_without_consumers(workflow: Workflow) -> set[str]:
    """Return the nodes whose results no other node takes: those at the end of the graph."""
    taken = {
        str(value[0])
        for node in workflow.values()
        for value in node.get("inputs", {}).values()
        if isinstance(value, list) and len(value) == 2
    }
    return set(workflow) - taken


def class_type(workflow: Workflow, node_id: str) -> str:
    """Return the class of a node, or "" for a node that the graph does not have (one made by another node)."""
    return str(_node(workflow, node_id).get("class_type", ""))


def title(workflow: Workflow, node_id: str) -> str:
    """Return the name that the author gave to a node, or else its class."""
    meta = _node(workflow, node_id).get("_meta")
    named = meta.get("title") if isinstance(meta, Mapping) else None
    return str(named or class_type(workflow, node_id))


def _node(workflow: Workflow, node_id: str) -> Mapping[str, Any]:
    """Return a node; ids such as "12:3" or "12.0.0.3" belong to what node 12 expanded into."""
    for candidate in (node_id, re.split(r"[.:]", node_id, maxsplit=1)[0]):
        node = workflow.get(candidate)
        if isinstance(node, Mapping):
            return node
    return {}


def nodes_of_class(workflow: Workflow, wanted: str) -> list[str]:
    """Return the ids of the nodes of one class."""
    return [node_id for node_id, node in workflow.items() if node.get("class_type") == wanted]


def string_inputs(workflow: Workflow) -> Iterator[tuple[str, str, str]]:
    """Yield `(node_id, input_name, value)` for every input that is a plain string."""
    for node_id, node in workflow.items():
        for name, value in node.get("inputs", {}).items():
            if isinstance(value, str):
                yield node_id, name, value


def split_annotation(value: str) -> tuple[str, str]:
    """Split `name [input]` into the name and the annotation, which is "" where there is none."""
    return (value.removesuffix(_ANNOTATION), _ANNOTATION) if value.endswith(_ANNOTATION) else (value, "")


def prefix_outputs(graph: Graph, folder: str) -> None:
    """Let every node with a `filename_prefix` save below `folder`, in place.

    A job's files then lie in one folder, cannot collide with another's, and an identical workflow makes them anew
    instead of naming those of the run before, while everything above the save node stays cached.

    Raises:
        InvalidWorkflow: a prefix would lead out of that folder.
    """
    for node_id, name, value in list(string_inputs(graph)):
        if name == "filename_prefix":
            if ".." in re.split(r"[/\\]", value):
                raise InvalidWorkflow(
                    f"Workflow validation failed: Node {node_id} (filename_prefix): {value!r} leads out of its folder"
                )
            graph[node_id]["inputs"][name] = f"{folder}/{value.strip('/') or _DEFAULT_PREFIX}"


def find_loop(workflow: Workflow) -> list[str]:
    """Return the ids of nodes that feed each other in a circle, in order, or nothing."""
    state: dict[str, int] = {}
    path: list[str] = []
    for start in workflow:
        stack: list[tuple[str, Iterator[str]]] = [(start, _links(workflow, start))]
        if state.get(start):
            continue
        state[start] = 1
        path.append(start)
        while stack:
            node_id, links = stack[-1]
            following = next(links, None)
            if following is None:
                stack.pop()
                path.pop()
                state[node_id] = 2
            elif state.get(following) == 1:
                return path[path.index(following) :]
            elif following not in state and following in workflow:
                state[following] = 1
                path.append(following)
                stack.append((following, _links(workflow, following)))
    return []


def _links(workflow: Workflow, node_id: str) -> Iterator[str]:
    for value in _node(workflow, node_id).get("inputs", {}).values():
        if is_link(value):
            yield str(value[0])


def is_link(value: Any) -> bool:
    """Return whether an input's value is a connection: `[node id, output slot]`."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)

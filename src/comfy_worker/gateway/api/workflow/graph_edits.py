"""Sets the prompt, the seeds or single inputs of a graph. Pure functions: they return a changed copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from comfy_worker.catalog.entry import shown
from comfy_worker.errors import InvalidInput
from comfy_worker.graph.workflow import Graph, copy_graph, is_link
from comfy_worker.types import Workflow

_ENCODER = "TextEncode"
"""Part of the name of every node class that turns a text into conditioning."""
_TEXTS = ("text", "prompt", "text_g", "text_l", "clip_g", "clip_l", "t5xxl", "llama", "bert", "mt5xl")
"""The text inputs of these classes; some have one for each of their encoders."""
_SEEDS = ("seed", "noise_seed")
_MAX_PROBLEMS = 10
_MAX_SUGGESTIONS = 200
_MAX_NAME = 100


def with_prompt(workflow: Workflow, text: str) -> Graph:
    """Return the graph with another positive prompt: the texts at the positive input of samplers and guiders.

    If there are none, the only text encoder of the graph.

    Raises:
        InvalidInput: no text can be identified as the positive prompt.
    """
    graph = copy_graph(workflow)
    encoders = [node_id for node_id in graph if _texts_of(graph[node_id])]
    positive = set(_positive_encoders(graph)) or set(encoders if len(encoders) == 1 else ())
    if not positive:
        raise InvalidInput(
            "It is unclear which text of the workflow the prompt replaces: no sampler's positive input leads to a "
            f"text, and the workflow has {len(encoders) or 'no'} text encoders",
            hint="Leave out prompt and put the text into the workflow",
        )
    for node_id in positive:
        graph[node_id]["inputs"].update(dict.fromkeys(_texts_of(graph[node_id]), text))
    return graph


def _positive_encoders(graph: Graph) -> Iterator[str]:
    """Yield the text encoders upstream of the positive input of a sampler or guider."""
    waiting = [value[0] for node in graph.values() for value in _positive_links(node)]
    seen: set[str] = set()
    while waiting:
        node_id = waiting.pop()
        node = graph.get(node_id)
        if node is None or node_id in seen:
            continue
        seen.add(node_id)
        if _texts_of(node):
            yield node_id
        else:
            waiting += [value[0] for value in _conditioning_links(node)]


def _positive_links(node: Mapping[str, Any]) -> Iterable[Any]:
    """Return the links at the positive input of a sampler or guider."""
    names = ("positive", "conditioning") if "Guider" in node["class_type"] else ("positive",)
    return [value for name, value in node["inputs"].items() if name in names and is_link(value)]


def _conditioning_links(node: Mapping[str, Any]) -> Iterable[Any]:
    """Return the links of the conditioning that a node passes on."""
    links = {name: value for name, value in node["inputs"].items() if is_link(value)}
    if "positive" in links:
        return [links["positive"]]
    return [value for name, value in links.items() if name.startswith("cond")]


def _texts_of(node: Mapping[str, Any]) -> list[str]:
    """Return the text inputs of a text encoder, whether they have a value or a link."""
    if _ENCODER not in node["class_type"]:
        return []
    return [
        name for name, value in node["inputs"].items() if name in _TEXTS and (isinstance(value, str) or is_link(value))
    ]


def with_seed(workflow: Workflow, seed: int) -> Graph:
    """Return the graph with every `seed` and `noise_seed` that is a number set to a seed.

    Raises:
        InvalidInput: the graph has none.
    """
    graph = copy_graph(workflow)
    found = [
        (node, name)
        for node in graph.values()
        for name, value in node["inputs"].items()
        if name in _SEEDS and isinstance(value, int) and not isinstance(value, bool)
    ]
    if not found:
        raise InvalidInput("No node of the workflow has a seed that could be set")
    for node, name in found:
        node["inputs"][name] = seed
    return graph


def with_inputs(workflow: Workflow, values: Mapping[str, Any]) -> Graph:
    """Return the graph with other values of existing inputs; `{"6.text": …}` sets the input `text` of node 6.

    Raises:
        InvalidInput: a node or input does not exist; the sentence names the first ten.
    """
    graph = copy_graph(workflow)
    unknown = []
    for key, value in values.items():
        node_id, _, name = key.rpartition(".")
        if node_id in graph and name in graph[node_id]["inputs"]:
            graph[node_id]["inputs"][name] = value
        else:
            unknown.append(key)
    if unknown:
        # The nearest name is only looked for in these: that takes its time.
        problems = [_unknown_input(graph, key) for key in unknown[:_MAX_PROBLEMS]]
        rest = len(unknown) - len(problems)
        raise InvalidInput("; ".join([*problems, *([f"and {rest} more"] if rest else [])]))
    return graph


def _unknown_input(graph: Graph, key: str) -> str:
    """Return what is wrong with `<node id>.<input>`."""
    node_id, _, name = key.rpartition(".")
    if node_id not in graph:
        return f"{shown(key)} names no node of the workflow; write it as <node id>.<input>"
    near = get_close_matches(name[:_MAX_NAME], list(graph[node_id]["inputs"])[:_MAX_SUGGESTIONS], n=1)
    advice = f", did you mean {shown(near[0])}?" if near else ""
    return f"node {shown(node_id)} has no input {shown(name)}{advice}"

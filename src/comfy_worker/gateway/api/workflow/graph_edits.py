"""What a caller sets in a graph with a text, a seed or the name of an input: pure functions, the graph given stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from comfy_worker.catalog.entry import shown
from comfy_worker.errors import InvalidInput
from comfy_worker.graph.workflow import Graph, copy_graph, is_link
from comfy_worker.types import Workflow

_ENCODER = "TextEncode"
"""In the name of every class that turns a text into conditioning."""
_TEXTS = ("text", "prompt", "text_g", "text_l", "clip_g", "clip_l", "t5xxl", "llama", "bert", "mt5xl")
"""The inputs of such classes that take the text; some take it once for each of their encoders."""
_SEEDS = ("seed", "noise_seed")
_MOST_EXPLAINED = 10
_MOST_NAMES = 200
_LONGEST_NAME = 100


def with_prompt(workflow: Workflow, text: str) -> Graph:
    """Return the graph with another positive prompt: the texts that a sampler's or guider's positive input leads to.

    In a graph in which none leads to a text, the only text there is.

    Raises:
        InvalidInput: it cannot be told which text that is.
    """
    graph = copy_graph(workflow)
    encoders = [node_id for node_id in graph if _texts_of(graph[node_id])]
    positive = set(_positive_encoders(graph)) or set(encoders if len(encoders) == 1 else ())
    if not positive:
        raise InvalidInput(
            "It cannot be told which text of the workflow the prompt is to replace: no sampler's positive input leads "
            f"to a text, and the workflow has {len(encoders) or 'no'} text encoders",
            hint="Leave out prompt and put the text into the workflow",
        )
    for node_id in positive:
        graph[node_id]["inputs"].update(dict.fromkeys(_texts_of(graph[node_id]), text))
    return graph


def _positive_encoders(graph: Graph) -> Iterator[str]:
    """Yield the nodes with a text that stand before the positive input of a sampler or a guider."""
    waiting = [value[0] for node in graph.values() for value in _begins(node)]
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
            waiting += [value[0] for value in _conditioning(node)]


def _begins(node: Mapping[str, Any]) -> Iterable[Any]:
    """Return the links through which a sampler or guider takes what is to be seen."""
    names = ("positive", "conditioning") if "Guider" in node["class_type"] else ("positive",)
    return [value for name, value in node["inputs"].items() if name in names and is_link(value)]


def _conditioning(node: Mapping[str, Any]) -> Iterable[Any]:
    """Return the links through which a node takes the conditioning that it hands on."""
    links = {name: value for name, value in node["inputs"].items() if is_link(value)}
    if "positive" in links:
        return [links["positive"]]
    return [value for name, value in links.items() if name.startswith("cond")]


def _texts_of(node: Mapping[str, Any]) -> list[str]:
    """Return the inputs of a text encoder that take the text, whether it stands there or comes from another node."""
    if _ENCODER not in node["class_type"]:
        return []
    return [
        name for name, value in node["inputs"].items() if name in _TEXTS and (isinstance(value, str) or is_link(value))
    ]


def with_seed(workflow: Workflow, seed: int) -> Graph:
    """Return the graph with a seed in every `seed` and `noise_seed` that is a number.

    Raises:
        InvalidInput: there is none.
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
    """Return the graph with other values for inputs that it has; `{"6.text": …}` is the input `text` of node 6.

    Raises:
        InvalidInput: there is no such node or input; the sentence names the first ten of them.
    """
    graph = copy_graph(workflow)
    problems = []
    for place, value in values.items():
        node_id, _, name = place.rpartition(".")
        if node_id in graph and name in graph[node_id]["inputs"]:
            graph[node_id]["inputs"][name] = value
        else:
            problems.append(place)
    if problems:
        # Only these are explained: to look for the nearest name takes its time.
        words = [_misplaced(graph, place) for place in problems[:_MOST_EXPLAINED]]
        rest = len(problems) - len(words)
        raise InvalidInput("; ".join([*words, *([f"and {rest} more"] if rest else [])]))
    return graph


def _misplaced(graph: Graph, place: str) -> str:
    """Return what is wrong with the name of an input that is not there."""
    node_id, _, name = place.rpartition(".")
    if node_id not in graph:
        return f"{shown(place)} names no node of the workflow; write it as <node id>.<input>"
    near = get_close_matches(name[:_LONGEST_NAME], list(graph[node_id]["inputs"])[:_MOST_NAMES], n=1)
    advice = f", did you mean {shown(near[0])}?" if near else ""
    return f"node {shown(node_id)} has no input {shown(name)}{advice}"

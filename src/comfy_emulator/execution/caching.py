"""Which results of the prompt before are used again: ComfyUI's cache by class, inputs and everything upstream."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_emulator.graph_utils import is_link
from comfy_emulator.node_definitions import JsonObject, NodeInterfaces

logger = logging.getLogger(__name__)

Fingerprint = Callable[[str], Any]
"""Gives what `IS_CHANGED` says of a node of the prompt; False for nodes without one."""


@dataclass(frozen=True)
class CachedResult:
    """What a node gave: a list of values an output slot, and its entry for the history, if it has one."""

    outputs: list[list[Any]]
    ui: JsonObject | None


class OutputCache:
    """Results of the nodes of one prompt; those that the next prompt has no use for are dropped when it starts."""

    def __init__(self) -> None:
        self._results: dict[str, CachedResult] = {}
        self._keys: dict[str, str] = {}

    def start_prompt(self, keys: Mapping[str, str]) -> None:
        """Keep only what this prompt's nodes (keys by node id) can use."""
        self._keys = dict(keys)
        wanted = set(keys.values())
        self._results = {key: result for key, result in self._results.items() if key in wanted}

    def get(self, node_id: str) -> CachedResult | None:
        """Give the result of a node, or of one that does the same."""
        return self._results.get(self._keys[node_id])

    def set(self, node_id: str, result: CachedResult) -> None:
        """Keep the result of a node that ran."""
        self._results[self._keys[node_id]] = result

    def clear(self) -> None:
        """Forget everything, as `/free` asks with `free_memory`."""
        self._results = {}


def cache_keys(
    prompt: Mapping[str, JsonObject], interfaces: NodeInterfaces, fingerprint: Fingerprint
) -> dict[str, str]:
    """Give each node a key that is equal for nodes that would give the same result, whatever their ids."""
    keys: dict[str, str] = {}

    def key(node_id: str) -> str:
        if node_id not in keys:
            keys[node_id] = ""  # a node in a cycle never runs, so its key need only be there
            keys[node_id] = _digest(signature(node_id))
        return keys[node_id]

    def signature(node_id: str) -> list[Any]:
        if node_id not in prompt:  # only an output that is left out may hang on a node that is not there
            return [uuid.uuid4().hex]
        node = prompt[node_id]
        own_id = node_id if "UNIQUE_ID" in interfaces.hidden(node["class_type"]).values() else None
        inputs = [
            [name, "link", key(value[0]), value[1]] if is_link(value) else [name, "value", value]
            for name, value in sorted(node.get("inputs", {}).items())
        ]
        return [node["class_type"], own_id, fingerprint(node_id), inputs]

    for node_id in prompt:
        key(node_id)
    return keys


def fingerprints(prompt: Mapping[str, JsonObject], interfaces: NodeInterfaces, input_dir: Path) -> Fingerprint:
    """Ask the nodes of a prompt for their fingerprint; one that fails counts as changed, as in ComfyUI."""

    def fingerprint(node_id: str) -> Any:
        node = prompt[node_id]
        ask = interfaces.node(node["class_type"]).fingerprint
        if ask is None:
            return False
        known = interfaces.inputs(node["class_type"])
        constants = {
            name: value for name, value in node.get("inputs", {}).items() if name in known and not is_link(value)
        }
        try:
            answer = ask(input_dir, **constants)
        except Exception as error:  # noqa: BLE001 - a node's own code may raise anything
            logger.warning("The fingerprint of node %s failed, so it runs again: %s", node_id, error)
            return uuid.uuid4().hex
        never_the_same = answer != answer  # a NaN, by which nodes say that they are to run each time
        return uuid.uuid4().hex if never_the_same else answer

    return fingerprint


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()

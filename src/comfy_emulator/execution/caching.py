"""The cache of node results between two prompts (`comfy_execution/caching.py` of ComfyUI).

A result is reused if the node's class, its inputs and all nodes before it are the same (`CacheKeySetInputSignature`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.graph_utils import is_link
from comfy_emulator.json_types import JsonObject
from comfy_emulator.node_definitions import NodeDefinitions

logger = logging.getLogger(__name__)

Fingerprint = Callable[[str], Any]
"""Returns a node's `IS_CHANGED` by node id; False for nodes without one."""


@dataclass(frozen=True)
class CacheEntry:
    """The result of a node: one list of values per output slot, and its `ui` with `meta`, if any."""

    outputs: list[list[Any]]
    ui: JsonObject | None


class OutputCache:
    """The results of the nodes of one prompt, until the next prompt starts that cannot use them."""

    def __init__(self) -> None:
        self._entries: dict[str, CacheEntry] = {}
        self._keys: dict[str, str] = {}

    def set_prompt(self, keys: Mapping[str, str]) -> None:
        """Drop all entries but those that the nodes of this prompt can use; `keys` are by node id."""
        self._keys = dict(keys)
        used = set(keys.values())
        self._entries = {key: entry for key, entry in self._entries.items() if key in used}

    def get(self, node_id: str) -> CacheEntry | None:
        """Return the result of a node, or of an equal one."""
        return self._entries.get(self._keys[node_id])

    def set(self, node_id: str, entry: CacheEntry) -> None:
        """Store the result of a node."""
        self._entries[self._keys[node_id]] = entry

    def clear(self) -> None:
        """Drop all entries."""
        self._entries = {}


def cache_keys(
    prompt: Mapping[str, JsonObject], definitions: NodeDefinitions, fingerprint: Fingerprint
) -> dict[str, str]:
    """Return a key for each node, equal for nodes with the same result, whatever their ids."""
    keys: dict[str, str] = {}

    def key(node_id: str) -> str:
        if node_id not in keys:
            keys[node_id] = ""  # ends the recursion in a cycle, whose nodes never run
            keys[node_id] = _digest(signature(node_id))
        return keys[node_id]

    def signature(node_id: str) -> list[Any]:
        if node_id not in prompt:  # possible only before outputs that failed validation and do not run
            return [uuid.uuid4().hex]
        node = prompt[node_id]
        own_id = node_id if "UNIQUE_ID" in definitions.hidden_inputs(node["class_type"]).values() else None
        inputs = [
            [name, "link", key(value[0]), value[1]] if is_link(value) else [name, "value", value]
            for name, value in sorted(node.get("inputs", {}).items())
        ]
        return [node["class_type"], own_id, fingerprint(node_id), inputs]

    for node_id in prompt:
        key(node_id)
    return keys


def fingerprints(prompt: Mapping[str, JsonObject], definitions: NodeDefinitions, folders: FolderPaths) -> Fingerprint:
    """Return the fingerprint function of a prompt; a failure counts as a change (`IsChangedCache`)."""

    def fingerprint(node_id: str) -> Any:
        node = prompt[node_id]
        is_changed = definitions.node(node["class_type"]).fingerprint
        if is_changed is None:
            return False
        defined = definitions.inputs(node["class_type"])
        constants = {
            name: value for name, value in node.get("inputs", {}).items() if name in defined and not is_link(value)
        }
        try:
            value = is_changed(folders, **constants)
        except Exception as error:  # noqa: BLE001 - a node's code may raise anything
            logger.warning("IS_CHANGED of node %s failed, so it runs again: %s", node_id, error)
            return uuid.uuid4().hex
        is_nan = value != value
        return uuid.uuid4().hex if is_nan else value

    return fingerprint


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()

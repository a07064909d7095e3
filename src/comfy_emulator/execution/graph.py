"""The order in which the nodes of a prompt run (`comfy_execution/graph.py` of ComfyUI)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from comfy_emulator.graph_utils import is_link
from comfy_emulator.json_types import JsonObject


class ExecutionList:
    """The nodes that have yet to run, and the nodes that block each of them.

    Args:
        prompt: the graph.
        is_output: whether a node is an output node.
        is_cached: whether a node's result is in the cache.
    """

    def __init__(
        self, prompt: Mapping[str, JsonObject], is_output: Callable[[str], bool], is_cached: Callable[[str], bool]
    ) -> None:
        self._prompt = prompt
        self._is_output = is_output
        self._is_cached = is_cached
        self._blocked_by: dict[str, set[str]] = {}
        self._blocking: dict[str, list[str]] = {}

    def add_node(self, output: str) -> None:
        """Add an output node and everything that it needs and that is not cached."""
        pending = [output]
        while pending:
            node_id = pending.pop()
            if node_id in self._blocked_by:
                continue
            sources = [source for source in self._sources(node_id) if not self._is_cached(source)]
            self._blocked_by[node_id] = set(sources)
            self._blocking.setdefault(node_id, [])
            for source in self._blocked_by[node_id]:
                self._blocking.setdefault(source, []).append(node_id)
            pending += sources

    def _sources(self, node_id: str) -> list[str]:
        return [value[0] for value in self._prompt[node_id]["inputs"].values() if is_link(value)]

    def pick_node(self) -> str | None:
        """Return the node that runs next; None when all have run.

        Of the nodes that are not blocked, an output node comes first, then one that blocks an output node, then one
        two links away from an output node, then the one that was added first (`ux_friendly_pick_node`).
        """
        ready = [node_id for node_id, sources in self._blocked_by.items() if not sources]
        for condition in (self._is_output, self._blocks_output, self._blocks_output_indirectly):
            choice = next((node_id for node_id in ready if condition(node_id)), None)
            if choice is not None:
                return choice
        return ready[0] if ready else None

    def _blocks_output(self, node_id: str) -> bool:
        return any(self._is_output(blocked) for blocked in self._blocking[node_id])

    def _blocks_output_indirectly(self, node_id: str) -> bool:
        return any(self._blocks_output(blocked) for blocked in self._blocking[node_id])

    def complete_node(self, node_id: str) -> None:
        """Remove a node that has run."""
        del self._blocked_by[node_id]
        for blocked in self._blocking.pop(node_id):
            self._blocked_by[blocked].discard(node_id)

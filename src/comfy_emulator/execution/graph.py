"""In which order the nodes of a prompt run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from comfy_emulator.graph_utils import is_link
from comfy_emulator.node_definitions import JsonObject


class ExecutionList:
    """The nodes still to run, each with the sources that it waits for.

    The choice among nodes that could run is ComfyUI's: outputs first, then what an output waits for, then what
    those wait for, otherwise the node that came into the list first.
    """

    def __init__(
        self, prompt: Mapping[str, JsonObject], is_output: Callable[[str], bool], is_cached: Callable[[str], bool]
    ) -> None:
        self._prompt = prompt
        self._is_output = is_output
        self._is_cached = is_cached
        self._waits_for: dict[str, set[str]] = {}
        self._feeds: dict[str, list[str]] = {}

    def add(self, output: str) -> None:
        """Add an output node and all that it needs and that is not cached."""
        found = [output]
        while found:
            node_id = found.pop()
            if node_id in self._waits_for:
                continue
            sources = [source for source in self._sources(node_id) if not self._is_cached(source)]
            self._waits_for[node_id] = set(sources)
            self._feeds.setdefault(node_id, [])
            for source in self._waits_for[node_id]:
                self._feeds.setdefault(source, []).append(node_id)
            found += sources

    def _sources(self, node_id: str) -> list[str]:
        return [value[0] for value in self._prompt[node_id]["inputs"].values() if is_link(value)]

    def next(self) -> str | None:
        """Choose the node to run now; None when all have run."""
        ready = [node_id for node_id, sources in self._waits_for.items() if not sources]
        for wanted in (self._is_output, self._feeds_output, self._feeds_output_in_two):
            choice = next((node_id for node_id in ready if wanted(node_id)), None)
            if choice is not None:
                return choice
        return ready[0] if ready else None

    def _feeds_output(self, node_id: str) -> bool:
        return any(self._is_output(fed) for fed in self._feeds[node_id])

    def _feeds_output_in_two(self, node_id: str) -> bool:
        return any(self._feeds_output(fed) for fed in self._feeds[node_id])

    def done(self, node_id: str) -> None:
        """Take a node that has run off the list."""
        del self._waits_for[node_id]
        for fed in self._feeds.pop(node_id):
            self._waits_for[fed].discard(node_id)

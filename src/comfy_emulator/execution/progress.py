"""How far the nodes of the running prompt are, as `progress_state` tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class _NodeProgress:
    value: float = 0
    max: float = 1
    state: str = "pending"


class ProgressState:
    """The state of each node of one prompt that has begun."""

    def __init__(self, prompt_id: str) -> None:
        self._prompt_id = prompt_id
        self._nodes: dict[str, _NodeProgress] = {}

    def start(self, node_id: str) -> None:
        """Note that a node begins."""
        self._nodes[node_id] = _NodeProgress(0.0, 1.0, "running")

    def update(self, node_id: str, value: float, maximum: float) -> None:
        """Note a step of a node."""
        self._nodes[node_id] = _NodeProgress(value, maximum, "running")

    def finish(self, node_id: str) -> None:
        """Note that a node has run, or is cached."""
        node = self._nodes.setdefault(node_id, _NodeProgress())
        node.value = node.max
        node.state = "finished"

    def message(self) -> dict[str, Any]:
        """Give the data of `progress_state`."""
        return {
            "prompt_id": self._prompt_id,
            "nodes": {
                node_id: {**asdict(node), "node_id": node_id, "prompt_id": self._prompt_id, **real_node(node_id)}
                for node_id, node in self._nodes.items()
            },
        }


def real_node(node_id: str) -> dict[str, Any]:
    """Give the fields by which a client finds the node of an expanded graph; the emulator expands none."""
    return {"display_node_id": node_id, "parent_node_id": None, "real_node_id": node_id}

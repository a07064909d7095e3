"""The progress of each node of the running prompt (`comfy_execution/progress.py` of ComfyUI)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from comfy_emulator.json_types import JsonObject


@dataclass
class _NodeProgress:
    value: float = 0
    max: float = 1
    state: str = "pending"


class ProgressRegistry:
    """The progress of the nodes of one prompt that have started."""

    def __init__(self, prompt_id: str) -> None:
        self._prompt_id = prompt_id
        self._nodes: dict[str, _NodeProgress] = {}

    def start(self, node_id: str) -> None:
        """Record that a node starts."""
        self._nodes[node_id] = _NodeProgress(0.0, 1.0, "running")

    def update(self, node_id: str, value: float, maximum: float) -> None:
        """Record a step of a node."""
        self._nodes[node_id] = _NodeProgress(value, maximum, "running")

    def finish(self, node_id: str) -> None:
        """Record that a node has run, or that its result was cached."""
        node = self._nodes.setdefault(node_id, _NodeProgress())
        node.value = node.max
        node.state = "finished"

    def message(self) -> JsonObject:
        """Return the data of a `progress_state` event (`WebUIProgressHandler._send_progress_state`)."""
        return {
            "prompt_id": self._prompt_id,
            "nodes": {
                node_id: {**asdict(node), "node_id": node_id, "prompt_id": self._prompt_id, **node_origin(node_id)}
                for node_id, node in self._nodes.items()
            },
        }


def node_origin(node_id: str) -> JsonObject:
    """Return the fields that lead from a node of an expanded graph to the client's; the emulator expands none."""
    return {"display_node_id": node_id, "parent_node_id": None, "real_node_id": node_id}

"""A node that is at work until a test lets it go on or fail, on the emulator as on a real ComfyUI.

For a real one it is `tests/data/gate_node.py`, to be put into its `custom_nodes/`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from comfy_emulator.json_types import JsonObject
from comfy_emulator.node_api import ImageBatch, NodeContext, NodeRegistry, NodeResult
from comfy_emulator.node_definitions import load_object_info
from tests.support.comfyui import graphs
from tests.support.waiting import wait_until

_LOOK_S = 0.002

OBJECT_INFO: dict[str, JsonObject] = {
    **load_object_info(),
    "TestGate": {
        "input": {"required": {"image": ["IMAGE"], "file": ["STRING", {"default": ""}]}},
        "output": ["IMAGE"],
        "output_is_list": [False],
        "output_node": False,
    },
}
"""What the emulator's nodes look like, and this one."""


def registry() -> NodeRegistry:
    """Return all nodes of the emulator, and this one; more may be added."""
    # Loaded late: they bring NumPy and PyAV.
    from comfy_emulator.nodes import REGISTRY

    nodes = NodeRegistry(dict(REGISTRY.nodes))
    nodes.add("TestGate")(_wait)
    return nodes


def _wait(context: NodeContext, image: ImageBatch, file: str) -> NodeResult:
    with Path(f"{file}.begun").open("a") as begun:
        begun.write("begun\n")
    while not Path(file).exists():
        context.sleep(_LOOK_S)
    if message := Path(file).read_text():
        raise RuntimeError(message)
    return NodeResult((image,))


class Gate:
    """One gate, and the workflow that comes by it at node 3."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"gate-{random.getrandbits(64):x}"

    def graph(self) -> graphs.Graph:
        """Return a workflow that saves a picture once the gate is open."""
        graph = graphs.picture((random.randrange(256), random.randrange(256), random.randrange(256)))
        graph["3"] = graphs.node("TestGate", image=["1", 0], file=str(self._file))
        graph["9"]["inputs"]["images"] = ["3", 0]
        return graph

    def open(self, failure: str = "") -> None:
        """Let the node go on, or fail with a sentence."""
        written = self._file.with_suffix(".written")
        written.write_text(failure)
        written.rename(self._file)

    @property
    def runs(self) -> int:
        """How often the node has begun."""
        begun = Path(f"{self._file}.begun")
        return len(begun.read_text().splitlines()) if begun.exists() else 0

    def wait_until_run(self, times: int = 1) -> None:
        """Return when the node has begun that often."""
        wait_until(lambda: self.runs >= times)


def job(graph: graphs.Graph, **job_input: Any) -> dict[str, Any]:
    """Return a job as RunPod hands it over; `policy` goes beside the input."""
    beside = {"policy": job_input.pop("policy")} if "policy" in job_input else {}
    return {"id": "job-1", "input": {"workflow": graph, **job_input}, **beside}

"""What two workflows share that take about as long."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from comfy_worker.types import Workflow

_TIMED_INPUTS = frozenset(
    {
        *("steps", "start_at_step", "end_at_step", "denoise", "seconds", "duration", "amount", "tile_size"),
        *("width", "height", "megapixels", "scale_by", "upscale_by"),
        *("batch_size", "length", "num_frames", "frames", "video_frames"),
    }
)
"""Inputs on which it depends how long a workflow takes; seeds, texts and the like do not count."""


def signature(workflow: Workflow) -> str:
    """Return what two workflows share that take about as long: their nodes, and how much these are to do."""
    parts = [
        (str(node.get("class_type")), sorted(_work(node.get("inputs", {}))))
        for _node_id, node in sorted(workflow.items())
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _work(inputs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield how much a node is to do, as far as it is set in the node itself."""
    for name, value in inputs.items():
        if name in _TIMED_INPUTS and isinstance(value, (str, int, float)):
            yield name, str(value)

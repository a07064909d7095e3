"""The signature of a workflow, by which its run time is predicted."""

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
"""Inputs that determine how long a workflow runs, unlike seeds and texts."""


def signature(workflow: Workflow) -> str:
    """Return a hash of the nodes and their workload; workflows with the same signature take about equally long."""
    parts = [
        (str(node.get("class_type")), sorted(_workload(node.get("inputs", {}))))
        for _node_id, node in sorted(workflow.items())
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _workload(inputs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in inputs.items():
        if name in _TIMED_INPUTS and isinstance(value, (str, int, float)):
            yield name, str(value)

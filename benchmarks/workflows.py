"""The workflows of benchmarks; each has a new colour, so that ComfyUI caches nothing."""

from __future__ import annotations

import itertools
import time
from typing import Any

_colors = itertools.count(int(time.time()) % 1_000_000 * 10)


def images(count: int, side: int) -> dict[str, Any]:
    """Return a workflow that makes `count` square images without a model."""
    size = {"width": side, "height": side, "batch_size": count, "color": next(_colors) % 0xFFFFFF}
    return {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "benchmark/image"}},
    }


def work(seconds: float, steps: int, *, preview: bool = False) -> dict[str, Any]:
    """Return a workflow that makes a small image with `seconds` of GPU work (custom node `TestWork`)."""
    graph = images(1, 64)
    inputs = {"image": ["1", 0], "seconds": seconds, "steps": steps, "preview": preview, "fail_at": 0}
    graph["3"] = {"class_type": "TestWork", "inputs": inputs}
    graph["9"]["inputs"]["images"] = ["3", 0]
    return graph

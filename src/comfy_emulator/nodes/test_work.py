"""`TestWork`, a node for tests: it takes a given time, reports steps and may fail.

The custom node of the same name for a real ComfyUI is `tests/data/worker_test_nodes.py`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_emulator.nodes.registry import REGISTRY

_PREVIEW_SIDE = 512


@REGISTRY.add("TestWork")
def test_work(
    context: NodeContext, image: ImageBatch, seconds: float, steps: int, preview: bool, fail_at: int
) -> NodeResult:
    """Take `seconds` in `steps` steps, send optional previews, and fail after step `fail_at` (0: never)."""
    frame = ("JPEG", Image.fromarray((image[0] * 255).astype(np.uint8)), _PREVIEW_SIDE) if preview else None
    for step in range(1, steps + 1):
        context.check_interrupted()
        context.sleep(seconds / steps)
        context.progress(step, steps, frame)
        if step == fail_at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (simulated)")
    return NodeResult((image,))

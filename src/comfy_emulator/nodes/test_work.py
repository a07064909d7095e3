"""The test node that stands in for a sampler: it takes a set time, reports steps and may fail."""

from __future__ import annotations

import numpy as np
from PIL import Image

from comfy_emulator.node_api import Context, ImageBatch, NodeResult
from comfy_emulator.nodes.registry import REGISTRY

_PREVIEW_SIDE = 512


@REGISTRY.add("TestWork")
def test_work(
    context: Context, image: ImageBatch, seconds: float, steps: int, preview: bool, fail_at: int
) -> NodeResult:
    """Takes `seconds` in `steps` steps, sends previews if asked, and fails after step `fail_at` (0: never)."""
    frame = ("JPEG", Image.fromarray((image[0] * 255).astype(np.uint8)), _PREVIEW_SIDE) if preview else None
    for step in range(1, steps + 1):
        context.check_interrupted()
        context.sleep(seconds / steps)
        context.progress(step, steps, frame)
        if step == fail_at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (simulated)")
    return NodeResult((image,))

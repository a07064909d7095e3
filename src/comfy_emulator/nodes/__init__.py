"""The emulator's nodes, registered in `REGISTRY` when this package is imported.

Nodes that need no model do the same as in ComfyUI, with NumPy, Pillow and PyAV. Nodes that need one imitate it: they
take time, report progress, and draw a placeholder with a banner that says that no model ran.
"""

from __future__ import annotations

from comfy_emulator.nodes import (
    audio,
    conditioning,
    images,
    latents,
    load_images,
    loaders,
    masks,
    meshes,
    primitives,
    sampling,
    save_images,
    test_work,
    upscale_models,
    vae,
    video,
)
from comfy_emulator.nodes.registry import REGISTRY

__all__ = [
    "REGISTRY",
    "audio",
    "conditioning",
    "images",
    "latents",
    "load_images",
    "loaders",
    "masks",
    "meshes",
    "primitives",
    "sampling",
    "save_images",
    "test_work",
    "upscale_models",
    "vae",
    "video",
]

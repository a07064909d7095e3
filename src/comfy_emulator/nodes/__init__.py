"""The nodes of the emulator.

Nodes that need no model do their work as in ComfyUI, with numpy, Pillow and PyAV; nodes that need one are imitated:
they take time, report progress and draw a picture that says that no model ran.
"""

from __future__ import annotations

from comfy_emulator.nodes import (
    audio,
    decoding,
    images,
    latents,
    loading,
    masks,
    meshes,
    models,
    sampling,
    saving,
    values,
    video,
    work,
)
from comfy_emulator.nodes.registry import REGISTRY

__all__ = [
    "REGISTRY",
    "audio",
    "decoding",
    "images",
    "latents",
    "loading",
    "masks",
    "meshes",
    "models",
    "sampling",
    "saving",
    "values",
    "video",
    "work",
]

"""Nodes that enlarge images with a model, imitated by Pillow."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_emulator.nodes.pixels import scale
from comfy_emulator.nodes.placeholder import with_banner
from comfy_emulator.nodes.registry import REGISTRY

_DEFAULT_UPSCALE = 4


@dataclass(frozen=True)
class UpscaleModel:
    """An upscale model: the name of its file, and its factor."""

    name: str
    scale: int


@REGISTRY.add("UpscaleModelLoader")
def upscale_model_loader(_context: NodeContext, model_name: str) -> NodeResult:
    """Return an upscale model; its factor is in its name (`4x`, `x2`), otherwise 4."""
    found = re.search(r"(?<!\d)([1-8])x(?!\d)|x([1-8])(?!\d)", model_name, re.IGNORECASE)
    factor = int(found.group(1) or found.group(2)) if found else _DEFAULT_UPSCALE
    return NodeResult((UpscaleModel(model_name, factor),))


@REGISTRY.add("ImageUpscaleWithModel")
def image_upscale_with_model(context: NodeContext, upscale_model: UpscaleModel, image: ImageBatch) -> NodeResult:
    """Enlarge images with Pillow, and add the banner."""
    height, width = image.shape[1] * upscale_model.scale, image.shape[2] * upscale_model.scale
    enlarged = []
    for number, picture in enumerate(scale(image[..., :3], width, height, "lanczos"), start=1):
        context.check_interrupted()
        enlarged.append(with_banner(picture, [f"enlarged {upscale_model.scale}x", upscale_model.name]))
        context.progress(number, len(image))
    return NodeResult((np.stack(enlarged),))

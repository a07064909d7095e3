"""Nodes that create and use masks (`comfy_extras/nodes_mask.py` of ComfyUI)."""

from __future__ import annotations

import numpy as np

from comfy_emulator.node_api import ImageBatch, Mask, NodeContext, NodeResult
from comfy_emulator.nodes.pixels import FloatArray, match_alpha, repeat_to, scale
from comfy_emulator.nodes.registry import REGISTRY

_CHANNELS = ("red", "green", "blue", "alpha")


@REGISTRY.add("SolidMask")
def solid_mask(_context: NodeContext, value: float, width: int, height: int) -> NodeResult:
    """Return a mask of one value."""
    return NodeResult((np.full((1, height, width), value, dtype=np.float32),))


@REGISTRY.add("InvertMask")
def invert_mask(_context: NodeContext, mask: Mask) -> NodeResult:
    """Invert a mask."""
    return NodeResult((np.float32(1.0) - mask,))


@REGISTRY.add("MaskToImage")
def mask_to_image(_context: NodeContext, mask: Mask) -> NodeResult:
    """Return a mask as a grey image."""
    return NodeResult((np.repeat(mask.reshape(-1, *mask.shape[-2:], 1), 3, axis=-1),))


@REGISTRY.add("ImageToMask")
def image_to_mask(_context: NodeContext, image: ImageBatch, channel: str) -> NodeResult:
    """Return one channel of an image as a mask."""
    return NodeResult((image[..., _CHANNELS.index(channel)],))


@REGISTRY.add("ImageCompositeMasked")
def image_composite_masked(
    _context: NodeContext,
    destination: ImageBatch,
    source: ImageBatch,
    x: int,
    y: int,
    resize_source: bool,
    mask: Mask | None = None,
) -> NodeResult:
    """Paste the source into the destination at (x, y), where the mask is set."""
    destination, source = match_alpha(destination, source)
    if resize_source:
        source = scale(source, destination.shape[2], destination.shape[1], "bilinear")
    source = repeat_to(source, len(destination))
    result = destination.copy()
    target = result[:, y : y + source.shape[1], x : x + source.shape[2], :]
    height, width = target.shape[1:3]
    if height and width:
        weight = _mask_for(source, mask)[:, :height, :width]
        target[...] = weight * source[:, :height, :width] + (1 - weight) * target
    return NodeResult((result,))


def _mask_for(source: ImageBatch, mask: Mask | None) -> FloatArray:
    """Return the mask at the size and number of the images, with one channel."""
    if mask is None:
        return np.ones((*source.shape[:3], 1), dtype=np.float32)
    planes = mask.reshape(-1, *mask.shape[-2:], 1)
    return repeat_to(scale(planes, source.shape[2], source.shape[1], "bilinear"), len(source))

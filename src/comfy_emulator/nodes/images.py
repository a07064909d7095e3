"""Nodes that create and change images (`nodes.py`, `comfy_extras/nodes_images.py`, `nodes_post_processing.py`)."""

from __future__ import annotations

import math

import numpy as np

from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_emulator.nodes.pixels import FloatArray, match_alpha, scale
from comfy_emulator.nodes.registry import REGISTRY


@REGISTRY.add("EmptyImage")
def empty_image(_context: NodeContext, width: int, height: int, batch_size: int, color: int) -> NodeResult:
    """Return images of one colour, 0xRRGGBB."""
    levels = np.array([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]) / 255
    return NodeResult((np.broadcast_to(levels.astype(np.float32), (batch_size, height, width, 3)).copy(),))


@REGISTRY.add("ImageScale")
def image_scale(
    _context: NodeContext, image: ImageBatch, upscale_method: str, width: int, height: int, crop: str
) -> NodeResult:
    """Scale images to a size; a side of 0 keeps the aspect, two change nothing."""
    old_height, old_width = image.shape[1:3]
    if width == 0 and height == 0:
        return NodeResult((image,))
    if width == 0:
        width = max(1, round(old_width * height / old_height))
    elif height == 0:
        height = max(1, round(old_height * width / old_width))
    return NodeResult((scale(image, width, height, upscale_method, crop),))


@REGISTRY.add("ImageScaleBy")
def image_scale_by(_context: NodeContext, image: ImageBatch, upscale_method: str, scale_by: float) -> NodeResult:
    """Scale images by a factor."""
    height, width = image.shape[1:3]
    return NodeResult((scale(image, round(width * scale_by), round(height * scale_by), upscale_method),))


@REGISTRY.add("ImageScaleToTotalPixels")
def image_scale_to_total_pixels(
    _context: NodeContext, image: ImageBatch, upscale_method: str, megapixels: float, resolution_steps: int = 1
) -> NodeResult:
    """Scale images to a number of megapixels (1024 x 1024); sides are multiples of `resolution_steps`."""
    height, width = image.shape[1:3]
    factor = math.sqrt(megapixels * 1024 * 1024 / (width * height))
    new_width = round(width * factor / resolution_steps) * resolution_steps
    new_height = round(height * factor / resolution_steps) * resolution_steps
    return NodeResult((scale(image, new_width, new_height, upscale_method),))


@REGISTRY.add("ImageInvert")
def image_invert(_context: NodeContext, image: ImageBatch) -> NodeResult:
    """Invert the colours."""
    return NodeResult((np.float32(1.0) - image,))


@REGISTRY.add("ImageBatch")
def image_batch(_context: NodeContext, image1: ImageBatch, image2: ImageBatch) -> NodeResult:
    """Join two batches; the second gets the size and channels of the first."""
    channels = max(image1.shape[-1], image2.shape[-1])
    image1, image2 = _with_channels(image1, channels), _with_channels(image2, channels)
    if image1.shape[1:] != image2.shape[1:]:
        image2 = scale(image2, image1.shape[2], image1.shape[1], "bilinear", "center")
    return NodeResult((np.concatenate([image1, image2]),))


def _with_channels(images: ImageBatch, channels: int) -> ImageBatch:
    missing = channels - images.shape[-1]
    return np.pad(images, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=1.0) if missing else images


@REGISTRY.add("ImageBlend")
def image_blend(
    _context: NodeContext, image1: ImageBatch, image2: ImageBatch, blend_factor: float, blend_mode: str
) -> NodeResult:
    """Blend the second image, scaled to the first, into the first."""
    image1, image2 = match_alpha(image1, image2)
    if image1.shape != image2.shape:
        image2 = scale(image2, image1.shape[2], image1.shape[1], "bicubic", "center")
    factor = np.float32(blend_factor)
    blended = image1 * (1 - factor) + _blend(image1, image2, blend_mode) * factor
    return NodeResult((np.clip(blended, 0, 1),))


def _blend(below: FloatArray, above: FloatArray, mode: str) -> FloatArray:
    """Return the blend before it is weighted (`Blend.blend_mode`)."""
    if mode == "normal":
        return above
    if mode == "multiply":
        return below * above
    if mode == "screen":
        return 1 - (1 - below) * (1 - above)
    if mode == "overlay":
        return np.where(below <= 0.5, 2 * below * above, 1 - 2 * (1 - below) * (1 - above))
    if mode == "soft_light":
        darker = below - (1 - 2 * above) * below * (1 - below)
        return np.where(above <= 0.5, darker, below + (2 * above - 1) * (_soft_light_curve(below) - below))
    if mode == "difference":
        return below - above
    raise ValueError(f"Unsupported blend mode: {mode}")


def _soft_light_curve(level: FloatArray) -> FloatArray:
    return np.where(level <= 0.25, ((16 * level - 12) * level + 4) * level, np.sqrt(np.maximum(level, 0)))


@REGISTRY.add("ImageCrop")
def image_crop(_context: NodeContext, image: ImageBatch, width: int, height: int, x: int, y: int) -> NodeResult:
    """Crop images; the result has at least one pixel."""
    left, top = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
    return NodeResult((image[:, top : top + height, left : left + width, :],))


@REGISTRY.add("ImageFlip")
def image_flip(_context: NodeContext, image: ImageBatch, flip_method: str) -> NodeResult:
    """Flip images."""
    return NodeResult((np.flip(image, axis=1 if flip_method.startswith("x") else 2),))


@REGISTRY.add("ImageRotate")
def image_rotate(_context: NodeContext, image: ImageBatch, rotation: str) -> NodeResult:
    """Rotate images clockwise by `90 degrees`, `180 degrees` or `270 degrees`, or not (`none`)."""
    quarters = 0 if rotation == "none" else int(rotation.split()[0]) // 90
    return NodeResult((np.rot90(image, k=quarters, axes=(2, 1)),))


@REGISTRY.add("ImagePadForOutpaint")
def image_pad_for_outpaint(
    _context: NodeContext, image: ImageBatch, left: int, top: int, right: int, bottom: int, feathering: int
) -> NodeResult:
    """Add a grey border, and return its mask, softened towards the image."""
    height, width = image.shape[1:3]
    padding = ((0, 0), (top, bottom), (left, right), (0, 0))
    padded = np.pad(image, padding, constant_values=0.5)
    mask = np.ones(padded.shape[1:3], dtype=np.float32)
    soft = np.zeros((height, width), dtype=np.float32)
    if 0 < feathering * 2 < min(height, width):
        distance = _distance_to_border(height, width, left, top, right, bottom)
        soft = (np.maximum(feathering - distance, 0) / feathering).astype(np.float32) ** 2
    mask[top : top + height, left : left + width] = soft
    return NodeResult((padded, mask[np.newaxis]))


def _distance_to_border(height: int, width: int, left: int, top: int, right: int, bottom: int) -> FloatArray:
    """Return the distance of each pixel from the nearest side with a border."""
    rows, columns = np.arange(height)[:, np.newaxis], np.arange(width)[np.newaxis, :]
    to_top = rows if top else np.full_like(rows, height)
    to_bottom = height - rows if bottom else np.full_like(rows, height)
    to_left = columns if left else np.full_like(columns, width)
    to_right = width - columns if right else np.full_like(columns, width)
    return np.minimum(np.minimum(to_top, to_bottom), np.minimum(to_left, to_right)).astype(np.float32)


@REGISTRY.add("RepeatImageBatch")
def repeat_image_batch(_context: NodeContext, image: ImageBatch, amount: int) -> NodeResult:
    """Repeat a batch `amount` times."""
    return NodeResult((np.tile(image, (amount, 1, 1, 1)),))


@REGISTRY.add("ImageFromBatch")
def image_from_batch(_context: NodeContext, image: ImageBatch, batch_index: int, length: int) -> NodeResult:
    """Return a part of a batch, at least its last image."""
    start = min(len(image) - 1, batch_index)
    return NodeResult((image[start : start + length].copy(),))


@REGISTRY.add("GetImageSize")
def get_image_size(_context: NodeContext, image: ImageBatch) -> NodeResult:
    """Return width, height and number of the images."""
    batch_size, height, width = image.shape[:3]
    return NodeResult((width, height, batch_size))

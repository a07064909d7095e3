"""Arrays of pixels: to and from Pillow, scaling, matching batches and channels (`comfy/utils.py` of ComfyUI)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from comfy_emulator.node_api import ImageBatch

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]

_CUBIC_A = -0.75
"""Sharpness of the bicubic kernel; torch's value, Pillow's is -0.5."""


def to_picture(image: FloatArray) -> Image.Image:
    """Return a Pillow image of an array (height, width, channels); levels are truncated, as in ComfyUI."""
    return Image.fromarray(np.clip(255.0 * image, 0, 255).astype(np.uint8))


def from_picture(picture: Image.Image) -> FloatArray:
    """Return an array (height, width, channels), values 0 to 1, of a Pillow image with 8 bits per channel."""
    levels: FloatArray = np.asarray(picture).astype(np.float32) / np.float32(255.0)
    return levels


def scale(images: FloatArray, width: int, height: int, method: str, crop: str = "disabled") -> FloatArray:
    """Scale images (..., height, width, channels) with the formulas of torch's `interpolate` (`common_upscale`).

    Args:
        images: the images.
        width: in pixels.
        height: in pixels.
        method: `nearest-exact`, `bilinear`, `area`, `bicubic`, `lanczos` (by Pillow, in 8 bits) or `bislerp`.
        crop: `center` crops to the aspect of the new size first; `disabled` does not.

    Raises:
        RuntimeError: a side of the new size is not positive, or cropping leaves nothing.
        ValueError: the method is unknown.
    """
    if crop == "center":
        images = _crop_to_aspect(images, width, height)
    if min(width, height, *images.shape[-3:-1]) < 1:
        raise RuntimeError(
            f"Input and output sizes should be greater than 0, but got input (H: {images.shape[-3]}, "
            f"W: {images.shape[-2]}) output (H: {height}, W: {width})"
        )
    if method == "lanczos":
        return _scale_lanczos(images, width, height)
    if method == "bislerp":
        return _scale_bislerp(_scale_bislerp(images, -2, width), -3, height)
    return _scale_axis(_scale_axis(images, -2, width, method), -3, height, method)


def _crop_to_aspect(images: FloatArray, width: int, height: int) -> FloatArray:
    if width < 1 or height < 1:
        return images
    old_height, old_width = images.shape[-3:-1]
    old_aspect, new_aspect = old_width / old_height, width / height
    x = y = 0
    if old_aspect > new_aspect:
        x = round((old_width - old_width * (new_aspect / old_aspect)) / 2)
    elif old_aspect < new_aspect:
        y = round((old_height - old_height * (old_aspect / new_aspect)) / 2)
    return images[..., y : old_height - y, x : old_width - x, :]


def _scale_lanczos(images: FloatArray, width: int, height: int) -> FloatArray:
    pictures = [to_picture(image).resize((width, height), Image.Resampling.LANCZOS) for image in images]
    return np.stack([from_picture(picture) for picture in pictures])


def _scale_axis(images: FloatArray, axis: int, size: int, method: str) -> FloatArray:
    old_size = images.shape[axis]
    if method == "area":
        return _average_axis(images, axis, size)
    if method == "nearest-exact":
        nearest: FloatArray = np.take(images, np.minimum(_centres(old_size, size).astype(np.int64), old_size - 1), axis)
        return nearest
    if method == "bilinear":
        return _weighted_sum(images, axis, _linear_taps(old_size, size))
    if method == "bicubic":
        return _weighted_sum(images, axis, _cubic_taps(old_size, size))
    raise ValueError(f"Unknown upscale method {method!r}.")


def _centres(old_size: int, size: int) -> npt.NDArray[np.float64]:
    """Return the centre of each new pixel in old pixels (0 is the outer edge of the first)."""
    centres: npt.NDArray[np.float64] = (np.arange(size, dtype=np.float64) + 0.5) * (old_size / size)
    return centres


def _average_axis(images: FloatArray, axis: int, size: int) -> FloatArray:
    old_size = images.shape[axis]
    starts = np.arange(size) * old_size // size
    ends = -((-(np.arange(size) + 1) * old_size) // size)
    sums = np.cumsum(images, axis=axis, dtype=np.float64)
    sums = np.concatenate([np.zeros_like(np.take(sums, [0], axis)), sums], axis=axis)
    counts = _along(axis, images.ndim, ends - starts)
    averages: FloatArray = ((np.take(sums, ends, axis) - np.take(sums, starts, axis)) / counts).astype(np.float32)
    return averages


def _linear_taps(old_size: int, size: int) -> list[tuple[IndexArray, FloatArray]]:
    position = np.maximum(_centres(old_size, size) - 0.5, 0)
    first = position.astype(np.int64)
    fraction = (position - first).astype(np.float32)
    return [(first, 1 - fraction), (np.minimum(first + 1, old_size - 1), fraction)]


def _cubic_taps(old_size: int, size: int) -> list[tuple[IndexArray, FloatArray]]:
    position = _centres(old_size, size) - 0.5
    first = np.floor(position).astype(np.int64)
    fraction = position - first
    return [
        (np.clip(first + tap, 0, old_size - 1), _cubic_weight(np.abs(fraction - tap)).astype(np.float32))
        for tap in (-1, 0, 1, 2)
    ]


def _cubic_weight(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance**2 + 1
    far = ((_CUBIC_A * distance - 5 * _CUBIC_A) * distance + 8 * _CUBIC_A) * distance - 4 * _CUBIC_A
    return np.where(distance <= 1, near, far)


def _weighted_sum(images: FloatArray, axis: int, taps: list[tuple[IndexArray, FloatArray]]) -> FloatArray:
    parts = (np.take(images, indices, axis) * _along(axis, images.ndim, weights) for indices, weights in taps)
    total: FloatArray = next(parts)
    for part in parts:
        total += part
    return total


def _along(axis: int, dimensions: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Reshape `values` to run along `axis` of an array with `dimensions` dimensions."""
    shape = [1] * dimensions
    shape[axis] = len(values)
    return values.reshape(shape)


def _scale_bislerp(images: FloatArray, axis: int, size: int) -> FloatArray:
    """Scale one axis by spherical interpolation of channel vectors (`bislerp`)."""
    (first, _), (second, fraction) = _linear_taps(images.shape[axis], size)
    left, right = np.take(images, first, axis), np.take(images, second, axis)
    ratio = _along(axis, images.ndim, fraction)
    left_norm = np.linalg.norm(left, axis=-1, keepdims=True)
    right_norm = np.linalg.norm(right, axis=-1, keepdims=True)
    left_unit = np.divide(left, left_norm, out=np.zeros_like(left), where=left_norm > 0)
    right_unit = np.divide(right, right_norm, out=np.zeros_like(right), where=right_norm > 0)
    cosine = np.sum(left_unit * right_unit, axis=-1, keepdims=True)
    parallel, opposite = cosine > 1 - 1e-5, cosine < 1e-5 - 1
    angle = np.where(parallel | opposite, np.pi / 2, np.arccos(np.clip(cosine, -1, 1)))
    turned = (np.sin((1 - ratio) * angle) * left_unit + np.sin(ratio * angle) * right_unit) / np.sin(angle)
    turned *= left_norm * (1 - ratio) + right_norm * ratio
    straight = left * (1 - ratio) + right * ratio
    return np.where(parallel, left, np.where(opposite, straight, turned)).astype(np.float32)


def repeat_to(batch: FloatArray, size: int) -> FloatArray:
    """Cut or repeat a batch to `size` entries (`repeat_to_batch_size`)."""
    return np.take(batch, np.arange(size) % len(batch), axis=0)


def match_alpha(destination: ImageBatch, source: ImageBatch) -> tuple[ImageBatch, ImageBatch]:
    """Return both with matching channels where ComfyUI can: the source loses surplus channels.

    A destination with more channels than the source gets one more, so that combining them fails as in ComfyUI
    (`image_alpha_fix` of `node_helpers.py`).
    """
    if destination.shape[-1] < source.shape[-1]:
        source = source[..., : destination.shape[-1]]
    elif destination.shape[-1] > source.shape[-1]:
        destination = np.pad(destination, ((0, 0), (0, 0), (0, 0), (0, 1)))
        destination[..., -1] = 1.0
    return destination, source

"""Draws a latent: its source image, painted over by each sampling, without the banner."""

from __future__ import annotations

import hashlib

import numpy as np

from comfy_emulator.nodes.latents import Latent
from comfy_emulator.nodes.pixels import FloatArray, repeat_to, scale
from comfy_emulator.nodes.placeholder import landscape

_SOURCE_COVER = 0.6
"""The share of a source image that a sampling with a denoise of 1 covers, so that the source stays visible."""

_FRAMES_PER_SECOND = 24


def render(latent: Latent, number: int, width: int, height: int, frame: int = 0) -> FloatArray:
    """Return one image (height, width, 3) of the batch.

    Args:
        latent: the latent.
        number: the index in the batch.
        width: in pixels.
        height: in pixels.
        frame: the frame of a video.
    """
    picture = _source(latent, number, width, height)
    cover = _SOURCE_COVER
    for sampling in latent.samplings:
        painted = landscape(f"{sampling.key} #{number}", width, height, frame / _FRAMES_PER_SECOND)
        share = sampling.denoise * cover * _mask(latent, number, width, height)
        picture = painted if picture is None else picture * (1 - share) + painted * share
        cover = 1.0
    return _unsampled(latent, number, width, height) if picture is None else picture


def _source(latent: Latent, number: int, width: int, height: int) -> FloatArray | None:
    if latent.source is None:
        return None
    picture = latent.source[number % len(latent.source)][..., :3]
    return picture if picture.shape[:2] == (height, width) else scale(picture, width, height, "bilinear")


def _mask(latent: Latent, number: int, width: int, height: int) -> FloatArray:
    """Return where samplings may paint, (height, width, 1)."""
    if latent.noise_mask is None:
        return np.ones((1, 1, 1), dtype=np.float32)
    plane = repeat_to(latent.noise_mask, number + 1)[number, 0]
    return scale(plane[..., np.newaxis], width, height, "bilinear")


def _unsampled(latent: Latent, number: int, width: int, height: int) -> FloatArray:
    """Return grey for an empty latent, and an image that depends on its values for one from a file."""
    values = latent.samples[number]
    if not values.any():
        return np.full((height, width, 3), 0.5, dtype=np.float32)
    return landscape(hashlib.sha256(values.tobytes()).hexdigest(), width, height)

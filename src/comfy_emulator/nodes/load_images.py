"""Nodes that load images (`LoadImage` and others of ComfyUI's `nodes.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

from comfy_emulator.node_api import Mask, NodeContext, NodeResult
from comfy_emulator.nodes.file_inputs import file_fingerprint, file_validator
from comfy_emulator.nodes.pixels import FloatArray, from_picture
from comfy_emulator.nodes.registry import REGISTRY

_validate = file_validator("image", "image")
_fingerprint = file_fingerprint("image")


@REGISTRY.add("LoadImage", validate=_validate, validates=("image",), fingerprint=_fingerprint)
@REGISTRY.add("LoadImageOutput", validate=_validate, validates=("image",), fingerprint=_fingerprint)
def load_image(context: NodeContext, image: str) -> NodeResult:
    """Return all frames of an image that have the size of the first, and their transparency as masks."""
    frames, masks = _load_frames(context.folders.annotated_path(image))
    return NodeResult((np.stack(frames), np.stack(masks)))


def _load_frames(path: Path) -> tuple[list[FloatArray], list[Mask]]:
    frames: list[FloatArray] = []
    masks: list[Mask] = []
    with _open(path) as picture:
        for raw in ImageSequence.Iterator(picture):
            frame = _upright(raw)
            pixels = from_picture(frame.convert("RGB"))
            if frames and pixels.shape != frames[0].shape:
                continue
            frames.append(pixels)
            masks.append(_transparency(frame))
            if picture.format == "MPO":  # its other frames show the same scene from another angle, or a thumbnail
                break
    return frames, masks


def _open(path: Path) -> Image.Image:
    """Open an image; retry a truncated one leniently, and raise the error of the retry (`node_helpers.pillow`)."""
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError, ValueError):
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return Image.open(path)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, and reduce 32-bit greys to 8 bits as ComfyUI does."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I":
        picture = picture.point(lambda level: level * (1 / 255))
    return picture


def _transparency(picture: Image.Image) -> Mask:
    """Return 1 where the image is transparent; 64 x 64 zeros without an alpha channel."""
    if "A" in picture.getbands():
        alpha = picture.getchannel("A")
    elif picture.mode == "P" and "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    else:
        return np.zeros((64, 64), dtype=np.float32)
    return 1 - from_picture(alpha)


@REGISTRY.add("LoadImageMask", validate=_validate, validates=("image",), fingerprint=_fingerprint)
def load_image_mask(context: NodeContext, image: str, channel: str) -> NodeResult:
    """Return one channel of an image as a mask; alpha is inverted, so that 1 is transparent."""
    with Image.open(context.folders.annotated_path(image)) as raw:
        picture = _upright(raw).convert("RGBA")
    mask = from_picture(picture.getchannel(channel[0].upper()))
    return NodeResult(((1.0 - mask if channel == "alpha" else mask)[np.newaxis],))

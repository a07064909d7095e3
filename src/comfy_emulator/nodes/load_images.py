"""Nodes that load pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

from comfy_emulator.node_api import Context, Mask, NodeResult
from comfy_emulator.nodes.pixels import FloatArray, from_picture
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import annotated_path, file_fingerprint, file_validator

_validate = file_validator("image", "image")
_fingerprint = file_fingerprint("image")


@REGISTRY.add("LoadImage", validate=_validate, validates=("image",), fingerprint=_fingerprint)
@REGISTRY.add("LoadImageOutput", validate=_validate, validates=("image",), fingerprint=_fingerprint)
def load_image(context: Context, image: str) -> NodeResult:
    """All frames of a picture that have the size of the first, and their transparency as a mask."""
    frames, masks = _load_frames(annotated_path(context.input_dir, image))
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
            if picture.format == "MPO":  # the further frames are the same scene from another angle, or a thumbnail
                break
    return frames, masks


def _open(path: Path) -> Image.Image:
    """Open a picture; one that is cut short gets a second, lenient try, whose error is the one that is reported."""
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
    """Turned as its EXIF data says; 32-bit greys brought down to 8 bits as ComfyUI does."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I":
        picture = picture.point(lambda level: level * (1 / 255))
    return picture


def _transparency(picture: Image.Image) -> Mask:
    """1 where the picture is see-through; 64 x 64 zeros for one without transparency."""
    if "A" in picture.getbands():
        alpha = picture.getchannel("A")
    elif picture.mode == "P" and "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    else:
        return np.zeros((64, 64), dtype=np.float32)
    return 1 - from_picture(alpha)


@REGISTRY.add("LoadImageMask", validate=_validate, validates=("image",), fingerprint=_fingerprint)
def load_image_mask(context: Context, image: str, channel: str) -> NodeResult:
    """One channel of a picture as a mask; alpha is turned round, so that 1 is see-through."""
    with Image.open(annotated_path(context.input_dir, image)) as raw:
        picture = _upright(raw).convert("RGBA")
    mask = from_picture(picture.getchannel(channel[0].upper()))
    return NodeResult(((1.0 - mask if channel == "alpha" else mask)[np.newaxis],))

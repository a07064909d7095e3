"""Nodes that save images or send them (`nodes.py`, `comfy_extras/nodes_images.py` of ComfyUI)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfy_emulator.folder_paths import FolderPaths
from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_emulator.nodes.pixels import to_picture
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import SavePath, metadata_texts, output_path, temp_path

_SAVE_LEVEL = 4
_PREVIEW_LEVEL = 1
_WEBP_METHODS = {"default": 4, "fastest": 0, "slowest": 6}
_EXIF_MODEL = 0x0110
_EXIF_MAKE = 0x010F


@REGISTRY.add("SaveImage")
def save_image(context: NodeContext, images: ImageBatch, filename_prefix: str = "ComfyUI") -> NodeResult:
    """Save PNG files in the output folder, with the prompt in their metadata."""
    path = output_path(context, filename_prefix, images.shape[2], images.shape[1])
    return _save_pngs(context, images, path, _SAVE_LEVEL)


@REGISTRY.add("PreviewImage")
def preview_image(context: NodeContext, images: ImageBatch) -> NodeResult:
    """Save PNG files in the temp folder, with the prompt in their metadata."""
    return _save_pngs(context, images, temp_path(context), _PREVIEW_LEVEL)


def _save_pngs(context: NodeContext, images: ImageBatch, path: SavePath, level: int) -> NodeResult:
    info = PngInfo()
    for key, text in metadata_texts(context).items():
        info.add_text(key, text)
    saved = []
    for number, image in enumerate(images):
        file, entry = path.next_file("png", number)
        to_picture(image).save(file, pnginfo=info, compress_level=level)
        saved.append(entry)
    return NodeResult(ui={"images": saved})


@REGISTRY.add("SaveAnimatedWEBP")
def save_animated_webp(
    context: NodeContext,
    images: ImageBatch,
    filename_prefix: str,
    fps: float,
    lossless: bool,
    quality: int,
    method: str,
) -> NodeResult:
    """Save a WebP file of all images; its EXIF data has the prompt as camera model, the rest as tags below it."""
    exif = Image.Exif()
    tags = {"prompt": _EXIF_MODEL}
    for key, text in metadata_texts(context).items():
        tag = tags.setdefault(key, _EXIF_MAKE - len(tags) + 1)
        exif[tag] = f"{key}:{text}"
    options = {"exif": exif, "lossless": lossless, "quality": quality, "method": _WEBP_METHODS[method]}
    return _save_animation(context, images, filename_prefix, "webp", fps, options)


@REGISTRY.add("SaveAnimatedPNG")
def save_animated_png(
    context: NodeContext, images: ImageBatch, filename_prefix: str, fps: float, compress_level: int
) -> NodeResult:
    """Save a PNG file of all images, with the prompt in private `comf` chunks after them."""
    info = PngInfo()
    for key, text in metadata_texts(context).items():
        info.add(b"comf", key.encode("latin-1") + b"\0" + text.encode("latin-1"), after_idat=True)
    options = {"pnginfo": info, "compress_level": compress_level}
    return _save_animation(context, images, filename_prefix, "png", fps, options)


def _save_animation(
    context: NodeContext, images: ImageBatch, prefix: str, extension: str, fps: float, options: dict[str, Any]
) -> NodeResult:
    file, entry = output_path(context, prefix, images.shape[2], images.shape[1]).next_file(extension)
    _write_animation(file, images, int(1000.0 / fps), options)
    ui: dict[str, list[Any]] = {"images": [entry]}
    if len(images) > 1:
        ui["animated"] = [True]
    return NodeResult(ui=ui)


def _write_animation(file: Path, images: ImageBatch, duration_ms: int, options: dict[str, Any]) -> None:
    first, *others = (to_picture(image) for image in images)
    first.save(file, save_all=True, append_images=others, duration=duration_ms, **options)


def _now(_folders: FolderPaths, **_inputs: Any) -> float:
    return time.time()


@REGISTRY.add("SaveImageWebsocket", fingerprint=_now)
def save_image_websocket(context: NodeContext, images: ImageBatch) -> NodeResult:
    """Send each image as a PNG preview of full size, and run in every prompt."""
    for number, image in enumerate(images):
        context.progress(number, len(images), ("PNG", to_picture(image), None))
    return NodeResult()

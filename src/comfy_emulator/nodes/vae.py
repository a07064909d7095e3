"""Nodes that turn pictures into latents and latents into pictures, and that enlarge pictures: all imitated."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from comfy_emulator.node_api import Context, ImageBatch, Mask, NodeResult
from comfy_emulator.nodes.latent_images import render
from comfy_emulator.nodes.latents import PIXELS_PER_LATENT, Latent
from comfy_emulator.nodes.loaders import Vae
from comfy_emulator.nodes.pixels import FloatArray, scale
from comfy_emulator.nodes.placeholder import with_banner
from comfy_emulator.nodes.registry import REGISTRY

_DEFAULT_UPSCALE = 4


@dataclass(frozen=True)
class UpscaleModel:
    """A model that enlarges pictures: the name of its file, and by how much."""

    name: str
    scale: int


@REGISTRY.add("VAEDecode")
def vae_decode(context: Context, samples: Latent, vae: Vae) -> NodeResult:
    """A picture of each latent, with a banner that says that no model ran; all frames of a video."""
    width, height = samples.pixel_width, samples.pixel_height
    details = _details(samples)
    pictures = []
    for number in range(len(samples.samples)):
        for frame in range(samples.frames):
            context.check_interrupted()
            pictures.append(with_banner(render(samples, number, width, height, frame), details))
    return NodeResult((np.stack(pictures),))


@REGISTRY.add("VAEDecodeTiled")
def vae_decode_tiled(context: Context, samples: Latent, vae: Vae, **_tiles: int) -> NodeResult:
    """As `VAEDecode`: tiles save memory and change nothing else."""
    return vae_decode(context, samples, vae)


def _details(latent: Latent) -> list[str]:
    """What the banner tells besides: the prompt first, as it is dropped last."""
    if not latent.samplings:
        return ["decoded without a sampler"]
    last = latent.samplings[-1]
    prompt = f'"{last.prompt}"' if last.prompt else "no prompt"
    return [prompt, f"seed {last.seed}, {last.steps} steps, {last.model}"]


@REGISTRY.add("VAEEncode")
def vae_encode(_context: Context, pixels: ImageBatch, vae: Vae) -> NodeResult:
    """Latents of pictures, cut to a multiple of 8 pixels."""
    return NodeResult((_encode(_cropped(pixels)),))


@REGISTRY.add("VAEEncodeForInpaint")
def vae_encode_for_inpaint(
    _context: Context,
    pixels: ImageBatch,
    vae: Vae,
    mask: Mask,
    grow_mask_by: int = 6,
) -> NodeResult:
    """Latents of pictures that are grey where the mask is set, and that samplers change only there."""
    planes = mask.reshape(-1, *mask.shape[-2:], 1)
    planes = _cropped(scale(planes, pixels.shape[2], pixels.shape[1], "bilinear")).round()
    grey = (_cropped(pixels) - 0.5) * (1 - planes) + np.float32(0.5)
    grown = _grown(planes[..., 0], grow_mask_by)[:, : planes.shape[1], : planes.shape[2]]
    return NodeResult((_encode(grey, noise_mask=grown[:, np.newaxis]),))


def _cropped(images: FloatArray) -> FloatArray:
    """Cut evenly at the sides to a multiple of `PIXELS_PER_LATENT`."""
    height, width = images.shape[1:3]
    top, left = height % PIXELS_PER_LATENT // 2, width % PIXELS_PER_LATENT // 2
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    return images[:, top : top + rows * PIXELS_PER_LATENT, left : left + columns * PIXELS_PER_LATENT]


def _encode(images: ImageBatch, noise_mask: Mask | None = None) -> Latent:
    """Means of 8 x 8 pixels, -1 to 1: the three colours and the brightness, as four channels."""
    height, width = images.shape[1] // PIXELS_PER_LATENT, images.shape[2] // PIXELS_PER_LATENT
    colours = scale(images[..., :3], width, height, "area") * 2 - 1
    channels = np.concatenate([colours, colours.mean(axis=-1, keepdims=True)], axis=-1)
    return Latent(np.ascontiguousarray(np.moveaxis(channels, -1, 1)), noise_mask, images)


def _grown(mask: Mask, by: int) -> Mask:
    """1 wherever a 1 lies in the window of `by` x `by` pixels; one row and column more if `by` is even."""
    if by == 0:
        return mask
    before = by // 2
    padded = np.pad(mask, ((0, 0), (before, before), (before, before)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (by, by), axis=(1, 2))
    grown: Mask = windows.max(axis=(3, 4))
    return grown


@REGISTRY.add("UpscaleModelLoader")
def upscale_model_loader(_context: Context, model_name: str) -> NodeResult:
    """An upscale model; how much it enlarges is read from its name (`4x`, `x2`), 4 if it does not say."""
    found = re.search(r"(?<!\d)([1-8])x(?!\d)|x([1-8])(?!\d)", model_name, re.IGNORECASE)
    factor = int(found.group(1) or found.group(2)) if found else _DEFAULT_UPSCALE
    return NodeResult((UpscaleModel(model_name, factor),))


@REGISTRY.add("ImageUpscaleWithModel")
def image_upscale_with_model(context: Context, upscale_model: UpscaleModel, image: ImageBatch) -> NodeResult:
    """Pictures enlarged by Pillow, with a banner that says that no model ran."""
    height, width = image.shape[1] * upscale_model.scale, image.shape[2] * upscale_model.scale
    enlarged = []
    for number, picture in enumerate(scale(image[..., :3], width, height, "lanczos"), start=1):
        context.check_interrupted()
        enlarged.append(with_banner(picture, [f"enlarged {upscale_model.scale}x", upscale_model.name]))
        context.progress(number, len(image))
    return NodeResult((np.stack(enlarged),))

"""Nodes that encode images into latents and decode latents into images, without a VAE."""

from __future__ import annotations

import numpy as np

from comfy_emulator.node_api import ImageBatch, Mask, NodeContext, NodeResult
from comfy_emulator.nodes.latent_images import render
from comfy_emulator.nodes.latents import PIXELS_PER_LATENT, Latent
from comfy_emulator.nodes.loaders import Vae
from comfy_emulator.nodes.pixels import FloatArray, scale
from comfy_emulator.nodes.placeholder import with_banner
from comfy_emulator.nodes.registry import REGISTRY


@REGISTRY.add("VAEDecode")
def vae_decode(context: NodeContext, samples: Latent, vae: Vae) -> NodeResult:
    """Draw each latent, and each frame of a video, as a placeholder with a banner."""
    width, height = samples.pixel_width, samples.pixel_height
    details = _details(samples)
    pictures = []
    for number in range(len(samples.samples)):
        for frame in range(samples.frames):
            context.check_interrupted()
            pictures.append(with_banner(render(samples, number, width, height, frame), details))
    return NodeResult((np.stack(pictures),))


@REGISTRY.add("VAEDecodeTiled")
def vae_decode_tiled(context: NodeContext, samples: Latent, vae: Vae, **_tiles: int) -> NodeResult:
    """Do the same as `VAEDecode`."""
    return vae_decode(context, samples, vae)


def _details(latent: Latent) -> list[str]:
    """Return the lines below the banner's title, the prompt first: a small image has no space for the others."""
    if not latent.samplings:
        return ["decoded without a sampler"]
    last = latent.samplings[-1]
    prompt = f'"{last.prompt}"' if last.prompt else "no prompt"
    return [prompt, f"seed {last.seed}, {last.steps} steps, {last.model}"]


@REGISTRY.add("VAEEncode")
def vae_encode(_context: NodeContext, pixels: ImageBatch, vae: Vae) -> NodeResult:
    """Encode images, cropped to a multiple of 8 pixels."""
    return NodeResult((_encode(_cropped(pixels)),))


@REGISTRY.add("VAEEncodeForInpaint")
def vae_encode_for_inpaint(
    _context: NodeContext,
    pixels: ImageBatch,
    vae: Vae,
    mask: Mask,
    grow_mask_by: int = 6,
) -> NodeResult:
    """Encode images that are grey where the mask is set; samplers change only that area."""
    planes = mask.reshape(-1, *mask.shape[-2:], 1)
    planes = _cropped(scale(planes, pixels.shape[2], pixels.shape[1], "bilinear")).round()
    grey = (_cropped(pixels) - 0.5) * (1 - planes) + np.float32(0.5)
    grown = _grown(planes[..., 0], grow_mask_by)[:, : planes.shape[1], : planes.shape[2]]
    return NodeResult((_encode(grey, noise_mask=grown[:, np.newaxis]),))


def _cropped(images: FloatArray) -> FloatArray:
    """Crop evenly at all sides to a multiple of `PIXELS_PER_LATENT`."""
    height, width = images.shape[1:3]
    top, left = height % PIXELS_PER_LATENT // 2, width % PIXELS_PER_LATENT // 2
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    return images[:, top : top + rows * PIXELS_PER_LATENT, left : left + columns * PIXELS_PER_LATENT]


def _encode(images: ImageBatch, noise_mask: Mask | None = None) -> Latent:
    """Return means of 8 x 8 pixels, -1 to 1: the three colours and the brightness, as four channels."""
    height, width = images.shape[1] // PIXELS_PER_LATENT, images.shape[2] // PIXELS_PER_LATENT
    colours = scale(images[..., :3], width, height, "area") * 2 - 1
    channels = np.concatenate([colours, colours.mean(axis=-1, keepdims=True)], axis=-1)
    return Latent(np.ascontiguousarray(np.moveaxis(channels, -1, 1)), noise_mask, images)


def _grown(mask: Mask, by: int) -> Mask:
    """Return 1 wherever a 1 is within `by` x `by` pixels; one row and column larger if `by` is even."""
    if by == 0:
        return mask
    before = by // 2
    padded = np.pad(mask, ((0, 0), (before, before), (before, before)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (by, by), axis=(1, 2))
    grown: Mask = windows.max(axis=(3, 4))
    return grown

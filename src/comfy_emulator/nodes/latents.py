"""Latents, and the nodes that create and change them (`nodes.py`, `comfy_extras/nodes_latent.py` of ComfyUI).

A latent is an array of the real shape, so that it can be saved, printed and scaled, together with the record of its
samplings, from which `VAEDecode` draws a placeholder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comfy_emulator.node_api import ImageBatch, Mask, NodeContext, NodeResult
from comfy_emulator.nodes.file_inputs import file_fingerprint, file_validator
from comfy_emulator.nodes.pixels import FloatArray, scale
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import metadata_texts, output_path
from comfy_emulator.tensor_text import describe

PIXELS_PER_LATENT = 8
"""Pixels per latent value along a side, in the models that the emulator imitates."""

FRAMES_PER_LATENT = 4
"""Frames of a video per latent value, after the first frame."""

_OLD_LATENT_SCALE = 0.18215
"""Values in latent files without `latent_format_version_0` are multiplied by this (Stable Diffusion 1's scale)."""


@dataclass(frozen=True)
class Sampling:
    """What a sampler did to a latent.

    Attributes:
        seed: of the noise.
        prompt: the positive text.
        model: the name of the model.
        steps: the number of steps.
        denoise: the share of the previous latent that it replaced, 0 to 1.
        settings: everything else that a real sampler's result depends on, as text.
    """

    seed: int
    prompt: str
    model: str
    steps: int
    denoise: float
    settings: str = ""

    @property
    def key(self) -> str:
        """A text that differs whenever a real sampler's result would."""
        return json.dumps([self.seed, self.prompt, self.model, self.steps, self.denoise, self.settings])


@dataclass(frozen=True)
class Latent:
    """ComfyUI's LATENT.

    Attributes:
        samples: (batch, channels, height, width), with frames before height for a video; (batch, channels, points)
            for a 3D shape.
        noise_mask: where samplers change the image, (batch, 1, height, width) in pixels.
        source: the images that were encoded, if any.
        samplings: what samplers did to it, in order.
        type: the type of model that it is for, where ComfyUI adds it.
    """

    samples: FloatArray
    noise_mask: Mask | None = None
    source: ImageBatch | None = None
    samplings: tuple[Sampling, ...] = ()
    type: str | None = None

    @property
    def pixel_width(self) -> int:
        """Width of the decoded image."""
        return int(self.samples.shape[-1]) * PIXELS_PER_LATENT

    @property
    def pixel_height(self) -> int:
        """Height of the decoded image."""
        return int(self.samples.shape[-2]) * PIXELS_PER_LATENT

    @property
    def frames(self) -> int:
        """Number of frames of the decoded video; 1 for an image."""
        return (int(self.samples.shape[2]) - 1) * FRAMES_PER_LATENT + 1 if self.samples.ndim == 5 else 1

    def as_dict(self) -> Mapping[str, Any]:
        """Return the dictionary that ComfyUI passes instead."""
        fields = {"samples": self.samples, "noise_mask": self.noise_mask, "type": self.type}
        return {key: value for key, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return describe(self.as_dict())


@REGISTRY.add("EmptyLatentImage")
def empty_latent_image(_context: NodeContext, width: int, height: int, batch_size: int = 1) -> NodeResult:
    """Return empty latents of images for Stable Diffusion."""
    return NodeResult((Latent(_zeros(batch_size, 4, height, width)),))


@REGISTRY.add("EmptySD3LatentImage")
def empty_sd3_latent_image(_context: NodeContext, width: int, height: int, batch_size: int = 1) -> NodeResult:
    """Return empty latents of images for Stable Diffusion 3 and Flux."""
    return NodeResult((Latent(_zeros(batch_size, 16, height, width)),))


@REGISTRY.add("EmptyHunyuanLatentVideo")
def empty_hunyuan_latent_video(
    _context: NodeContext, width: int, height: int, length: int, batch_size: int = 1
) -> NodeResult:
    """Return empty latents of videos with `length` frames."""
    flat = _zeros(batch_size, 16, height, width)
    frames = (length - 1) // FRAMES_PER_LATENT + 1
    return NodeResult((Latent(np.repeat(flat[:, :, np.newaxis], frames, axis=2)),))


def _zeros(batch_size: int, channels: int, height: int, width: int) -> FloatArray:
    return np.zeros((batch_size, channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT), dtype=np.float32)


@REGISTRY.add("RepeatLatentBatch")
def repeat_latent_batch(_context: NodeContext, samples: Latent, amount: int) -> NodeResult:
    """Return a batch repeated `amount` times."""
    return NodeResult((replace(samples, samples=np.concatenate([samples.samples] * amount)),))


@REGISTRY.add("SetLatentNoiseMask")
def set_latent_noise_mask(_context: NodeContext, samples: Latent, mask: Mask) -> NodeResult:
    """Return a latent that samplers change only where the mask is set."""
    return NodeResult((replace(samples, noise_mask=mask.reshape(-1, 1, *mask.shape[-2:])),))


@REGISTRY.add("LatentUpscale")
def latent_upscale(
    _context: NodeContext, samples: Latent, upscale_method: str, width: int, height: int, crop: str
) -> NodeResult:
    """Return a latent for another size in pixels, at least 64; a side of 0 keeps the aspect, two change nothing."""
    old_height, old_width = samples.samples.shape[-2:]
    if width == 0 and height == 0:
        return NodeResult((samples,))
    if width == 0:
        height = max(64, height)
        width = round(old_width * height / old_height)
    elif height == 0:
        width = max(64, width)
        height = round(old_height * width / old_width)
    columns, rows = max(64, width) // PIXELS_PER_LATENT, max(64, height) // PIXELS_PER_LATENT
    return NodeResult((_scaled(samples, columns, rows, upscale_method, crop),))


@REGISTRY.add("LatentUpscaleBy")
def latent_upscale_by(_context: NodeContext, samples: Latent, upscale_method: str, scale_by: float) -> NodeResult:
    """Return a latent scaled by a factor."""
    rows, columns = samples.samples.shape[-2:]
    columns, rows = round(columns * scale_by), round(rows * scale_by)
    return NodeResult((_scaled(samples, columns, rows, upscale_method, "disabled"),))


def _scaled(latent: Latent, columns: int, rows: int, method: str, crop: str) -> Latent:
    values = scale(np.moveaxis(latent.samples, 1, -1), columns, rows, method, crop)
    return replace(latent, samples=np.ascontiguousarray(np.moveaxis(values, -1, 1)))


@REGISTRY.add("SaveLatent")
def save_latent(context: NodeContext, samples: Latent, filename_prefix: str = "ComfyUI") -> NodeResult:
    """Save a safetensors file with the extension `.latent` in the output folder."""
    from safetensors.numpy import save_file

    file, entry = output_path(context, filename_prefix).next_file("latent")
    tensors = {
        "latent_tensor": np.ascontiguousarray(samples.samples),
        "latent_format_version_0": np.zeros(0, dtype=np.float32),
    }
    save_file(tensors, file, metadata=metadata_texts(context))
    return NodeResult(ui={"latents": [entry]})


@REGISTRY.add(
    "LoadLatent",
    validate=file_validator("latent", "latent"),
    validates=("latent",),
    fingerprint=file_fingerprint("latent"),
)
def load_latent(context: NodeContext, latent: str) -> NodeResult:
    """Return a latent from a file, without its samplings."""
    from safetensors.numpy import load_file

    tensors = load_file(context.folders.annotated_path(latent))
    samples = tensors["latent_tensor"].astype(np.float32)
    if "latent_format_version_0" not in tensors:
        samples = samples * np.float32(1.0 / _OLD_LATENT_SCALE)
    return NodeResult((Latent(samples),))

"""Latents, and the nodes that make and shape them.

A latent here is an array of the real shape, so that it can be saved, printed and scaled, and the story of how it
came about, from which `VAEDecode` draws a picture: no model runs in the emulator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comfy_emulator.node_api import Context, ImageBatch, Mask, NodeResult
from comfy_emulator.nodes.pixels import FloatArray, scale
from comfy_emulator.nodes.registry import REGISTRY
from comfy_emulator.nodes.save_paths import (
    annotated_path,
    file_fingerprint,
    file_validator,
    metadata_texts,
    output_path,
)
from comfy_emulator.tensor_text import describe

PIXELS_PER_LATENT = 8
"""Pixels along a side that one latent value stands for, in the models that the emulator imitates."""

FRAMES_PER_LATENT = 4
"""Frames of a video that one latent value stands for, after the first."""

_OLD_LATENT_SCALE = 0.18215
"""Latent files without `latent_format_version_0` hold values multiplied by this, the scale of Stable Diffusion 1."""


@dataclass(frozen=True)
class Sampling:
    """What a sampler did to a latent.

    Attributes:
        seed: of the noise.
        prompt: the positive text.
        model: name of the model.
        steps: how many steps the sampler took.
        denoise: how much of what was there before it replaced, 0 to 1.
        settings: everything else that a real sampler's picture depends on, as a text.
    """

    seed: int
    prompt: str
    model: str
    steps: int
    denoise: float
    settings: str = ""

    @property
    def key(self) -> str:
        """A text that differs wherever a real sampler's picture would."""
        return json.dumps([self.seed, self.prompt, self.model, self.steps, self.denoise, self.settings])


@dataclass(frozen=True)
class Latent:
    """What ComfyUI passes as LATENT.

    Attributes:
        samples: (batch, channels, height, width), with frames before height for a video; (batch, channels, points)
            for a 3D shape.
        noise_mask: where a sampler may change the picture, (batch, 1, height, width) in pixels.
        source: the pictures that were encoded, if there were any.
        samplings: what samplers did to it, the last one last.
        type: what kind of model it is for, where ComfyUI says so.
    """

    samples: FloatArray
    noise_mask: Mask | None = None
    source: ImageBatch | None = None
    samplings: tuple[Sampling, ...] = ()
    type: str | None = None

    @property
    def pixel_width(self) -> int:
        """Width of the decoded picture."""
        return int(self.samples.shape[-1]) * PIXELS_PER_LATENT

    @property
    def pixel_height(self) -> int:
        """Height of the decoded picture."""
        return int(self.samples.shape[-2]) * PIXELS_PER_LATENT

    @property
    def frames(self) -> int:
        """Frames of the decoded video; 1 for a picture."""
        return (int(self.samples.shape[2]) - 1) * FRAMES_PER_LATENT + 1 if self.samples.ndim == 5 else 1

    def as_dict(self) -> Mapping[str, Any]:
        """The dictionary that ComfyUI passes in its place."""
        fields = {"samples": self.samples, "noise_mask": self.noise_mask, "type": self.type}
        return {key: value for key, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return describe(self.as_dict())


@REGISTRY.add("EmptyLatentImage")
def empty_latent_image(_context: Context, width: int, height: int, batch_size: int = 1) -> NodeResult:
    """Empty latents of pictures, as for Stable Diffusion."""
    return NodeResult((Latent(_zeros(batch_size, 4, height, width)),))


@REGISTRY.add("EmptySD3LatentImage")
def empty_sd3_latent_image(_context: Context, width: int, height: int, batch_size: int = 1) -> NodeResult:
    """Empty latents of pictures, as for Stable Diffusion 3 and Flux."""
    return NodeResult((Latent(_zeros(batch_size, 16, height, width)),))


@REGISTRY.add("EmptyHunyuanLatentVideo")
def empty_hunyuan_latent_video(
    _context: Context, width: int, height: int, length: int, batch_size: int = 1
) -> NodeResult:
    """Empty latents of videos of `length` frames."""
    flat = _zeros(batch_size, 16, height, width)
    frames = (length - 1) // FRAMES_PER_LATENT + 1
    return NodeResult((Latent(np.repeat(flat[:, :, np.newaxis], frames, axis=2)),))


def _zeros(batch_size: int, channels: int, height: int, width: int) -> FloatArray:
    return np.zeros((batch_size, channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT), dtype=np.float32)


@REGISTRY.add("RepeatLatentBatch")
def repeat_latent_batch(_context: Context, samples: Latent, amount: int) -> NodeResult:
    """A batch so many times over."""
    return NodeResult((replace(samples, samples=np.concatenate([samples.samples] * amount)),))


@REGISTRY.add("SetLatentNoiseMask")
def set_latent_noise_mask(_context: Context, samples: Latent, mask: Mask) -> NodeResult:
    """A latent that samplers change only where the mask is set."""
    return NodeResult((replace(samples, noise_mask=mask.reshape(-1, 1, *mask.shape[-2:])),))


@REGISTRY.add("LatentUpscale")
def latent_upscale(
    _context: Context, samples: Latent, upscale_method: str, width: int, height: int, crop: str
) -> NodeResult:
    """A latent for another size in pixels, at least 64; a side of 0 follows the other, two of 0 change nothing."""
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
def latent_upscale_by(_context: Context, samples: Latent, upscale_method: str, scale_by: float) -> NodeResult:
    """A latent scaled by a factor."""
    rows, columns = samples.samples.shape[-2:]
    columns, rows = round(columns * scale_by), round(rows * scale_by)
    return NodeResult((_scaled(samples, columns, rows, upscale_method, "disabled"),))


def _scaled(latent: Latent, columns: int, rows: int, method: str, crop: str) -> Latent:
    values = scale(np.moveaxis(latent.samples, 1, -1), columns, rows, method, crop)
    return replace(latent, samples=np.ascontiguousarray(np.moveaxis(values, -1, 1)))


@REGISTRY.add("SaveLatent")
def save_latent(context: Context, samples: Latent, filename_prefix: str = "ComfyUI") -> NodeResult:
    """A safetensors file with the ending `.latent` in the output folder."""
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
def load_latent(context: Context, latent: str) -> NodeResult:
    """A latent from a file; how it came about is not in there."""
    from safetensors.numpy import load_file

    tensors = load_file(annotated_path(context.input_dir, latent))
    samples = tensors["latent_tensor"].astype(np.float32)
    if "latent_format_version_0" not in tensors:
        samples = samples * np.float32(1.0 / _OLD_LATENT_SCALE)
    return NodeResult((Latent(samples),))

"""Samplers without a model: they take time, report each step with a preview, and record their inputs.

The interfaces are those of `nodes.py` and `comfy_extras/nodes_custom_sampler.py` of ComfyUI.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from comfy_emulator.node_api import NodeContext, NodeResult
from comfy_emulator.nodes.conditioning import Conditioning
from comfy_emulator.nodes.latent_images import render
from comfy_emulator.nodes.latents import Latent, Sampling
from comfy_emulator.nodes.loaders import Model
from comfy_emulator.nodes.pixels import FloatArray, to_picture
from comfy_emulator.nodes.placeholder import seeded
from comfy_emulator.nodes.registry import REGISTRY

STEP_SECONDS = float(os.environ.get("COMFY_EMULATOR_STEP_SECONDS", "0.02"))
"""Seconds per step, whatever the size of the image."""

_PREVIEW_SIDE = 512
"""Longest side of a preview in pixels (`MAX_PREVIEW_RESOLUTION` of `latent_preview.py`)."""

_PREVIEW_PIXELS = 128
_NDIM_OF_SHAPE = 3
_HIGHEST_SIGMA = 14.614642
"""The first sigma of Stable Diffusion 1."""


@dataclass(frozen=True)
class Noise:
    """The noise of a seed."""

    seed: int


@dataclass(frozen=True)
class Sampler:
    """A sampling algorithm, by name."""

    name: str


@dataclass(frozen=True)
class Guider:
    """A model with its conditionings."""

    model: Model
    positive: Conditioning
    negative: Conditioning | None = None
    cfg: float = 1.0


@REGISTRY.add("RandomNoise")
def random_noise(_context: NodeContext, noise_seed: int) -> NodeResult:
    """Return the noise of a seed."""
    return NodeResult((Noise(noise_seed),))


@REGISTRY.add("KSamplerSelect")
def k_sampler_select(_context: NodeContext, sampler_name: str) -> NodeResult:
    """Return a sampling algorithm."""
    return NodeResult((Sampler(sampler_name),))


@REGISTRY.add("BasicGuider")
def basic_guider(_context: NodeContext, model: Model, conditioning: Conditioning) -> NodeResult:
    """Return a model with one conditioning."""
    return NodeResult((Guider(model, conditioning),))


@REGISTRY.add("CFGGuider")
def cfg_guider(
    _context: NodeContext, model: Model, positive: Conditioning, negative: Conditioning, cfg: float
) -> NodeResult:
    """Return a model with a positive and a negative conditioning."""
    return NodeResult((Guider(model, positive, negative, cfg),))


@REGISTRY.add("BasicScheduler")
def basic_scheduler(
    _context: NodeContext,
    model: Model,
    scheduler: str,
    steps: int,
    denoise: float,
) -> NodeResult:
    """Return the sigma before each step and after the last, evenly spaced for all models and schedulers."""
    if denoise <= 0:
        return NodeResult((np.zeros(0, dtype=np.float32),))
    total = steps if denoise >= 1 else int(steps / denoise)
    return NodeResult((np.linspace(_HIGHEST_SIGMA, 0, total + 1, dtype=np.float32)[-(steps + 1) :],))


@REGISTRY.add("KSampler")
def k_sampler(
    context: NodeContext,
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    denoise: float = 1.0,
) -> NodeResult:
    """Sample in `steps` steps; with a denoise of 0 in none."""
    guider = Guider(model, positive, negative, cfg)
    sampling = _sampling(guider, seed, steps if denoise > 0 else 0, denoise, f"{sampler_name} {scheduler}")
    return NodeResult((_sample(context, latent_image, sampling),))


@REGISTRY.add("KSamplerAdvanced")
def k_sampler_advanced(
    context: NodeContext,
    model: Model,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> NodeResult:
    """Sample the steps from `start_at_step` to `end_at_step` of `steps`."""
    taken = max(0, min(end_at_step, steps) - start_at_step)
    settings = f"{sampler_name} {scheduler} {add_noise} {start_at_step}-{end_at_step} {return_with_leftover_noise}"
    guider = Guider(model, positive, negative, cfg)
    sampling = _sampling(guider, noise_seed, taken, taken / steps, settings)
    return NodeResult((_sample(context, latent_image, sampling),))


@REGISTRY.add("SamplerCustom")
def sampler_custom(
    context: NodeContext,
    model: Model,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: Conditioning,
    negative: Conditioning,
    sampler: Sampler,
    sigmas: FloatArray,
    latent_image: Latent,
) -> NodeResult:
    """Sample one step between each two sigmas; both outputs are the result."""
    guider = Guider(model, positive, negative, cfg)
    result = _sample_sigmas(context, guider, noise_seed, sigmas, f"{sampler.name} noise {add_noise}", latent_image)
    return NodeResult((result, result))


@REGISTRY.add("SamplerCustomAdvanced")
def sampler_custom_advanced(
    context: NodeContext, noise: Noise, guider: Guider, sampler: Sampler, sigmas: FloatArray, latent_image: Latent
) -> NodeResult:
    """Sample one step between each two sigmas; both outputs are the result."""
    result = _sample_sigmas(context, guider, noise.seed, sigmas, sampler.name, latent_image)
    return NodeResult((result, result))


def _sample_sigmas(
    context: NodeContext, guider: Guider, seed: int, sigmas: FloatArray, settings: str, latent: Latent
) -> Latent:
    steps = max(0, len(sigmas) - 1)
    denoise = min(1.0, float(sigmas[0]) / _HIGHEST_SIGMA) if steps else 0.0
    return _sample(context, latent, _sampling(guider, seed, steps, denoise, settings))


def _sampling(guider: Guider, seed: int, steps: int, denoise: float, settings: str) -> Sampling:
    everything = (settings, guider.cfg, guider.model.settings, guider.positive.settings, guider.negative)
    return Sampling(seed, guider.positive.text, guider.model.name, steps, denoise, repr(everything))


def _sample(context: NodeContext, latent: Latent, sampling: Sampling) -> Latent:
    """Take the steps; without any, return the latent unchanged."""
    if not sampling.steps:
        return latent
    values = seeded(sampling.key).standard_normal(latent.samples.shape, dtype=np.float32)
    result = replace(latent, samples=values, samplings=(*latent.samplings, sampling))
    picture = _small_picture(result)
    for step in range(1, sampling.steps + 1):
        context.check_interrupted()
        context.sleep(STEP_SECONDS)
        preview = None if picture is None else ("JPEG", _preview(picture, sampling, step), _PREVIEW_SIDE)
        context.progress(step, sampling.steps, preview)
    return result


def _small_picture(latent: Latent) -> FloatArray | None:
    """Return the image of the previews; a 3D shape has none."""
    if latent.samples.ndim == _NDIM_OF_SHAPE:
        return None
    shrink = min(1.0, _PREVIEW_PIXELS / max(latent.pixel_width, latent.pixel_height))
    width, height = round(latent.pixel_width * shrink), round(latent.pixel_height * shrink)
    return render(latent, 0, max(1, width), max(1, height))


def _preview(picture: FloatArray, sampling: Sampling, step: int) -> Image.Image:
    """Return the image under the noise that is left after a step."""
    remaining = 1 - step / sampling.steps
    noise = seeded(f"{sampling.key} step {step}").random(picture.shape, dtype=np.float32)
    return to_picture(picture * np.float32(1 - remaining) + noise * np.float32(remaining))

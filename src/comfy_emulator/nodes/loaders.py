"""Nodes that load and patch models. Nothing is loaded: a model is only its file name and its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from comfy_emulator.node_api import NodeContext, NodeResult
from comfy_emulator.nodes.registry import REGISTRY


@dataclass(frozen=True)
class Model:
    """A diffusion model: the name of its file, and its patches (LoRAs, sampling settings)."""

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """Text encoders: the names of their files, and their patches."""

    names: tuple[str, ...]
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vae:
    """A VAE: the name of its file."""

    name: str


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet: the name of its file."""

    name: str


@REGISTRY.add("CheckpointLoaderSimple")
def checkpoint_loader_simple(_context: NodeContext, ckpt_name: str) -> NodeResult:
    """Return model, text encoders and VAE of a checkpoint."""
    return NodeResult((Model(ckpt_name), Clip((ckpt_name,)), Vae(ckpt_name)))


@REGISTRY.add("UNETLoader")
def unet_loader(_context: NodeContext, unet_name: str, weight_dtype: str = "default") -> NodeResult:
    """Return a diffusion model."""
    return NodeResult((Model(unet_name, (f"weights {weight_dtype}",)),))


@REGISTRY.add("CLIPLoader")
@REGISTRY.add("DualCLIPLoader")
@REGISTRY.add("TripleCLIPLoader")
def clip_loader(_context: NodeContext, **inputs: str) -> NodeResult:
    """Return text encoders; each input whose name starts with `clip_name` is one."""
    names = tuple(value for key, value in inputs.items() if key.startswith("clip_name"))
    return NodeResult((Clip(names, (f"type {inputs['type']}",) if "type" in inputs else ()),))


@REGISTRY.add("VAELoader")
def vae_loader(_context: NodeContext, vae_name: str) -> NodeResult:
    """Return a VAE."""
    return NodeResult((Vae(vae_name),))


@REGISTRY.add("ControlNetLoader")
def control_net_loader(_context: NodeContext, control_net_name: str) -> NodeResult:
    """Return a ControlNet."""
    return NodeResult((ControlNet(control_net_name),))


@REGISTRY.add("LoraLoader")
def lora_loader(
    _context: NodeContext, model: Model, clip: Clip, lora_name: str, strength_model: float, strength_clip: float
) -> NodeResult:
    """Patch model and text encoders with a LoRA; a strength of 0 changes nothing."""
    return NodeResult((_with_lora(model, lora_name, strength_model), _with_lora(clip, lora_name, strength_clip)))


@REGISTRY.add("LoraLoaderModelOnly")
def lora_loader_model_only(_context: NodeContext, model: Model, lora_name: str, strength_model: float) -> NodeResult:
    """Patch a model with a LoRA."""
    return NodeResult((_with_lora(model, lora_name, strength_model),))


def _with_lora(patched: Model | Clip, lora_name: str, strength: float) -> Model | Clip:
    if strength == 0:
        return patched
    return replace(patched, settings=(*patched.settings, f"lora {lora_name} {strength}"))


@REGISTRY.add("ModelSamplingSD3")
@REGISTRY.add("ModelSamplingFlux")
def model_sampling(_context: NodeContext, model: Model, **inputs: float) -> NodeResult:
    """Patch a model with another sampling schedule."""
    return NodeResult((replace(model, settings=(*model.settings, f"sampling {sorted(inputs.items())}")),))


@REGISTRY.add("CLIPSetLastLayer")
def clip_set_last_layer(_context: NodeContext, clip: Clip, stop_at_clip_layer: int) -> NodeResult:
    """Patch text encoders to stop at an earlier layer."""
    return NodeResult((replace(clip, settings=(*clip.settings, f"layer {stop_at_clip_layer}")),))

"""Nodes that load models and prepare texts. Nothing is loaded: a model here is its name and its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from comfy_emulator.node_api import Context, ImageBatch, NodeResult
from comfy_emulator.nodes.registry import REGISTRY


@dataclass(frozen=True)
class Model:
    """A diffusion model: the name of its file, and what patches it (LoRAs, sampling settings)."""

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """Text encoders: the names of their files, and what patches them."""

    names: tuple[str, ...]
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vae:
    """What turns latents into pictures and back: the name of its file."""

    name: str


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet: the name of its file."""

    name: str


@dataclass(frozen=True)
class Conditioning:
    """Texts for a sampler, and the settings that go with them."""

    texts: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All texts in one."""
        return " ".join(text for text in self.texts if text)


@REGISTRY.add("CheckpointLoaderSimple")
def checkpoint_loader_simple(_context: Context, ckpt_name: str) -> NodeResult:
    """The three parts of a checkpoint."""
    return NodeResult((Model(ckpt_name), Clip((ckpt_name,)), Vae(ckpt_name)))


@REGISTRY.add("UNETLoader")
def unet_loader(_context: Context, unet_name: str, weight_dtype: str = "default") -> NodeResult:
    """A diffusion model."""
    return NodeResult((Model(unet_name, (f"weights {weight_dtype}",)),))


@REGISTRY.add("CLIPLoader")
@REGISTRY.add("DualCLIPLoader")
@REGISTRY.add("TripleCLIPLoader")
def clip_loader(_context: Context, **inputs: str) -> NodeResult:
    """One, two or three text encoders; every input whose name starts with `clip_name` is one."""
    names = tuple(value for key, value in inputs.items() if key.startswith("clip_name"))
    return NodeResult((Clip(names, (f"type {inputs['type']}",) if "type" in inputs else ()),))


@REGISTRY.add("VAELoader")
def vae_loader(_context: Context, vae_name: str) -> NodeResult:
    """A VAE."""
    return NodeResult((Vae(vae_name),))


@REGISTRY.add("ControlNetLoader")
def control_net_loader(_context: Context, control_net_name: str) -> NodeResult:
    """A ControlNet."""
    return NodeResult((ControlNet(control_net_name),))


@REGISTRY.add("LoraLoader")
def lora_loader(
    _context: Context, model: Model, clip: Clip, lora_name: str, strength_model: float, strength_clip: float
) -> NodeResult:
    """Model and text encoders with a LoRA; a strength of 0 changes nothing."""
    return NodeResult((_with_lora(model, lora_name, strength_model), _with_lora(clip, lora_name, strength_clip)))


@REGISTRY.add("LoraLoaderModelOnly")
def lora_loader_model_only(_context: Context, model: Model, lora_name: str, strength_model: float) -> NodeResult:
    """A model with a LoRA."""
    return NodeResult((_with_lora(model, lora_name, strength_model),))


def _with_lora(patched: Model | Clip, lora_name: str, strength: float) -> Model | Clip:
    if strength == 0:
        return patched
    return replace(patched, settings=(*patched.settings, f"lora {lora_name} {strength}"))


@REGISTRY.add("ModelSamplingSD3")
@REGISTRY.add("ModelSamplingFlux")
def model_sampling(_context: Context, model: Model, **inputs: float) -> NodeResult:
    """A model with another sampling schedule."""
    return NodeResult((replace(model, settings=(*model.settings, f"sampling {sorted(inputs.items())}")),))


@REGISTRY.add("CLIPSetLastLayer")
def clip_set_last_layer(_context: Context, clip: Clip, stop_at_clip_layer: int) -> NodeResult:
    """Text encoders that stop at an earlier layer."""
    return NodeResult((replace(clip, settings=(*clip.settings, f"layer {stop_at_clip_layer}")),))


@REGISTRY.add("CLIPTextEncode")
def clip_text_encode(_context: Context, text: str, clip: Clip) -> NodeResult:
    """A text."""
    return NodeResult((_encoded(clip, text),))


@REGISTRY.add("CLIPTextEncodeFlux")
def clip_text_encode_flux(_context: Context, clip: Clip, clip_l: str, t5xxl: str, guidance: float) -> NodeResult:
    """The texts for the two encoders of Flux; the same text for both counts once."""
    encoded = _encoded(clip, *dict.fromkeys((t5xxl, clip_l)))
    return NodeResult((_with_setting(encoded, f"guidance {guidance}"),))


@REGISTRY.add("CLIPTextEncodeHunyuanDiT")
def clip_text_encode_hunyuan_dit(_context: Context, clip: Clip, bert: str, mt5xl: str) -> NodeResult:
    """The texts for the two encoders of Hunyuan DiT; the same text for both counts once."""
    return NodeResult((_encoded(clip, *dict.fromkeys((bert, mt5xl))),))


def _encoded(clip: Clip, *texts: str) -> Conditioning:
    return Conditioning(texts, (*clip.names, *clip.settings))


def _with_setting(conditioning: Conditioning, setting: str) -> Conditioning:
    return replace(conditioning, settings=(*conditioning.settings, setting))


@REGISTRY.add("ConditioningZeroOut")
def conditioning_zero_out(_context: Context, conditioning: Conditioning) -> NodeResult:
    """A conditioning that says nothing."""
    return NodeResult((replace(conditioning, texts=()),))


@REGISTRY.add("ConditioningCombine")
def conditioning_combine(_context: Context, conditioning_1: Conditioning, conditioning_2: Conditioning) -> NodeResult:
    """Two conditionings at once."""
    texts = (*conditioning_1.texts, *conditioning_2.texts)
    return NodeResult((Conditioning(texts, (*conditioning_1.settings, *conditioning_2.settings)),))


@REGISTRY.add("FluxGuidance")
def flux_guidance(_context: Context, conditioning: Conditioning, guidance: float) -> NodeResult:
    """A conditioning that is followed more or less closely."""
    return NodeResult((_with_setting(conditioning, f"guidance {guidance}"),))


@REGISTRY.add("ControlNetApplyAdvanced")
def control_net_apply_advanced(
    _context: Context,
    positive: Conditioning,
    negative: Conditioning,
    control_net: ControlNet,
    image: ImageBatch,
    strength: float,
    start_percent: float,
    end_percent: float,
    vae: Vae | None = None,
) -> NodeResult:
    """Conditionings bound to a picture; a strength of 0 changes nothing."""
    if strength == 0:
        return NodeResult((positive, negative))
    setting = f"control {control_net.name} {strength} {start_percent}-{end_percent} {float(image.mean()):.6f}"
    return NodeResult((_with_setting(positive, setting), _with_setting(negative, setting)))

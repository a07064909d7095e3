"""Nodes that encode and combine prompt texts. Nothing is encoded: a conditioning is only its texts and settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from comfy_emulator.node_api import ImageBatch, NodeContext, NodeResult
from comfy_emulator.nodes.loaders import Clip, ControlNet, Vae
from comfy_emulator.nodes.registry import REGISTRY


@dataclass(frozen=True)
class Conditioning:
    """ComfyUI's CONDITIONING: texts for a sampler, and settings."""

    texts: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All texts, joined."""
        return " ".join(text for text in self.texts if text)


@REGISTRY.add("CLIPTextEncode")
def clip_text_encode(_context: NodeContext, text: str, clip: Clip) -> NodeResult:
    """Encode a text."""
    return NodeResult((_encode(clip, text),))


@REGISTRY.add("CLIPTextEncodeFlux")
def clip_text_encode_flux(_context: NodeContext, clip: Clip, clip_l: str, t5xxl: str, guidance: float) -> NodeResult:
    """Encode the texts for the two encoders of Flux; equal texts count once."""
    encoded = _encode(clip, *dict.fromkeys((t5xxl, clip_l)))
    return NodeResult((_with_setting(encoded, f"guidance {guidance}"),))


@REGISTRY.add("CLIPTextEncodeHunyuanDiT")
def clip_text_encode_hunyuan_dit(_context: NodeContext, clip: Clip, bert: str, mt5xl: str) -> NodeResult:
    """Encode the texts for the two encoders of Hunyuan DiT; equal texts count once."""
    return NodeResult((_encode(clip, *dict.fromkeys((bert, mt5xl))),))


def _encode(clip: Clip, *texts: str) -> Conditioning:
    return Conditioning(texts, (*clip.names, *clip.settings))


def _with_setting(conditioning: Conditioning, setting: str) -> Conditioning:
    return replace(conditioning, settings=(*conditioning.settings, setting))


@REGISTRY.add("ConditioningZeroOut")
def conditioning_zero_out(_context: NodeContext, conditioning: Conditioning) -> NodeResult:
    """Return a conditioning without text."""
    return NodeResult((replace(conditioning, texts=()),))


@REGISTRY.add("ConditioningCombine")
def conditioning_combine(
    _context: NodeContext, conditioning_1: Conditioning, conditioning_2: Conditioning
) -> NodeResult:
    """Combine two conditionings."""
    texts = (*conditioning_1.texts, *conditioning_2.texts)
    return NodeResult((Conditioning(texts, (*conditioning_1.settings, *conditioning_2.settings)),))


@REGISTRY.add("FluxGuidance")
def flux_guidance(_context: NodeContext, conditioning: Conditioning, guidance: float) -> NodeResult:
    """Set the guidance of a conditioning."""
    return NodeResult((_with_setting(conditioning, f"guidance {guidance}"),))


@REGISTRY.add("ControlNetApplyAdvanced")
def control_net_apply_advanced(
    _context: NodeContext,
    positive: Conditioning,
    negative: Conditioning,
    control_net: ControlNet,
    image: ImageBatch,
    strength: float,
    start_percent: float,
    end_percent: float,
    vae: Vae | None = None,
) -> NodeResult:
    """Add a control image to conditionings; a strength of 0 changes nothing."""
    if strength == 0:
        return NodeResult((positive, negative))
    setting = f"control {control_net.name} {strength} {start_percent}-{end_percent} {float(image.mean()):.6f}"
    return NodeResult((_with_setting(positive, setting), _with_setting(negative, setting)))

"""Finds the models that a workflow needs and ComfyUI does not have, and reads `/object_info`. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comfy_worker.graph.file_references import MODEL_FILE
from comfy_worker.types import Workflow

_FOLDERS = {
    ("CLIPVisionLoader", "clip_name"): "clip_vision",
    ("UpscaleModelLoader", "model_name"): "upscale_models",
    ("LatentUpscaleModelLoader", "model_name"): "latent_upscale_models",
    ("PhotoMakerLoader", "photomaker_model_name"): "photomaker",
    ("ModelPatchLoader", "name"): "model_patches",
}
_FOLDERS_BY_INPUT = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "vae_name": "vae",
    "lora_name": "loras",
    "control_net_name": "controlnet",
    "style_model_name": "style_models",
    "gligen_name": "gligen",
    "hypernetwork_name": "hypernetworks",
    "audio_encoder_name": "audio_encoders",
}
"""The folders of ComfyUI's own loaders below `models/`."""

CANVAS_ONLY = frozenset(
    {"Note", "MarkdownNote", "Reroute", "PrimitiveNode", "GetNode", "SetNode", "Anything Everywhere"}
)
"""Nodes that exist on ComfyUI's canvas only and are resolved when a workflow is exported for the API."""


def model_folder(class_type: str, input_name: str) -> str | None:
    """Return the folder below ComfyUI's `models/` whose files an input lists, None if it is not known."""
    known = _FOLDERS.get((class_type, input_name))
    return known or _FOLDERS_BY_INPUT.get(re.sub(r"_?\d+$", "", input_name))


def missing_models(workflow: Workflow, object_info: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Sequence[str]]]:
    """Yield `(node_id, input_name, value, choices)` for every missing model file."""
    combos: dict[str, Mapping[str, Sequence[str]]] = {}
    for node_id, node in workflow.items():
        node_class = str(node.get("class_type"))
        if node_class not in combos:
            inputs = inputs_of(object_info.get(node_class, {}))
            offered = {name: combo_values(config) for name, config in inputs.items()}
            combos[node_class] = {name: values for name, values in offered.items() if values is not None}
        for name, choices in combos[node_class].items():
            value = node.get("inputs", {}).get(name)
            if isinstance(value, str) and MODEL_FILE.search(value) and value not in choices:
                yield node_id, name, value, choices


def inputs_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a node class, name to `[type, options]`, from its entry in `/object_info`."""
    inputs = definition.get("input", {})
    return {**inputs.get("optional", {}), **inputs.get("required", {})}


def combo_values(config: Any) -> list[str] | None:
    """Return the values of a combo, `[[…], {…}]` or `["COMBO", {"options": […]}]`; None for another input."""
    if not isinstance(config, Sequence) or isinstance(config, str) or not config:
        return None
    options = config[1] if len(config) > 1 and isinstance(config[1], Mapping) else {}
    values = config[0] if isinstance(config[0], list) else options.get("options")
    return [str(value) for value in values] if isinstance(values, list) else None

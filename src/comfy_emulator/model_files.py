"""Model files that the emulator pretends to have, and the node inputs that list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Models = Mapping[str, Sequence[str]]
"""File names by model folder."""

MODEL_FOLDERS = (
    "checkpoints",
    "configs",
    "loras",
    "vae",
    "text_encoders",
    "diffusion_models",
    "clip_vision",
    "style_models",
    "embeddings",
    "diffusers",
    "vae_approx",
    "controlnet",
    "gligen",
    "upscale_models",
    "latent_upscale_models",
    "custom_nodes",
    "hypernetworks",
    "photomaker",
    "classifiers",
    "model_patches",
    "audio_encoders",
)
"""The folders of ComfyUI, in the order of its `/models` (`folder_names_and_paths` of `folder_paths.py`)."""

DEFAULT_MODELS: Models = {
    "checkpoints": (
        "flux1-dev-fp8.safetensors",
        "sd3_medium_incl_clips_t5xxlfp8.safetensors",
        "sd3.5_large_fp8_scaled.safetensors",
        "sd_xl_base_1.0.safetensors",
        "v1-5-pruned-emaonly-fp16.safetensors",
        "v1-5-pruned-emaonly.safetensors",
    ),
    "loras": ("pixel-art-xl.safetensors",),
    "vae": ("ae.safetensors", "hunyuan_video_vae_bf16.safetensors"),
    "text_encoders": (
        "clip_g.safetensors",
        "clip_l.safetensors",
        "llava_llama3_fp8_scaled.safetensors",
        "t5xxl_fp16.safetensors",
    ),
    "diffusion_models": ("flux1-dev.safetensors", "hunyuan_video_t2v_720p_bf16.safetensors"),
    "clip_vision": ("clip_vision_h.safetensors",),
    "controlnet": ("control_v11p_sd15_canny_fp16.safetensors",),
    "upscale_models": ("RealESRGAN_x4plus.pth",),
}
"""The default: names of widely used files, by folder."""

_INPUTS = {
    "audio_encoders": ("AudioEncoderLoader.audio_encoder_name",),
    "checkpoints": (
        "CheckpointLoader.ckpt_name",
        "CheckpointLoaderSimple.ckpt_name",
        "CreateHookModelAsLora.ckpt_name",
        "CreateHookModelAsLoraModelOnly.ckpt_name",
        "ImageOnlyCheckpointLoader.ckpt_name",
        "LTXAVTextEncoderLoader.ckpt_name",
        "LTXVAudioVAELoader.ckpt_name",
        "unCLIPCheckpointLoader.ckpt_name",
    ),
    "clip_vision": ("CLIPVisionLoader.clip_name",),
    "configs": ("CheckpointLoader.config_name",),
    "controlnet": ("ControlNetLoader.control_net_name", "DiffControlNetLoader.control_net_name"),
    "diffusers": ("DiffusersLoader.model_path",),
    "diffusion_models": ("UNETLoader.unet_name",),
    "gligen": ("GLIGENLoader.gligen_name",),
    "hypernetworks": ("HypernetworkLoader.hypernetwork_name",),
    "latent_upscale_models": ("LatentUpscaleModelLoader.model_name",),
    "loras": (
        "CreateHookLora.lora_name",
        "CreateHookLoraModelOnly.lora_name",
        "LoraLoader.lora_name",
        "LoraLoaderModelOnly.lora_name",
    ),
    "model_patches": ("ModelPatchLoader.name",),
    "photomaker": ("PhotoMakerLoader.photomaker_model_name",),
    "style_models": ("StyleModelLoader.style_model_name",),
    "text_encoders": (
        "CLIPLoader.clip_name",
        "DualCLIPLoader.clip_name1",
        "DualCLIPLoader.clip_name2",
        "LTXAVTextEncoderLoader.text_encoder",
        "QuadrupleCLIPLoader.clip_name1",
        "QuadrupleCLIPLoader.clip_name2",
        "QuadrupleCLIPLoader.clip_name3",
        "QuadrupleCLIPLoader.clip_name4",
        "TripleCLIPLoader.clip_name1",
        "TripleCLIPLoader.clip_name2",
        "TripleCLIPLoader.clip_name3",
    ),
    "upscale_models": ("UpscaleModelLoader.model_name",),
    "vae": ("VAELoader.vae_name",),
}

FOLDER_OF_INPUT: Mapping[tuple[str, str], str] = {
    (entry.partition(".")[0], entry.partition(".")[2]): folder
    for folder, entries in _INPUTS.items()
    for entry in entries
}
"""The model folder that a node's input lists, by class and input name."""


class ModelFiles:
    """The pretended model files and those that exist below `models/`.

    Args:
        pretended: file names by model folder.
        root: the folder `models/`, which need not exist.
    """

    def __init__(self, pretended: Models, root: Path) -> None:
        self._pretended = pretended
        self._root = root

    def names(self, folder: str) -> list[str]:
        """Return the file names in a model folder (`get_filename_list` of `folder_paths.py`)."""
        existing = (str(file.relative_to(self._root / folder)) for file in self._existing(folder))
        return [*self._pretended.get(folder, ()), *existing]

    def entries(self, folder: str) -> list[dict[str, Any]]:
        """Return name, size and times of each file (`get_model_file_list` of `app/model_manager.py`)."""
        pretended = [
            {"name": name, "pathIndex": 0, "modified": 0.0, "created": 0.0, "size": 0}
            for name in self._pretended.get(folder, ())
        ]
        return [*pretended, *(_entry(file, self._root / folder) for file in self._existing(folder))]

    def _existing(self, folder: str) -> list[Path]:
        return sorted(file for file in (self._root / folder).rglob("*") if file.is_file())


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    status = file.stat()
    times = {"modified": status.st_mtime, "created": status.st_ctime}
    return {"name": str(file.relative_to(folder)), "pathIndex": 0, **times, "size": status.st_size}

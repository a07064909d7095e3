"""The ComfyUI that the emulator answers as; `/system_stats` reports these versions."""

COMFYUI_VERSION = "0.8.0"
REQUIRED_FRONTEND_VERSION = "1.35.9"
REQUIRED_TEMPLATES_VERSION = "0.7.67"
PYTORCH_VERSION = "2.13.0+cpu"

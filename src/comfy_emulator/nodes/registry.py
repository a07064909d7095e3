"""The registry of this package's nodes."""

from __future__ import annotations

from comfy_emulator.node_api import NodeRegistry

REGISTRY = NodeRegistry()
"""All nodes of the emulator by class name; complete when `comfy_emulator.nodes` is imported."""

"""The one registry that the modules of this package fill."""

from __future__ import annotations

from comfy_emulator.node_api import Registry

REGISTRY = Registry()
"""Every node of the emulator by class name; complete once `comfy_emulator.nodes` is imported."""

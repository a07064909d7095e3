"""Loads and runs the operator's modifiers, which import their base class from `comfy_worker.modifiers`."""

from __future__ import annotations

from comfy_worker.gateway.modifiers.loader import LoadedModifier, Modifiers
from comfy_worker.gateway.modifiers.runner import ModifierResult, run_modifier

__all__ = ["LoadedModifier", "ModifierResult", "Modifiers", "run_modifier"]

"""Modifiers: the operator's own classes, each of which makes a workflow out of a few named values.

A modifier's file needs one line of ours: `from comfy_worker.modifiers import BaseModifier`.
"""

from __future__ import annotations

from comfy_worker.modifiers.base import BaseModifier
from comfy_worker.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.modifiers.loader import FoundModifier, Modifiers
from comfy_worker.modifiers.random_ints import RANDOM_INT, randomized
from comfy_worker.modifiers.run import apply

__all__ = [
    "RANDOM_INT",
    "BaseModifier",
    "FoundModifier",
    "MissingValue",
    "ModifierFailed",
    "Modifiers",
    "apply",
    "randomized",
]

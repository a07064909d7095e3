"""Modifiers: the operator's own classes, each of which makes a workflow out of a few named values.

A modifier's file needs one line: `from modifiers.basemodifier import BaseModifier`, as AI-Dock's wrapper has it, or
`from comfy_worker.modifiers import BaseModifier`, which type checkers find too.
"""

from __future__ import annotations

from comfy_worker.modifiers.base import BaseModifier
from comfy_worker.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.modifiers.loader import FoundModifier, Modifiers
from comfy_worker.modifiers.random_ints import RANDOM_INT, randomized
from comfy_worker.modifiers.run import Made, apply

__all__ = [
    "RANDOM_INT",
    "BaseModifier",
    "FoundModifier",
    "Made",
    "MissingValue",
    "ModifierFailed",
    "Modifiers",
    "apply",
    "randomized",
]

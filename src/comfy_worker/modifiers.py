"""What a modifier imports. A modifier is an operator's class that builds a workflow from a few named values.

Its file needs one line: `from modifiers.basemodifier import BaseModifier`, as for AI-Dock's wrapper, or
`from comfy_worker.modifiers import BaseModifier`, which type checkers understand too.
"""

from __future__ import annotations

from comfy_worker.gateway.modifiers.base import BaseModifier
from comfy_worker.gateway.modifiers.errors import MissingValue, ModifierFailed
from comfy_worker.gateway.modifiers.random_ints import RANDOM_INT, randomized

__all__ = ["RANDOM_INT", "BaseModifier", "MissingValue", "ModifierFailed", "randomized"]

"""The placeholder for a random integer, with which a stored workflow gets a new seed each time."""

from __future__ import annotations

import copy
import random
from typing import Any, TypeVar

RANDOM_INT = "__RANDOM_INT__"
"""Replaced with a random integer or, within a longer string, with its digits."""

HIGHEST = 2**32 - 1

Value = TypeVar("Value")


def randomized(workflow: Value) -> Value:
    """Return a copy of a workflow with a random integer (0 to 2**32 - 1) for each `__RANDOM_INT__` in it."""
    filled: Value = fill_random_ints(copy.deepcopy(workflow))
    return filled


def fill_random_ints(value: Any, lowest: int = 0, highest: int = HIGHEST, placeholder: str = RANDOM_INT) -> Any:
    """Replace the placeholders in `value`, in place, and return it, or the integer if it is a placeholder itself."""

    def filled(inner: Any) -> Any:
        if isinstance(inner, dict):
            for key, item in inner.items():
                inner[key] = filled(item)
        elif isinstance(inner, list):
            inner[:] = [filled(item) for item in inner]
        elif isinstance(inner, str):
            return in_text(inner)
        return inner

    def in_text(text: str) -> str | int:
        if text == placeholder:
            return random.randint(lowest, highest)
        first, *others = text.split(placeholder)
        return first + "".join(f"{random.randint(lowest, highest)}{part}" for part in others)

    return filled(value)
